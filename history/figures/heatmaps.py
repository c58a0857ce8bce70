"""Layer × step: how every layer uses its width over training.

Trouble is dark where utilization is drawn and bright, hot, where concentration is. The colours are
perceptually uniform and safe for the colour-blind.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..measured import Grid, read_grid
from ..session import History
from .drawing import EMPTY_COLOUR, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

LOWEST_UTILIZATION = 1e-5
"""Where the logarithmic colours end; below it, zero included, a cell has the darkest colour."""
HATCH_COLOUR, HATCH = "0.35", "////"


class _Panel(NamedTuple):
    column: str
    title: str
    unit: str
    colours: str
    logarithmic: bool


_PANELS = (
    _Panel("hard_utilization", "Hard utilization", "share of the width, log", "viridis", True),
    _Panel("soft_utilization", "Soft utilization", "share of the width, log", "viridis", True),
    _Panel("spectral_concentration", "Spectral concentration", "0: flat, 1: one direction", "magma", False),
)


def layer_step_heatmaps(history: History, run_id: str, *, site: str = "post") -> "Figure":
    """Hard utilization, soft utilization and spectral concentration of every layer over training.

    Side by side; rows are layers, layer 0 at the bottom; columns are the sampled steps at their place on the
    step axis, each as wide as the way to its neighbours. In a mixture of experts a cell is the median over
    the experts. Cells whose activations were not finite are hatched, cells without a record are grey.

    Returns:
        A figure about 1000 pixels wide; `figure.savefig("run.png")` writes it.

    Raises:
        ValueError: the run has no records of that site.
        ImportError: matplotlib is not installed.

    Source: Jha & Reagen 2025, the layer×step figures.
    """
    grid = read_grid(history, run_id, site)
    figure = new_figure(_height_inches(len(grid.layers)))
    axes = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, _PANELS, strict=True):
        _draw(figure, axis, panel, grid)
    axes[0].set_ylabel("layer")
    experts = ", median over experts" if grid.experts else ""
    subtitle = f"how each feed-forward layer uses its width ({site}-activation{experts})"
    figure.suptitle(f"{run_id}\n{subtitle}", fontsize=10)
    _explain_empty_cells(figure, grid)
    return figure


def _draw(figure: "Figure", axis: "Axes", panel: _Panel, grid: Grid) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    edges_x = step_edges(grid.steps)
    edges_y = np.arange(len(grid.layers) + 1, dtype=np.float64) - 0.5
    values_LS = np.ma.masked_invalid(grid.values[panel.column])
    axis.set_facecolor(EMPTY_COLOUR)
    norm, ticks = _utilization_scale(values_LS) if panel.logarithmic else _concentration_scale()
    clipped = np.ma.clip(values_LS, norm.vmin, norm.vmax)
    mesh = axis.pcolormesh(edges_x, edges_y, clipped, norm=norm, cmap=panel.colours, rasterized=True)
    axis.add_collection(_hatching(grid.not_finite, edges_x, edges_y))
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("step")
    axis.set_xlim(edges_x[0], edges_x[-1])
    first, last = int(grid.steps[0]), int(grid.steps[-1])
    marks = MaxNLocator(5, integer=True).tick_values(first, last) if first < last else grid.steps
    axis.set_xticks([mark for mark in marks if first <= mark <= last])
    if last >= 10_000:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    every = math.ceil(len(grid.layers) / 16)
    axis.set_yticks(range(0, len(grid.layers), every), [str(layer) for layer in grid.layers[::every]])
    axis.tick_params(labelsize=8)
    bar = figure.colorbar(mesh, ax=axis, location="bottom", aspect=30, pad=0.03, label=panel.unit)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)


def _hatching(
    cells_LS: NDArray[np.bool_], edges_x: NDArray[np.float64], edges_y: NDArray[np.float64]
) -> "PolyCollection":
    from matplotlib.collections import PolyCollection

    corners = [
        [(edges_x[column + right], edges_y[row + up]) for right, up in ((0, 0), (1, 0), (1, 1), (0, 1))]
        for row, column in np.argwhere(cells_LS)
    ]
    return PolyCollection(corners, facecolor="none", edgecolor=HATCH_COLOUR, linewidth=0, hatch=HATCH)


def step_edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """(S+1,) where each step's cell begins and ends: halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    halfway = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - halfway[0]], halfway, [2 * steps[-1] - halfway[-1]]])


def _utilization_scale(values_LS: Any) -> tuple["Normalize", list[float]]:
    """Colours from below the least to above the greatest value, in steps of 1, 2, 5; one decade at least."""
    from matplotlib.colors import LogNorm

    found = np.clip(values_LS.compressed(), LOWEST_UTILIZATION, 1.0)
    least, greatest = (float(found.min()), float(found.max())) if found.size else (1e-3, 1.0)
    low, high, marks = _snapped(least, greatest, digits=(1, 2, 5))
    if len(marks) > 7:
        low, high, marks = _snapped(least, greatest, digits=(1,))
    return LogNorm(low, high), marks


def _snapped(least: float, greatest: float, digits: tuple[int, ...]) -> tuple[float, float, list[float]]:
    marks = [float(f"{digit}e{power}") for power in range(-5, 0) for digit in digits] + [1.0]
    high = min(mark for mark in marks if mark >= greatest)
    low = max(mark for mark in marks if mark <= max(min(least, high / 10), LOWEST_UTILIZATION))
    return low, high, [mark for mark in marks if low <= mark <= high]


def _concentration_scale() -> tuple["Normalize", list[float]]:
    from matplotlib.colors import Normalize

    return Normalize(0, 1), [0, 0.25, 0.5, 0.75, 1]


def _explain_empty_cells(figure: "Figure", grid: Grid) -> None:
    from matplotlib.patches import Patch

    keys = []
    if grid.not_finite.any():
        keys.append(Patch(facecolor=EMPTY_COLOUR, edgecolor=HATCH_COLOUR, hatch=HATCH, label="activations not finite"))
    if grid.missing.any():
        keys.append(Patch(facecolor=EMPTY_COLOUR, edgecolor=HATCH_COLOUR, label="no record"))
    if keys:
        figure.legend(handles=keys, loc="outside lower right", ncols=len(keys), fontsize=8, frameon=False)


def _height_inches(layers: int) -> float:
    return min(2.6 + 0.14 * layers, 7.0)
