"""The points of a law: each run at its width, the median over its layers, with their spread as the error bar.

From records to a point in three medians: over the experts of a layer at a step, over the steps of the window, over
the layers. Runs are the replicates: two runs of one width are two points, the layers of one run are not points of
their own, since they were trained together.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..schemas import TABLES
from .session import History

METRICS = ("hard_rank", "soft_rank", "effective_dimension", "hard_utilization", "soft_utilization")
LOW_SHARE, HIGH_SHARE = 0.5, 1.25
"""A layer uses little or much of its width below or above these multiples of its run's median layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which records a law is fitted to."""

    runs: tuple[str, ...] = ()
    """Run ids, or patterns such as `llama-*`; all runs of the store where empty."""
    site: str = "post"
    steps: tuple[int, int] | None = None
    """The window, both ends included; where None, the last part of each layer's samples."""
    last: float = 0.1
    """That part, in (0, 1]; one sample at least."""
    corrected: bool = False
    """The ranks without their finite-sample bias, and all that follows from them."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps must be (from, to) with from ≤ to, got {self.steps}")
        if not 0 < self.last <= 1:
            raise ValueError(f"last must lie in (0, 1], such as 0.1 for the last tenth, got {self.last:g}")


class LayerUse(NamedTuple):
    """How one layer of one run used its width in the window: medians over its samples, None where all are null."""

    run_id: str
    layer: int
    width: int
    hard_rank: float | None
    soft_rank: float | None
    effective_dimension: float | None
    hard_utilization: float | None
    soft_utilization: float | None
    effective_dimension_before: float | None
    """In as many samples before the window."""
    samples: int
    low_samples: int
    """In how many of them the layer used less than half the share of its width that the run's median layer uses."""
    high_samples: int
    """In how many it used more than one and a quarter of that share."""
    low_since: int | None
    """The first step from which on it was low in every sample up to the window's end."""
    first_step: int
    last_step: int
    tokens_per_width: float
    records: int
    incomplete: int
    unusable: int
    """Records without ranks: not finite, or a corrected rank that the sample does not determine."""

    @property
    def share(self) -> float | None:
        """Of the width."""
        return None if self.effective_dimension is None else self.effective_dimension / self.width


class Spread(NamedTuple):
    """A median over layers and its error bar, their quartiles."""

    median: float
    lower: float
    upper: float


class Point(NamedTuple):
    """A run at a width. A run whose layers have several widths is a point at each."""

    run_id: str
    width: int
    layers: int
    tokens_per_width: float
    last_step: int
    values: dict[str, Spread]
    """By metric; a metric that every layer lacks is not there."""


def layer_uses(history: History, selection: Selection) -> list[LayerUse]:
    """The layers of the selected runs, by run and layer.

    Raises:
        ValueError: a run or pattern fits nothing, or nothing was recorded in the window.
    """
    runs = selected_runs(history, selection)
    rows = _layer_rows(history, runs, selection)
    if not rows:
        window = "" if selection.steps is None else f" in steps {selection.steps[0]} to {selection.steps[1]}"
        raise ValueError(f"no records of site {selection.site!r}{window} in {_named(runs)}: choose other steps or runs")
    return rows


def _layer_rows(history: History, runs: Sequence[str], selection: Selection) -> list[LayerUse]:
    return [LayerUse(**row) for row in history.query(*_layers_sql(runs, selection)).to_pylist()]


def width_points(layers: Iterable[LayerUse]) -> list[Point]:
    """A point for each run and width, ascending by width; without those in which no layer has a rank."""
    together: dict[tuple[int, str], list[LayerUse]] = {}
    for layer in layers:
        together.setdefault((layer.width, layer.run_id), []).append(layer)
    points = []
    for (width, run_id), found in sorted(together.items()):
        values = {metric: _spread([getattr(layer, metric) for layer in found]) for metric in METRICS}
        known = {metric: spread for metric, spread in values.items() if spread is not None}
        if known:
            tokens = float(np.median([layer.tokens_per_width for layer in found]))
            last = max(layer.last_step for layer in found)
            points.append(Point(run_id, width, len(found), tokens, last, known))
    return points


