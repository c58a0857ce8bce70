"""Fits: the laws of the runs of a store, at their end and over training.

    with open_history("runs/") as history:
        (found,) = fit(history)
        found.law("soft_rank").beta

Records → `points` → `laws`; what the data cannot tell comes with every fit (`limits`).
"""

from collections.abc import Iterable
from typing import NamedTuple

from .laws import LEAST_WIDTHS, Law, asymmetry, growth, too_few_widths, width_law
from .limits import limits
from .points import (
    METRICS,
    LayerUse,
    Point,
    Selection,
    layer_uses,
    run_tags,
    run_values,
    samples_sql,
    selected_runs,
    width_points,
)
from .session import History

STABLE_R2 = 0.6
"""Jha & Reagen 2025: from about step 5000 on the power law is stable, with R² above it."""


class Fit(NamedTuple):
    """The laws of some runs in a window."""

    by: str | None
    """The column or tag by which runs were told apart,"""
    value: str | None
    """and what it says of these; None where it says nothing of them."""
    selection: Selection
    layers: list[LayerUse]
    points: list[Point]
    laws: dict[str, Law]
    """By metric, see `METRICS`."""
    missing: dict[str, str]
    """Why a metric has no law."""
    limits: tuple[str, ...]
    """What these data cannot tell, a sentence each."""

    def law(self, metric: str) -> Law:
        """One of them.

        Raises:
            ValueError: there is none; the message says why.
        """
        if metric not in self.laws:
            raise ValueError(self.missing.get(metric, f"metric must be one of {', '.join(METRICS)}, got {metric!r}"))
        return self.laws[metric]

    @property
    def reading(self) -> tuple[str, ...]:
        """What the laws say, a sentence each."""
        names = {metric: metric.replace("_", " ").capitalize() for metric in ("hard_rank", "soft_rank")}
        sentences = []
        for metric, name in names.items():
            if metric in self.laws:
                law = self.laws[metric]
                sentences.append(f"{name}: × {2**law.beta:.2f} where the width doubles; it {growth(law)}.")
        both = [point.values for point in self.points if names.keys() <= point.values.keys()]
        if names.keys() <= self.laws.keys() and len(both) == len(self.points):
            widths = [point.width for point in self.points]
            ranks = ([values[metric].median for values in both] for metric in names)
            sentences.append(asymmetry(widths, *ranks))
        return tuple(sentences)


class StepFit(NamedTuple):
    """The laws at one step of all runs."""

    step: int
    laws: dict[str, Law]
    """Those that could be fitted there."""


def fit(history: History, selection: Selection | None = None, *, by: str | None = None) -> list[Fit]:
    """The laws of the selected runs, one fit for each value of `by`.

    Args:
        selection: all runs, the last tenth of their samples, where not given.
        by: a column of `runs`, or a key of the tags that were given to `attach`.

    Returns:
        Fits by ascending value. A law that cannot be fitted is missing there, with the reason.

    Raises:
        ValueError: a run, column or tag is unknown, or the window holds no records.

    Source: Jha & Reagen 2025; points and window: docs/laws.md.
    """
    selection = selection or Selection()
    layers = layer_uses(history, selection)
    runs = sorted({layer.run_id for layer in layers})
    tags = run_tags(history, runs)
    value_of = dict.fromkeys(runs) if by is None else run_values(history, runs, by)
    fits = []
    for value in sorted(set(value_of.values()), key=lambda value: (value is None, value)):
        mine = [layer for layer in layers if value_of[layer.run_id] == value]
        points = width_points(mine)
        laws, missing = _laws(points)
        said = limits(selection, mine, points, laws.get("effective_dimension"), tags)
        fits.append(Fit(by, value, selection, mine, points, laws, missing, said))
    return fits


def fit_by_step(history: History, selection: Selection | None = None) -> list[StepFit]:
    """The laws over training: at each step that all selected runs have sampled, within the window if there is one.

    Raises:
        ValueError: a run is unknown, the runs share no step, or have fewer than three widths.
    """
    selection = selection or Selection()
    runs = selected_runs(history, selection)
    samples, parameters = samples_sql(runs, selection)
    medians = ", ".join(f"median({metric}) AS {metric}" for metric in METRICS)
    rows = history.query(
        f"""SELECT run_id, width, step, {medians} FROM ({samples}) WHERE step >= ?
        GROUP BY run_id, width, step ORDER BY step, width, run_id""",
        [*parameters, selection.steps[0] if selection.steps else 0],
    ).to_pylist()
    steps: dict[int, list[dict[str, float]]] = {}
    sampled: dict[str, set[int]] = {run: set() for run in runs}
    for row in rows:
        sampled[row["run_id"]].add(row["step"])
        steps.setdefault(row["step"], []).append(row)
    shared = sorted(set.intersection(*sampled.values()))
    if not shared:
        raise ValueError(f"no step was sampled by all of these runs: {_first_steps(sampled)}; name runs of one cadence")
    widths = sorted({row["width"] for row in rows})
    if len(widths) < LEAST_WIDTHS:
        raise ValueError(too_few_widths(widths))
    return [StepFit(step, _laws_at(steps[step])) for step in shared]


def stable_from(steps: Iterable[StepFit], metric: str) -> int | None:
    """The step from which on the law's R² stays above 0.6; None where it does not at the end."""
    since = None
    for found in steps:
        law = found.laws.get(metric)
        if law is None or law.r2 is None or law.r2 <= STABLE_R2:
            since = None
        elif since is None:
            since = found.step
    return since


def _laws(points: list[Point]) -> tuple[dict[str, Law], dict[str, str]]:
    laws: dict[str, Law] = {}
    missing: dict[str, str] = {}
    for metric in METRICS:
        known = [point for point in points if metric in point.values]
        zero = next((point for point in known if point.values[metric].median <= 0), None)
        if zero is not None:
            missing[metric] = (
                f"{metric} is 0 in run {zero.run_id} (width {zero.width}), which has no logarithm: leave that run out"
            )
            continue
        try:
            values = [point.values[metric].median for point in known]
            laws[metric] = width_law([point.width for point in known], values, metric=metric)
        except ValueError as error:
            missing[metric] = str(error)
    return laws, missing


def _laws_at(rows: list[dict[str, float]]) -> dict[str, Law]:
    laws = {}
    for metric in METRICS:
        known = [(row["width"], row[metric]) for row in rows if row[metric] is not None and row[metric] > 0]
        if len({width for width, _ in known}) >= LEAST_WIDTHS:
            laws[metric] = width_law(*zip(*known, strict=True), metric=metric)
    return laws


def _first_steps(sampled: dict[str, set[int]]) -> str:
    shown = [f"{run} has {', '.join(map(str, sorted(steps)[:3]))}, …" for run, steps in list(sampled.items())[:3]]
    return "; ".join(shown)
