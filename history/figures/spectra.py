"""Spectra: how the variance falls from direction to direction, against the power law and its templates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..measured import TEMPLATES, Spectrum, evenly, read_grid, read_spectra, spectrum_steps, template_cumulative
from ..session import History
from .drawing import dress, line_styles, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS, STEPS = 4, 5
"""Layers and steps that are drawn where none are named."""


def spectra(
    history: History,
    run_id: str,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    site: str = "post",
) -> "Figure":
    """Spectra of chosen layers and steps on log-log axes, with the fitted power law of the last step.

    A panel a layer, a line a step, from dark (early) to bright (late). In a mixture of experts the expert whose hard
    rank is the median.

    Args:
        history: an open store.
        run_id: whose.
        layers: up to four from the first to the last, where not given.
        steps: up to five from the first to the last, where not given.
        site: "post" or "pre".

    Raises:
        ValueError: the store has no such spectra.
        ImportError: matplotlib is not installed.
    """
    layers, steps = _chosen(history, run_id, site, layers, steps)
    found = _found(history, run_id, layers, steps, site)
    figure = new_figure(3.4)
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.88, len(steps)))
    axes = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axis, layer in zip(axes, layers, strict=True):
        last = None
        for step, colour in zip(steps, colours, strict=True):
            if (spectrum := found.get((layer, step))) is not None:
                axis.plot(spectrum.direction, _positive(spectrum.share), color=colour, lw=1.4, label=f"step {step}")
                last = spectrum
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.minorticks_off()
        dress(axis, f"layer {layer}", "direction", "")
        if last is not None and not np.isnan(last.alpha):
            fit = np.exp(last.level) * last.direction**-last.alpha
            axis.plot(last.direction, fit, color="black", lw=1, ls="--", label=f"fit, α = {last.alpha:.2f}")
        axis.legend(fontsize=7, frameon=False, loc="lower left")
    axes[0].set_ylabel("share of the variance", fontsize=9)
    lowest = min(_positive(one.share)[~np.isnan(_positive(one.share))].min() for one in found.values())
    axes[0].set_ylim(max(lowest / 2, 1e-9), 2)
    figure.suptitle(f"{run_id}\nspectra ({site}-activation), and the power law of the last step", fontsize=10)
    return figure


def cumulative_variance(
    history: History,
    run_id: str,
    *,
    layers: Sequence[int] | None = None,
    step: int | None = None,
    site: str = "post",
) -> "Figure":
    """Share of the variance in the first directions, against exact power laws of α 0.8, 1.2 and 1.5.

    Above the α 1.5 template lies incipient collapse, below the one of 0.8 dilution (Jha & Reagen 2025).

    Args:
        history: an open store.
        run_id: whose.
        layers: up to seven from the first to the last, where not given.
        step: the last one with spectra, where not given.
        site: "post" or "pre".

    Raises:
        ValueError: the store has no such spectra.
        ImportError: matplotlib is not installed.
    """
    layers, (*_, last) = _chosen(history, run_id, site, layers, None if step is None else [step], most_layers=7)
    found = _found(history, run_id, layers, [last], site)
    figure = new_figure(4.2)
    axis = figure.subplots()
    width = max(one.width for one in found.values())
    for alpha, dash in zip(TEMPLATES, (":", "--", "-."), strict=True):
        axis.plot(*template_cumulative(width, alpha), color="0.45", ls=dash, lw=1.2, label=f"template α = {alpha}")
    for (layer, _), (colour, dash) in zip(sorted(found), line_styles(), strict=False):
        one = found[layer, last]
        axis.plot(one.direction / one.width, one.cumulative, color=colour, ls=dash, lw=1.6, label=f"layer {layer}")
    axis.axvline(0.1, color="0.7", lw=0.8)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.01)
    dress(axis, "", "share of the directions", "share of the variance")
    axis.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    figure.suptitle(f"{run_id}\ncumulative variance at step {last} ({site}-activation)", fontsize=10)
    return figure


def _chosen(
    history: History,
    run_id: str,
    site: str,
    layers: Sequence[int] | None,
    steps: Sequence[int] | None,
    most_layers: int = PANELS,
) -> tuple[list[int], list[int]]:
    if layers is None:
        known = read_grid(history, run_id, site).layers
        layers = [int(one) for one in known[evenly(len(known), most_layers)]]
    if steps is None:
        stored = spectrum_steps(history, run_id, site)
        if not len(stored):
            raise ValueError(f"the store has no spectra of run {run_id!r} at site {site!r}")
        steps = [int(one) for one in stored[evenly(len(stored), STEPS)]]
    return list(layers), sorted(steps)


def _found(
    history: History, run_id: str, layers: list[int], steps: list[int], site: str
) -> dict[tuple[int, int], Spectrum]:
    found = read_spectra(history, run_id, layers=layers, steps=steps, site=site, points=200)
    if not found:
        raise ValueError(
            f"the store has no spectra of run {run_id!r}, site {site!r}, layers {layers}, steps {steps}: "
            "ask for some that it sampled"
        )
    return found


def _positive(share: np.ndarray) -> np.ndarray:
    return np.where(share > 0, share, np.nan)