def points_of(history: History, run_ids: Sequence[str], site: str = "post") -> list[Point]:
    """The points of these runs in the window that a fit takes if nothing else is said; of skipped records there is
    none."""
    selection = Selection(runs=tuple(run_ids), site=site)
    return width_points(_layer_rows(history, selected_runs(history, selection), selection))


def selected_runs(history: History, selection: Selection) -> list[str]:
    """The ids of the runs that the selection names, sorted.

    Raises:
        ValueError: a name fits no run that has records; the message has those that there are.
    """
    asked = selection.runs or ("*",)
    if not any(character in name for name in asked for character in "*?["):
        rows = history.query(
            f"SELECT DISTINCT run_id FROM records_raw WHERE run_id IN ({_places(asked)}) ORDER BY run_id", list(asked)
        )
        if rows.num_rows == len(set(asked)):  # the store's other runs are not even listed
            return list(rows.column("run_id").to_pylist())
    found = history.query("SELECT DISTINCT run_id FROM records_raw ORDER BY run_id").column("run_id").to_pylist()
    chosen: set[str] = set()
    for pattern in asked:
        fitting = fnmatch.filter(found, pattern)
        if not fitting:
            raise ValueError(f"no run {pattern!r} has records; the store has {_named(found)}")
        chosen.update(fitting)
    return sorted(chosen)


