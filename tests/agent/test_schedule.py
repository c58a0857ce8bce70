"""Which steps are sampled."""

import pytest
from eigenwatch.agent.schedule import Every
from hypothesis import given
from hypothesis import strategies as st

periods = st.integers(1, 50)
strides = st.lists(st.integers(1, 120), min_size=1, max_size=200)


def sampled(every: int, steps: list[int]) -> list[int]:
    schedule, chosen = Every(steps=every), []
    for step in steps:
        if schedule.due(step, chosen[-1] if chosen else None):
            chosen.append(step)
    return chosen


def steps_of(first: int, strides: list[int]) -> list[int]:
    steps = [first]
    for stride in strides:
        steps.append(steps[-1] + stride)
    return steps


@given(periods, st.integers(1, 300))
def test_from_zero_on_it_is_each_multiple(every, count):
    assert sampled(every, list(range(count))) == list(range(0, count, every))


@given(periods, st.integers(0, 10**9), strides)
def test_it_is_the_first_step_seen_and_the_first_at_or_after_each_multiple(every, first, strides):
    steps = steps_of(first, strides)
    expected = {first}
    for multiple in range((first // every + 1) * every, steps[-1] + 1, every):
        expected.add(next(step for step in steps if step >= multiple))
    assert sampled(every, steps) == sorted(expected)


@given(periods, st.integers(0, 10**9), strides)
def test_no_two_samples_share_a_period_and_no_period_with_a_step_lacks_one(every, first, strides):
    steps = steps_of(first, strides)
    chosen = [step // every for step in sampled(every, steps)]
    assert chosen == sorted({step // every for step in steps})


@given(periods, strides, st.integers(0, 200))
def test_a_restart_samples_its_first_step_and_then_what_an_unbroken_run_samples(every, strides, cut):
    steps = steps_of(0, strides)
    later = steps[min(cut, len(steps) - 1) :]
    assert set(sampled(every, later)) - {later[0]} <= set(sampled(every, steps))


@pytest.mark.parametrize("steps", [0, -1, 1.0, "100", None, True])
def test_a_period_that_is_no_positive_integer_is_refused(steps):
    with pytest.raises(ValueError, match=r"every must be a positive integer .* got"):
        Every(steps=steps)
