"""The judge: which records move which alert."""

import pyarrow as pa
import pytest
from eigenwatch.aggregator.judge import Judge
from eigenwatch.schemas import ALERTS, COLLAPSE, METRIC_NAMES, NON_FINITE, RecordKey

WINDOW = COLLAPSE.window_samples
KEY = RecordKey("run", 0, 0, 3, "post", None)
COLLAPSED = {"hard_rank": 1.2, "hard_utilization": 1e-4, "spectral_concentration": 0.999}
HEALTHY = {"hard_rank": 400.0, "hard_utilization": 0.2, "spectral_concentration": 0.4}
BROKEN = dict.fromkeys(METRIC_NAMES)


@pytest.fixture
def judge():
    return Judge()


def tell(judge: Judge, steps, values: dict, key: RecordKey = KEY) -> list[dict]:
    """Rows that records with these values at these steps cause."""
    finite = values is not BROKEN
    return [
        row
        for step in steps
        for row in judge.judge(key._replace(step=step), {**values, "width": 2048, "finite": finite})
    ]


def firing(judge: Judge) -> dict[tuple, bool]:
    return {(one.series, one.kind): one.firing for one in judge.alerts.values()}


def test_a_collapse_is_one_row_and_an_alert_that_fires(judge):
    (row,) = tell(judge, range(10), COLLAPSED)
    assert row["state"] == "firing"
    assert row["kind"] == "collapse"
    assert (row["step"], row["since_step"]) == (WINDOW - 1, 0)
    assert row["evidence_steps"] == list(range(WINDOW))
    assert firing(judge) == {(KEY.series, "collapse"): True}
    stored = pa.Table.from_pylist([row | {"written_at": None}], schema=pa.schema(list(ALERTS)))
    assert set(row) | {"written_at"} == set(stored.column_names)


def test_a_healthy_layer_has_no_alert_at_all(judge):
    assert tell(judge, range(10), HEALTHY) == []
    assert judge.alerts == {}


def test_an_alert_that_ends_keeps_its_id_and_the_next_one_has_another(judge):
    story = [COLLAPSED, HEALTHY, COLLAPSED]
    rows = [
        row for index, values in enumerate(story) for row in tell(judge, range(10 * index, 10 * index + 10), values)
    ]
    assert [row["state"] for row in rows] == ["firing", "resolved", "firing"]
    assert rows[0]["alert_id"] == rows[1]["alert_id"] != rows[2]["alert_id"]
    assert [row["since_step"] for row in rows] == [0, 0, 20]
    assert firing(judge) == {(KEY.series, "collapse"): True}


def test_after_it_was_resolved_an_alert_is_shown_as_inactive(judge):
    tell(judge, range(10), COLLAPSED)
    tell(judge, range(10, 20), HEALTHY)
    assert firing(judge) == {(KEY.series, "collapse"): False}


def test_a_record_that_is_older_or_comes_again_moves_nothing(judge):
    assert tell(judge, [100, 100, 90, 100, 5, 0], COLLAPSED) == []
    assert tell(judge, [200], COLLAPSED) == []
    (row,) = tell(judge, [300], COLLAPSED)
    assert row["evidence_steps"] == [100, 200, 300]


def test_a_record_that_is_not_finite_does_not_move_the_collapse(judge):
    tell(judge, range(WINDOW - 1), COLLAPSED)
    (broken,) = tell(judge, range(10, 20), BROKEN)
    assert (broken["kind"], broken["state"], broken["severity"]) == ("non_finite", "firing", "critical")
    assert (broken["since_step"], broken["evidence_steps"]) == (10, [10])
    assert "step 10" in broken["reason"]
    (row,) = tell(judge, [20], COLLAPSED)
    assert (row["kind"], row["state"]) == ("collapse", "firing")
    assert tell(judge, range(30, 40), BROKEN) == []
    assert firing(judge) == {(KEY.series, "collapse"): True, (KEY.series, "non_finite"): True}


def test_what_was_not_finite_is_over_after_some_finite_samples_in_a_row(judge):
    enough = NON_FINITE.leave_samples
    (fired,) = tell(judge, [0], BROKEN)
    assert tell(judge, range(1, enough), HEALTHY) == []
    assert tell(judge, [enough], BROKEN) == [], "it fires still"
    (resolved,) = tell(judge, range(10, 10 + enough), HEALTHY)
    assert (resolved["state"], resolved["alert_id"]) == ("resolved", fired["alert_id"])
    (anew,) = tell(judge, [50], BROKEN)
    assert anew["alert_id"] != fired["alert_id"]


