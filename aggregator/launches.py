"""A launch that is under way, as the coordinator knows it, and its row of `runs`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..schemas import RunDescription
from .recovery import StoredLaunch, kept_columns
from .snapshot import RunCounters


@dataclass(slots=True)
class OpenLaunch:
    """Changed by the coordinator only, under its lock."""

    run: RunDescription
    attempt: int
    started_at: datetime
    heard_at: float
    """On the monotonic clock."""
    ended: dict[int, bool] = field(default_factory=dict)
    """Ranks that send nothing more, and whether they said goodbye rather than died."""
    status: str = "running"
    dropped: dict[int, dict[str, int]] = field(default_factory=dict)
    """Losses by rank and reason."""
    heard: bool = True
    """False while it is known from the store only."""
    in_use: bool = False
    """Whether another launch of its run id was found to train at the same time."""
    written: dict[str, Any] = field(default_factory=dict)
    """What its newest row keeps for a coordinator that starts again."""
    next_row: float = 0.0
    """When the next row may be written that says nothing else; on the monotonic clock."""

    @classmethod
    def taken_up(cls, stored: StoredLaunch, silent_seconds: float) -> OpenLaunch:
        """One of which nobody but the store has told yet, which was silent for so long."""
        return cls(
            run=stored.run,
            attempt=stored.attempt,
            started_at=stored.started_at,
            heard_at=time.monotonic() - silent_seconds,
            ended=stored.ended,
            dropped=stored.losses,
            heard=False,
            in_use=stored.run_id_in_use,
            written=kept_columns(stored.counters, stored.losses, stored.ended),
        )

    @property
    def key(self) -> tuple[str, int]:
        return self.run.run_id, self.attempt

    def speaks(self) -> None:
        self.heard, self.heard_at = True, time.monotonic()

    def lost(self, rank: int, dropped: dict[str, int]) -> None:
        """Notes what a rank has lost so far, by reason. It never falls: what a dead job left is delivered by a courier
        that does not know it."""
        known = self.dropped.get(rank, {})
        reasons = known.keys() | dropped.keys()
        self.dropped[rank] = {reason: max(known.get(reason, 0), dropped.get(reason, 0)) for reason in reasons}

    def kept(self, counters: dict[str, RunCounters]) -> dict[str, Any]:
        return kept_columns(counters, self.dropped, self.ended)

    def row(self, kept: dict[str, Any], written_at: datetime) -> dict[str, Any]:
        """Of `runs`."""
        run = self.run
        return {
            "attempt": self.attempt,
            "launch_id": run.launch_id,
            "status": self.status,
            "world_size": run.world_size,
            "layers": [
                {
                    "layer": one.layer,
                    "site": one.site,
                    "expert": one.expert,
                    "name": one.name,
                    "width": one.width,
                }
                for one in run.layers
            ],
            "tags": list(run.tags.items()),
            "started_at": self.started_at,
            "ended_at": None if self.status == "running" else written_at,
            "run_id_in_use": self.in_use,
            **kept,
            "written_at": written_at,
        }
