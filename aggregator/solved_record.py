"""From a closed group to rows: solve, measure, and lay out what the store keeps of it.

Called by the shard's worker thread; no state.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas import METRIC_NAMES, RecordKey
from ..spectrum import measure
from .open_records import ClosedRecord
from .solver import SolveFailed, Solver

log = logging.getLogger("eigenwatch.aggregator")

KEY_COLUMNS = ("step", "attempt", "layer", "site", "expert")


class SolvedRecord(NamedTuple):
    """A record that is not written yet."""

    key: RecordKey
    row: dict[str, Any]
    """Of `records`, but for `written_at`."""
    eigenvalues: NDArray[np.float32] | None
    """(D,) descending; None where the activations were not finite, there were none, or no solver succeeded."""
    alerts: tuple[dict[str, Any], ...] = ()
    """Rows of `alerts` that it causes, but for `written_at`."""


def solve_record(closed: ClosedRecord, solver: Solver) -> SolvedRecord:
    """Solves and measures one group; a group that cannot be solved gives a record with null metrics."""
    key, group = closed.key, closed.group
    started = time.perf_counter()
    eigenvalues, path = None, None
    metrics: dict[str, Any] = dict.fromkeys((*METRIC_NAMES, "hard_rank_correction"))
    if group.finite and group.tokens:
        try:
            spectrum, path = solver.solve(group.covariance())
            metrics = measure(group, spectrum)
            eigenvalues = spectrum.float().numpy()
        except SolveFailed as error:
            log.error("run %s layer %d step %d was not solved: %s", key.run_id, key.layer, key.step, error)
    row = {
        **{column: getattr(key, column) for column in KEY_COLUMNS},
        "width": group.width,
        "tokens": group.tokens,
        "tokens_per_width": group.tokens / group.width,
        **metrics,
        "finite": group.finite,
        "complete": closed.complete,
        "ranks_seen": len(group.ranks),
        "ranks_expected": len(closed.ranks_expected),
        "ranks_missing": sorted(closed.missing) or None,
        "form": closed.form,
        "sampling_steps": closed.sampling_steps,
        "overhead_ratio": closed.overhead_ratio,
        "solver": path,
        "solve_seconds": time.perf_counter() - started,
        "captured_at": datetime.fromtimestamp(closed.captured_at, UTC),
    }
    return SolvedRecord(key, row, eigenvalues)


def rows_by_table(solved: list[SolvedRecord], written_at: datetime) -> dict[str, list[dict[str, Any]]]:
    """What to append to each table, in this order: the records come last, since they make the rest count."""
    stamp = {"written_at": written_at}
    return {
        "eigenvalues": [
            {column: one.row[column] for column in KEY_COLUMNS} | {"eigenvalues": one.eigenvalues} | stamp
            for one in solved
            if one.eigenvalues is not None
        ],
        "alerts": [row | stamp for one in solved for row in one.alerts],
        "records": [one.row | stamp for one in solved],
    }
