"""What the aggregator costs, in one run: python benchmarks/aggregator.py [--quick] [SECTION …]

Every figure is a ratio of two things that were timed in turn, the median of alternating blocks with its quartiles, so
that a machine which is busy for a while shows in both. `--quick` takes small matrices and few rounds: it shows that the
benchmark runs, not how fast anything is.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.shard import Shard
from eigenwatch.aggregator.solver import Job
from eigenwatch.aggregator.solver_process import SolverProcess
from eigenwatch.schemas import LayerDescription, Origin, Partial, PartialCovariance, RecordKey, RunDescription
from eigenwatch.spectrum import Group, Moments, partial_of, samples_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

PATIENCE_SECONDS = 600.0
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


FULL = Size(rounds=9, widths=(2048, 3072), gram_width=2048, small_width=256, small_layers=96, slq_width=3072)
QUICK = Size(rounds=3, widths=(128,), gram_width=128, small_width=32, small_layers=8, slq_width=256)


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
        shares = tuple((rank,) for rank in range(ranks))
        layer = LayerDescription(layer=0, site="post", name="h.0", width=width, shares=shares)
        run = RunDescription(run_id=run_id, launch_id=run_id, world_size=ranks, layers=(layer,))
        self._run_id, self._step = run_id, 0
        self._shard = Shard(store, CPU, ShardLimits())
        self._shard.open_run(run.to_wire(), 0)

    def busy_seconds(self, partials: list[Partial]) -> float:
        """Pushes a record's partials; how long its worker was then busy with it, but for writing."""
        before = self._shard.snapshot([]).solve_seconds
        self._step += 1
        for one in partials:
            header, mean, payload = one.to_wire()
            reply = self._shard.push(header | {"run_id": self._run_id, "step": self._step}, mean, payload)
            assert reply.status == "merged", reply
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := self._shard.snapshot([]).solve_seconds).counts[-1] == before.counts[-1]:
            assert time.monotonic() < deadline, "the record was not solved"
            time.sleep(0.01)
        return now.total_seconds - before.total_seconds

    def flush(self) -> None:
        assert self._shard.flush(PATIENCE_SECONDS) == 0

    def __enter__(self) -> "OneLayer":
        return self

    def __exit__(self, *_: object) -> None:
        self._shard.close(PATIENCE_SECONDS)


# --- shared by the sections ---


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


SECTIONS: dict[str, Callable[[Size], list[Row]]] = {"solver": solver}


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
