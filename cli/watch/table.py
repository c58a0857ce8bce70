"""Draws a view for a screen of a given size; pure, so that any size can be looked at.

What does not fit goes in this order: columns from the right, then the layers that are best off, then alerts. How many
are missing is said each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...schemas import STALE_AFTER_SECONDS
from .view import OK, VALUES, Firing, Ingestion, Layer, View, badness, sorting

BARS = "▁▂▃▄▅▆▇█"
SPARK_MIN, SPARK_GOOD, SPARK_MAX = 8, 20, 60
"""A sparkline's cells: it is left out below the first, and further columns leave it the second."""
BETWEEN = 2
ALERTS_SHARE = 3
"""Alerts take at most this part of a screen's lines, `1 / ALERTS_SHARE`."""
SHORT = {
    "hard_rank": "hard", "soft_rank": "soft", "hard_utilization": "hard util", "soft_utilization": "soft util",
    "spectral_concentration": "conc", "effective_dimension": "eDim",
}  # fmt: skip
_LOGARITHMIC = ("rank", "utilization", "dimension", "variance")
_COLOURS = {OK: "green", "skipped": "dim", "incomplete": "yellow", "no record": "yellow", "stale": "yellow"}


class Column(NamedTuple):
    """One column of values beside the layer, its state and the sparkline."""

    title: str
    cell: Callable[[Layer], str]


def draw(view: View, now: float, width: int, height: int | None) -> RenderableType:
    """The view in at most `height` lines of `width` cells; all of it where height is None.

    Args:
        now: Unix time, for how long ago things were.
    """
    lines: list[RenderableType] = [_cut(_title(view), width)]
    lines += [_cut(Text(f"waiting: {what}", "yellow"), width) for what in view.waiting_for]
    if view.run_id is None:
        return Group(*lines)
    lines += [_cut(line, width) for line in _packed(_ingestion(view, now), width)]
    room = None if height is None else max(height - len(lines), 2)
    alerts = _alerts(view, width, room)
    lines += alerts
    if room is not None:
        room -= len(alerts)
    if view.layers and (room is None or room >= 3):
        lines += _table(view, width, room)
    return Group(*lines[:height])


def _title(view: View) -> Text:
    if view.run_id is None:
        return Text.assemble(("eigenwatch", "bold"), "  ", view.source)
    style = "green" if view.status in ("running", "finished") else "bold yellow"
    chosen = f" ({view.chosen})" if view.chosen else ""
    parts: list[str | tuple[str, str]] = [(view.run_id, "bold"), chosen, "  ", (view.status, style)]
    if view.step is not None:
        parts.append(f"  step {view.step}")
    if view.attempt:
        parts.append(f"  attempt {view.attempt}")
    if view.world_size:
        parts.append(f"  {_count(view.world_size, 'rank')}")
    parts.append(f"  {_count(len(view.layers), 'layer')}")
    if view.alerts:
        parts.append((f"  {_count(len(view.alerts), 'alert')}", "bold red"))
    return Text.assemble(*parts)


def _ingestion(view: View, now: float) -> list[Text]:
    """What there is to say of the telemetry itself."""
    told: Ingestion = view.ingestion
    parts: list[tuple[str, str]] = []
    if told.last_record_at is None:
        parts.append(("no record yet", "yellow"))
    else:
        ago = max(now - told.last_record_at, 0.0)
        late = ago > STALE_AFTER_SECONDS and view.status == "running"
        parts.append((f"last record {duration(ago)} ago", "bold yellow" if late else ""))
    if told.records_per_second is not None:
        parts.append((f"{told.records_per_second:.2g} records/s", ""))
    if told.complete_ratio is not None:
        ratio = math.floor(1000 * told.complete_ratio) / 10  # 99.99 % is not all
        parts.append((f"{ratio:g} % complete", "" if told.complete_ratio == 1 else "yellow"))
    if told.ranks_missing:
        parts.append((f"missing ranks {', '.join(map(str, told.ranks_missing))}", "yellow"))
    if told.latency_seconds is not None:
        parts.append((f"stored {duration(told.latency_seconds)} after its step", ""))
    if told.backlog_seconds is not None:
        parts.append((f"backlog {duration(told.backlog_seconds)}", "yellow" if told.backlog_seconds > 30 else ""))
    if told.shards_here is not None:
        away = told.shards_away or 0
        text = _count(told.shards_here, "shard") + (f", {away} away" if away else "")
        parts.append((text, "yellow" if away else ""))
    dropped = sorted((reason, count) for reason, count in told.dropped.items() if count)
    if dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped)
        parts.append((f"{sum(count for _, count in dropped)} dropped ({reasons})", "yellow"))
    else:
        parts.append(("none dropped", ""))
    if told.run_id_in_use:
        parts.append(("another job trains under this run id at the same time", "bold yellow"))
    return [Text(text, style) for text, style in parts]


