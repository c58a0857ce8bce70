"""What the aggregator costs, in one run: python benchmarks/aggregator.py [--quick] [SECTION …]

Every figure is a ratio of two things that were timed in turn, the median of alternating blocks with its quartiles, so
that a machine which is busy for a while shows in both. `--quick` takes small matrices and few rounds: it shows that the
benchmark runs, not how fast anything is.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from eigenwatch.agent.combine import combine
from eigenwatch.aggregator.actors import THREADS, ShardActor, remote
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.shard import Shard
from eigenwatch.aggregator.snapshot import Histogram
from eigenwatch.aggregator.solver import Job
from eigenwatch.aggregator.solver_process import SolverProcess
from eigenwatch.schemas import (
    LayerDescription,
    Origin,
    Partial,
    PartialCovariance,
    RecordKey,
    RunDescription,
    WirePartial,
)
from eigenwatch.spectrum import Group, Moments, partial_of, samples_of
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

PATIENCE_SECONDS = 600.0
PUSHES = 8
"""In one block, and in flight."""
CPU = SolverConfig(device="cpu", own_process=True)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    ratios: list[float]
    target: str = ""


class Size(NamedTuple):
    """How much is measured."""

    rounds: int
    widths: tuple[int, ...]
    """Of one record's matrix."""
    gram_width: int
    small_width: int
    small_layers: int
    slq_width: int
    push_widths: tuple[int, ...]
    combined_width: int
    combined_ranks: int


FULL = Size(rounds=9, widths=(2048, 3072), gram_width=2048, small_width=256, small_layers=96, slq_width=3072,
            push_widths=(3072,), combined_width=1024, combined_ranks=64)  # fmt: skip
QUICK = Size(rounds=3, widths=(128,), gram_width=128, small_width=32, small_layers=8, slq_width=256,
             push_widths=(256,), combined_width=64, combined_ranks=8)  # fmt: skip


# --- solver: from a closed record to its row ---


def solver(size: Size) -> list[Row]:
    with tempfile.TemporaryDirectory() as store:
        rows = [one for width in size.widths for one in over_bare(store, width, size.rounds)]
        rows.append(gram_over_full(store, size.gram_width, size.rounds))
        rows.append(estimate_over_full(size))
    return [*rows, *together_over_one_by_one(size)]


def over_bare(store: str, width: int, rounds: int) -> list[Row]:
    """The shard's worker from a closed record to its row, by a child process, over LAPACK alone; and the file apart."""
    x_ND = activations(3 * width, width)
    partials = [scatter_of(half, rank) for rank, half in enumerate(x_ND.chunk(2))]
    matrix_DD = torch.cov(x_ND.double().T)
    with OneLayer(store, f"bare-{width}", width, ranks=2) as shard:
        shard.busy_seconds(partials)  # the child has imported torch now
        busy, written = [], []
        for _ in range(rounds):
            bare = timed(lambda: torch.linalg.eigvalsh(matrix_DD))
            seconds = shard.busy_seconds(partials)
            busy.append(seconds / bare)
            written.append(timed(shard.flush) / bare)
    target = "≤ 1.1" if width >= 2048 else ""
    return [
        Row(f"shard busy per record / torch.linalg.eigvalsh, D={width}", busy, target),
        Row(f"… and its files, fsynced / torch.linalg.eigvalsh, D={width}", written),
    ]


