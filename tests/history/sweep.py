"""A store with a sweep over widths, whose ranks follow known laws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.history.stored import record, run, write

WIDTHS = (256, 512, 1024, 2048, 4096)
HARD, SOFT = 0.5, 0.9
"""β of the two ranks."""
EMPTY, MIDDLE, FULL = 0.2, 1.0, 2.0
LAYERS = (MIDDLE, EMPTY, MIDDLE, FULL, MIDDLE)
"""Each layer's ranks over those of the median layer."""
STEPS = range(0, 300, 10)


def ranks(width: int, factor: float = 1.0, noise: float = 1.0) -> dict[str, float]:
    return {"hard_rank": 1.5 * width**HARD * factor * noise, "soft_rank": 0.6 * width**SOFT * factor * noise}


def write_run(
    store: Path,
    run_id: str,
    width: int,
    *,
    tags: dict[str, str] | None = None,
    factors: Sequence[float] = LAYERS,
    noise: float = 1.0,
    steps: Sequence[int] = STEPS,
    **columns: Any,
) -> None:
    """One run whose ranks double from the first step to the last tenth, and stay there."""
    settled = steps[-max(len(steps) // 5, 1)]
    rows = [
        record(step, layer, width=width)
        | {
            name: rank * (0.5 + 0.5 * min(step / max(settled, 1), 1))
            for name, rank in ranks(width, factor, noise).items()
        }
        | columns
        for step in steps
        for layer, factor in enumerate(factors)
    ]
    write(store, run_id, "records", *rows)
    write(store, run_id, "runs", run(written=0, tags=tags or {}))


def write_sweep(store: Path, prefix: str = "llama", widths: Sequence[int] = WIDTHS, **options: Any) -> Path:
    """A run for each width, named by it."""
    for width in widths:
        write_run(store, f"{prefix}-{width}", width, **options)
    return store
