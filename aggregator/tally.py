"""The tally: what a shard has counted, by run, since it started; the endpoint shows it. The shard guards it."""

from __future__ import annotations

from collections import Counter

from .snapshot import LATENCY_BOUNDS, SOLVE_BOUNDS, Histogram, RunCounters


class Tally:
    """Counters of partials and records, and how long they took."""

    def __init__(self) -> None:
        self.solve_seconds = Histogram.empty(SOLVE_BOUNDS)
        self.latency_seconds = Histogram.empty(LATENCY_BOUNDS)
        self._received: Counter[str] = Counter()
        self._messages: Counter[str] = Counter()
        self._duplicated: Counter[str] = Counter()
        self._written: Counter[str] = Counter()
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        """Of `_dropped`, those that were turned away."""

    @property
    def runs(self) -> set[str]:
        """Of which something was counted."""
        return set(self._received) | {run for run, _ in self._dropped}

    def received(self, run_id: str, partials: int) -> None:
        """One message brought so many partials."""
        self._received[run_id] += partials
        self._messages[run_id] += 1

    def duplicated(self, run_id: str, partials: int) -> None:
        self._duplicated[run_id] += partials

    def dropped(self, run_id: str, reason: str, partials: int) -> None:
        self._dropped[(run_id, reason)] += partials

    def refused(self, run_id: str, reason: str) -> int:
        """One partial was; how many so far, of this run and for this reason."""
        self._dropped[(run_id, reason)] += 1
        self._refused[(run_id, reason)] += 1
        return self._refused[(run_id, reason)]

    def solved(self, seconds: float) -> None:
        self.solve_seconds = self.solve_seconds.observe(seconds)

    def written(self, run_id: str, latencies_seconds: list[float], records: int) -> None:
        """So many records are durable; latencies are those that are to be shown."""
        for seconds in latencies_seconds:
            self.latency_seconds = self.latency_seconds.observe(seconds)
        self._written[run_id] += records

    def of(self, run_id: str) -> RunCounters:
        dropped = tuple((reason, n) for (owner, reason), n in sorted(self._dropped.items()) if owner == run_id)
        return RunCounters(
            self._received[run_id], self._duplicated[run_id], self._written[run_id], dropped, self._messages[run_id]
        )

    def forget(self, runs: set[str]) -> None:
        for counter in (self._received, self._messages, self._duplicated, self._written):
            for run in runs:
                del counter[run]
        for by_reason in (self._dropped, self._refused):
            for name in [one for one in by_reason if one[0] in runs]:
                del by_reason[name]
