"""What the watch shows: one immutable picture of a run, whatever it was read from.

A source (`stored`, `scraped`) makes it on the reading thread, `table` draws it on the main one; `--json` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ...schemas import STALE_AFTER_SECONDS

VALUES = (
    "hard_rank",
    "soft_rank",
    "hard_utilization",
    "soft_utilization",
    "spectral_concentration",
    "effective_dimension",
)
"""Shown of every layer's last record; the metric that is watched has its history too."""
RATE_SECONDS = 60.0
"""Records per second are counted over this long."""
HISTORY_SAMPLES = 120
"""Kept of every layer: as many as the widest sparkline shows."""

COLLAPSE, NOT_FINITE, STALE, NO_RECORD, INCOMPLETE, SKIPPED, OK = (
    "collapse", "not finite", "stale", "no record", "incomplete", "skipped", "ok",
)  # fmt: skip


class Series(NamedTuple):
    """One layer's stream of records."""

    layer: int
    site: str
    expert: int | None

    @property
    def name(self) -> str:
        """In few characters: the site only where it is not the usual one."""
        site = "" if self.site == "post" else f" {self.site}"
        return f"{self.layer}{site}" + ("" if self.expert is None else f" e{self.expert}")


class Layer(NamedTuple):
    """A row of the table."""

    series: Series
    states: tuple[str, ...]
    """What is wrong with it, the worst first; or `ok` alone."""
    width: int | None
    step: int | None
    """Of the last record; None before the first."""
    values: dict[str, float | None]
    history: list[float | None]
    """The watched metric, oldest first."""
    written_at: float | None
    """Unix time of the last record."""


class Firing(NamedTuple):
    """An alert that is active."""

    series: Series
    kind: str
    severity: str
    since_step: int | None
    """None where the source does not say."""
    reason: str


class Ingestion(NamedTuple):
    """How the telemetry itself does; None where the source does not say."""

    last_record_at: float | None
    """Unix time."""
    records_per_second: float | None
    complete_ratio: float | None
    """Records that every expected rank contributed to, among those looked at."""
    ranks_missing: tuple[int, ...] = ()
    dropped: dict[str, int] = {}  # noqa: RUF012
    """Partials that were lost or refused, by reason."""
    latency_seconds: float | None = None
    """From the capture of the last record to its being stored."""
    backlog_seconds: float | None = None
    shards_here: int | None = None
    shards_away: int | None = None
    run_id_in_use: bool = False


class View(NamedTuple):
    """A run as it is now."""

    source: str
    run_id: str | None
    """None while there is no run to show."""
    status: str
    attempt: int | None
    world_size: int | None
    metric: str
    layers: list[Layer]
    alerts: list[Firing]
    ingestion: Ingestion
    chosen: str | None = None
    """Why it is this run, where none was named."""
    waiting_for: tuple[str, ...] = ()
    """Why this is not what is there now."""

    @property
    def step(self) -> int | None:
        return max((layer.step for layer in self.layers if layer.step is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "step": self.step,
            "layers": [_flat(layer) | {"history": layer.history} for layer in self.layers],
            "alerts": [_flat(alert) for alert in self.alerts],
            "ingestion": self.ingestion._asdict(),
        }


class Source(Protocol):
    """Where views come from; called by one thread."""

    def read(self, now: float) -> View:
        """The newest view. Whatever may pass (no store yet, no answer) is no error: `waiting_for` says so.

        Raises:
            SeveralRuns: see there.
        """

    def close(self) -> None: ...


class SeveralRuns(ValueError):
    """More than one run is under way, and none was named."""

    def __init__(self, runs: Sequence[str]) -> None:
        self.runs = sorted(runs)
        super().__init__(f"{len(runs)} runs are under way ({', '.join(self.runs)}): name one of them")


def waiting(source: str, metric: str, what: str) -> View:
    """The view of nothing yet."""
    return View(source, None, "waiting", None, None, metric, [], [], Ingestion(None, None, None), None, (what,))


def states_of(
    *, alerts: Sequence[Firing], finite: bool, complete: bool, skipped: bool, idle_seconds: float | None
) -> tuple[str, ...]:
    """What is wrong with a layer, the worst first.

    Args:
        alerts: that fire on it.
        idle_seconds: since its last record, where more are expected; else None.
    """
    found = [*dict.fromkeys(alert.kind for alert in alerts)]
    found += [NOT_FINITE] if not finite and "non_finite" not in found else []
    found += [STALE] if idle_seconds is not None and idle_seconds > STALE_AFTER_SECONDS and STALE not in found else []
    found += [INCOMPLETE] if not complete and INCOMPLETE not in found else []
    found += [SKIPPED] if skipped else []
    return tuple(found) or (OK,)


def badness(layer: Layer) -> tuple[int, float, Series]:
    """Sorts the worst layer first: what is wrong with it, then how little of its width it uses."""
    ranks = {OK: 5, SKIPPED: 4, INCOMPLETE: 3, NO_RECORD: 2, STALE: 2, NOT_FINITE: 1}
    rank = min(ranks.get(state, 0) for state in layer.states)
    used = layer.values.get("hard_utilization")
    return rank, 2.0 if used is None else used, sorting(layer.series)


def sorting(series: Series) -> Series:
    return series._replace(expert=-1 if series.expert is None else series.expert)


def _flat(named: Layer | Firing) -> dict[str, Any]:
    row = named._asdict()
    del row["series"]
    return {**named.series._asdict(), **row}
