"""The law between a rank and the width: rank = e^c · D^β, a straight line in logarithms.

Pure: widths and ranks in, a law out; where they come from is `points`' affair. SciPy is imported when the first
law is fitted, so that a query does not wait for it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .points import Point

LEAST_WIDTHS = 3
"""Through two widths any line fits; a third can contradict it."""
CONFIDENCE = 0.95


class Law(NamedTuple):
    """value = e^intercept · width^beta, by ordinary least squares of ln value on ln width."""

    metric: str
    beta: float
    beta_ci95: float
    """Half of the 95 % interval of beta: Student's t with points − 2 degrees of freedom."""
    intercept: float
    r2: float | None
    """The share of the variance of ln value that the line explains; None where the value never varies."""
    points: int
    widths: tuple[float, ...]
    """The different ones, ascending."""

    def at(self, width: float) -> float:
        """The value that the law gives for a width."""
        return math.exp(self.intercept + self.beta * math.log(width))


def width_law(widths: Sequence[float], values: Sequence[float], *, metric: str = "rank") -> Law:
    """Fits a law through points (width, value), each of which counts once, in any order.

    Args:
        widths: at least three different ones; several points may share one.
        values: as many, positive: ranks, or utilizations.
        metric: what the values are, for messages.

    Raises:
        ValueError: there are fewer than three widths, or a number has no logarithm.

    Source: Jha & Reagen 2025, the asymmetric law; 95 % interval from Student's t with n − 2 degrees of freedom.

    Example:
        >>> law = width_law([256, 512, 1024, 2048], [20, 28, 45, 60])
        >>> f"{law.beta:.3f} ± {law.beta_ci95:.3f}, R² {law.r2:.3f}"
        '0.544 ± 0.145, R² 0.992'
    """
    from scipy import stats

    if len(widths) != len(values):
        raise ValueError(f"a law needs one {metric} for each width, got {len(widths)} widths and {len(values)} values")
    for name, numbers in (("width", widths), (metric, values)):
        for number in numbers:
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"a {name} of {number:g} has no logarithm: leave that point out")
    different = tuple(sorted(set(map(float, widths))))
    if len(different) < LEAST_WIDTHS:
        raise ValueError(too_few_widths(different))
    x, y = np.log(np.asarray(widths, dtype=float)), np.log(np.asarray(values, dtype=float))
    if np.ptp(y) == 0:
        return Law(metric, 0.0, 0.0, float(y[0]), None, len(x), different)
    line = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * line.stderr)
    return Law(metric, float(line.slope), half, float(line.intercept), float(line.rvalue**2), len(x), different)


def law_of(points: Sequence[Point], metric: str) -> Law | None:
    """The law of one metric through the points that have it; None where there is none, as with two widths."""
    known = [(point.width, point.values[metric].median) for point in points if metric in point.values]
    try:
        return width_law([width for width, _ in known], [value for _, value in known], metric=metric)
    except ValueError:
        return None


def too_few_widths(widths: Sequence[float]) -> str:
    """What is missing, where there are fewer than three widths."""
    missing = LEAST_WIDTHS - len(widths)
    found = ", ".join(f"{width:g}" for width in widths) or "none"
    return (
        f"a law needs at least {LEAST_WIDTHS} different widths, got {len(widths)} ({found}): "
        f"add runs of {missing} more {'width' if missing == 1 else 'widths'}"
    )


def growth(law: Law) -> str:
    """What the exponent says, as the end of a sentence, no surer than its interval."""
    low, high = law.beta - law.beta_ci95, law.beta + law.beta_ci95
    if low <= 0 and high >= 1:
        return "anything from not at all to in proportion to the width: these points cannot tell"
    if high < 0:
        return "falls as the width grows"
    if low <= 0:
        return "does not measurably grow with the width, and less than in proportion to it"
    if high < 1:
        return "grows, but less than in proportion to the width"
    if low > 1:
        return "grows faster than the width"
    return f"grows, and growth in proportion to the width (β = 1) is within its interval, {low:.2f} to {high:.2f}"


def asymmetry(widths: Sequence[float], hard_ranks: Sequence[float], soft_ranks: Sequence[float]) -> str:
    """Whether new width goes to the tail: the law of soft rank / hard rank over the same points, in words.

    The two ranks of a point err together, so their ratio tells more than their two intervals do.
    """
    ratios = [soft / hard for hard, soft in zip(hard_ranks, soft_ranks, strict=True)]
    law = width_law(widths, ratios, metric="soft rank / hard rank")
    exponent = f"soft rank / hard rank goes as D^({law.beta:.2f} ± {law.beta_ci95:.2f})"
    if law.beta > law.beta_ci95:
        return f"Tail growth: {exponent}, so new width goes to directions of low variance first."
    if law.beta < -law.beta_ci95:
        return f"Head growth: {exponent}, so new width goes to the dominant directions first."
    return f"No asymmetry is shown: {exponent}, and that interval holds 0."
