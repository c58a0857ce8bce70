"""Which closed record is solved next: fair between runs, in the order of steps within one, small ones together."""

import math

import pytest
import torch
from eigenwatch.aggregator.backlog import BATCH_BYTES, BATCH_WIDTH, Backlog
from eigenwatch.aggregator.open_records import ClosedRecord
from eigenwatch.schemas import RecordKey
from eigenwatch.spectrum import Group
from hypothesis import given
from hypothesis import strategies as st

from tests.spectrum.cases import partial_of

from .test_solver import as_rows

WIDE = BATCH_WIDTH + 1


def closed(
    step: int = 100, layer: int = 0, width: int = WIDE, run: str = "run", attempt: int = 0, finite: bool = True, rows=()
) -> ClosedRecord:
    key = RecordKey(run, attempt, step, layer, "post", None)
    return ClosedRecord(key, Group(width=width, finite=finite), 1, 0.0, "scatter", None, None, rows)


def backlog_of(*records: ClosedRecord) -> Backlog:
    backlog = Backlog()
    backlog.add(records)
    return backlog


def drained(backlog: Backlog) -> list[list[ClosedRecord]]:
    batches = []
    while batch := backlog.next():
        batches.append(batch)
    assert len(backlog) == 0
    return batches


def test_the_oldest_step_comes_first_and_within_it_the_longest_job():
    records = [closed(200), closed(100, 0), closed(100, 1, 2 * WIDE), closed(300), closed(100, 2, 3 * WIDE)]
    order = [(one.key.step, one.key.layer) for (one,) in drained(backlog_of(*records))]
    assert order == [(100, 2), (100, 1), (100, 0), (200, 0), (300, 0)]


def test_a_job_is_as_long_as_the_matrix_that_is_solved():
    few = closed(layer=1, width=2 * WIDE, rows=(as_rows(torch.ones(5, 2 * WIDE)),))
    assert [one.key.layer for (one,) in drained(backlog_of(few, closed(layer=0)))] == [0, 1]


def test_a_run_that_floods_does_not_delay_another_by_more_than_the_job_at_work():
    backlog = backlog_of(*(closed(step, run="flood") for step in range(50)))
    for _ in range(10):
        backlog.next()
        backlog.spent("flood", 1.0)
    backlog.next()
    backlog.add(closed(step, run="quiet") for step in range(2))
    backlog.spent("flood", 1.0)
    turns = []
    for _ in range(4):
        turns.append(backlog.next()[0].key.run_id)
        backlog.spent(turns[-1], 1.0)
    assert turns == ["quiet", "flood", "quiet", "flood"]


def served(costs: dict[str, float], jobs: int, returning: str | None = None) -> dict[str, float]:
    """Solver seconds of each run after so many jobs, all of them always waiting; `returning` has one job at a time."""
    backlog, seconds, step = Backlog(), dict.fromkeys(costs, 0.0), 0
    for run in costs:
        backlog.add(closed(step, run=run) for step in range(1 if run == returning else jobs))
    for _ in range(jobs):
        (one,) = backlog.next()
        run = one.key.run_id
        seconds[run] += costs[run]
        backlog.spent(run, costs[run])
        if run == returning:
            step += 1
            backlog.add([closed(step, run=run)])
    return seconds


@pytest.mark.parametrize("returning", [None, "long"])
def test_runs_get_the_same_seconds_however_long_their_jobs_are(returning):
    seconds = served({"short": 1.0, "long": 10.0}, 220, returning)
    assert abs(seconds["short"] - seconds["long"]) <= 10.0


def test_a_run_that_was_away_has_saved_nothing_up():
    backlog = backlog_of(closed(0, run="early"), *(closed(step, run="busy") for step in range(100)))
    backlog.next()
    backlog.spent("early", 1.0)
    for _ in range(50):
        backlog.next()
        backlog.spent("busy", 1.0)
    backlog.add(closed(step, run="early") for step in range(1, 50))
    turns = []
    for _ in range(20):
        (one,) = backlog.next()
        turns.append(one.key.run_id)
        backlog.spent(one.key.run_id, 1.0)
    assert 9 <= turns.count("early") <= 11


