"""The overhead contract: what is measured, and what follows for the cadence."""

import pytest
from eigenwatch.agent import Schedule
from eigenwatch.agent.overhead import LEAST_SAMPLES, WARM_UP_STEPS, Meter, wanted_stretch
from hypothesis import given
from hypothesis import strategies as st


def metered(
    step: float, stall: float, every: int = 10, timed: float | None = None, plain: int = 20, sampled: int = 5
) -> Meter:
    meter = Meter(asynchronous=True)
    for _ in range(WARM_UP_STEPS):
        meter.ended(1000.0, {Schedule(every=every): 1000.0})
    for _ in range(plain):
        meter.ended(step, {})
    for _ in range(sampled):
        meter.ended(step + stall, {Schedule(every=every): stall if timed is None else timed})
    return meter


def test_the_stall_is_spread_over_the_steps_between_samples():
    assert metered(step=0.5, stall=0.1, every=10).ratio() == pytest.approx(0.1 / 5)
    assert metered(step=0.5, stall=0.1, every=10).ratio(4) == pytest.approx(0.1 / 20)


def test_the_stalls_of_several_cadences_add_up():
    meter = Meter()
    for step in range(1, 200):
        stalls = {Schedule(every=every): stall for every, stall in ((2, 0.01), (20, 0.4)) if step % every == 0}
        meter.ended(0.5 + sum(stalls.values()), stalls)
    assert meter.ratio() == pytest.approx((0.01 / 2 + 0.4 / 20) / 0.5)


def test_a_schedule_that_has_ended_costs_nothing_any_more():
    meter, ends, goes_on = Meter(), Schedule(every=1, end=100), Schedule(every=100)
    for _ in range(99):
        meter.ended(0.5, {ends: 0.05})
    meter.ended(0.5, {ends: 0.05, goes_on: 0.05})
    assert meter.ratio(step=99) == pytest.approx(0.05 / 0.45 + 0.0005 / 0.45, rel=0.1)
    assert meter.ratio(step=100) == pytest.approx(0.0005 / 0.45, rel=0.1)


def test_steps_that_rise_by_more_than_one_are_fewer_between_samples():
    meter = Meter()
    for call in range(1, 100):
        meter.ended(0.5, {Schedule(every=20): 0.1} if call % 2 == 0 else {}, stride=10)
    assert meter.ratio() == pytest.approx(0.1 / (2 * 0.5))
    assert meter.ratio(4) == pytest.approx(0.1 / (8 * 0.5))


def test_work_after_our_calls_is_shared_out_over_the_cadences_as_what_was_timed():
    assert metered(step=0.5, stall=0.1, every=10, timed=0.001).ratio() == pytest.approx(0.1 / 5)


def test_work_that_goes_on_after_our_calls_is_counted_by_the_difference_of_step_times():
    assert metered(step=0.5, stall=0.1, timed=0.001).stall_seconds == pytest.approx(0.1)
    assert metered(step=0.5, stall=0.1, timed=0.001, plain=2).stall_seconds == pytest.approx(0.001)


def test_on_a_cpu_what_else_makes_a_sampled_step_long_is_not_counted():
    meter = Meter()
    for step in range(100):
        evaluates = step % 10 == 0
        meter.ended(10.0 if evaluates else 0.5, {Schedule(every=10): 0.001} if evaluates else {})
    assert meter.stall_seconds == pytest.approx(0.001)


def test_where_every_step_is_sampled_its_own_part_is_taken_off():
    meter = metered(step=0.5, stall=0.1, every=1, plain=0)
    assert meter.step_seconds == pytest.approx(0.5)
    assert meter.ratio() == pytest.approx(0.2)


def test_before_the_first_sample_nothing_is_known():
    assert Meter().ratio() is None
    assert wanted_stretch(Meter(), 0.01, 4) == 4


def test_one_slow_sample_stretches_nothing():
    for sampled in range(1, LEAST_SAMPLES):
        assert wanted_stretch(metered(step=0.1, stall=50, every=1, sampled=sampled), 0.01, 1) == 1
    assert wanted_stretch(metered(step=0.1, stall=50, every=1, sampled=LEAST_SAMPLES), 0.01, 1) > 1000


@given(st.floats(1e-3, 10), st.floats(1e-6, 100), st.integers(1, 1000), st.floats(1e-4, 1), st.integers(0, 10))
def test_the_contract_is_kept_and_the_cadence_does_not_swing(step, stall, every, max_overhead, power):
    meter = metered(step, stall, every)
    stretch = wanted_stretch(meter, max_overhead, 1 << power)
    assert stretch & (stretch - 1) == 0
    assert meter.ratio(stretch) <= max_overhead * (1 + 1e-9)
    assert wanted_stretch(meter, max_overhead, stretch) == stretch
    if stretch > 1 << power:
        assert meter.ratio(stretch // 2) > max_overhead