def gram_over_full(store: str, width: int, rounds: int) -> Row:
    """A record of N = D/4 rows by their products, over the same rows as a scatter."""
    x_ND = activations(width // 4, width)
    as_rows, as_scatter = [samples_of(x_ND, origin(0))], [scatter_of(x_ND, 0)]
    with OneLayer(store, f"gram-{width}", width, ranks=1) as shard:
        shard.busy_seconds(as_rows)
        ratios = []
        for _ in range(rounds):
            full = shard.busy_seconds(as_scatter)
            ratios.append(shard.busy_seconds(as_rows) / full)
    return Row(f"Gram route / full solve, N=D/4, D={width}", ratios, "≤ 0.125")


def estimate_over_full(size: Size) -> Row:
    """The preview by stochastic Lanczos quadrature over the exact solve."""
    width = size.slq_width
    job = Job(key(0), Group.of(scatter_of(activations(2 * width, width), 0)))
    exact, preview = SolverProcess(CPU), SolverProcess(dataclasses.replace(CPU, method="slq", slq_width=width))
    ratios = []
    for round_ in range(size.rounds + 1):
        full = timed(lambda: exact.solve([job]))
        estimated = timed(lambda: preview.solve([job]))
        if round_ > 0:  # the first starts the children
            ratios.append(estimated / full)
    for one in (exact, preview):
        one.close()
    return Row(f"SLQ preview / full solve, D={width}", ratios)


def together_over_one_by_one(size: Size) -> list[Row]:
    """Records per second of small layers: solved in one call, over a call each."""
    width, layers = size.small_width, size.small_layers
    jobs = [Job(key(0), Group.of(scatter_of(activations(4 * width, width, seed), 0))) for seed in range(layers)]
    solver = SolverProcess(CPU)
    solver.solve(jobs)
    rates = []
    for _ in range(size.rounds):
        alone = timed(lambda: [solver.solve([job]) for job in jobs])
        together = timed(lambda: solver.solve(jobs))
        rates.append((layers / together, layers / alone))
    solver.close()
    what = f"D={width}, {layers} layers"
    return [
        Row(f"records per second, together / one by one, {what}", [together / alone for together, alone in rates]),
        Row(f"… together, per second, {what}", [together for together, _ in rates]),
        Row(f"… one by one, per second, {what}", [alone for _, alone in rates]),
    ]


class OneLayer:
    """A shard that serves one layer, and a stopwatch for what its worker does."""

    def __init__(self, store: str, run_id: str, width: int, ranks: int) -> None:
        run = one_layer_run(run_id, width, ranks)
        self._run_id, self._step = run_id, 0
        self._shard = Shard(store, CPU, ShardLimits())
        self._shard.open_run(run.to_wire(), 0)

    def busy_seconds(self, partials: list[Partial]) -> float:
        """Pushes a record's partials; how long its worker was then busy with it, but for writing."""
        before = self._shard.snapshot([]).solve_seconds
        self._push([one.to_wire() for one in partials])
        return self._solved_since(before)

    def _solved_since(self, before: Histogram) -> float:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := self._shard.snapshot([]).solve_seconds).counts[-1] == before.counts[-1]:
            assert time.monotonic() < deadline, "the record was not solved"
            time.sleep(0.01)
        return now.total_seconds - before.total_seconds

    def record_seconds(self, wires: list[WirePartial]) -> float:
        """All that a record costs the shard but its file: merging what comes, and the worker."""
        before = self._shard.snapshot([]).solve_seconds
        started = time.perf_counter()
        self._push(wires)
        merged = time.perf_counter() - started
        return merged + self._solved_since(before)

    def _push(self, wires: list[WirePartial]) -> None:
        self._step += 1
        for header, mean, payload in wires:
            reply = self._shard.push(header | {"run_id": self._run_id, "step": self._step}, mean, payload)
            assert reply.status == "merged", reply

    def flush(self) -> None:
        assert self._shard.flush(PATIENCE_SECONDS) == 0

    def __enter__(self) -> "OneLayer":
        return self

    def __exit__(self, *_: object) -> None:
        self._shard.close(PATIENCE_SECONDS)


# --- push: from a partial in a courier to its place in the sum ---


def push(size: Size) -> list[Row]:
    """Pushes to a real actor until they are merged, as many in flight as a courier has, over `ray.put` of the same
    bytes by the same process; both for one partial."""
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=2 << 30, log_to_driver=False, logging_level="ERROR"
    )
    try:
        with tempfile.TemporaryDirectory() as store:
            return [one for width in size.push_widths for one in push_over_put(store, width, size.rounds)]
    finally:
        ray.shutdown()


class Reader:
    """An actor that reads every number of what it is sent: no shard can do less."""

    def push(self, header: dict[str, Any], mean: NDArray[np.float64], payload: NDArray[np.float32]) -> float:
        return float(payload.max())


