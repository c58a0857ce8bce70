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

import pyarrow.dataset as ds

from ..schemas import RunDescription, table_folder
from ..schemas.delivery import Opened
from .open_records import Launch
from .snapshot import RunState
from .writer import StoreWriter

log = logging.getLogger("eigenwatch.aggregator")

LOST_SECONDS = 3600.0
"""A run of which no rank was heard for this long is lost. Long, so that the staleness alert comes first."""
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
            owners = {layer.layer: self._shard_names[layer.layer % len(self._shard_names)] for layer in run.layers}
            return Opened(launch.attempt, owners)

    def heartbeat(self, run_id: str, attempt: int, rank: int, dropped: dict[str, int]) -> None:
        """A rank lives; `dropped` is what it has lost so far by reason."""
        with self._lock:
            launch = self._launches.get((run_id, attempt))
            if launch is not None:
                launch.heard_at = time.monotonic()
                launch.dropped[rank] = dropped

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
        """Launches under way; those not heard of for long are ended first."""
        with self._lock:
            for launch in list(self._launches.values()):
                if time.monotonic() - launch.heard_at > LOST_SECONDS:
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
            ]

    def ended(self) -> list[Launch]:
        """Launches that ended lately."""
        with self._lock:
            return list(self._ended)

    def _open(self, run: RunDescription) -> _Launch:
        attempt, known = self._attempt_of(run)
        for earlier in [one for one in self._launches.values() if one.run.run_id == run.run_id]:
            log.warning("run %s was started again; attempt %d ends", run.run_id, earlier.attempt)
            self._end(earlier, "lost")
        launch = _Launch(
            run=run,
            attempt=attempt,
            started_at=datetime.now(UTC),
            heard_at=time.monotonic(),
            unfinished=set(range(run.world_size)),
        )
        self._launches[(run.run_id, attempt)] = launch
        if not known:
            self._write(launch)
        return launch

    def _attempt_of(self, run: RunDescription) -> tuple[int, bool]:
        """The attempt of this launch, and whether the store knows it."""
        folder = table_folder(self._writer.store, run.run_id, "runs")
        if not folder.is_dir():
            return 0, False
        table = ds.dataset(folder, format="parquet").to_table(["attempt", "launch_id"])
        attempts = dict(zip(table["launch_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))
        if run.launch_id in attempts:
            return attempts[run.launch_id], True
        return max(attempts.values(), default=-1) + 1, False

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
        except OSError as error:
            log.error("run %s: its row could not be written: %s", run.run_id, error)
