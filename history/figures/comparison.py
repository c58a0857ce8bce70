"""Comparison: the same measure of several runs, by step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..measured import read_grid
from ..session import History
from .drawing import dress, line_styles, new_figure, plain_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("hard_utilization", "Hard utilization", True),
    ("soft_utilization", "Soft utilization", True),
    ("spectral_concentration", "Spectral concentration", False),
)


def comparison(history: History, run_ids: Sequence[str], *, layer: int | None = None, site: str = "post") -> "Figure":
    """Utilizations and concentration of several runs by step.

    Args:
        history: an open store.
        run_ids: a line each.
        layer: of this layer; where not given the median over the layers, with a band from the lower to the upper
            quartile.
        site: "post" or "pre".

    Raises:
        ValueError: a run has no records of that site, or no such layer.
        ImportError: matplotlib is not installed.
    """
    grids = [read_grid(history, run_id, site) for run_id in run_ids]
    for grid in grids:
        if layer is not None and layer not in grid.layers:
            raise ValueError(f"run {grid.run_id!r} has no layer {layer}, its layers are {grid.layers.tolist()}")
    figure = new_figure(3.6)
    for axis, (column, title, logarithmic) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for grid, (colour, dash) in zip(grids, line_styles(), strict=False):
            rows = grid.values[column] if layer is None else grid.values[column][grid.layers == layer]
            known = ~np.isnan(rows).all(axis=0)
            lower, middle, upper = np.nanquantile(rows[:, known], (0.25, 0.5, 0.75), axis=0)
            axis.plot(grid.steps[known], middle, color=colour, ls=dash, label=grid.run_id)
            if layer is None:
                axis.fill_between(grid.steps[known], lower, upper, color=colour, alpha=0.15, lw=0)
        if logarithmic:
            plain_log(axis)
        else:
            axis.set_ylim(0, 1)
        dress(axis, title, "step", "")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(grids), 4), fontsize=8, frameon=False)
    of = "median of the layers, band between their quartiles" if layer is None else f"layer {layer}"
    figure.suptitle(of, fontsize=10)
    return figure