def test_what_is_not_finite_stays_so_over_a_restart(judge):
    (fired,) = tell(judge, [5], BROKEN)
    again = continued(judge, [fired], (5, BROKEN))
    assert tell(again, [6], BROKEN) == []
    (resolved,) = tell(again, range(10, 20), HEALTHY)
    assert resolved["alert_id"] == fired["alert_id"]


def test_every_series_is_judged_by_itself(judge):
    keys = [KEY, KEY._replace(layer=4), KEY._replace(site="pre"), KEY._replace(expert=0), KEY._replace(attempt=1)]
    for step in range(WINDOW - 1):
        for key in keys:
            assert tell(judge, [step], COLLAPSED, key) == []
    for key in keys:
        (row,) = tell(judge, [WINDOW], COLLAPSED, key)
        assert [row[name] for name in ("attempt", "layer", "site", "expert")] == list(key.series[1:])
    assert len(judge.alerts) == len(keys)
    resolved = [row["alert_id"] for key in keys for row in tell(judge, range(50, 60), HEALTHY, key)]
    assert len(set(resolved)) == len(keys)


def test_what_ended_is_forgotten(judge):
    other = KEY._replace(attempt=1)
    (before,) = tell(judge, range(10), COLLAPSED)
    tell(judge, range(10), COLLAPSED, other)
    judge.forget({("run", 0), ("never", 7)})
    assert firing(judge) == {(other.series, "collapse"): True}
    (row,) = tell(judge, range(WINDOW), COLLAPSED)
    assert row["state"] == "firing", "it starts from nothing, so that an older step is judged"
    assert row["alert_id"] != before["alert_id"]


def continued(judge: Judge, rows: list[dict], *records: tuple[int, dict], key: RecordKey = KEY) -> Judge:
    """A judge that takes up from the store what another wrote: the newest records of a series, and its alerts."""
    series = key.series
    judged = [{**values, "width": 2048, "finite": values is not BROKEN, "step": step} for step, values in records]
    again = Judge()
    again.recall({series: judged}, {(series, row["kind"]): row for row in rows})
    assert firing(again) == firing(judge)
    return again


def test_a_window_goes_on_after_a_restart_as_if_there_had_been_none(judge):
    assert tell(judge, range(WINDOW - 1), COLLAPSED) == []
    again = continued(judge, [], *((step, COLLAPSED) for step in range(WINDOW - 1)))
    assert tell(again, range(WINDOW - 1), COLLAPSED) == [], "these are judged already"
    (row,) = tell(again, [WINDOW], COLLAPSED)
    assert row["evidence_steps"] == [*range(WINDOW - 1), WINDOW]
    assert row["since_step"] == 0


def test_an_alert_that_fires_does_not_fire_again_and_ends_under_its_id(judge):
    (fired,) = tell(judge, range(WINDOW), COLLAPSED)
    again = continued(judge, [fired], *((step, COLLAPSED) for step in range(WINDOW)))
    assert tell(again, range(WINDOW, 20), COLLAPSED) == []
    (resolved,) = tell(again, range(20, 30), HEALTHY)
    assert (resolved["state"], resolved["alert_id"], resolved["since_step"]) == ("resolved", fired["alert_id"], 0)
    thrice = continued(again, [resolved], *((step, HEALTHY) for step in range(20, 20 + WINDOW)))
    (anew,) = tell(thrice, range(40, 50), COLLAPSED)
    assert anew["alert_id"] != fired["alert_id"]


def test_an_alert_whose_row_was_written_but_not_its_record_does_not_fire_twice(judge):
    (fired,) = tell(judge, range(WINDOW), COLLAPSED)
    again = continued(judge, [fired], *((step, COLLAPSED) for step in range(WINDOW - 1)))
    assert tell(again, range(WINDOW - 1, 10), COLLAPSED) == [], "the record comes again, since it was not durable"


def test_an_alert_of_which_nothing_was_written_is_raised_when_its_record_comes_again(judge):
    (lost,) = tell(judge, range(WINDOW), COLLAPSED)
    again = Judge()
    rows = [{**COLLAPSED, "width": 2048, "finite": True, "step": step} for step in range(WINDOW - 1)]
    again.recall({KEY.series: rows}, {})
    assert again.alerts == {}
    (row,) = tell(again, [WINDOW - 1], COLLAPSED)
    assert {**row, "alert_id": lost["alert_id"]} == lost


def test_an_alert_whose_records_are_all_durable_but_not_its_row_is_raised_by_the_next(judge):
    again = Judge()
    rows = [{**COLLAPSED, "width": 2048, "finite": True, "step": step} for step in range(WINDOW)]
    again.recall({KEY.series: rows}, {})
    (row,) = tell(again, [WINDOW], COLLAPSED)
    assert row["state"] == "firing"
