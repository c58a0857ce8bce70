"""Rank against width, over runs of several widths: how many of the new directions a wider layer uses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..measured import read_grid
from ..session import History
from ..width_points import WidthLaw, width_law, width_points
from .drawing import OKABE_ITO, dress, new_figure, plain_log, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SERIES = (("soft_rank", "soft rank", "s"), ("effective_dimension", "effective dimension", "D"),
           ("hard_rank", "hard rank", "o"))  # fmt: skip


def rank_against_width(history: History, run_ids: Sequence[str], *, site: str = "post") -> "Figure":
    """Hard rank, soft rank and effective dimension against width on log-log axes, with fits.

    A point is the median over a run's layers, its bar reaches from their lower to their upper quartile; β is the
    slope, with its 95 % Student-t interval from three points on.

    Raises:
        ValueError: a run has no records of that site.
        ImportError: matplotlib is not installed.

    Source: Jha & Reagen 2025, the asymmetric law.
    """
    grids = [read_grid(history, run_id, site) for run_id in run_ids]
    figure = new_figure(4.2)
    axis = figure.subplots()
    widths: list[float] = [point.width for point in width_points(grids, "hard_rank")] or [1.0]
    for (rank, name, marker), colour in zip(_SERIES, OKABE_ITO, strict=False):
        points = width_points(grids, rank)
        if not points:
            continue
        x, y = [point.width for point in points], [point.rank for point in points]
        bars = [[point.rank - point.lower for point in points], [point.upper - point.rank for point in points]]
        law = width_law(x, y)
        axis.errorbar(x, y, yerr=bars, fmt=marker, color=colour, capsize=3, ms=5, label=f"{name}{slope_text(law)}")
        if law is not None:
            ends = np.array([min(x), max(x)])
            axis.plot(ends, np.exp(law.intercept) * ends**law.beta, color=colour, lw=1.2, ls="--")
    plain_log(axis)
    plain_log_ticks(axis, widths)
    dress(axis, "", "width", "rank, median over layers")
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"rank against width, {len(grids)} run{'s' if len(grids) > 1 else ''}", fontsize=10)
    return figure


def slope_text(law: WidthLaw | None) -> str:
    """ ": β 0.61 ± 0.40, R² 0.70", or nothing where there is no line."""
    if law is None:
        return ""
    interval = "" if law.beta_ci95 is None else f" ± {law.beta_ci95:.2f}"
    return f": β {law.beta:.2f}{interval}, R² {law.r2:.2f}"