def run_tags(history: History, runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """The tags with which each run's newest attempt was attached."""
    rows = history.query(
        f"SELECT run_id, arg_max(tags, attempt) AS tags FROM runs WHERE run_id IN ({_places(runs)}) GROUP BY run_id",
        list(runs),
    ).to_pylist()
    return {run: {} for run in runs} | {row["run_id"]: dict(row["tags"]) for row in rows}


def run_values(history: History, runs: Sequence[str], column: str) -> dict[str, str | None]:
    """What a column of `runs`, or else the tag of that name, says of each run's newest attempt; None where nothing.

    Raises:
        ValueError: there is neither; the message has the columns and tags that there are.
    """
    columns = TABLES["runs"].names
    if column in columns:
        rows = history.query(
            f'SELECT run_id, CAST(arg_max("{column}", attempt) AS VARCHAR) AS value FROM runs '
            f"WHERE run_id IN ({_places(runs)}) GROUP BY run_id",
            list(runs),
        ).to_pylist()
        return dict.fromkeys(runs) | {row["run_id"]: row["value"] for row in rows}
    tags = run_tags(history, runs)
    known = sorted(set().union(*tags.values()))
    if column not in known:
        raise ValueError(
            f"these runs have no tag {column!r}, and runs has no such column: tags {', '.join(known) or 'none'}; "
            f"columns {', '.join(columns)}"
        )
    return {run: tags[run].get(column) for run in runs}


def samples_sql(runs: Sequence[str], selection: Selection) -> tuple[str, list[Any]]:
    """SELECT of one row for each run, layer, width and step, experts by their median; and its parameters.

    Utilizations and effective dimension follow from the two ranks here, so that they are corrected with them.
    """
    kind = "_corrected" if selection.corrected else ""
    until = "" if selection.steps is None else "AND step <= ?"
    sql = f"""
        SELECT run_id, layer, width, step, median(h) AS hard_rank, median(s) AS soft_rank,
            median(e) AS effective_dimension, median(hu) AS hard_utilization, median(su) AS soft_utilization,
            median(tokens_per_width) AS tokens_per_width, count(*) AS records,
            count(*) FILTER (NOT complete) AS incomplete, count(*) FILTER (e IS NULL) AS unusable
        FROM (
            SELECT run_id, layer, width, step, tokens_per_width, complete,
                CASE WHEN finite AND isfinite(hard_rank{kind}) AND hard_rank{kind} > 0 THEN hard_rank{kind} END AS h,
                CASE WHEN finite AND isfinite(soft_rank{kind}) AND soft_rank{kind} > 0 THEN soft_rank{kind} END AS s,
                (h - 1) / greatest(width - 1, 1) AS hu,
                (s - 1) / greatest(width - 1, 1) AS su,
                CASE WHEN hu > 0 AND su > 0 THEN 1 + (width - 1) * 2 * hu * su / (hu + su)
                    WHEN h IS NOT NULL AND s IS NOT NULL THEN 1 END AS e
            FROM records
            WHERE run_id IN ({_places(runs)}) AND site = ? AND solver IS DISTINCT FROM 'skipped' {until}
        )
        GROUP BY run_id, layer, width, step"""
    return sql, [*runs, selection.site, *([] if selection.steps is None else [selection.steps[1]])]


def _layers_sql(runs: Sequence[str], selection: Selection) -> tuple[str, list[Any]]:
    samples, parameters = samples_sql(runs, selection)
    if selection.steps is None:
        size, bound = "ceil(? * count(*) OVER series)", selection.last
    else:
        size, bound = "count(*) FILTER (step >= ?) OVER series", selection.steps[0]
    medians = ", ".join(f"median({metric}) FILTER (age <= size) AS {metric}" for metric in METRICS)
    sql = f"""
        WITH sample AS MATERIALIZED (
            SELECT *, effective_dimension / width AS share, {size} AS size,
                row_number() OVER (PARTITION BY run_id, layer, width ORDER BY step DESC) AS age
            FROM ({samples})
            WINDOW series AS (PARTITION BY run_id, layer, width)
        ), layer_median AS (
            SELECT run_id, layer, width, {medians},
                median(effective_dimension) FILTER (age > size AND age <= 2 * size) AS effective_dimension_before,
                count(*) FILTER (age <= size) AS samples,
                min(step) FILTER (age <= size) AS first_step, max(step) FILTER (age <= size) AS last_step,
                median(tokens_per_width) FILTER (age <= size) AS tokens_per_width,
                CAST(sum(records) FILTER (age <= size) AS BIGINT) AS records,
                CAST(sum(incomplete) FILTER (age <= size) AS BIGINT) AS incomplete,
                CAST(sum(unusable) FILTER (age <= size) AS BIGINT) AS unusable
            FROM sample GROUP BY run_id, layer, width HAVING any_value(size) > 0
        ), typical AS (
            SELECT run_id, median(effective_dimension / width) AS share FROM layer_median GROUP BY run_id
        ), judged AS (
            SELECT sample.*, coalesce(sample.share < {LOW_SHARE} * typical.share, false) AS low,
                coalesce(sample.share > {HIGH_SHARE} * typical.share, false) AS high,
                max(step) FILTER (NOT low) OVER (PARTITION BY run_id, layer, width) AS not_low_at
            FROM sample JOIN typical USING (run_id)
        ), counted AS (
            SELECT run_id, layer, width, count(*) FILTER (low AND age <= size) AS low_samples,
                count(*) FILTER (high AND age <= size) AS high_samples,
                min(step) FILTER (step > coalesce(not_low_at, -1)) AS low_since
            FROM judged GROUP BY run_id, layer, width
        )
        SELECT {", ".join(LayerUse._fields)} FROM layer_median JOIN counted USING (run_id, layer, width)
        ORDER BY run_id, layer, width"""
    return sql, [bound, *parameters]


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    lower, median, upper = np.quantile(known, (0.25, 0.5, 0.75))
    return Spread(float(median), float(lower), float(upper))


def _places(values: Sequence[object]) -> str:
    """Placeholders; not `IN (SELECT unnest(?))`, through which DuckDB would open the files of every run."""
    return ", ".join("?" * len(values))


def _named(names: Sequence[str], shown: int = 10) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "") or "no runs"
