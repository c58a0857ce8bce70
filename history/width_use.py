"""Which layers waste their width, and since when: a verdict on each layer of a run, and the answer in words.

A verdict counts once `COLLAPSE.window_samples` samples in a row agree, and begins with the first of them; collapse
enters and leaves by the thresholds of its alert. It says what the records show so far, and nothing of what the layer
would do with another width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..schemas.thresholds import COLLAPSE
from .measured import Grid, over_layers

FRONT_LOADED_SHARE = 0.9
"""Of the variance in the first 10 % of directions: incipient collapse (Jha & Reagen 2025, power-law α ≥ 1.5)."""
BEHIND_RATIO = 0.5
"""Of the median layer's share of effective directions: a layer below it uses little next to its peers,"""
PEERS_LEAST = 4
"""if there are at least so many layers to compare."""

NOT_FINITE, COLLAPSED, FRONT_LOADED, BEHIND, IN_USE = "not finite", "collapsed", "front-loaded", "behind", "in use"
WASTEFUL = (NOT_FINITE, COLLAPSED, FRONT_LOADED, BEHIND)
"""From the worst."""


class LayerVerdict(NamedTuple):
    """One layer's verdict; the values are medians over the last quarter of the sampled steps, NaN where unknown."""

    layer: int
    width: int
    state: str
    since_step: int | None
    """The first step from which on the state holds; None for a layer in use."""
    hard_rank: float
    soft_rank: float
    effective_dimension: float
    spectral_concentration: float
    variance_10: float


def layer_verdicts(grid: Grid) -> list[LayerVerdict]:
    """A verdict for each layer, in their order."""
    values = grid.values
    share_LS = values["effective_dimension"] / grid.widths[:, None]
    with np.errstate(invalid="ignore"):
        few = (values["hard_utilization"] <= COLLAPSE.hard_utilization_enter) | (
            values["hard_rank"] <= COLLAPSE.directions_enter
        )
        many = (values["hard_utilization"] > COLLAPSE.hard_utilization_leave) & (
            values["hard_rank"] > COLLAPSE.directions_leave
        )
        collapsed = few & (values["spectral_concentration"] >= COLLAPSE.concentration_enter)
        healthy = many | (values["spectral_concentration"] < COLLAPSE.concentration_leave)
        front_loaded = values["variance_10"] >= FRONT_LOADED_SHARE
        behind = share_LS < BEHIND_RATIO * over_layers(share_LS)
    if len(grid.layers) < PEERS_LEAST:
        behind = np.zeros_like(behind)
    signs = {
        NOT_FINITE: (grid.not_finite, ~grid.not_finite),
        COLLAPSED: (collapsed, healthy),
        FRONT_LOADED: (front_loaded, ~front_loaded),
        BEHIND: (behind, ~behind),
    }
    lately = {name: grid.lately(name) for name in LayerVerdict._fields[4:]}
    uses = []
    for row, layer in enumerate(grid.layers):
        known = grid.not_finite[row] | ~np.isnan(values["hard_rank"][row])
        state, since = IN_USE, None
        for sign, (enter_LS, leave_LS) in signs.items():
            first = held_since(enter_LS[row, known], leave_LS[row, known], COLLAPSE.window_samples)
            if first is not None:
                state, since = sign, int(grid.steps[known][first])
                break
        measured = {name: float(values_L[row]) for name, values_L in lately.items()}
        uses.append(LayerVerdict(int(layer), int(grid.widths[row]), state, since, **measured))
    return uses


def held_since(enter: NDArray[np.bool_], leave: NDArray[np.bool_], window: int) -> int | None:
    """Where the state that holds at the end began, or None: it takes `window` samples in a row to enter or to leave.

    Args:
        enter: (S,) samples that speak for the state,
        leave: (S,) and against it; some may do neither.
        window: with fewer samples than that, all must agree.
    """
    window = min(window, len(enter))
    if not window:
        return None
    enters, leaves = (np.asarray(sliding_window_view(flags, window).all(axis=-1)) for flags in (enter, leave))
    since: int | None = None
    for begin, (enters_here, leaves_here) in enumerate(zip(enters, leaves, strict=True)):
        if since is None and enters_here:
            since = begin
        elif since is not None and leaves_here:
            since = None
    return since


