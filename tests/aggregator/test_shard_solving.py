"""A shard between a closed record and its row: rows that stay rows, steps that are left out, solvers that die."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.open_records import OpenRecords
from eigenwatch.aggregator.shard import Shard
from eigenwatch.schemas import METRIC_NAMES, PartialCovariance, PartialSamples, RunDescription

from tests.processes import wait_until
from tests.spectrum.cases import partial_of

from .test_shard import FLUSH_SECONDS, KEY, NEVER, durable, fates, layer, push, rows, run, stored

WIDTH = 32
FEW, MANY = 9, 40
"""Tokens of one of two ranks: together fewer than the width, and more."""
OpenShard = Callable[..., Shard]


@pytest.fixture
def open_shard(tmp_path: Path) -> Iterator[OpenShard]:
    shards = []

    def open_one(described: RunDescription | None = None, **solver) -> Shard:
        limits = ShardLimits(deadline_seconds=NEVER)
        shards.append(Shard(str(tmp_path), SolverConfig(device="cpu", **solver), limits))
        shards[-1].open_run((described or run(layer(width=WIDTH))).to_wire(), 0)
        return shards[-1]

    yield open_one
    for one in shards:
        one.close(FLUSH_SECONDS)


def samples(rank: int, tokens: int, step: int = 100) -> PartialSamples:
    x_ND = rows(rank, step, tokens, WIDTH)
    return PartialSamples(key=KEY._replace(step=step), rank=rank, share=rank, captured_at=1.0, samples=x_ND.numpy())


def scatter(rank: int, tokens: int, step: int = 100) -> PartialCovariance:
    return partial_of(rows(rank, step, tokens, WIDTH), rank=rank, key=KEY._replace(step=step))


def record_of(shard: Shard, store: Path, *partials: PartialSamples | PartialCovariance) -> dict:
    assert push(shard, *partials) == ["merged"] * len(partials)
    assert shard.flush(FLUSH_SECONDS) == 0
    return stored(store)[-1]


@pytest.mark.parametrize(
    ("tokens", "path", "form"),
    [((FEW, FEW), "cpu-float64-gram", "samples"), ((FEW, MANY), "cpu-float64", "samples")],
)
def test_rows_make_the_record_of_their_scatters_by_the_shorter_way(open_shard, tmp_path, tokens, path, form):
    shard = open_shard()
    by_scatter = record_of(shard, tmp_path, *(scatter(rank, n) for rank, n in enumerate(tokens)))
    shard.open_run(run(layer(width=WIDTH)).to_wire(), 1)
    for rank, n in enumerate(tokens):
        header, mean, payload = samples(rank, n).to_wire()
        assert shard.push(header | {"attempt": 1}, mean, payload).status == "merged"
    shard.flush(FLUSH_SECONDS)
    by_rows = stored(tmp_path)[-1]
    assert (by_rows["solver"], by_rows["form"]) == (path, form)
    for name in (*METRIC_NAMES, "tokens", "ranks_seen", "complete", "hard_rank_correction"):
        expected = by_scatter[name]
        near = pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected
        assert name.startswith("power_law") or by_rows[name] == near, name
    first, second = (np.array(row["eigenvalues"]) for row in stored(tmp_path, "eigenvalues"))
    np.testing.assert_allclose(second, first, atol=1e-5 * first[0])


@pytest.mark.parametrize("first", [samples(0, FEW), scatter(0, FEW)])
@pytest.mark.parametrize("second", [samples(1, FEW), scatter(1, FEW), scatter(1, MANY)])
def test_a_record_may_come_in_both_forms(open_shard, tmp_path, first, second):
    record = record_of(open_shard(), tmp_path, first, second)
    x_ND = torch.cat([rows(0, 100, FEW, WIDTH), rows(1, 100, second.tokens, WIDTH)]).double()
    assert record["total_variance"] == pytest.approx(float(torch.cov(x_ND.T).trace()), rel=1e-6)
    assert record["tokens"] == len(x_ND)
    forms = {first.form, second.form}
    assert record["form"] == ("mixed" if len(forms) > 1 else forms.pop())
    assert record["solver"] == ("cpu-float64-gram" if record["form"] == "samples" else "cpu-float64")


def test_a_rank_whose_rows_come_late_is_added_to_the_rows_that_were_kept(open_shard, tmp_path):
    shard = open_shard()
    early = record_of(shard, tmp_path, samples(0, FEW))
    assert (early["ranks_seen"], early["tokens"], early["solver"]) == (1, FEW, "cpu-float64-gram")
    both = record_of(shard, tmp_path, samples(1, FEW))
    assert (both["ranks_seen"], both["tokens"], both["complete"]) == (2, 2 * FEW, True)
    assert push(shard, samples(0, FEW)) == ["durable"]


def test_rows_are_kept_in_memory_of_the_shard_and_counted(open_shard):
    limit = 8 * (WIDTH * WIDTH + WIDTH) + 1
    records = OpenRecords(NEVER, limit)
    for rank in range(2):
        records.merge(samples(rank, FEW), range(2), 0.0, "samples")
    assert records.held_bytes == 2 * 4 * FEW * WIDTH
    assert records.turned_away(samples(0, FEW, 200), 0.0) == "busy"
    (closed,) = records.close_due(0.0)
    assert {one.rank for one in closed.rows} == closed.ranks == {0, 1}
    records.solved(KEY)
    assert records.held_bytes == 4 * WIDTH, "of the spectrum, which is to be written"
    assert records.turned_away(samples(0, FEW), 0.0) == "duplicate"
    records.merge(samples(0, FEW, 200), range(2), 0.0, "samples")
    records.close_due(NEVER)
    records.settled(KEY._replace(step=200))
    assert records.held_bytes == 4 * WIDTH + 4 * FEW * WIDTH, "they wait for the late rank"
    records.forget({("run", 0)})
    assert records.held_bytes == 4 * WIDTH

    shard = open_shard()
    sent = samples(0, FEW)
    header, mean, payload = sent.to_wire()
    shard.push(header, mean, payload)
    payload[:] = np.nan  # the sender's memory is its own again
    push(shard, samples(1, FEW))
    shard.flush(FLUSH_SECONDS)
    assert shard.snapshot([]).latest[0].values["finite"] == 1.0


def test_rows_that_are_not_finite_are_a_record_without_metrics(open_shard, tmp_path):
    bad = samples(1, FEW)
    bad.samples[2, 3] = np.inf
    record = record_of(open_shard(), tmp_path, samples(0, FEW), bad)
    assert (record["finite"], record["complete"], record["tokens"], record["solver"]) == (False, True, 2 * FEW, None)
    assert [name for name in METRIC_NAMES if record[name] is not None] == []


LATEST_ONLY = dataclasses.replace(run(layer(width=WIDTH)), latest_only=True)


def test_a_run_that_wants_the_latest_only_has_older_steps_stored_and_not_solved(open_shard, tmp_path):
    shard = open_shard(LATEST_ONLY)
    push(shard, *(scatter(0, MANY, step) for step in (100, 200, 300)))  # all wait for rank 1, and are closed together
    assert shard.flush(FLUSH_SECONDS) == 0
    records = stored(tmp_path)
    assert [(row["step"], row["solver"]) for row in records] == [
        (100, "skipped"), (200, "skipped"), (300, "cpu-float64"),
    ]  # fmt: skip
    for row in records[:2]:
        assert [name for name in METRIC_NAMES if row[name] is not None] == []
        assert (row["finite"], row["tokens"], row["ranks_seen"], row["solve_seconds"]) == (True, MANY, 1, 0.0)
    assert [row["step"] for row in stored(tmp_path, "eigenvalues")] == [300]
    assert durable(shard, KEY, KEY._replace(step=200)) == [True, True]
    (latest,) = shard.snapshot([]).latest
    assert latest.step == 300
    assert latest.values["hard_rank"] > 1


def test_a_skipped_step_is_solved_if_its_late_rank_comes_when_nothing_newer_waits(open_shard, tmp_path):
    shard = open_shard(LATEST_ONLY)
    push(shard, *(scatter(0, MANY, step) for step in (100, 200)))
    shard.flush(FLUSH_SECONDS)
    record = record_of(shard, tmp_path, scatter(1, MANY, 100))
    assert (record["step"], record["solver"], record["complete"]) == (100, "cpu-float64", True)


def test_skipped_steps_neither_fire_nor_reset_an_alert(open_shard, tmp_path):
    described = run(layer(ranks=(0, 1), width=64))
    shard = open_shard(dataclasses.replace(described, latest_only=True))
    flat = torch.randn(300, 1) * torch.ones(64) + 1e-3 * torch.randn(300, 64)

    def sent(step: int, collapsed: bool) -> PartialCovariance:
        return partial_of(flat if collapsed else torch.randn(300, 64), key=KEY._replace(step=step))

    for step in range(0, 40, 10):
        push(shard, sent(step, collapsed=True), *([sent(step - 5, collapsed=False)] if step else []))
        shard.flush(FLUSH_SECONDS)
        firing = [one.firing for one in shard.snapshot([]).alerts]
        assert firing == ([] if step < 20 else [True])
    by_step = {row["step"]: row["solver"] for row in stored(tmp_path)}
    assert [by_step[step] for step in (5, 15, 25)] == ["skipped"] * 3


def test_a_run_that_did_not_ask_for_it_has_every_step_solved(open_shard, tmp_path):
    shard = open_shard()
    push(shard, *(scatter(0, MANY, step) for step in (100, 200, 300)))
    shard.flush(FLUSH_SECONDS)
    assert {row["solver"] for row in stored(tmp_path)} == {"cpu-float64"}


def test_a_record_that_no_rung_solves_is_stored_without_metrics_and_counted(open_shard, tmp_path):
    lies = scatter(0, MANY)
    lies.scatter[1] = np.nan
    shard = open_shard(run(layer(ranks=(0,), width=WIDTH)))
    record = record_of(shard, tmp_path, lies)
    assert (record["solver"], record["finite"], record["hard_rank"]) == (None, True, None)
    assert shard.snapshot([]).counters["run"].dropped == (("unsolved", 1),)
    assert fates(shard) == ["durable"]
    assert record_of(shard, tmp_path, scatter(0, MANY, 200))["solver"] == "cpu-float64"


def test_layers_that_are_solved_together_have_the_records_that_each_would_have(open_shard, tmp_path):
    layers = [layer(index, ranks=(0,), width=WIDTH) for index in range(6)]
    shard = open_shard(run(*layers))
    sent = [partial_of(rows(index, 100, MANY, WIDTH), key=KEY._replace(layer=index)) for index in range(6)]
    push(shard, *sent)
    shard.flush(FLUSH_SECONDS)
    for index, record in enumerate(sorted(stored(tmp_path), key=lambda row: row["layer"])):
        x_ND = rows(index, 100, MANY, WIDTH).double()
        assert record["total_variance"] == pytest.approx(float(torch.cov(x_ND.T).trace()), rel=1e-6)
        spectrum_D = torch.linalg.eigvalsh(torch.cov(x_ND.T))
        assert record["hard_rank"] == pytest.approx(float(spectrum_D.sum() ** 2 / spectrum_D.square().sum()), rel=1e-5)


def test_a_shard_whose_solver_is_killed_again_and_again_stores_every_record(open_shard, tmp_path):
    shard = open_shard(own_process=True)
    for step in range(4):
        pid = wait_until(lambda: shard._solver.pid, "a solver")
        os.kill(pid, signal.SIGKILL)
        record = record_of(shard, tmp_path, scatter(0, MANY, step), scatter(1, MANY, step))
        assert (record["step"], record["solver"], record["complete"]) == (step, "cpu-float64", True)
        assert record["hard_rank"] > 1
    assert shard.snapshot([]).counters["run"].dropped == ()
    pid = shard._solver.pid
    assert shard.close(FLUSH_SECONDS) == 0
    assert not Path(f"/proc/{pid}").exists()
