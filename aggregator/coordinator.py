"""The coordinator: knows which launches of which runs are under way, and which shard owns which layer.

It sees no partials. Couriers open a launch here, say every few seconds that their rank lives, and finish. It writes the
`runs` table, from which it also learns, after a restart, which attempt a launch has.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ..schemas import RunDescription
from ..schemas.delivery import Opened
from .ownership import owners
from .snapshot import Launch, RunState
from .stored import stored_attempts
from .writer import StoreWriter, UnwritableRows

log = logging.getLogger("eigenwatch.aggregator")

LOST_SECONDS = 3600.0
"""A run of which no rank was heard for this long is lost. Long, so that the staleness alert comes first."""
REPLACED_SECONDS = 60.0
"""The same for a launch whose run was started again."""
REMEMBERED_ENDED = 1000


@dataclass(slots=True)
class _Launch:
    run: RunDescription
    attempt: int
    started_at: datetime
    heard_at: float
    unfinished: set[int]
    clean: bool = True
    status: str = "running"
    dropped: dict[int, dict[str, int]] = field(default_factory=dict)
    """Losses by rank and reason."""


class Coordinator:
    """The registry of launches. Methods are called from several threads."""

    def __init__(self, store: str, shard_names: list[str]) -> None:
        self._writer = StoreWriter(store)
        self._shard_names = shard_names
        self._launches: dict[Launch, _Launch] = {}
        self._ended: deque[Launch] = deque(maxlen=REMEMBERED_ENDED)
        self._written_at = datetime.fromtimestamp(0, UTC)
        self._lock = threading.RLock()

    def open_run(self, run_wire: dict[str, Any]) -> Opened:
        """Opens a launch; each of its ranks asks, and all get the same answer. Idempotent."""
        run = RunDescription.from_wire(run_wire)
        with self._lock:
            launch = next(
                (one for one in self._launches.values() if one.run.launch_id == run.launch_id), None
            ) or self._open(run)
            launch.heard_at = time.monotonic()
            return Opened(launch.attempt, owners(run, self._shard_names))

    def heartbeat(self, run_id: str, attempt: int, rank: int, dropped: dict[str, int]) -> bool:
        """A rank lives; `dropped` is what it has lost so far by reason. False if the launch must be opened again."""
        with self._lock:
            launch = self._launches.get((run_id, attempt))
            if launch is None:
                return False
            launch.heard_at = time.monotonic()
            launch.dropped[rank] = dropped
            return True

    def finish(self, run_id: str, attempt: int, rank: int, clean: bool, dropped: dict[str, int]) -> None:
        """A rank sends nothing more: it closed (`clean`) or died. The last one ends the launch."""
        with self._lock:
            launch = self._launches.get((run_id, attempt))
            if launch is None:
                return
            launch.dropped[rank] = dropped
            launch.clean &= clean
            launch.unfinished.discard(rank)
            if not launch.unfinished:
                self._end(launch, "finished" if launch.clean else "lost")

    def running(self) -> list[RunState]:
        """The newest launch of each run under way; launches not heard of for long are ended first.

        An earlier launch of a run that was started again may still have partials to deliver: it stays open, unshown.
        """
        with self._lock:
            newest: dict[str, int] = {}
            for run_id, attempt in self._launches:
                newest[run_id] = max(attempt, newest.get(run_id, 0))
            for launch in list(self._launches.values()):
                replaced = launch.attempt < newest[launch.run.run_id]
                if time.monotonic() - launch.heard_at > (REPLACED_SECONDS if replaced else LOST_SECONDS):
                    self._end(launch, "lost")
            return [
                RunState(
                    launch.run.run_id,
                    launch.attempt,
                    launch.run.world_size,
                    len(launch.run.layers),
                    dict(sum((Counter(one) for one in launch.dropped.values()), Counter[str]())),
                )
                for launch in self._launches.values()
                if launch.attempt == newest[launch.run.run_id]
            ]

    def ended(self) -> list[Launch]:
        """Launches that ended lately."""
        with self._lock:
            return list(self._ended)

    def _open(self, run: RunDescription) -> _Launch:
        launch = _Launch(
            run=run,
            attempt=self._attempt_of(run),
            started_at=datetime.now(UTC),
            heard_at=time.monotonic(),
            unfinished=set(range(run.world_size)),
        )
        key = (run.run_id, launch.attempt)
        self._launches[key] = launch
        if key in self._ended:
            self._ended.remove(key)
        self._write(launch)
        return launch

    def _attempt_of(self, run: RunDescription) -> int:
        """The attempt that the store knows for this launch, else the next one of the run."""
        attempts = stored_attempts(self._writer.store, run.run_id)
        return attempts.get(run.launch_id, max(attempts.values(), default=-1) + 1)

    def _end(self, launch: _Launch, status: str) -> None:
        launch.status = status
        self._write(launch, ended_at=datetime.now(UTC))
        del self._launches[(launch.run.run_id, launch.attempt)]
        self._ended.append((launch.run.run_id, launch.attempt))

    def _write(self, launch: _Launch, ended_at: datetime | None = None) -> None:
        self._written_at = max(datetime.now(UTC), self._written_at + timedelta(microseconds=1))
        run = launch.run
        row = {
            "attempt": launch.attempt,
            "launch_id": run.launch_id,
            "status": launch.status,
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
            "started_at": launch.started_at,
            "ended_at": ended_at,
            "written_at": self._written_at,
        }
        try:
            self._writer.append("runs", run.run_id, [row])
        except (OSError, UnwritableRows) as error:
            log.error("run %s: its row could not be written: %s", run.run_id, error)
