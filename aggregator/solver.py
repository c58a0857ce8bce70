"""The solver: from the merged partials of a record to its eigenvalues and metrics, by the first rung of a ladder that
succeeds.

A job is values alone and `solve_at` a function of it, so that it runs alike in the shard's own process (`LocalSolver`:
notebooks and tests) and in a child that may be killed (`solver_process`). The shard's worker thread calls `solve`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schemas import METRIC_NAMES, PartialSamples, RecordKey
from ..spectrum import (
    Gram,
    Group,
    covariance_of,
    eigenvalues_of_lower,
    estimate,
    measure_estimate,
    measure_together,
    rows_of,
)
from .config import SolverConfig

log = logging.getLogger("eigenwatch.aggregator")


class Job(NamedTuple):
    """What is solved: a finite group, and the partials that are still rows."""

    key: RecordKey
    group: Group
    rows: tuple[PartialSamples, ...] = ()

    @property
    def tokens(self) -> int:
        return self.group.tokens + sum(one.tokens for one in self.rows)

    @property
    def by_products(self) -> bool:
        """Whether the N×N products of the rows are solved: every token came as a row, and they are fewer than D."""
        return bool(self.rows) and not self.group.tokens and self.tokens < self.group.width

    @property
    def order(self) -> int:
        """Of the matrix that is solved: N or D."""
        return self.tokens if self.by_products else self.group.width


class Rung(NamedTuple):
    """One way to solve."""

    device: str
    precision: str

    def __str__(self) -> str:
        return f"{self.device}-{self.precision}"


class Solved(NamedTuple):
    """What became of a job."""

    metrics: dict[str, Any]
    """By column; all None where `eigenvalues` is."""
    eigenvalues: NDArray[np.float32] | None
    """(D,) descending; None where rows were not finite, or every rung failed."""
    path: str | None
    """The rung that succeeded and what it did, such as "cpu-float64", "cuda-float64-gram" or "cpu-float64-slq"."""
    finite: bool = True
    """False where rows held NaN or Inf."""
    error: float | None = None
    """Relative standard error of `soft_rank`, where the spectrum is an estimate."""
    failure: str | None = None
    """Why every rung failed."""


class RungFailed(RuntimeError):
    """A rung did not solve these jobs."""

    def __init__(self, why: str, tries: int = 1) -> None:
        super().__init__(why)
        self.tries = tries
        """How often the last rung may be tried where it fails in this way: more than once where the solver went with
        it, which need not have been the job's fault."""


class Solver(Protocol):
    """What the shard's worker thread asks of a solver; all calls come from that thread."""

    def start(self) -> None:
        """Makes ready, and does not wait for it."""
        ...

    def solve(self, jobs: Sequence[Job]) -> list[Solved]:
        """Solves jobs of one width together; one answer each, in their order. Fails for none."""
        ...

    def close(self) -> None: ...


class LocalSolver:
    """Solves in this process."""

    def __init__(self, config: SolverConfig) -> None:
        self._config = config
        self._ladder = ladder(config, torch.cuda.is_available())

    def start(self) -> None:
        pass

    def solve(self, jobs: Sequence[Job]) -> list[Solved]:
        return climb(jobs, self._ladder, self._attempt)

    def close(self) -> None:
        pass

    def _attempt(self, jobs: Sequence[Job], rung: Rung) -> list[Solved]:
        try:
            return solve_at(jobs, rung, self._config)
        except (RuntimeError, ValueError, AssertionError, MemoryError) as error:  # assertion: a torch without CUDA
            raise RungFailed(str(error) or type(error).__name__) from error


def ladder(config: SolverConfig, gpu: bool) -> tuple[Rung, ...]:
    """The rungs, first to last: on a GPU both precisions, the wanted one first, then the CPU."""
    other = "float32" if config.precision == "float64" else "float64"
    on_gpu = (Rung("cuda", config.precision), Rung("cuda", other))
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpu)
    return (*(on_gpu if use_gpu else ()), Rung("cpu", "float64"))