def test_runs_that_are_done_are_forgotten():
    backlog = backlog_of(*(closed(run=f"run-{index}") for index in range(50)))
    for batch in iter(backlog.next, []):
        backlog.spent(batch[0].key.run_id, 1.0)
    assert not backlog._runs


def test_small_layers_of_one_step_are_solved_together():
    records = [closed(layer=layer, width=BATCH_WIDTH) for layer in range(5)] + [closed(200, width=BATCH_WIDTH)]
    assert [[one.key.layer for one in batch] for batch in drained(backlog_of(*records))] == [[0, 1, 2, 3, 4], [0]]


@pytest.mark.parametrize(
    "other",
    [closed(200, 1, 64), closed(100, 1, 65), closed(100, 1, 64, run="other"), closed(100, 1, 64, attempt=1)],
    ids=["step", "width", "run", "attempt"],
)
def test_what_differs_is_not_solved_together(other):
    assert [len(batch) for batch in drained(backlog_of(closed(width=64), other))] == [1, 1]


def test_wide_layers_are_solved_one_by_one():
    assert [len(batch) for batch in drained(backlog_of(closed(layer=0), closed(layer=1)))] == [1, 1]


def test_a_batch_is_bounded_in_bytes():
    most = BATCH_BYTES // (8 * BATCH_WIDTH**2)
    records = [closed(layer=layer, width=BATCH_WIDTH) for layer in range(most + 3)]
    assert [len(batch) for batch in drained(backlog_of(*records))] == [most, 3]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from([8, 64, WIDE])), unique=True), st.data()
)
def test_records_of_one_series_come_in_the_order_of_their_steps_and_each_once(places, data):
    widths = {layer: width for _, layer, width in places}
    records = [closed(step, layer, widths[layer]) for step, layer in {(step, layer) for step, layer, _ in places}]
    order = [one for batch in drained(backlog_of(*data.draw(st.permutations(records)))) for one in batch]
    assert sorted(one.key for one in order) == sorted(one.key for one in records)
    for layer in widths:
        steps = [one.key.step for one in order if one.key.layer == layer]
        assert steps == sorted(steps)


LATEST = {("run", 0)}


def steps(records: list[ClosedRecord]) -> list[tuple[int, int]]:
    return [(one.key.step, one.key.layer) for one in records]


def test_only_the_latest_of_a_series_is_left_to_a_run_that_asked_for_it():
    backlog = backlog_of(closed(100), closed(300), closed(200), closed(100, 1), closed(100, run="other"))
    backlog.add([closed(200, run="other")])
    assert steps(backlog.superseded(LATEST)) == [(100, 0), (200, 0)]
    assert backlog.superseded(LATEST) == []
    assert sorted(steps([batch[0] for batch in drained(backlog)])) == [(100, 0), (100, 1), (200, 0), (300, 0)]


def test_a_record_on_which_an_alert_hangs_or_that_is_stored_already_is_not_superseded():
    stored = closed(150)
    backlog = backlog_of(closed(100, finite=False), stored, closed(200))
    assert backlog.superseded(LATEST, {stored.key}) == []
    assert len(backlog) == 3


def test_the_samples_of_a_job_count_as_its_tokens():
    x_ND = torch.randn(7, 9)
    one = closed(width=9, rows=(as_rows(x_ND),))
    assert (one.job.tokens, one.job.order, one.job.by_products) == (7, 7, True)
    full = ClosedRecord(one.key, Group.of(partial_of(x_ND)), 1, math.inf, "scatter", None, None, one.rows)
    assert (full.job.tokens, full.job.order, full.job.by_products) == (14, 9, False)
