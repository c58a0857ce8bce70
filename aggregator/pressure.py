"""Back-pressure: how far a shard that falls behind asks a run to stretch its cadence.

The measure is how long a closed record has waited for the solver. The answer is a power of two, so that cadences nest;
it rises while the shard stays behind, and falls after a calm time, which doubles each time it turned out too hopeful.
Couriers hear it with the fates of their partials, and the run's deciding rank announces the change ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

SETTLE_SECONDS = 60.0
"""After a change, until its effect shows: it is announced ahead, and what was sampled before is still to be solved."""
CALM_SECONDS = 300.0
MAX_CALM_SECONDS = 6 * 3600.0
MAX_STRETCH = 1 << 20


@dataclass(slots=True)
class _Run:
    stretch: int = 1
    changed_at: float = float("-inf")
    late_at: float = float("-inf")
    calm_seconds: float = CALM_SECONDS
    relaxed: bool = False
    """Whether the last change was for less."""


class Pressure:
    """What each run is asked for. Guarded by the shard's lock."""

    def __init__(self, behind_seconds: float) -> None:
        """`behind_seconds`: a record that has waited longer for the solver is late."""
        self._behind_seconds = behind_seconds
        self._runs: dict[str, _Run] = {}

    def stretch(self, run_id: str, behind_seconds: float, now: float) -> int:
        """What the run is asked for now.

        Args:
            run_id: whose.
            behind_seconds: how long the oldest of its closed records has waited to be solved.
            now: on any clock, the same for all calls.
        """
        if run_id not in self._runs and behind_seconds <= self._behind_seconds:
            return 1
        run = self._runs.setdefault(run_id, _Run())
        if behind_seconds > self._behind_seconds:
            run.late_at = now
            if now >= run.changed_at + SETTLE_SECONDS and run.stretch < MAX_STRETCH:
                if run.relaxed:
                    run.calm_seconds = min(2 * run.calm_seconds, MAX_CALM_SECONDS)
                run.stretch, run.changed_at, run.relaxed = 2 * run.stretch, now, False
        elif run.stretch > 1 and now >= max(run.changed_at, run.late_at) + run.calm_seconds:
            run.stretch, run.changed_at, run.relaxed = run.stretch // 2, now, True
        return run.stretch

    def forget(self, run_ids: set[str]) -> None:
        """Drops runs that have ended."""
        for run_id in run_ids & self._runs.keys():
            del self._runs[run_id]
