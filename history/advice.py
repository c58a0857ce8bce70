"""Advice from a fit: where more width stops paying, which layers could do with less, which with more.

Each piece carries the numbers it rests on and says itself in words; `Fit.limits` says what none of it can tell.
How it is reckoned: docs/laws.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .fits import Fit
from .laws import CONFIDENCE, LEAST_WIDTHS, Law, width_law
from .limits import collapsed_runs
from .points import LayerUse, Point

PERSISTENT = 0.9
"""Of the samples in the window."""
RISING = 0.05
"""Relative change of effective dimension since the window before, from which it rises with training."""
DRAWS = 20_000


class Gain(NamedTuple):
    """Directions that one more unit of width brings at a width: the derivative of effective dimension by width."""

    width: float
    value: float
    low: float
    high: float


class Knee(NamedTuple):
    """The width at which the marginal gain falls under the threshold, by the law of effective dimension."""

    threshold: float
    """Directions for one more unit of width."""
    given: bool
    """Or half of the gain at the narrowest width."""
    width: float
    """0 where no width gains that much, infinity where the gain never falls under it; likewise the interval's ends."""
    low: float
    high: float
    gains: tuple[Gain, ...]
    """At each width of the fit."""

    @property
    def text(self) -> str:
        first, last = self.gains[0], self.gains[-1]
        chosen = "as chosen" if self.given else f"half of it at width {first.width:g}"
        interval = f"95 % interval {_width(self.low)} to {_width(self.high)}"
        gain = f"At width {last.width:g} one more unit of width brings {last.value:.2g} directions ({_interval(last)})"
        if self.width == np.inf:
            return f"{gain}. It does not fall with the width; a fall under {self.threshold:.2g}: {interval}."
        if self.width < first.width:
            return f"{gain}. It is under {self.threshold:.2g}, {chosen}, at every width here ({interval})."
        where = f"falls under {self.threshold:.2g}, {chosen}, at width {_width(self.width)} ({interval})"
        beyond = "; that is beyond the widest run, by extrapolation" if self.width > last.width else ""
        return f"{gain}. It {where}{beyond}."


class Candidate(NamedTuple):
    """A layer of a run that could do with less width, or with more."""

    use: LayerUse
    of_median: float
    """The share of its width that it uses, over that of its run's median layer."""
    change: float | None
    """Relative change of its effective dimension since the window before."""
    law: Law | None
    """Of this layer's effective dimension over the runs, where they have three widths."""
    text: str


class Advice(NamedTuple):
    """What a fit suggests."""

    knee: Knee | None
    knee_missing: str | None
    """Why there is no knee."""
    prune: tuple[Candidate, ...]
    """The emptiest first."""
    widen: tuple[Candidate, ...]
    """The fullest first."""
    limits: tuple[str, ...]


def advise(fit: Fit, *, gain: float | None = None) -> Advice:
    """Advice on the width of the runs of a fit, and of their layers.

    Args:
        fit: with laws or without: what is said of layers needs no second width.
        gain: the marginal gain, in directions for one more unit of width, that is too little; half of the gain at the
            narrowest width where not given.

    Raises:
        ValueError: `gain` is not positive.
    """
    if gain is not None and not gain > 0:
        raise ValueError(f"gain must be positive, such as 0.02 directions for one more unit of width, got {gain:g}")
    law = fit.laws.get("effective_dimension")
    knee = None if law is None else _knee(fit.points, law, gain)
    if law is None:
        missing = fit.missing["effective_dimension"]
    else:
        missing = f"effective dimension is not shown to grow with the width (β {law.beta:.2f} ± {law.beta_ci95:.2f})"
    prune, widen = _candidates(fit.layers)
    return Advice(knee, missing if knee is None else None, prune, widen, fit.limits)


def _knee(points: Sequence[Point], law: Law, gain: float | None) -> Knee | None:
    """The law's own knee; its interval from draws of (β, c), which err together, by Student's t."""
    if law.beta <= law.beta_ci95:
        return None
    beta, intercept = _draws(points, law)
    slope = law.beta * law.at(law.widths[0]) / law.widths[0]
    threshold = slope / 2 if gain is None else gain
    gains = []
    for width in law.widths:
        low, high = _quantiles(beta * np.exp(intercept) * width ** (beta - 1))
        gains.append(Gain(width, law.beta * law.at(width) / width, low, high))
    low, high = _quantiles(_crossing(beta, intercept, threshold))
    at = float(_crossing(np.array(law.beta), np.array(law.intercept), threshold))
    return Knee(threshold, gain is not None, at, low, high, tuple(gains))


