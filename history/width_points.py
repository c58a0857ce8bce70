"""Rank against width: a point a run and width, and the line log rank = β·log D + c through them.

The points are medians over the layers of each layer's median over the last quarter of its samples; the bars reach from
the lower to the upper quartile of the layers (Jha & Reagen 2025, the asymmetric law).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .measured import Grid

RANKS = ("hard_rank", "soft_rank", "effective_dimension")


class WidthPoint(NamedTuple):
    """One rank of the layers of one width of one run."""

    run_id: str
    width: int
    layers: int
    rank: float
    lower: float
    """First quartile of the layers,"""
    upper: float
    """and third."""


class WidthLaw(NamedTuple):
    """rank ≈ exp(intercept) · width^beta."""

    beta: float
    beta_ci95: float | None
    """Half of the 95 % Student-t interval; None for fewer than three points."""
    r2: float
    intercept: float


def width_points(grids: Sequence[Grid], rank: str) -> list[WidthPoint]:
    """The points of one rank of these runs, by width."""
    points = []
    for grid in grids:
        lately_L = grid.lately(rank)
        for width in np.unique(grid.widths):
            ranks = lately_L[(grid.widths == width) & ~np.isnan(lately_L)]
            if len(ranks):
                lower, middle, upper = (float(one) for one in np.quantile(ranks, (0.25, 0.5, 0.75)))
                points.append(WidthPoint(grid.run_id, int(width), len(ranks), middle, lower, upper))
    return sorted(points, key=lambda point: (point.width, point.run_id))


def width_law(widths: Sequence[float], ranks: Sequence[float]) -> WidthLaw | None:
    """Least squares of ln rank on ln width; None for fewer than two widths."""
    from scipy.special import stdtrit

    if len(set(widths)) < 2:
        return None
    x, y = np.log(widths), np.log(ranks)
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, beta = float(dx @ dx), float(dy @ dy), float(dx @ dy / (dx @ dx))
    unexplained = max(0.0, yy - beta**2 * xx)
    freedom = len(x) - 2
    interval = float(stdtrit(freedom, 0.975)) * (unexplained / freedom / xx) ** 0.5 if freedom > 0 else None
    r2 = 1 - unexplained / yy if yy > 0 else 1.0
    return WidthLaw(beta, interval, r2, float(y.mean() - beta * x.mean()))
