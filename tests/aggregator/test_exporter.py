"""The endpoint: what Prometheus reads there is the newest snapshot, every family of the catalogue and no other."""

import math
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from eigenwatch.aggregator.exporter import Endpoint
from eigenwatch.aggregator.judge import Alert
from eigenwatch.aggregator.snapshot import (
    LATENCY_BOUNDS,
    SOLVE_BOUNDS,
    Histogram,
    LatestRecord,
    RunCounters,
    RunState,
    ShardSnapshot,
    Snapshot,
)
from eigenwatch.schemas import DATA_QUALITY, METRIC_NAMES, SeriesKey
from eigenwatch.schemas.prometheus import FAMILIES, RECORD_GAUGES
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.prometheus_programs import program

COLUMNS = (*METRIC_NAMES, *(metric.name for metric in DATA_QUALITY))
LAYERS = 3
SECONDS = (0.0005, 0.02, 0.02, 5.0, 1e6)


def record(series: SeriesKey, step: int = 500, **values: float) -> LatestRecord:
    every = {name: 10.0 * series.layer + index for index, name in enumerate(COLUMNS)}
    return LatestRecord(series, step, 1.7e9, values or every)


def shard(*latest: LatestRecord, alerts: tuple[Alert, ...] = (), **counters: RunCounters) -> ShardSnapshot:
    solve, latency = Histogram.empty(SOLVE_BOUNDS), Histogram.empty(LATENCY_BOUNDS)
    for seconds in SECONDS:
        solve, latency = solve.observe(seconds), latency.observe(seconds)
    return ShardSnapshot("incarnation", list(latest), list(alerts), counters, solve, latency, 2.5, {})


def series(layer: int, run: str = "run", attempt: int = 1, site: str = "post", expert: int | None = None) -> SeriesKey:
    return SeriesKey(run, attempt, layer, site, expert)


def running(run: str = "run", attempt: int = 1, **dropped: int) -> RunState:
    return RunState(run, attempt, 8, LAYERS, dropped)


TYPICAL = Snapshot(
    1.7e9 + 1,
    [running(outbox_full=2)],
    [
        shard(
            *(record(series(layer)) for layer in range(2)),
            alerts=(
                Alert(series(0), "collapse", "critical", True),
                Alert(series(1), "collapse", "critical", False),
            ),
            run=RunCounters(10, 2, 5, (("width", 1), ("outbox_full", 3)), 4),
        ),
        shard(record(series(2, site="pre", expert=7)), run=RunCounters(7, 0, 1, (), 7)),
    ],
)


class Shown:
    """An endpoint whose snapshot a test may exchange."""

    def __init__(self) -> None:
        self.snapshot = TYPICAL
        self.endpoint = Endpoint(lambda: self.snapshot, "127.0.0.1", 0)

    def text(self) -> str:
        with urllib.request.urlopen(self.endpoint.url, timeout=10) as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            return response.read().decode()

    def families(self) -> dict[str, Metric]:
        return {family.name: family for family in text_string_to_metric_families(self.text())}

    def values(self, name: str, *labels: str) -> dict[tuple[str | None, ...], float]:
        """Values of a family's samples by the values of these labels."""
        family = self.families()[name]
        return {tuple(one.labels.get(label) for label in labels): one.value for one in family.samples}


@pytest.fixture(scope="module")
def one_endpoint() -> Iterator[Shown]:
    shown = Shown()
    yield shown
    shown.endpoint.close()


@pytest.fixture
def shown(one_endpoint: Shown) -> Shown:
    one_endpoint.snapshot = TYPICAL
    return one_endpoint


def test_every_family_of_the_catalogue_is_shown_with_its_type_and_help_and_no_other(shown):
    families = shown.families()
    assert set(families) == {family.name for family in FAMILIES}
    for family in FAMILIES:
        assert families[family.name].type == family.kind
        assert families[family.name].documentation == family.help
        assert families[family.name].samples, family.name


def test_every_sample_has_the_labels_of_its_family_and_the_expert_only_where_there_is_one(shown):
    families = shown.families()
    for family in FAMILIES:
        for sample in families[family.name].samples:
            labels = set(sample.labels) - {"le"}
            assert labels in ({*family.labels}, {*family.labels} - {"expert"}), sample
            assert ("expert" in labels) == (sample.labels.get("layer") == "2"), sample


