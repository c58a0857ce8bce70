"""The aggregator in the training process: no Ray, one rank; for tests and notebooks.

The same coordinator and shard as in the cluster, called directly. It solves on the CPU: a failed solve on a GPU could
poison the training's own process.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemas import RunDescription
from ..schemas.delivery import PushReply
from .config import ShardLimits, SolverConfig
from .coordinator import Coordinator
from .exporter import Endpoint
from .shard import Shard
from .snapshot import Snapshot, counted_by

_SHARD = "shard-0"


class InlineAggregator:
    """What the agent's inline hand-over speaks to; found by its entry point."""

    def __init__(self, *, store: str, metrics_port: int | None) -> None:
        self._coordinator = Coordinator(store, [_SHARD])
        self._shard = Shard(store, SolverConfig(device="cpu"), ShardLimits())
        self._endpoint = None if metrics_port is None else Endpoint(self._snapshot, "127.0.0.1", metrics_port)
        self.metrics_url = self._endpoint.url if self._endpoint is not None else None

    def open(self, run: RunDescription) -> int:
        """Announces the run; returns its attempt."""
        attempt = self._coordinator.open_run(run.to_wire()).attempt
        self._shard.open_run(run.to_wire(), attempt)
        return attempt

    def push(self, header: dict[str, Any], mean: NDArray[np.float64], payload: NDArray[Any]) -> PushReply:
        """Merges a partial; waits while the shard is busy, which holds up the outbox's thread only."""
        while (reply := self._shard.push(header, mean, payload)).status == "busy":
            time.sleep(0.05)
        return reply

    def heartbeat(self, run_id: str, attempt: int, rank: int, dropped: dict[str, int]) -> None:
        self._coordinator.heartbeat(run_id, attempt, rank, dropped)

    def finish(self, run_id: str, attempt: int, rank: int, dropped: dict[str, int], timeout_seconds: float) -> int:
        """Writes everything and ends; returns how many partials are not durable."""
        undurable = self._shard.close(timeout_seconds) + self._shard.given_up
        self._snapshot()  # which tells the coordinator what was counted
        self._coordinator.finish(run_id, attempt, rank, True, dropped)
        if self._endpoint is not None:
            self._endpoint.close()
        return undurable

    def _snapshot(self) -> Snapshot:
        shard = self._shard.snapshot(self._coordinator.ended())
        return Snapshot(time.time(), self._coordinator.running(counted_by([shard])), [shard])