def _draws(points: Sequence[Point], law: Law) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    known = [point for point in points if law.metric in point.values]
    x = np.log([point.width for point in known])
    y = np.log([point.values[law.metric].median for point in known])
    freedom = len(x) - 2
    variance = float(np.sum((y - law.intercept - law.beta * x) ** 2)) / freedom
    random = np.random.default_rng(0)
    scale = np.sqrt(variance * freedom / random.chisquare(freedom, DRAWS))
    # About the mean of x, slope and height err independently.
    beta = law.beta + scale * random.standard_normal(DRAWS) / np.sqrt(np.sum((x - x.mean()) ** 2))
    height = y.mean() + scale * random.standard_normal(DRAWS) / np.sqrt(len(x))
    return beta, height - beta * x.mean()


def _crossing(beta: NDArray[np.float64], intercept: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """Where β·e^c·D^(β−1) = threshold: 0 where β ≤ 0, infinity where β ≥ 1."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        width = np.exp((np.log(beta) + intercept - np.log(threshold)) / (1 - beta))
    return np.where(beta <= 0, 0.0, np.where(beta >= 1, np.inf, width))


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, (tail, 1 - tail), method="inverted_cdf")  # which never mixes with infinity
    return float(low), float(high)


def _candidates(layers: Sequence[LayerUse]) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    collapsed = set(collapsed_runs(layers))
    shares: dict[str, list[float]] = {}
    together: dict[int, list[LayerUse]] = {}
    for layer in layers:
        if layer.share is not None and layer.effective_dimension is not None and layer.run_id not in collapsed:
            shares.setdefault(layer.run_id, []).append(layer.share)
            together.setdefault(layer.layer, []).append(layer)
    prune, widen = [], []
    for of_one_layer in together.values():
        law = _law_of_layer(of_one_layer)
        for use in of_one_layer:
            assert use.share is not None
            assert use.effective_dimension is not None
            of_median = use.share / float(np.median(shares[use.run_id]))
            before = use.effective_dimension_before
            change = use.effective_dimension / before - 1 if before else None
            candidate = Candidate(use, of_median, change, law, "")
            if use.low_samples >= PERSISTENT * use.samples:
                prune.append(candidate._replace(text=_words(candidate, use.low_samples)))
            elif use.high_samples >= PERSISTENT * use.samples and _rises(candidate):
                widen.append(candidate._replace(text=_words(candidate, use.high_samples)))
    return (
        tuple(sorted(prune, key=lambda found: found.of_median)),
        tuple(sorted(widen, key=lambda found: -found.of_median)),
    )


def _law_of_layer(uses: Sequence[LayerUse]) -> Law | None:
    if len({use.width for use in uses}) < LEAST_WIDTHS:
        return None
    values = [use.effective_dimension for use in uses if use.effective_dimension is not None]
    return width_law([use.width for use in uses], values, metric="effective_dimension")


def _rises(candidate: Candidate) -> bool:
    with_width = candidate.law is not None and candidate.law.beta > candidate.law.beta_ci95
    return with_width or (candidate.change is not None and candidate.change > RISING)


def _words(candidate: Candidate, agreeing: int) -> str:
    use = candidate.use
    assert use.effective_dimension is not None
    evidence = [
        f"{candidate.of_median:.2g} times the share of its run's median layer, in {agreeing} of {use.samples} samples"
    ]
    if use.low_since is not None and use.low_samples == use.samples:
        evidence.append(f"under half of it since step {use.low_since}")
    if candidate.change is not None:
        evidence.append(f"{candidate.change:+.0%} since the window before")
    if candidate.law is not None:
        evidence.append(f"goes as D^({candidate.law.beta:.2f} ± {candidate.law.beta_ci95:.2f}) over the runs")
    return (
        f"{use.run_id}, layer {use.layer}: effective dimension {use.effective_dimension:.1f} of {use.width} "
        f"({use.effective_dimension / use.width:.1%}); {'; '.join(evidence)}"
    )


def _interval(gain: Gain) -> str:
    return f"{gain.low:.2g} to {gain.high:.2g}"


def _width(width: float) -> str:
    if width == 0:
        return "below any"
    return "no end" if width == np.inf or width > 1e7 else f"{width:.3g}"