@pytest.mark.parametrize("family", RECORD_GAUGES, ids=lambda family: family.name)
def test_every_gauge_is_shown_for_every_layer(shown, family):
    index = COLUMNS.index(family.name.removeprefix("eigenwatch_"))
    assert shown.values(family.name, "run", "layer", "site", "expert") == {
        ("run", "0", "post", None): index,
        ("run", "1", "post", None): 10.0 + index,
        ("run", "2", "pre", "7"): 20.0 + index,
    }


def test_series_stand_in_the_order_of_the_layers_however_their_records_came(shown):
    keys = [series(2), series(0), series(1, expert=1), series(1, expert=0), series(1, site="pre"), series(10)]
    shown.snapshot = Snapshot(1.7e9, [running()], [shard(*map(record, keys[:3])), shard(*map(record, keys[3:]))])
    assert list(shown.values("eigenwatch_hard_rank", "layer", "site", "expert")) == [
        ("0", "post", None), ("1", "post", "0"), ("1", "post", "1"), ("1", "pre", None), ("2", "post", None),
        ("10", "post", None),
    ]  # fmt: skip


def test_when_and_at_which_step_a_layer_was_last_recorded(shown):
    assert set(shown.values("eigenwatch_last_record_timestamp_seconds", "layer").values()) == {1.7e9}
    assert shown.values("eigenwatch_last_record_step", "layer") == {("0",): 500, ("1",): 500, ("2",): 500}
    assert shown.values("eigenwatch_snapshot_timestamp_seconds") == {(): 1.7e9 + 1}


def test_a_metric_that_does_not_exist_is_absent_and_not_zero(shown):
    shown.snapshot = TYPICAL._replace(shards=[shard(record(series(0), tokens=5.0, finite=0.0))])
    assert shown.values("eigenwatch_tokens", "layer") == {("0",): 5.0}
    assert shown.values("eigenwatch_finite", "layer") == {("0",): 0.0}
    assert shown.values("eigenwatch_hard_rank", "layer") == {}


def test_an_active_alert_is_one_and_a_resolved_one_zero(shown):
    assert shown.values("eigenwatch_alert_active", "run", "layer", "kind", "severity") == {
        ("run", "0", "collapse", "critical"): 1.0,
        ("run", "1", "collapse", "critical"): 0.0,
    }


def test_what_runs_is_told(shown):
    assert shown.values("eigenwatch_run_info", "run", "attempt", "world_size", "layers") == {("run", "1", "8", "3"): 1}
    ((versions, one),) = shown.values("eigenwatch_build_info", "version", "torch", "ray").items()
    assert all(versions)
    assert one == 1


def test_counters_sum_over_shards_and_ranks_and_end_in_total(shown):
    def count(name: str, *labels: str):
        assert all(sample.name == f"{name}_total" for sample in shown.families()[name].samples)
        return shown.values(name, *labels)

    assert count("eigenwatch_partials_received", "run") == {("run",): 17}
    assert count("eigenwatch_partials_duplicated", "run") == {("run",): 2}
    assert count("eigenwatch_records_written", "run") == {("run",): 6}
    assert count("eigenwatch_partials_dropped", "run", "reason") == {("run", "width"): 1, ("run", "outbox_full"): 5}


def test_the_counters_of_a_run_start_at_zero(shown):
    shown.snapshot = Snapshot(0.0, [running("new", 0)], [])
    for name in ("eigenwatch_partials_received", "eigenwatch_partials_duplicated", "eigenwatch_records_written"):
        assert shown.values(name, "run") == {("new",): 0.0}


@pytest.mark.parametrize(
    ("name", "bounds"),
    [("eigenwatch_solve_seconds", SOLVE_BOUNDS), ("eigenwatch_record_latency_seconds", LATENCY_BOUNDS)],
)
def test_histograms_are_cumulative_over_all_shards(shown, name, bounds):
    samples = shown.families()[name].samples
    buckets = {float(one.labels["le"]): one.value for one in samples if one.name == f"{name}_bucket"}
    assert list(buckets) == [*bounds, math.inf]
    for bound, count in buckets.items():
        assert count == 2 * sum(seconds <= bound for seconds in SECONDS)
    sums = {one.name: one.value for one in samples}
    assert sums[f"{name}_count"] == 2 * len(SECONDS)
    assert sums[f"{name}_sum"] == pytest.approx(2 * sum(SECONDS))


