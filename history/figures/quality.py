"""Data quality: how far the records of a run can be trusted."""

from typing import TYPE_CHECKING

import numpy as np

from ..measured import Grid, over_layers, read_grid
from ..session import History
from .drawing import OKABE_ITO, dress, new_figure, plain_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def data_quality(history: History, run_id: str, *, site: str = "post") -> "Figure":
    """Completeness, tokens per width, and raw against corrected ranks over training.

    Raises:
        ValueError: the run has no records of that site.
        ImportError: matplotlib is not installed.
    """
    grid = read_grid(history, run_id, site)
    figure = new_figure(3.4)
    complete, tokens, ranks = figure.subplots(1, 3)
    kinds = {
        "complete": (grid.complete & grid.finite, OKABE_ITO[5]),
        "incomplete": (grid.recorded & grid.finite & ~grid.complete, OKABE_ITO[4]),
        "not finite": (grid.not_finite, OKABE_ITO[1]),
        "no record": (grid.missing, "0.8"),
    }
    present = {name: both for name, both in kinds.items() if both[0].any() or name == "complete"}
    counts = [flags_LS.sum(axis=0) for flags_LS, _ in present.values()]
    colours = [colour for _, colour in present.values()]
    complete.stackplot(grid.steps, counts, colors=colours, labels=list(present), step="mid")
    dress(complete, "Layers with a record", "step", "layers")
    complete.set_ylim(0, 1.25 * len(grid.layers))
    complete.yaxis.get_major_locator().set_params(integer=True)
    complete.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)

    ratio_LS = grid.values["tokens_per_width"]
    tokens.plot(grid.steps, over_layers(ratio_LS), color=OKABE_ITO[0], label="median of the layers")
    tokens.axhline(2, color=OKABE_ITO[1], lw=1, ls="--", label="2: below it no corrected soft rank")
    plain_log(tokens)
    dress(tokens, "Tokens per width", "step", "")
    tokens.legend(fontsize=8, frameon=False)

    for rank, colour in (("soft_rank", OKABE_ITO[0]), ("hard_rank", OKABE_ITO[1])):
        name = rank.replace("_", " ")
        ranks.plot(grid.steps, over_layers(grid.values[rank]), color=colour, label=f"{name}, raw")
        corrected = over_layers(grid.values[f"{rank}_corrected"])
        if not np.isnan(corrected).all():
            ranks.plot(grid.steps, corrected, color=colour, ls="--", label=f"{name}, corrected")
    plain_log(ranks)
    dress(ranks, "Ranks, median of the layers", "step", "")
    ranks.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{run_id}\n{quality_words(grid)}", fontsize=10)
    return figure


def quality_words(grid: Grid) -> str:
    """What the data is worth, in one sentence."""
    records, incomplete = int(grid.recorded.sum()), int((grid.recorded & ~grid.complete).sum())
    tokens = grid.values["tokens_per_width"][grid.recorded]
    trouble = [
        f"{int(count)} {name}"
        for name, count in (("incomplete", incomplete), ("not finite", grid.not_finite.sum()))
        if count
    ]
    return (
        f"{records} records, {', '.join(trouble) or 'all of them complete and finite'}; "
        f"{np.median(tokens):.3g} tokens per width"
    )
