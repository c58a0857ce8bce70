"""A shard from push to file: what comes in as partials is stored as the records of all their tokens."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from eigenwatch import spectrum
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.shard import Shard
from eigenwatch.schemas import (
    METRIC_NAMES,
    LayerDescription,
    PartialCovariance,
    PartialSamples,
    RecordKey,
    RunDescription,
    table_folder,
)
from torch import Tensor

from tests.processes import wait_until
from tests.spectrum.cases import blocks_of, partial_of

WIDTH = 12
SOON, NEVER = 0.2, 3600.0
FLUSH_SECONDS = 30.0
KEY = RecordKey("run", 0, 100, 0, "post", None)


def layer(index: int = 0, ranks: tuple[int, ...] = (0, 1), **changes: Any) -> LayerDescription:
    described = LayerDescription(
        layer=index, site="post", name=f"h.{index}", width=WIDTH, shares=tuple((r,) for r in ranks)
    )
    return dataclasses.replace(described, **changes)


def run(*layers: LayerDescription, run_id: str = "run") -> RunDescription:
    return RunDescription(run_id=run_id, launch_id="launch", world_size=3, layers=layers or (layer(),))


def rows(rank: int, step: int = 100, tokens: int = 40, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(tokens, width, generator=generator) * torch.arange(1, width + 1) + 3.0 * rank


def partial(rank: int, step: int = 100, tokens: int = 40, width: int = WIDTH, **key: Any) -> PartialCovariance:
    return partial_of(rows(rank, step, tokens, width), rank=rank, key=KEY._replace(step=step, **key))


def broken(rank: int, step: int = 100) -> PartialCovariance:
    x_ND = rows(rank, step)
    x_ND[0, 0] = math.nan
    return partial_of(x_ND, rank=rank, key=KEY._replace(step=step))


OpenShard = Callable[..., Shard]


@pytest.fixture
def open_shard(tmp_path: Path) -> Iterator[OpenShard]:
    """Opens shards on one store that know a run; ends them after the test."""
    shards = []

    def open_one(
        described: RunDescription | None = None, deadline_seconds: float = NEVER, memory_bytes: int = 1 << 30
    ) -> Shard:
        limits = ShardLimits(deadline_seconds=deadline_seconds, memory_bytes=memory_bytes)
        shards.append(Shard(str(tmp_path), SolverConfig(device="cpu"), limits))
        shards[-1].open_run((described or run()).to_wire(), 0)
        return shards[-1]

    yield open_one
    for one in shards:
        one.close(FLUSH_SECONDS)


def push(shard: Shard, *partials: PartialCovariance) -> list[str]:
    return [shard.push(*one.to_wire()).status for one in partials]


def stored(store: Path, table: str = "records", run_id: str = "run") -> list[dict[str, Any]]:
    """Every row of a table, oldest first."""
    files = sorted(table_folder(store, run_id, table).glob("part-*.parquet"))
    if not files:
        return []
    written = pa.concat_tables(pq.read_table(file) for file in files)
    return written.sort_by([("written_at", "ascending"), ("step", "ascending"), ("layer", "ascending")]).to_pylist()


def fates(shard: Shard, *keys: RecordKey, rank: int = 0) -> list[str]:
    return [fate for (fate,) in shard.fates([(tuple(key), [rank]) for key in keys or (KEY,)])]


def durable(shard: Shard, *keys: RecordKey) -> list[bool]:
    return [fate in ("partly", "durable") for fate in fates(shard, *keys)]


def wait_for_rows(store: Path, count: int) -> list[dict[str, Any]]:
    return wait_until(lambda: found if len(found := stored(store)) >= count else [], f"{count} records")


def test_a_record_is_that_of_all_tokens_together(open_shard, tmp_path):
    shard = open_shard(run(layer(ranks=(0, 1, 2))))
    assert push(shard, partial(1, tokens=30), partial(0, tokens=70), partial(2, tokens=1)) == ["merged"] * 3
    (record,) = wait_for_rows(tmp_path, 1)
    (spectra,) = stored(tmp_path, "eigenvalues")

    x_ND = torch.cat([rows(0, tokens=70), rows(1, tokens=30), rows(2, tokens=1)]).double()
    true_D = torch.linalg.eigvalsh(torch.cov(x_ND.T)).flip(-1)
    found_D = torch.tensor(spectra["eigenvalues"], dtype=torch.float64)
    assert float((found_D - true_D).abs().max()) < 1e-5 * float(true_D[0])
    for name in ("hard_rank", "soft_rank", "spectral_concentration", "effective_dimension", "top1_share"):
        assert record[name] == pytest.approx(float(getattr(spectrum, name)(true_D)), rel=1e-4), name
    assert record["total_variance"] == pytest.approx(float(true_D.sum()), rel=1e-5)
    assert record["hard_rank_correction"] == "pairs"
    assert {name for name in METRIC_NAMES if record[name] is None} == {"js_divergence"}
    expected = {
        "step": 100, "attempt": 0, "layer": 0, "site": "post", "expert": None, "width": WIDTH, "tokens": 101,
        "tokens_per_width": 101 / WIDTH, "finite": True, "complete": True, "ranks_seen": 3, "ranks_expected": 3,
        "form": "scatter", "solver": "cpu-float64",
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["written_at"] == spectra["written_at"]
    assert record["captured_at"].timestamp() == 1.0
    assert 0 < record["solve_seconds"] < 10


def test_ranks_that_push_at_once_are_added_up_together(open_shard, tmp_path):
    ranks = tuple(range(8))
    shard = open_shard(run(layer(ranks=ranks, width=400)))
    with ThreadPoolExecutor(len(ranks)) as threads:
        answers = list(threads.map(lambda rank: push(shard, partial(rank, width=400)), ranks))
    assert answers == [["merged"]] * len(ranks)
    (row,) = wait_for_rows(tmp_path, 1)
    true_D = spectrum.eigenvalues(torch.cov(torch.cat([rows(rank, width=400) for rank in ranks]).double().T))
    assert row["complete"]
    assert row["hard_rank"] == pytest.approx(spectrum.hard_rank(true_D).item(), rel=1e-5)


def test_the_same_partial_again_changes_nothing(open_shard, tmp_path):
    shard = open_shard()
    assert push(shard, partial(0), partial(0), partial(1), partial(1)) == ["merged", "duplicate", "merged", "duplicate"]
    (record,) = wait_for_rows(tmp_path, 1)
    assert record["tokens"] == 80
    wait_until(lambda: durable(shard) == [True], "its durability")
    assert push(shard, partial(0), partial(1)) == ["durable", "durable"]
    assert shard.snapshot([]).counters["run"].duplicated == 4


def test_a_run_that_was_not_announced_must_be(open_shard):
    shard = open_shard()
    assert push(shard, partial(0, run_id="other"), partial(0, attempt=1)) == ["unknown_run", "unknown_run"]
    shard.open_run(run(run_id="other").to_wire(), 0)
    assert push(shard, partial(0, run_id="other")) == ["merged"]


@pytest.mark.parametrize(
    ("sent", "reason", "words"),
    [
        (partial(0, width=WIDTH + 1), "width", f"width {WIDTH}, got {WIDTH + 1}"),
        (partial(2), "unexpected", "no layer 0 (post) on rank 2"),
        (partial(0, layer=7), "unexpected", "no layer 7 (post) on rank 0"),
        (partial(0, site="pre"), "unexpected", "no layer 0 (pre)"),
        (partial(0, expert=3), "unexpected", "layer 0"),
    ],
)
def test_what_the_run_did_not_announce_is_refused_and_counted(open_shard, sent, reason, words):
    shard = open_shard()
    reply = shard.push(*sent.to_wire())
    assert (reply.status, reply.reason) == ("refused", reason)
    assert words in reply.message
    assert shard.snapshot([]).counters["run"].dropped == ((reason, 1),)
    assert push(shard, partial(0)) == ["merged"]


def test_what_is_malformed_is_refused_and_counted_for_the_run_if_it_is_one(open_shard):
    shard = open_shard()
    header, mean, scatter = partial(0).to_wire()
    for sent in (
        header | {"tokens": -1},
        header | {"version": 99},
        header | {"run_id": "../../etc"},
        header | {"run_id": "nobody", "step": None},
        "no header",
    ):
        assert shard.push(sent, mean, scatter).status == "refused"
    counters = shard.snapshot([]).counters
    assert counters["run"].dropped == (("malformed", 1), ("version", 1))
    assert counters["unknown"].dropped == (("malformed", 3),)
    assert set(counters) == {"run", "unknown"}, "no label comes from what was refused"


def test_a_record_is_stored_incomplete_at_its_deadline_and_again_when_the_late_rank_has_come(open_shard, tmp_path):
    shard = open_shard(deadline_seconds=SOON)
    push(shard, partial(0))
    (early,) = wait_for_rows(tmp_path, 1)
    assert (early["complete"], early["ranks_seen"], early["ranks_expected"], early["tokens"]) == (False, 1, 2, 40)
    assert early["hard_rank_correction"] == "gaussian"
    wait_until(lambda: durable(shard) == [True], "its durability")
    assert push(shard, partial(0)) == ["duplicate"]
    assert push(shard, partial(1)) == ["merged"]
    first, second = wait_for_rows(tmp_path, 2)
    assert first == early
    assert (second["complete"], second["ranks_seen"], second["tokens"]) == (True, 2, 80)
    assert second["written_at"] > first["written_at"]
    spectra = stored(tmp_path, "eigenvalues")
    assert [row["written_at"] for row in spectra] == [first["written_at"], second["written_at"]]


def test_a_shard_that_restarts_knows_what_is_durable(open_shard, tmp_path):
    first = open_shard(deadline_seconds=SOON)
    push(first, partial(0), partial(1), partial(0, step=200))
    wait_for_rows(tmp_path, 2)
    assert first.close(FLUSH_SECONDS) == 0

    second = open_shard(deadline_seconds=SOON)
    assert durable(second, KEY, KEY._replace(step=200), KEY._replace(step=300)) == [True, True, False]
    assert push(second, partial(0), partial(1)) == ["durable", "durable"]
    assert second.snapshot([]).counters["run"].received == 0


def test_a_rank_that_comes_late_to_a_restarted_shard_does_not_replace_what_more_ranks_made(open_shard, tmp_path):
    described = run(layer(ranks=(0, 1, 2)))
    first = open_shard(described, deadline_seconds=SOON)
    push(first, partial(0), partial(1))
    (before,) = wait_for_rows(tmp_path, 1)
    assert before["ranks_seen"] == 2
    first.close(FLUSH_SECONDS)

    second = open_shard(described, deadline_seconds=SOON)
    assert push(second, partial(2)) == ["merged"]
    wait_until(lambda: second.snapshot([]).counters["run"].dropped, "the loss to be counted")
    assert second.snapshot([]).counters["run"].dropped == (("late", 1),)
    assert [fates(second, rank=rank) for rank in range(3)] == [["partly"], ["partly"], ["dropped"]]
    assert push(second, partial(2)) == ["dropped"]
    second.close(FLUSH_SECONDS)
    assert stored(tmp_path) == [before]


def test_all_ranks_that_push_again_to_a_restarted_shard_replace_what_some_of_them_made(open_shard, tmp_path):
    first = open_shard(deadline_seconds=SOON)
    push(first, partial(0))
    wait_for_rows(tmp_path, 1)
    first.close(FLUSH_SECONDS)
    second = open_shard()
    push(second, partial(0), partial(1))
    assert [record["ranks_seen"] for record in wait_for_rows(tmp_path, 2)] == [1, 2]


def test_activations_that_are_not_finite_are_a_record_without_metrics(open_shard, tmp_path):
    shard = open_shard()
    push(shard, partial(0), broken(1), partial(0, step=200), partial(1, step=200))
    assert shard.flush(FLUSH_SECONDS) == 0
    bad, good = stored(tmp_path)
    assert (bad["finite"], bad["complete"], bad["tokens"]) == (False, True, 80)
    assert [name for name in METRIC_NAMES if bad[name] is not None] == []
    assert bad["solver"] is None
    assert good["finite"]
    assert good["hard_rank"] > 1
    assert [row["step"] for row in stored(tmp_path, "eigenvalues")] == [200]
    (latest,) = shard.snapshot([]).latest
    assert latest.step == 200


def test_the_last_record_of_a_layer_is_shown_even_if_it_has_no_metrics(open_shard):
    shard = open_shard()
    push(shard, partial(0), partial(1), broken(0, step=200), broken(1, step=200))
    shard.flush(FLUSH_SECONDS)
    (latest,) = shard.snapshot([]).latest
    assert latest.step == 200
    assert latest.values == {
        "width": WIDTH,
        "tokens": 80,
        "tokens_per_width": 80 / WIDTH,
        "complete": 1.0,
        "finite": 0.0,
    }


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_record_of_hardly_any_tokens_is_stored(open_shard, tmp_path, tokens):
    shard = open_shard(run(layer(ranks=(0,))))
    push(shard, partial(0, tokens=tokens))
    shard.flush(FLUSH_SECONDS)
    (record,) = stored(tmp_path)
    assert record["hard_rank"] == pytest.approx(1.0)
    assert record["hard_utilization"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("end", [Shard.flush, Shard.close])
def test_flushing_writes_everything_complete_or_not(open_shard, tmp_path, end):
    shard = open_shard()
    push(shard, *(partial(0, step=step) for step in range(5)), partial(1, step=3))
    assert end(shard, FLUSH_SECONDS) == 0
    complete = {row["step"]: row["complete"] for row in stored(tmp_path)}
    assert complete == {step: step == 3 for step in range(5)}
    assert durable(shard, *(KEY._replace(step=step) for step in range(5))) == [True] * 5
    assert shard.close(FLUSH_SECONDS) == 0


def test_after_a_flush_a_shard_goes_on_waiting_for_all_ranks(open_shard, tmp_path):
    shard = open_shard()
    push(shard, partial(0))
    shard.flush(FLUSH_SECONDS)
    push(shard, partial(0, step=200), partial(0, step=300), partial(1, step=300))
    wait_for_rows(tmp_path, 2)
    push(shard, partial(1, step=200))
    records = wait_for_rows(tmp_path, 3)
    assert [(row["step"], row["complete"]) for row in records] == [(100, False), (300, True), (200, True)]


def test_what_the_store_refuses_is_kept_until_it_takes_it(open_shard, tmp_path, caplog):
    shard = open_shard()
    in_the_way = tmp_path / "run_id=run"
    in_the_way.touch()
    push(shard, partial(0), partial(1))
    wait_until(lambda: "trying again" in caplog.text, "the first refusal")
    assert durable(shard) == [False]
    assert shard.flush(0.1) == 1
    in_the_way.unlink()
    (record,) = wait_for_rows(tmp_path, 1)
    assert record["complete"]
    wait_until(lambda: durable(shard) == [True], "its durability")


def test_when_memory_is_full_ranks_are_asked_to_push_again(open_shard):
    shard = open_shard(memory_bytes=1)
    assert push(shard, partial(0), partial(0, step=200), partial(1)) == ["merged", "busy", "merged"]
    wait_until(lambda: push(shard, partial(0, step=200)) == ["merged"], "room")


def test_a_snapshot_counts_what_happened(open_shard):
    shard = open_shard(run(layer(0), layer(1, ranks=(0,))))
    push(shard, partial(0), partial(0), partial(1), partial(0, layer=1), partial(1, layer=1))
    push(shard, partial(0, step=200))
    before = shard.snapshot([]).counters["run"]
    assert (before.received, before.duplicated, before.dropped) == (4, 1, (("unexpected", 1),))
    shard.flush(FLUSH_SECONDS)
    snapshot = shard.snapshot([])
    assert snapshot.counters["run"].records_written == 3
    assert {(one.series.layer, one.step) for one in snapshot.latest} == {(0, 200), (1, 100)}
    by_layer = {one.series.layer: one.values for one in snapshot.latest}
    assert by_layer[0]["complete"] == 0.0
    assert by_layer[1]["complete"] == 1.0
    assert set(METRIC_NAMES) - set(by_layer[1]) == {"js_divergence"}
    for histogram in (snapshot.solve_seconds, snapshot.latency_seconds):
        assert histogram.counts[-1] == 3
        assert list(histogram.counts) == sorted(histogram.counts)
        assert histogram.total_seconds > 0


def test_an_older_step_that_comes_late_is_stored_and_not_shown_as_the_last(open_shard, tmp_path):
    shard = open_shard(run(layer(ranks=(0,))))
    push(shard, partial(0, step=200))
    shard.flush(FLUSH_SECONDS)
    push(shard, partial(0, step=100))
    shard.flush(FLUSH_SECONDS)
    assert [row["step"] for row in stored(tmp_path)] == [200, 100]
    assert [one.step for one in shard.snapshot([]).latest] == [200]


def test_runs_and_attempts_are_told_apart(open_shard, tmp_path):
    shard = open_shard(run(layer(ranks=(0,))))
    other = run(layer(ranks=(0,)), run_id="other")
    shard.open_run(other.to_wire(), 0)
    shard.open_run(run(layer(ranks=(0,))).to_wire(), 1)
    push(shard, partial(0), partial(0, run_id="other"), partial(0, attempt=1))
    shard.flush(FLUSH_SECONDS)
    assert sorted(row["attempt"] for row in stored(tmp_path)) == [0, 1]
    assert len(stored(tmp_path, run_id="other")) == 1
    assert {one.series[:2] for one in shard.snapshot([]).latest} == {("run", 0), ("run", 1), ("other", 0)}


def test_a_run_that_ended_is_forgotten_and_nothing_of_it_shown(open_shard):
    shard = open_shard(run(layer(ranks=(0,))))
    shard.open_run(run(layer(ranks=(0,)), run_id="other").to_wire(), 0)
    push(shard, partial(0), partial(0), partial(0, run_id="other"), partial(2))
    shard.flush(FLUSH_SECONDS)
    snapshot = shard.snapshot([("run", 0), ("never", 3)])
    assert set(snapshot.counters) == {"other"}
    assert {one.series.run_id for one in snapshot.latest} == {"other"}
    assert push(shard, partial(0), partial(0, run_id="other")) == ["unknown_run", "durable"]
    shard.open_run(run(layer(ranks=(0,))).to_wire(), 0)
    assert push(shard, partial(0)) == ["durable"], "it learns from the store what it has forgotten"


def test_a_layer_that_collapses_raises_an_alert_in_the_store_and_in_the_snapshot(open_shard, tmp_path):
    width = 64
    shard = open_shard(run(layer(ranks=(0,), width=width)))
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0))

    def rows_at(step: int, collapsed: bool) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(300, width, generator=generator)
        return noise + 100 * torch.randn(300, 1, generator=generator) * direction if collapsed else noise

    for step in range(6):
        push(shard, partial_of(rows_at(step, step < 3), key=KEY._replace(step=step)))
        shard.flush(FLUSH_SECONDS)
        (alerts,) = [[one.firing for one in shard.snapshot([]).alerts]]
        assert alerts == ([] if step < 2 else [step < 5])
    firing, resolved = stored(tmp_path, "alerts")
    assert (firing["state"], resolved["state"]) == ("firing", "resolved")
    assert firing["alert_id"] == resolved["alert_id"]
    assert firing["evidence_steps"] == [0, 1, 2]
    assert (firing["step"], resolved["step"]) == (2, 5)
    assert firing["written_at"] in [row["written_at"] for row in stored(tmp_path)]


SHARED = LayerDescription(layer=0, site="post", name="h.0", width=WIDTH, shares=((0, 1), (2,)))
"""Ranks 0 and 1 hold the same tokens."""
UPPER, LOWER = blocks_of(partial(0), (0, 1))


def test_ranks_of_a_tensor_parallel_group_are_one_sample_of_the_record(open_shard, tmp_path):
    shard = open_shard(run(SHARED))
    assert push(shard, LOWER, partial(2), UPPER, UPPER) == ["merged", "merged", "merged", "duplicate"]
    shard.flush(FLUSH_SECONDS)
    (record,) = stored(tmp_path)
    assert (record["tokens"], record["ranks_seen"], record["ranks_expected"]) == (80, 3, 3)
    assert record["complete"]
    x_ND = torch.cat([rows(0), rows(2)]).double()
    assert record["hard_rank"] == pytest.approx(float(spectrum.hard_rank(spectrum.eigenvalues(torch.cov(x_ND.T)))))
    whole = spectrum.merge([partial(0), partial(2)])
    assert record["hard_rank_corrected"] == pytest.approx(spectrum.hard_rank_corrected(whole).value)


@pytest.mark.parametrize(
    "sent",
    [
        partial(0),
        dataclasses.replace(UPPER, rank=1),
        dataclasses.replace(LOWER, rank=0),
        dataclasses.replace(LOWER, share=1),
        dataclasses.replace(UPPER, rows=(0, 5), scatter=UPPER.scatter[: 5 * WIDTH]),
        dataclasses.replace(partial(2), share=0),
    ],
    ids=["the whole", "another's block", "another's block too", "another share", "fewer rows", "of another share"],
)
def test_a_block_that_the_run_did_not_announce_is_refused(open_shard, sent):
    shard = open_shard(run(SHARED))
    reply = shard.push(*sent.to_wire())
    assert (reply.status, reply.reason) == ("refused", "unexpected")
    assert f"rank {sent.rank} of run run holds rows" in reply.message
    assert push(shard, UPPER, LOWER, partial(2)) == ["merged"] * 3


def test_blocks_that_contradict_one_another_are_refused_and_counted(open_shard):
    shard = open_shard(run(SHARED))
    push(shard, UPPER)
    reply = shard.push(*dataclasses.replace(LOWER, tokens=39).to_wire())
    assert (reply.status, reply.reason) == ("refused", "contradiction")
    assert "40 and of 39 tokens" in reply.message
    assert push(shard, LOWER) == ["merged"]


def test_a_record_without_the_rest_of_a_share_is_that_of_the_others(open_shard, tmp_path):
    shard = open_shard(run(SHARED))
    push(shard, UPPER, partial(2))
    shard.flush(FLUSH_SECONDS)
    (record,) = stored(tmp_path)
    assert (record["tokens"], record["ranks_seen"], record["complete"]) == (40, 1, False)
    true = spectrum.hard_rank(spectrum.eigenvalues(torch.cov(rows(2).double().T)))
    assert record["hard_rank"] == pytest.approx(float(true))


def test_a_record_of_which_no_share_is_whole_is_given_up_at_its_deadline_and_counted(open_shard, tmp_path):
    shard = open_shard(run(SHARED), deadline_seconds=SOON)
    push(shard, UPPER)
    wait_until(lambda: shard.snapshot([]).counters["run"].dropped == (("incomplete_share", 1),), "the loss")
    assert fates(shard) == ["dropped"], "it is not to be kept any longer"
    assert stored(tmp_path) == []
    push(shard, LOWER)
    shard.flush(FLUSH_SECONDS)
    assert [record["tokens"] for record in stored(tmp_path)] == [40], "the rest came after all"


def test_a_block_that_is_not_finite_is_a_record_even_if_its_share_is_never_whole(open_shard, tmp_path):
    shard = open_shard(run(SHARED))
    push(shard, blocks_of(broken(0), (0, 1))[1])
    shard.flush(FLUSH_SECONDS)
    (record,) = stored(tmp_path)
    assert (record["finite"], record["complete"], record["tokens"]) == (False, False, 0)


def nothing(rank: int, step: int = 100, **key: Any) -> PartialCovariance:
    return partial_of(torch.empty(0, WIDTH), rank=rank, key=KEY._replace(step=step, **key))


def test_an_expert_that_one_rank_saw_no_token_of_is_complete(open_shard, tmp_path):
    shard = open_shard(run(layer(expert=3)))
    assert push(shard, nothing(1, expert=3), partial(0, expert=3)) == ["merged", "merged"]
    (record,) = wait_for_rows(tmp_path, 1)
    assert (record["complete"], record["tokens"], record["expert"]) == (True, 40, 3)
    assert record["hard_rank_correction"] == "gaussian", "one sample, not two"


def test_an_expert_that_nobody_saw_a_token_of_is_a_record_without_metrics(open_shard, tmp_path):
    shard = open_shard(run(layer(expert=3)))
    push(shard, nothing(0, expert=3), nothing(1, expert=3))
    (record,) = wait_for_rows(tmp_path, 1)
    assert (record["complete"], record["finite"], record["tokens"]) == (True, True, 0)
    assert [name for name in METRIC_NAMES if record[name] is not None] == []
    assert record["solver"] is None
    assert stored(tmp_path, "eigenvalues") == []
    wait_until(lambda: durable(shard, KEY._replace(expert=3)) == [True], "its durability")
    (latest,) = shard.snapshot([]).latest
    assert (latest.values["tokens"], latest.values["finite"]) == (0, 1)


def samples(rank: int, step: int = 100, dtype: torch.dtype = torch.float32, **fields: Any) -> PartialSamples:
    x_ND = rows(rank, step).to(dtype)
    array = (x_ND.view(torch.uint16) if dtype == torch.bfloat16 else x_ND).numpy()
    key = KEY._replace(step=step)
    return PartialSamples(key=key, rank=rank, share=rank, captured_at=1.0, samples=array, **fields)


def test_rows_make_the_record_that_their_scatter_makes(open_shard, tmp_path):
    shard = open_shard()
    push(shard, partial(0), partial(1))
    shard.flush(FLUSH_SECONDS)
    shard.open_run(run().to_wire(), 1)
    for rank in range(2):
        header, mean, payload = samples(rank).to_wire()
        assert shard.push(header | {"attempt": 1}, mean, payload).status == "merged"
    shard.flush(FLUSH_SECONDS)
    scatter, rows = stored(tmp_path)
    assert (scatter["form"], rows["form"]) == ("scatter", "samples")
    same = set(scatter) - {"form", "attempt", "written_at", "solve_seconds"}
    assert {name: scatter[name] for name in same} == {name: rows[name] for name in same}
    first, second = stored(tmp_path, "eigenvalues")
    assert first["eigenvalues"] == second["eigenvalues"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_half_precision_are_exact_numbers(open_shard, tmp_path, dtype):
    shard = open_shard()
    assert push(shard, samples(0, dtype=dtype), partial(1)) == ["merged", "merged"]
    shard.flush(FLUSH_SECONDS)
    (record,) = stored(tmp_path)
    assert record["form"] == "mixed"
    x_ND = torch.cat([rows(0).to(dtype).double(), rows(1).double()])
    assert record["total_variance"] == pytest.approx(float(torch.cov(x_ND.T).trace()), rel=1e-6)


def test_rows_come_again_or_of_nobody_as_scatters_do(open_shard):
    shard = open_shard()
    assert push(shard, samples(0), samples(0), partial(0)) == ["merged", "duplicate", "duplicate"]
    assert push(shard, samples(2)) == ["refused"]
    assert shard.snapshot([]).counters["run"].received == 1


def test_one_rank_of_a_tensor_parallel_group_does_not_send_rows(open_shard):
    assert push(open_shard(run(SHARED)), samples(0), samples(2)) == ["refused", "merged"]


def test_rows_that_are_not_finite_are_a_record_without_metrics(open_shard, tmp_path):
    shard = open_shard()
    bad = samples(0)
    bad.samples[3, 2] = np.nan
    push(shard, bad, samples(1))
    shard.flush(FLUSH_SECONDS)
    (record,) = stored(tmp_path)
    assert (record["finite"], record["tokens"], record["hard_rank"]) == (False, 80, None)


def test_schedule_and_cost_are_columns_and_gauges(open_shard, tmp_path):
    shard = open_shard()
    push(shard, samples(0, sampling_steps=50, overhead_ratio=0.002))
    push(shard, dataclasses.replace(partial(1), sampling_steps=50, overhead_ratio=0.004))
    push(shard, partial(0, step=50), partial(1, step=50))
    shard.flush(FLUSH_SECONDS)
    without, record = sorted(stored(tmp_path), key=lambda row: row["step"])
    assert (record["sampling_steps"], record["overhead_ratio"]) == (50, 0.004)
    assert (without["sampling_steps"], without["overhead_ratio"]) == (None, None)
    (latest,) = shard.snapshot([]).latest
    assert (latest.values["sampling_steps"], latest.values["overhead_ratio"]) == (50.0, 0.004)


BOTH_SITES = run(layer(ranks=(0,), paired=True), layer(ranks=(0,), site="pre", paired=True))
PRE = KEY._replace(site="pre")


def at_pre(step: int = 100, tokens: int = 60) -> PartialCovariance:
    return partial_of(rows(7, step, tokens), key=PRE._replace(step=step))


@pytest.mark.parametrize("pre_first", [True, False])
def test_both_sites_of_a_layer_know_how_far_their_spectra_lie_apart(open_shard, tmp_path, pre_first):
    shard = open_shard(BOTH_SITES)
    first, second = (at_pre(), partial(0)) if pre_first else (partial(0), at_pre())
    push(shard, first)
    wait_until(lambda: shard.snapshot([]).solve_seconds.counts[-1] == 1, "the first to be solved")
    push(shard, second)
    records = wait_for_rows(tmp_path, 2)
    post, pre = (spectrum.eigenvalues(torch.cov(x_ND.double().T)) for x_ND in (rows(0), rows(7, tokens=60)))
    expected = pytest.approx(float(spectrum.js_divergence(pre, post)), rel=1e-4)
    assert {record["site"]: record["js_divergence"] for record in records} == {"post": expected, "pre": expected}
    assert records[0]["written_at"] == records[1]["written_at"]


def test_a_record_that_waits_for_its_sibling_is_not_durable_and_comes_out_at_the_deadline(open_shard, tmp_path):
    shard = open_shard(BOTH_SITES, deadline_seconds=4.0)
    push(shard, partial(0))
    wait_until(lambda: shard.snapshot([]).solve_seconds.counts[-1] == 1, "it to be solved")
    assert durable(shard) == [False]
    assert push(shard, partial(0)) == ["duplicate"]
    assert stored(tmp_path) == []
    (record,) = wait_for_rows(tmp_path, 1)
    assert (record["complete"], record["js_divergence"]) == (True, None)
    wait_until(lambda: durable(shard) == [True], "its durability")
    push(shard, at_pre())
    shard.flush(FLUSH_SECONDS)
    assert [row["js_divergence"] for row in stored(tmp_path)] == [None, None], "too late, and not lost"


def test_a_record_whose_other_site_has_a_cadence_of_its_own_waits_for_nothing(open_shard, tmp_path):
    shard = open_shard(run(layer(ranks=(0,)), layer(ranks=(0,), site="pre")))
    push(shard, partial(0))
    (record,) = wait_for_rows(tmp_path, 1)
    assert record["js_divergence"] is None


def test_the_sibling_of_a_record_that_waits_finds_room_however_little_memory_there_is(open_shard, tmp_path):
    shard = open_shard(BOTH_SITES, memory_bytes=4 * WIDTH)
    push(shard, partial(0))
    wait_until(lambda: push(shard, at_pre()) == ["merged"], "room")
    assert all(record["js_divergence"] for record in wait_for_rows(tmp_path, 2))


@pytest.mark.parametrize("end", [Shard.flush, Shard.close])
def test_flushing_does_not_wait_for_siblings(open_shard, tmp_path, end):
    shard = open_shard(BOTH_SITES)
    push(shard, partial(0), partial(0, step=200), at_pre(200))
    wait_until(lambda: shard.snapshot([]).solve_seconds.counts[-1] == 3, "all to be solved")
    assert end(shard, FLUSH_SECONDS) == 0
    assert {(row["step"], row["site"]): row["js_divergence"] is None for row in stored(tmp_path)} == {
        (100, "post"): True,
        (200, "post"): False,
        (200, "pre"): False,
    }


def test_a_sibling_that_has_no_spectrum_or_is_given_up_leaves_the_record_alone(open_shard, tmp_path):
    pre = dataclasses.replace(SHARED, site="pre", paired=True)
    shard = open_shard(run(layer(ranks=(0,), paired=True), pre), deadline_seconds=SOON)
    bad = rows(0)
    bad[0, 0] = math.nan
    push(shard, partial(0), *blocks_of(partial_of(bad, key=PRE), (0, 1)), partial(2, site="pre"))
    push(shard, partial(0, step=200), blocks_of(partial_of(rows(0), key=PRE._replace(step=200)), (0, 1))[0])
    records = wait_for_rows(tmp_path, 3)
    found = {(row["step"], row["site"]): row["js_divergence"] for row in records}
    assert found == {(100, "post"): None, (100, "pre"): None, (200, "post"): None}
    assert shard.snapshot([]).counters["run"].dropped == (("incomplete_share", 1),)


def test_a_record_whose_sibling_is_durable_already_does_not_wait_for_it(open_shard, tmp_path):
    shard = open_shard(run(layer(paired=True), layer(ranks=(0,), site="pre", paired=True)))
    push(shard, at_pre())
    shard.flush(FLUSH_SECONDS)
    push(shard, partial(0), partial(1))
    assert len(wait_for_rows(tmp_path, 2)) == 2, "long before the deadline"


def test_a_collapse_is_told_before_the_sibling_has_come(open_shard):
    shard = open_shard(run(layer(ranks=(0,), width=64), layer(ranks=(0,), width=64, site="pre")))
    flat = torch.randn(300, 1) * torch.ones(64) + 1e-3 * torch.randn(300, 64)
    for step in range(3):
        push(shard, partial_of(flat, key=KEY._replace(step=step)))
    wait_until(lambda: [one.firing for one in shard.snapshot([]).alerts] == [True], "the alert")


def test_records_that_are_solved_together_share_a_file(open_shard, tmp_path):
    shard = open_shard(run(*(layer(index, ranks=(0,)) for index in range(8))))
    push(shard, *(partial(0, layer=index) for index in range(8)))
    shard.flush(FLUSH_SECONDS)
    assert len(list(tmp_path.glob("run_id=run/records/part-*.parquet"))) <= 2
    assert len(stored(tmp_path)) == 8


def test_a_partial_may_lie_in_memory_that_is_read_only(open_shard, tmp_path):
    shard = open_shard()
    for rank in range(2):
        header, mean, scatter = partial(rank).to_wire()
        mean, scatter = mean.copy(), scatter.copy()
        for array in (mean, scatter):
            array.flags.writeable = False
        assert shard.push(header, mean, scatter).status == "merged"
        assert np.array_equal(scatter, partial(rank).scatter)
    shard.flush(FLUSH_SECONDS)
    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize("name", ["deadline_seconds", "memory_bytes"])
def test_limits_that_leave_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        ShardLimits(**{name: 0})
