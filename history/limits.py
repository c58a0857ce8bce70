"""What the data of a fit cannot tell: a sentence for each reason to trust its numbers less."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import numpy as np

from ..schemas.thresholds import COLLAPSE
from .laws import CONFIDENCE, Law
from .points import LayerUse, Point, Selection

FEW_WIDTHS = 5
NARROW_SPAN = 4.0
FEW_TOKENS = 2.0
"""Tokens a width, under which raw ranks are clearly too low and the corrected soft rank is null."""
UNEQUAL_TOKENS = 1.5
"""Ratio of tokens a width between points, above which their biases differ."""
MOVING = 0.05
"""Relative change of effective dimension from one window to the next, above which training still moves it."""
FEW_SAMPLES = 3
UNEQUAL_ENDS = 1.1
LEAST_BEND = 0.1
"""Change of the exponent from the narrowest width to the widest that is worth a word."""


def limits(
    selection: Selection,
    layers: Sequence[LayerUse],
    points: Sequence[Point],
    law: Law | None,
    tags: Mapping[str, Mapping[str, str]],
) -> tuple[str, ...]:
    """The sentences for a fit through these points; `law` is that of effective dimension."""
    return tuple(
        sentence
        for sentence in (
            *_of_the_widths(points, law, tags),
            *_of_the_records(selection, layers, points),
            *_of_the_training(selection, layers, points),
            "A rank says which directions carry variance, not which of them the loss needs: try a change of width on a "
            "short run before you rely on it.",
        )
        if sentence
    )


def collapsed_runs(layers: Sequence[LayerUse]) -> list[str]:
    """The runs whose median layer has no more directions than a collapsed one."""
    ranks: dict[str, list[float]] = {}
    for layer in layers:
        if layer.hard_rank is not None:
            ranks.setdefault(layer.run_id, []).append(layer.hard_rank)
    return sorted(run for run, found in ranks.items() if median(found) <= COLLAPSE.directions_enter)


def change(layers: Sequence[LayerUse]) -> float | None:
    """The median layer's relative change of effective dimension since the window before; None where there is none."""
    changes = [
        layer.effective_dimension / layer.effective_dimension_before - 1
        for layer in layers
        if layer.effective_dimension is not None and layer.effective_dimension_before
    ]
    return median(changes) if changes else None


def _of_the_widths(
    points: Sequence[Point], law: Law | None, tags: Mapping[str, Mapping[str, str]]
) -> tuple[str | None, ...]:
    widths = sorted({point.width for point in points})
    if len(widths) < 2:
        return ("One width: nothing here says what another width would bring.",)
    few = span = repeats = None
    if len(widths) < FEW_WIDTHS:
        few = f"{len(widths)} widths leave a wide interval; from {FEW_WIDTHS} on it tells more."
    if widths[-1] < NARROW_SPAN * widths[0]:
        span = (
            f"The widths span a factor of {widths[-1] / widths[0]:.2g} only; an exponent wants {NARROW_SPAN:g} or more."
        )
    if max(Counter(point.width for point in points).values()) == 1:
        repeats = "One run a width: how far two runs of one width differ is unknown, so a seed may pass for an effect."
    return few, span, repeats, _bend(points, law), _mixed(points, tags)


def _bend(points: Sequence[Point], law: Law | None) -> str | None:
    """Whether a parabola in the logarithms fits clearly better than the line: the law saturates, or steepens."""
    if law is None or len(law.widths) < FEW_WIDTHS:
        return None
    from scipy import stats

    known = [point for point in points if law.metric in point.values]
    x = np.log([point.width for point in known])
    y = np.log([point.values[law.metric].median for point in known])
    design = np.vander(x - x.mean(), 3)
    coefficients, _, _, _ = np.linalg.lstsq(design, y, rcond=None)
    variance = float(np.sum((y - design @ coefficients) ** 2)) / (len(x) - 3)
    error = float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
    bend = float(coefficients[0])
    sure = abs(bend) > error * stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 3)
    if not sure or abs(2 * bend * np.ptp(x)) < LEAST_BEND:
        return None
    flatter = "flatten, so β is too high beyond the widest run" if bend < 0 else "steepen, so β is too low beyond it"
    return f"The points of effective dimension do not lie on a line: they {flatter}, and the knee is off."


