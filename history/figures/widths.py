"""Rank against width, over runs of several widths: how many of the new directions a wider layer uses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..laws import Law, law_of
from ..points import points_of
from ..session import History
from .drawing import OKABE_ITO, dress, new_figure, plain_log, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SERIES = (("soft_rank", "soft rank", "s"), ("effective_dimension", "effective dimension", "D"),
           ("hard_rank", "hard rank", "o"))  # fmt: skip


def rank_against_width(history: History, run_ids: Sequence[str], *, site: str = "post") -> "Figure":
    """Hard rank, soft rank and effective dimension against width on log-log axes, with fits.

    A point is the median over a run's layers, its bar reaches from their lower to their upper quartile; β is the
    slope from three widths on, with its 95 % Student-t interval.

    Raises:
        ValueError: a run has no records of that site.
        ImportError: matplotlib is not installed.

    Source: Jha & Reagen 2025, the asymmetric law.
    """
    points = points_of(history, run_ids, site)
    figure = new_figure(4.2)
    axis = figure.subplots()
    for (rank, name, marker), colour in zip(_SERIES, OKABE_ITO, strict=False):
        x = [point.width for point in points if rank in point.values]
        spreads = [point.values[rank] for point in points if rank in point.values]
        if not spreads:
            continue
        bars = [[one.median - one.lower for one in spreads], [one.upper - one.median for one in spreads]]
        law = law_of(points, rank)
        label = f"{name}{slope_text(law)}"
        axis.errorbar(
            x, [one.median for one in spreads], yerr=bars, fmt=marker, color=colour, capsize=3, ms=5, label=label
        )
        if law is not None:
            ends = [min(x), max(x)]
            axis.plot(ends, [law.at(end) for end in ends], color=colour, lw=1.2, ls="--")
    plain_log(axis)
    plain_log_ticks(axis, [point.width for point in points] or [1.0])
    dress(axis, "", "width", "rank, median over layers")
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"rank against width, {len(run_ids)} run{'s' if len(run_ids) > 1 else ''}", fontsize=10)
    return figure


def slope_text(law: Law | None) -> str:
    """ ": β 0.61 ± 0.40, R² 0.70", or nothing where there is no law."""
    if law is None:
        return ""
    r2 = "" if law.r2 is None else f", R² {law.r2:.2f}"
    return f": β {law.beta:.2f} ± {law.beta_ci95:.2f}{r2}"
