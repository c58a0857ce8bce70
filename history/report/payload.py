"""What the charts of a report draw, as compact JSON: numbers of four digits, steps thinned to a bound.

A step that is shown is shown as it was recorded, and every verdict in words is made from all of them.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..laws import law_of
from ..measured import TEMPLATES, Grid, Spectrum, evenly, template_cumulative
from ..points import Point
from .reading import Reading

CELLS_MOST = 24_000
"""Layer × step cells in one report, shared evenly by its runs: 96 layers keep 250 of 1 000 steps."""
STEPS_LEAST = 20
_COLUMNS = (
    "hard_utilization",
    "soft_utilization",
    "spectral_concentration",
    "effective_dimension",
    "hard_rank",
    "soft_rank",
    "hard_rank_corrected",
    "soft_rank_corrected",
    "power_law_alpha",
    "tokens_per_width",
    "js_divergence",
)
_RANKS = ("hard_rank", "soft_rank", "effective_dimension")
_LAW = ("beta", "beta_ci95", "intercept", "r2")
MISSING, COMPLETE, INCOMPLETE, NOT_FINITE = range(4)


def payload(readings: Sequence[Reading]) -> dict[str, Any]:
    """The data of all charts, as values that JSON knows."""
    most = max(STEPS_LEAST, CELLS_MOST // sum(len(reading.grid.layers) for reading in readings))
    one_site = len({reading.grid.site for reading in readings}) == 1  # else there is no law that all follow
    points = [point for reading in readings for point in reading.points if one_site]
    return {
        "runs": [_run(reading, most) for reading in readings],
        "templates": _templates(readings),
        "widths": {rank: _widths(points, rank) for rank in _RANKS},
    }


def as_json(values: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: no character of it can end the element or begin a comment."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def shown_steps(grid: Grid, most: int) -> NDArray[np.int64]:
    """(S',) positions of the steps that the charts show."""
    return evenly(len(grid.steps), most)


def _run(reading: Reading, most: int) -> dict[str, Any]:
    grid = reading.grid
    kept = shown_steps(grid, most)
    cells = {name: _rows(grid.values[name][:, kept]) for name in _COLUMNS if not np.isnan(grid.values[name]).all()}
    quality = np.select(
        [grid.missing, grid.not_finite, grid.complete], [MISSING, NOT_FINITE, COMPLETE], default=INCOMPLETE
    )
    return {
        "id": grid.run_id,
        "site": grid.site,
        "layers": grid.layers.tolist(),
        "widths": grid.widths.tolist(),
        "steps": grid.steps[kept].tolist(),
        "sampled": len(grid.steps),
        "experts": grid.experts,
        "cells": cells,
        "quality": quality[:, kept].tolist(),
        "worst": _worst(reading),
        "spectra": _spectra(reading.spectra),
        "pre": _spectra(reading.pre_spectra),
    }


def _worst(reading: Reading) -> int:
    """The layer that the report opens with: the one that uses least of its width."""
    shares = [use.effective_dimension / use.width for use in reading.uses]
    known = [(share, use.layer) for share, use in zip(shares, reading.uses, strict=True) if not math.isnan(share)]
    return min(known)[1] if known else reading.uses[0].layer


def _spectra(found: dict[tuple[int, int], Spectrum]) -> dict[str, Any]:
    """By "layer/step"; the directions stand once for each width."""
    directions = {str(one.width): one.direction.tolist() for one in found.values()}
    items = {
        f"{layer}/{step}": [
            one.width,
            _numbers(one.share, 3),
            _numbers(one.cumulative, 4),
            _number(one.alpha, 4),
            _number(one.level, 4),
            one.expert,
        ]
        for (layer, step), one in sorted(found.items())
    }
    return {"directions": directions, "steps": sorted({step for _, step in found}), "items": items}


def _templates(readings: Sequence[Reading]) -> dict[str, Any]:
    widths = {int(width) for reading in readings for width in reading.grid.widths}
    found = {}
    for width in sorted(widths):
        curves = {alpha: template_cumulative(width, alpha) for alpha in TEMPLATES}
        found[str(width)] = {f"{alpha:g}": [_numbers(x, 4), _numbers(y, 4)] for alpha, (x, y) in curves.items()}
    return found


def _widths(points: Sequence[Point], rank: str) -> dict[str, Any]:
    law = law_of(points, rank)
    return {
        "points": [[one.run_id, one.width, *_numbers(one.values[rank], 4)] for one in points if rank in one.values],
        "law": None if law is None else {name: _number(getattr(law, name), 6) for name in _LAW},
    }


def _rows(values_LS: NDArray[np.float64]) -> list[list[float | None]]:
    return [_numbers(row, 4) for row in values_LS]


def _numbers(values: Iterable[float], digits: int) -> list[float | None]:
    return [_number(value, digits) for value in values]


def _number(value: float | None, digits: int) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded
