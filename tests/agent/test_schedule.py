"""Which steps are sampled."""

import itertools

import pytest
from eigenwatch.agent.schedule import Schedule
from hypothesis import given
from hypothesis import strategies as st

periods = st.integers(1, 50)
strides = st.lists(st.integers(1, 120), min_size=1, max_size=200)
starts = st.integers(0, 1000)
stretches = st.sampled_from([1, 2, 4, 8])


def sampled(schedule: Schedule, steps: list[int], stretch: int = 1) -> list[int]:
    """The steps after the first that are sampled."""
    return [step for before, step in itertools.pairwise(steps) if schedule.due(before, step, stretch)]


def steps_of(first: int, strides: list[int]) -> list[int]:
    steps = [first]
    for stride in strides:
        steps.append(steps[-1] + stride)
    return steps


@given(periods, st.integers(1, 300))
def test_from_zero_on_it_is_each_multiple(every, count):
    assert sampled(Schedule(every=every), list(range(-1, count))) == list(range(0, count, every))


@given(periods, starts, strides, stretches)
def test_it_is_the_first_step_at_or_after_each_multiple_whatever_the_stride(every, first, strides, stretch):
    steps, cadence = steps_of(first, strides), every * stretch
    expected = {
        next(step for step in steps if step >= multiple)
        for multiple in range((first // cadence + 1) * cadence, steps[-1] + 1, cadence)
    }
    assert sampled(Schedule(every=every), steps, stretch) == sorted(expected)


@given(periods, strides, st.integers(0, 200))
def test_a_restart_samples_what_an_unbroken_run_samples(every, strides, cut):
    steps = steps_of(0, strides)
    later = steps[min(cut, len(steps) - 1) :]
    schedule = Schedule(every=every)
    assert sampled(schedule, later) == [step for step in sampled(schedule, steps) if step > later[0]]


@given(periods, stretches)
def test_a_stretched_cadence_samples_some_of_the_same_steps(every, stretch):
    """So a rank that learns of it late samples too much, which is seen as incomplete, and never too little."""
    steps, schedule = list(range(-1, 500)), Schedule(every=every)
    assert set(sampled(schedule, steps, stretch)) <= set(sampled(schedule, steps))
    assert sampled(schedule, steps, stretch) == list(range(0, 500, every * stretch))


def test_nothing_is_sampled_before_the_start_or_after_the_end():
    schedule = Schedule(every=10, start=25, end=60)
    assert sampled(schedule, list(range(-1, 200))) == [25, 35, 45, 55]
    assert sampled(schedule, list(range(-1, 200, 7))) == [27, 41, 48, 55]


def test_a_dense_start_is_log_spaced_up_to_the_cadence():
    schedule = Schedule(every=20, start=100, dense_start=True)
    assert sampled(schedule, list(range(-1, 160))) == [100, 101, 102, 104, 108, 116, 120, 140]


def test_a_rotation_takes_each_group_of_layers_in_turn_and_every_group_at_the_dense_start():
    schedule = Schedule(every=10, rotate=3, dense_start=True)
    points = [point for step in range(61) if (point := schedule.due(step - 1, step))]
    turns = [None if point.turns is None else [turn % 3 for turn in point.turns] for point in points]
    assert turns == [[0], None, None, None, None, [1], [2], [0], [1], [2], [0]]
    assert schedule.sampling_steps(2) == 60


@pytest.mark.parametrize("stride", [1, 7, 20, 33, 1000])
def test_a_rotation_reaches_every_layer_however_steps_rise(stride):
    schedule = Schedule(every=10, rotate=4)
    points = [schedule.due(step - stride, step) for step in range(0, 40 * stride + 1, stride)]
    seen = [layer for layer in range(8) if any(point is not None and point.is_for(layer, 4) for point in points)]
    assert seen == list(range(8))


@pytest.mark.parametrize("steps", [0, -1, 1.0, "100", None, True])
def test_a_period_that_is_no_positive_integer_is_refused(steps):
    with pytest.raises(ValueError, match=r"every must be a positive integer .* got"):
        Schedule(every=steps)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": -1}, "start must be a non-negative"),
        ({"start": 10, "end": 9}, "end must be None or a step not before start=10"),
        ({"rotate": 0}, "rotate must be a positive"),
        ({"max_overhead": 0}, "max_overhead must be None or a share"),
        ({"max_overhead": 2}, "max_overhead must be None or a share"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_with_the_field_and_what_it_accepts(wrong, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**wrong)