def test_the_series_of_a_run_that_ended_vanish(shown):
    shown.snapshot = TYPICAL._replace(runs=[running("other", 0)])
    assert 'run="run"' not in "".join(
        line
        for line in shown.text().splitlines()
        if not line.startswith(("#", "eigenwatch_partials", "eigenwatch_messages", "eigenwatch_records"))
    )
    shown.snapshot = Snapshot(0.0, [], [])
    assert 'run="' not in shown.text()
    assert shown.families()["eigenwatch_hard_rank"].samples == []


def test_an_earlier_attempt_is_not_shown_beside_the_one_that_runs(shown):
    both = [record(series(0, attempt=0), 900), record(series(0, attempt=1), 500)]
    alerts = (Alert(series(0, attempt=0), "collapse", "critical", True),)
    shown.snapshot = TYPICAL._replace(shards=[shard(*both, alerts=alerts)])
    assert shown.values("eigenwatch_last_record_step", "run", "layer") == {("run", "0"): 500}
    assert shown.values("eigenwatch_alert_active", "layer") == {}


def test_no_two_samples_are_the_same_series(shown):
    lines = [line.rsplit(" ", 1)[0] for line in shown.text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines))


def test_promtool_finds_nothing(shown):
    promtool = program("promtool", "prometheus")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=shown.text(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_listens_on_this_host_alone(shown):
    port = int(shown.endpoint.url.split(":")[2].split("/")[0])
    assert shown.endpoint.url == f"http://127.0.0.1:{port}/metrics"
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # it would not be free if the endpoint were bound to every address


def test_a_port_that_cannot_be_had_is_one_line_with_the_remedy(shown):
    port = int(shown.endpoint.url.split(":")[2].split("/")[0])
    for bad, words in ((port, "in use"), (70000, "port")):
        with pytest.raises(
            ValueError, match=f"127.0.0.1:{bad} cannot be used .*{words}.*another metrics port"
        ) as refused:
            Endpoint(lambda: TYPICAL, "127.0.0.1", bad)
        assert "\n" not in str(refused.value)


def test_a_host_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match=r"192\.0\.2\.1:0 cannot be used"):
        Endpoint(lambda: TYPICAL, "192.0.2.1", 0)


def test_the_port_is_free_again_when_it_is_closed():
    endpoint = Endpoint(lambda: TYPICAL, "127.0.0.1", 0)
    port = int(endpoint.url.split(":")[2].split("/")[0])
    endpoint.close()
    Endpoint(lambda: TYPICAL, "127.0.0.1", port).close()


def test_several_endpoints_live_in_one_process(shown):
    other = Shown()
    other.snapshot = TYPICAL._replace(runs=[], shards=[])
    assert shown.values("eigenwatch_hard_rank", "layer") != other.values("eigenwatch_hard_rank", "layer")
    other.endpoint.close()


def test_what_shards_counted_that_are_no_more_stays_in_the_counters(shown):
    earlier = RunCounters(100, 20, 50, (("width", 7), ("late", 1)))
    shown.snapshot = TYPICAL._replace(runs=[running(outbox_full=2)._replace(earlier=earlier)])
    assert shown.values("eigenwatch_partials_received", "run") == {("run",): 117}
    assert shown.values("eigenwatch_partials_duplicated", "run") == {("run",): 22}
    assert shown.values("eigenwatch_records_written", "run") == {("run",): 56}
    assert shown.values("eigenwatch_partials_dropped", "reason") == {("late",): 1, ("outbox_full",): 5, ("width",): 8}


def test_a_run_id_that_two_jobs_use_is_shown(shown):
    assert shown.values("eigenwatch_run_id_in_use", "run") == {("run",): 0}
    shown.snapshot = TYPICAL._replace(runs=[running()._replace(in_use=True)])
    assert shown.values("eigenwatch_run_id_in_use", "run") == {("run",): 1}