def _mixed(points: Sequence[Point], tags: Mapping[str, Mapping[str, str]]) -> str | None:
    """Runs of different making in one fit, as far as their tags tell and their widths do not."""
    width_of = {point.run_id: point.width for point in points}
    for tag in sorted(set().union(*(tags[run] for run in width_of)) - {"seed"}):
        values = {run: tags[run].get(tag, "not set") for run in width_of}
        of_a_width: dict[int, set[str]] = {}
        for run, width in width_of.items():
            of_a_width.setdefault(width, set()).add(values[run])
        # One value a width is another name for the width, or for what grows with it.
        if len(set(values.values())) > 1 and max(map(len, of_a_width.values())) > 1:
            return (
                f"The runs differ in {tag} ({', '.join(sorted(set(values.values())))}): --by {tag} fits each by itself."
            )
    return None


def _of_the_records(
    selection: Selection, layers: Sequence[LayerUse], points: Sequence[Point]
) -> tuple[str | None, ...]:
    few = unequal = incomplete = unusable = None
    tokens = [point.tokens_per_width for point in points]
    if tokens and min(tokens) < FEW_TOKENS and not selection.corrected:
        worst = min(points, key=lambda point: point.tokens_per_width)
        few = (
            f"{worst.tokens_per_width:.2g} tokens a width in {worst.run_id} (width {worst.width}): raw ranks are too "
            "low there; --corrected mends the hard rank, more tokens mend both."
        )
    elif tokens and max(tokens) > UNEQUAL_TOKENS * min(tokens) and not selection.corrected:
        unequal = (
            f"Tokens a width go from {min(tokens):.2g} to {max(tokens):.2g}: the fewer, the lower a raw rank, so β is "
            "biased; compare with --corrected."
        )
    records, without = sum(layer.records for layer in layers), sum(layer.unusable for layer in layers)
    lacking = sum(layer.incomplete for layer in layers)
    if lacking:
        incomplete = f"{lacking} of {records} records in the window are incomplete: some ranks' tokens are not in them."
    if without:
        runs = _named(layer.run_id for layer in layers if layer.unusable)
        why = "not finite, or too few tokens to correct" if selection.corrected else "not finite"
        unusable = f"{without} of {records} records in the window have no ranks ({why}) and were left out: {runs}."
    return few, unequal, incomplete, unusable


def _of_the_training(
    selection: Selection, layers: Sequence[LayerUse], points: Sequence[Point]
) -> tuple[str | None, ...]:
    ends = few = moving = collapsed = None
    last = sorted((point.last_step, point.run_id) for point in points)
    if last and last[-1][0] > UNEQUAL_ENDS * last[0][0]:
        ends = (
            f"The windows end at different steps, {last[0][0]} in {last[0][1]} and {last[-1][0]} in {last[-1][1]}"
            + (": choose common ones with --steps FROM:TO." if selection.steps is None else ".")
        )
    samples = min(layer.samples for layer in layers)
    if samples < FEW_SAMPLES:
        counted = "1 sample" if samples == 1 else f"{samples} samples"
        few = f"{counted} a layer in the window cannot show what persists: take a longer one with --last or --steps."
    moved = change(layers)
    if moved is None:
        moving = "Nothing was sampled before the window, so whether training still moves the ranks is unknown."
    elif abs(moved) > MOVING:
        moving = (
            f"Training still moves the ranks: effective dimension changed by {moved:+.0%} in the median layer since "
            "the window before."
        )
    if runs := collapsed_runs(layers):
        collapsed = (
            f"{_named(runs)}: collapsed, half of the layers have {COLLAPSE.directions_enter:g} directions or fewer. "
            "That is no matter of width: mend the training first, and leave such runs out of a fit."
        )
    return ends, few, moving, collapsed


def _named(names: Iterable[str], shown: int = 5) -> str:
    different = sorted(set(names))
    return ", ".join(different[:shown]) + (f" and {len(different) - shown} more" if len(different) > shown else "")