def push_over_put(store: str, width: int, rounds: int) -> list[Row]:
    run = one_layer_run(f"push-{width}", width, ranks=PUSHES * (rounds + 2))  # no record is ever complete
    limits = ShardLimits(deadline_seconds=PATIENCE_SECONDS, memory_bytes=8 << 30)
    shard = remote(ShardActor, num_cpus=1).remote(store, CPU, limits)
    ray.get(shard.open_run.remote(run.to_wire(), 0, [0], 0))
    reader = ray.remote(Reader).options(num_cpus=1, max_concurrency=THREADS).remote()
    header, mean, payload = scatter_of(activations(2 * width, width), 0).to_wire()
    next_rank = iter(range(PUSHES * (rounds + 2)))

    def pushed() -> None:
        ranks = [next(next_rank) for _ in range(PUSHES)]
        sent = [header | {"run_id": run.run_id, "rank": rank, "share": rank} for rank in ranks]
        replies = ray.get([shard.push.remote(one, mean, payload) for one in sent])
        assert {reply.status for reply in replies} == {"merged"}

    def read() -> None:
        ray.get([reader.push.remote(header, mean, payload) for _ in range(PUSHES)])

    pushed()
    read()
    ratios, bounds, rates = [], [], []
    for _ in range(rounds):
        put = timed(lambda: [ray.put(payload) for _ in range(PUSHES)]) / PUSHES
        bounds.append(timed(read) / PUSHES / put)
        taken = timed(pushed) / PUSHES
        ratios.append(taken / put)
        rates.append(payload.nbytes / taken / 1e9)
    ray.kill(shard)
    ray.kill(reader)
    target = "≤ 1.6" if width >= 3072 else ""
    return [
        Row(f"push until merged, {PUSHES} in flight / ray.put of the same bytes, D={width}", ratios, target),
        Row(f"… the same to an actor that only reads every number, D={width}", bounds),
        Row(f"… pushed and merged, GB/s, D={width}", rates),
    ]


# --- ranks: what more ranks on a node cost the shard ---


def ranks(size: Size) -> list[Row]:
    """What a record costs its shard, by the ranks whose partials the node combiner has summed; and the node."""
    width, most = size.combined_width, size.combined_ranks
    wires = [scatter_of(activations(2 * width, width, rank), rank).to_wire() for rank in range(most)]
    counts = [2**power for power in range(most.bit_length())]
    cost: dict[int, list[float]] = {count: [] for count in counts}
    node: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as store, contextlib.ExitStack() as shards:
        shard = {count: shards.enter_context(OneLayer(store, f"ranks-{count}", width, ranks=count)) for count in counts}
        for round_ in range(size.rounds + 1):
            for count in counts:
                started = time.perf_counter()
                (packet,) = combine(wires[:count])
                combined = time.perf_counter() - started
                seconds = shard[count].record_seconds([packet.wire])
                if round_ > 0:  # the first starts the children
                    cost[count].append(seconds)
                    node[count].append(combined)
    alone = cost[1]
    rows = []
    for count in counts:
        share = [seconds / one for seconds, one in zip(cost[count], alone, strict=True)]
        rows.append(Row(f"cost of a record at the shard, {count} ranks of a node / 1, D={width}", share, "≤ 1.15"))
    rate = [1 / seconds for seconds in cost[most]]
    summed = [most * wires[0].payload.nbytes / seconds / 1e9 for seconds in node[most]]
    return [
        *rows,
        Row(f"… records per second, {most} ranks", rate),
        Row(f"… the node's combiner, GB/s of partials summed, {most} ranks", summed),
    ]


# --- shared by the sections ---


def one_layer_run(run_id: str, width: int, ranks: int) -> RunDescription:
    shares = tuple((rank,) for rank in range(ranks))
    layer = LayerDescription(layer=0, site="post", name="h.0", width=width, shares=shares)
    return RunDescription(run_id=run_id, launch_id=run_id, world_size=ranks, layers=(layer,))


def key(step: int) -> RecordKey:
    return RecordKey("bench", 0, step, 0, "post", None)


def origin(rank: int) -> Origin:
    return Origin(key=key(0), rank=rank, share=rank, captured_at=1.0)


def activations(tokens: int, width: int, seed: int = 0) -> Tensor:
    """(N, D) with the spectrum of a healthy layer, λ_k ∝ 1/k."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) * torch.arange(1, width + 1) ** -0.5


def scatter_of(x_ND: Tensor, rank: int) -> PartialCovariance:
    moments = Moments(x_ND.shape[1])
    moments.add(x_ND)
    return partial_of(moments, origin(rank))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


SECTIONS: dict[str, Callable[[Size], list[Row]]] = {"push": push, "solver": solver, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small matrices, few rounds")
    asked = parser.parse_args()
    unknown = set(asked.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: choose of {', '.join(SECTIONS)}")
    size = QUICK if asked.quick else FULL
    threads = torch.get_num_threads()
    table = Table(
        title=f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, medians of "
        f"{size.rounds} alternating blocks"
    )
    for heading in ("", "median", "quartiles", "target"):
        table.add_column(heading)
    for name in asked.sections or SECTIONS:
        for row in SECTIONS[name](size):
            low, median, high = statistics.quantiles(row.ratios, n=4)
            table.add_row(row.name, f"{median:.3g}", f"{low:.3g} – {high:.3g}", row.target)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
