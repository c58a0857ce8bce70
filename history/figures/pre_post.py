"""Pre → post: what the nonlinearity does to the spectrum, where both sites were observed."""

from typing import TYPE_CHECKING

import numpy as np

from ..measured import read_grid
from ..session import History
from .drawing import EMPTY_COLOUR, OKABE_ITO, dress, new_figure, plain_log
from .heatmaps import step_edges

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pre_post(history: History, run_id: str) -> "Figure":
    """Jensen–Shannon divergence of the pre and post spectra of every layer over training, and the ranks of both sites.

    Raises:
        ValueError: the run did not record both sites.
        ImportError: matplotlib is not installed.
    """
    post, pre = read_grid(history, run_id), read_grid(history, run_id, "pre")
    divergence_LS = np.ma.masked_invalid(post.values["js_divergence"])
    if divergence_LS.count() == 0:
        raise ValueError(f"run {run_id!r} has no js_divergence: observe both sites, attach(…, sites=('post', 'pre'))")
    figure = new_figure(3.6)
    heat, ranks = figure.subplots(1, 2)
    edges_y = np.arange(len(post.layers) + 1) - 0.5
    heat.set_facecolor(EMPTY_COLOUR)
    mesh = heat.pcolormesh(step_edges(post.steps), edges_y, divergence_LS, cmap="cividis", vmin=0, rasterized=True)
    every = -(-len(post.layers) // 16)
    heat.set_yticks(range(0, len(post.layers), every), [str(layer) for layer in post.layers[::every]])
    dress(heat, "Jensen–Shannon divergence of the spectra", "step", "layer")
    heat.grid(False)
    figure.colorbar(mesh, ax=heat, label="nats; ln 2 at most").ax.tick_params(labelsize=8)

    for rank, name, colour in (("soft_rank", "soft rank", OKABE_ITO[0]), ("hard_rank", "hard rank", OKABE_ITO[1])):
        for grid, fill in ((pre, "none"), (post, colour)):
            ranks.plot(
                grid.layers, grid.lately(rank), "o-", color=colour, mfc=fill, lw=1, ms=5, label=f"{name}, {grid.site}"
            )
    plain_log(ranks)
    ranks.xaxis.get_major_locator().set_params(integer=True)
    dress(ranks, "Ranks before and after", "layer", "rank, last quarter of the steps")
    ranks.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run_id}\nwhat the nonlinearity does to the spectrum", fontsize=10)
    return figure