def _packed(parts: list[Text], width: int) -> list[Text]:
    """In as few lines as they fit."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + 3 + part.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], " · ", part)
        else:
            lines.append(part)
    return lines


def _alerts(view: View, width: int, room: int | None) -> list[Text]:
    shown = sorted(view.alerts, key=lambda alert: (alert.severity != "critical", sorting(alert.series)))
    left = 0
    if room is not None and len(shown) > max(room // ALERTS_SHARE, 1):
        most = max(room // ALERTS_SHARE - 1, 0)
        left, shown = len(shown) - most, shown[:most]
    lines = [_alert(alert) if room is None else _cut(_alert(alert), width) for alert in shown]
    if left:
        lines.append(_cut(Text(f"{left} {'more alerts' if shown else 'alerts'}: eigenwatch query \"FROM alerts\"",
                               "red"), width))  # fmt: skip
    return lines


def _alert(alert: Firing) -> Text:
    since = "" if alert.since_step is None else f" since step {alert.since_step}"
    style = "bold red" if alert.severity == "critical" else "yellow"
    return Text.assemble((f"{alert.kind} layer {alert.series.name}{since}", style), f": {alert.reason}")


def _table(view: View, width: int, room: int | None) -> list[RenderableType]:
    """Heading and rows, and a line about what is hidden."""
    layers = view.layers
    hidden = 0
    if room is not None and len(layers) > room - 2:
        most = max(room - 2, 0)
        hidden, layers = len(layers) - most, sorted(layers, key=badness)[:most]
    metric = view.metric
    names = [_short(layer.series.name, 14) for layer in layers]
    states = [_short(", ".join(layer.states), 24) for layer in layers]
    widest = [max(map(cell_len, [title, *cells])) for title, cells in (("layer", names), ("state", states))]
    left = width - sum(widest) - BETWEEN
    columns = [_column(metric), *(_column(name) for name in VALUES if name != metric)]
    columns += [Column("D", lambda layer: _whole(layer.width)), Column("step", lambda layer: _whole(layer.step))]
    fitting: list[tuple[Column, list[str]]] = []
    for column in columns:
        cells = [column.cell(layer) for layer in layers]
        needed = max(map(cell_len, [column.title, *cells])) + BETWEEN
        if left - needed < (SPARK_GOOD + BETWEEN if fitting else 0):
            break
        left -= needed
        fitting.append((column, cells))
    longest = max((len(layer.history) for layer in layers), default=0)
    spark = min(left - BETWEEN, max(longest, SPARK_MIN), SPARK_MAX)
    scale = Scale.over(metric, layers, spark) if spark >= SPARK_MIN else None
    table = Table(box=None, pad_edge=False, padding=(0, BETWEEN, 0, 0), header_style="bold", collapse_padding=True)
    table.add_column("layer", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column, _ in fitting[:1]:
        table.add_column(column.title, justify="right", no_wrap=True)
    if scale is not None:
        table.add_column("", no_wrap=True)
    for column, _ in fitting[1:]:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row, layer in enumerate(layers):
        style = _COLOURS.get(layer.states[0], "bold red")
        cells = [cells[row] for _, cells in fitting]
        sparkline = [] if scale is None else [Text(scale.sparkline(layer.history, spark), style)]
        table.add_row(Text(names[row]), Text(states[row], style), *cells[:1], *sparkline, *cells[1:])
    said = [f"{hidden} layers hidden" + (", better off than these" if layers else "")] if hidden else []
    said += [] if scale is None else [f"{metric} {scale.caption}"]
    return [table, _cut(Text("; ".join(said), "dim"), width)] if said else [table]


class Scale(NamedTuple):
    """One scale for all sparklines of a screen, so that layers can be compared."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, metric: str, layers: list[Layer], samples: int) -> Scale:
        """From the least to the most that is shown; logarithmic for ranks and utilizations, as in the paper."""
        shown = [value for layer in layers for value in layer.history[-samples:] if value is not None]
        logarithmic = any(word in metric for word in _LOGARITHMIC) and any(value > 0 for value in shown)
        if logarithmic:
            shown = [value for value in shown if value > 0]
        return cls(min(shown, default=0.0), max(shown, default=0.0), logarithmic)

    @property
    def caption(self) -> str:
        return f"{BARS[0]} {number(self.low)} … {BARS[-1]} {number(self.high)}{', log' if self.logarithmic else ''}"

    def sparkline(self, history: list[float | None], samples: int) -> str:
        """The last samples, the newest at the right; a dot where there is no value."""
        return "".join("·" if value is None else BARS[self._bar(value)] for value in history[-samples:]).rjust(samples)

    def _bar(self, value: float) -> int:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / (high - low) if high > low else 0.5
        return min(max(round(share * (len(BARS) - 1)), 0), len(BARS) - 1)


def duration(seconds: float) -> str:
    """In one unit, as a person would say it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def _column(name: str) -> Column:
    return Column(SHORT.get(name, name.replace("_", " ")), lambda layer: number(layer.values.get(name)))


def _whole(value: int | None) -> str:
    return "–" if value is None else str(value)


def _count(many: int, what: str) -> str:
    return f"{many} {what}" if many == 1 else f"{many} {what}s"


def _short(text: str, cells: int) -> str:
    return text if len(text) <= cells else text[: max(cells - 1, 0)] + "…"


def _cut(line: Text, width: int) -> Text:
    line = line.copy()
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line