def climb(
    jobs: Sequence[Job], rungs: Sequence[Rung], attempt: Callable[[Sequence[Job], Rung], list[Solved]]
) -> list[Solved]:
    """The answers of the first rung on which `attempt` does not raise `RungFailed`.

    Jobs that fail together are tried again one by one, so that one of them spoils no other. Of the last rung more than
    one try may be allowed: below there is nothing.
    """
    failures: list[str] = []
    tries = 1
    while len(failures) < len(rungs) - 1 + tries:
        rung = rungs[min(len(failures), len(rungs) - 1)]
        try:
            return attempt(jobs, rung)
        except RungFailed as failed:
            if len(jobs) > 1:
                log.warning("%d records failed together on %s (%s): one by one", len(jobs), rung, failed)
                return [solved for job in jobs for solved in climb([job], rungs, attempt)]
            failures.append(f"{rung}: {failed}")
            tries = failed.tries
    return [unsolved(failure="; ".join(failures))]


def unsolved(finite: bool = True, failure: str | None = None) -> Solved:
    """Of a job without eigenvalues."""
    return Solved(dict.fromkeys((*METRIC_NAMES, "hard_rank_correction")), None, None, finite, failure=failure)


def solve_at(jobs: Sequence[Job], rung: Rung, config: SolverConfig) -> list[Solved]:
    """Solves and measures jobs of one width on one rung.

    Raises:
        RuntimeError, ValueError: one of them could not be solved.
    """
    solved = [unsolved(finite=False)] * len(jobs)
    exactly: list[tuple[int, Group | Gram]] = []
    for index, job in enumerate(jobs):
        merged = _merged(job, rung.device)
        if not merged.finite:
            continue
        if config.method == "slq" and job.order >= config.slq_width:
            solved[index] = _estimated(job, merged, rung)
        else:
            exactly.append((index, merged))
    if exactly:
        groups = [merged for _, merged in exactly]
        spectra_KD = _spectra(groups, rung)
        metrics = measure_together(groups, spectra_KD)
        for (index, merged), values, spectrum in zip(exactly, metrics, spectra_KD.float().numpy(), strict=True):
            solved[index] = Solved(values, spectrum, f"{rung}{_way(merged)}")
    return solved


def _estimated(job: Job, merged: Group | Gram, rung: Rung) -> Solved:
    """By quadrature, in float64 on whatever rung; the probes are those of the record's key."""
    matrix = merged.products if isinstance(merged, Gram) else merged.scatter(rung.device)
    seed = int.from_bytes(blake2b(repr(tuple(job.key)).encode(), digest_size=7).digest(), "big")
    found = estimate(matrix.div_(max(merged.tokens - 1, 1)), seed)
    padding = torch.zeros(merged.width - len(found.eigenvalues), dtype=torch.float64)
    found = found._replace(eigenvalues=torch.cat((found.eigenvalues, padding)))
    path = f"{rung.device}-float64{_way(merged)}-slq"
    spectrum = found.eigenvalues.float().numpy()
    return Solved(measure_estimate(merged, found), spectrum, path, error=found.soft_rank_error)


def _way(merged: Group | Gram) -> str:
    return "-gram" if isinstance(merged, Gram) else ""


def _merged(job: Job, device: str) -> Group | Gram:
    if job.by_products:
        return Gram.of([rows_of(one).to(device) for one in job.rows if one.tokens])
    if not job.rows:
        return job.group
    group = Group(width=job.group.width).add_(job.group)  # a copy: what failed is tried again
    for one in job.rows:
        group.add_(covariance_of(one))
    return group


def _spectra(merged: Sequence[Group | Gram], rung: Rung) -> Tensor:
    """(K, D) float64 on the CPU: the covariances' eigenvalues, those of one order in one call."""
    spectra_KD = torch.zeros(len(merged), merged[0].width, dtype=torch.float64)
    by_order: dict[int, list[int]] = {}
    for index, one in enumerate(merged):
        by_order.setdefault(one.tokens if isinstance(one, Gram) else one.width, []).append(index)
    for order, members in by_order.items():
        lowers = [_lower(merged[index], rung.device) for index in members]
        # Side by side as they lie in memory, by columns: a stack of transposed matrices would be copied across.
        lower = lowers[0][None] if len(lowers) == 1 else torch.stack([one.mT for one in lowers]).mT
        found = eigenvalues_of_lower(lower, dtype=getattr(torch, rung.precision))
        degrees_K = torch.tensor([max(merged[index].tokens - 1, 1) for index in members])
        spectra_KD[members, :order] = found / degrees_K[:, None]
    return spectra_KD


def _lower(merged: Group | Gram, device: str) -> Tensor:
    return merged.products if isinstance(merged, Gram) else merged.lower(device)