def answer(uses: list[LayerVerdict]) -> str:
    """The opening question, which layers waste their width and since when, in two or three sentences."""
    wasteful = [use for use in uses if use.state in WASTEFUL]
    rest = [use for use in uses if use.state == IN_USE]
    if not wasteful:
        return f"No layer wastes its width by these measures. {_in_use(rest, 'All')}"
    heads = (
        f"All {len(uses)} layers waste"
        if not rest and len(uses) > 1
        else f"{len(wasteful)} of {len(uses)} layers {'wastes' if len(wasteful) == 1 else 'waste'}"
    )
    sentences = [f"{heads} {'its' if len(wasteful) == 1 else 'their'} width."]
    for state in WASTEFUL:
        if of_state := [use for use in wasteful if use.state == state]:
            sentences.append(_SAID[state](of_state))
    if rest:
        sentences.append(_in_use(rest, "The other"))
    return " ".join(sentences)


def named(layers: list[int]) -> str:
    """ "layer 3", "layers 0–2 and 5": runs of neighbours in short."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    texts = [str(span[0]) if len(span) == 1 else f"{span[0]}–{span[-1]}" for span in spans]
    joined = texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    return f"layer{'' if len(layers) == 1 else 's'} {joined}"


def since(uses: list[LayerVerdict]) -> str:
    """ "since step 16", or "since step 16 to 40"."""
    steps = sorted({use.since_step for use in uses if use.since_step is not None})
    if len(steps) == 1:
        return f"since step {steps[0]}"
    return f"since steps {steps[0]} to {steps[-1]}, one after another"


def _subject(uses: list[LayerVerdict]) -> str:
    text = named([use.layer for use in uses])
    return text[0].upper() + text[1:]


def _say_not_finite(uses: list[LayerVerdict]) -> str:
    return f"{_subject(uses)} had activations that are not finite {since(uses)}."


def _say_collapsed(uses: list[LayerVerdict]) -> str:
    return (
        f"{_subject(uses)} {'has' if len(uses) == 1 else 'have'} collapsed, {since(uses)}: "
        f"{_span([use.hard_rank for use in uses])} dominant directions of {_widths(uses)}."
    )


def _say_front_loaded(uses: list[LayerVerdict]) -> str:
    return (
        f"{_subject(uses)} {'is' if len(uses) == 1 else 'are'} front-loaded, {since(uses)}: "
        f"{_span([100 * use.variance_10 for use in uses])} % of the variance in the first tenth of the directions."
    )


def _say_behind(uses: list[LayerVerdict]) -> str:
    return (
        f"{_subject(uses)} {'lies' if len(uses) == 1 else 'lie'} behind, {since(uses)}: "
        f"{_span([use.effective_dimension for use in uses])} effective directions of {_widths(uses)}, "
        "less than half of what the median layer uses."
    )


def _in_use(uses: list[LayerVerdict], which: str) -> str:
    count = f"{which} {len(uses)} layers use" if len(uses) > 1 else f"{which.replace('All', 'Its')} one uses"
    return f"{count} {_span([use.effective_dimension for use in uses])} effective directions of {_widths(uses)}."


_SAID: dict[str, Callable[[list[LayerVerdict]], str]] = {
    NOT_FINITE: _say_not_finite,
    COLLAPSED: _say_collapsed,
    FRONT_LOADED: _say_front_loaded,
    BEHIND: _say_behind,
}


def _span(values: list[float]) -> str:
    known = [value for value in values if not np.isnan(value)]
    if not known:
        return "an unknown number of"
    low, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def _widths(uses: list[LayerVerdict]) -> str:
    widths = sorted({use.width for use in uses})
    return " and ".join(map(str, widths)) if len(widths) <= 2 else f"{widths[0]} to {widths[-1]}"
