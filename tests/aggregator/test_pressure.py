"""Back-pressure: who asks for less, how much, and when for more again."""

from eigenwatch.aggregator.pressure import CALM_SECONDS, SETTLE_SECONDS, Pressure

BEHIND_SECONDS = 30.0
LATE = BEHIND_SECONDS + 1


def test_a_shard_that_keeps_up_asks_for_nothing():
    pressure = Pressure(BEHIND_SECONDS)
    assert [pressure.stretch("run", BEHIND_SECONDS, float(now)) for now in range(0, 1000, 50)] == [1] * 20


def test_the_longer_it_is_behind_the_further_the_cadence_is_stretched_but_each_change_may_show_its_effect():
    pressure = Pressure(BEHIND_SECONDS)
    assert [pressure.stretch("run", LATE, float(now)) for now in (0, 1, 59, 60, 61, 119, 120)] == [2, 2, 2, 4, 4, 4, 8]


def test_a_run_that_is_behind_is_asked_and_no_other():
    pressure = Pressure(BEHIND_SECONDS)
    assert pressure.stretch("slow", LATE, 0.0) == 2
    assert pressure.stretch("quick", 0.0, 0.0) == 1


def test_after_a_calm_time_half_is_asked_for_and_longer_calm_is_needed_where_that_was_too_hopeful():
    pressure = Pressure(BEHIND_SECONDS)
    assert pressure.stretch("run", LATE, 0.0) == 2
    assert pressure.stretch("run", 0.0, CALM_SECONDS - 1) == 2
    assert pressure.stretch("run", 0.0, CALM_SECONDS) == 1
    again = CALM_SECONDS + SETTLE_SECONDS
    assert pressure.stretch("run", LATE, again) == 2
    assert pressure.stretch("run", 0.0, again + 2 * CALM_SECONDS - 1) == 2
    assert pressure.stretch("run", 0.0, again + 2 * CALM_SECONDS) == 1


def test_a_run_that_ended_is_forgotten():
    pressure = Pressure(BEHIND_SECONDS)
    pressure.stretch("run", LATE, 0.0)
    pressure.forget({"run", "unknown"})
    assert pressure.stretch("run", 0.0, 1.0) == 1
