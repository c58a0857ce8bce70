"""From a solved group to rows: what the store keeps of a record.

Called by the shard's worker thread; no state.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas import RecordKey
from .open_records import ClosedRecord
from .solver import Solved, unsolved

SKIPPED = "skipped"
"""In place of a solver's path: a newer record of the series waited, and the run wants only the latest."""
KEY_COLUMNS = ("step", "attempt", "layer", "site", "expert")


class SolvedRecord(NamedTuple):
    """A record that is not written yet."""

    key: RecordKey
    row: dict[str, Any]
    """Of `records`, but for `written_at`."""
    eigenvalues: NDArray[np.float32] | None
    """(D,) descending; None where there were no activations or not finite ones, and where it was not solved."""
    alerts: tuple[dict[str, Any], ...] = ()
    """Rows of `alerts` that it causes, but for `written_at`."""


def solvable(closed: ClosedRecord) -> bool:
    """Whether there is anything to solve: partials that are not finite, or of no tokens, have no spectrum."""
    return closed.group.finite and closed.job.tokens > 0


def record_of(closed: ClosedRecord, solved: Solved, solve_seconds: float) -> SolvedRecord:
    """The record that is stored; one that could not be solved has null metrics."""
    key = closed.key
    tokens, width = closed.job.tokens, closed.group.width
    row = {
        **{column: getattr(key, column) for column in KEY_COLUMNS},
        "width": width,
        "tokens": tokens,
        "tokens_per_width": tokens / width,
        **solved.metrics,
        "finite": closed.group.finite and solved.finite,
        "complete": closed.complete,
        "ranks_seen": len(closed.ranks_expected) - len(closed.missing),
        "ranks_expected": len(closed.ranks_expected),
        "ranks_missing": sorted(closed.missing) or None,
        "form": closed.form,
        "sampling_steps": closed.sampling_steps,
        "overhead_ratio": closed.overhead_ratio,
        "solver": solved.path,
        "solver_error": solved.error,
        "solve_seconds": solve_seconds,
        "captured_at": datetime.fromtimestamp(closed.captured_at, UTC),
    }
    return SolvedRecord(key, row, solved.eigenvalues)


def skipped_record(closed: ClosedRecord) -> SolvedRecord:
    """The record of a step that is not solved because a newer one waits: it says so, and has no metrics."""
    return record_of(closed, unsolved()._replace(path=SKIPPED), 0.0)


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
