"""The overhead contract: what is measured, and what follows for the cadence."""

import pytest
from eigenwatch.agent.overhead import WARM_UP_STEPS, Cadence, Change, Meter, wanted_stretch
from hypothesis import given
from hypothesis import strategies as st


def metered(step: float, stall: float, timed: float | None = None, plain: int = 20, sampled: int = 5) -> Meter:
    meter = Meter(asynchronous=True)
    for _ in range(WARM_UP_STEPS):
        meter.ended(1000.0, True, 1000.0)
    for _ in range(plain):
        meter.ended(step, False, 0.0)
    for _ in range(sampled):
        meter.ended(step + stall, True, stall if timed is None else timed)
    return meter


def test_the_stall_is_spread_over_the_steps_between_samples():
    assert metered(step=0.5, stall=0.1).ratio(10) == pytest.approx(0.1 / 5)


def test_work_that_goes_on_after_our_calls_is_counted_by_the_difference_of_step_times():
    assert metered(step=0.5, stall=0.1, timed=0.001).stall_seconds == pytest.approx(0.1)
    assert metered(step=0.5, stall=0.1, timed=0.001, plain=2).stall_seconds == pytest.approx(0.001)


def test_on_a_cpu_what_else_makes_a_sampled_step_long_is_not_counted():
    meter = Meter()
    for step in range(100):
        evaluates = step % 10 == 0
        meter.ended(10.0 if evaluates else 0.5, sampled=evaluates, timed_seconds=0.001 * evaluates)
    assert meter.stall_seconds == pytest.approx(0.001)


def test_where_every_step_is_sampled_its_own_part_is_taken_off():
    meter = metered(step=0.5, stall=0.1, plain=0)
    assert meter.step_seconds == pytest.approx(0.5)
    assert meter.ratio(1) == pytest.approx(0.2)


def test_before_the_first_sample_nothing_is_known():
    assert Meter().ratio(1) is None
    assert wanted_stretch(Meter(), 10, 0.01, 4) == 4


@given(st.floats(1e-3, 10), st.floats(1e-6, 100), st.integers(1, 1000), st.floats(1e-4, 1), st.integers(0, 10))
def test_the_contract_is_kept_and_the_cadence_does_not_swing(step, stall, every, max_overhead, power):
    meter = metered(step, stall)
    stretch = wanted_stretch(meter, every, max_overhead, 1 << power)
    assert stretch & (stretch - 1) == 0
    assert meter.ratio(every * stretch) <= max_overhead * (1 + 1e-9)
    assert wanted_stretch(meter, every, max_overhead, stretch) == stretch
    if stretch > 1 << power:
        assert meter.ratio(every * stretch // 2) > max_overhead


def test_a_change_holds_from_its_step_on_and_a_later_word_wins():
    cadence = Cadence()
    cadence.announce(Change(100, 4))
    assert [cadence.stretch_at(step) for step in (0, 99, 100, 500)] == [1, 1, 4, 4]
    cadence.announce(Change(300, 2))
    assert [cadence.stretch_at(step) for step in (99, 299, 300)] == [1, 4, 2]
    cadence.announce(Change(200, 8))
    assert [cadence.stretch_at(step) for step in (199, 200, 1000)] == [4, 8, 8]
