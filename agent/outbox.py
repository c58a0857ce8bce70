"""The outbox: where a training step leaves what it saw and goes on.

`put` runs on the training thread and returns at once, whatever the network, the disk or Ray do. One daemon thread
turns samples into partials and hands them over. What waits here is bounded; when it is full the oldest is dropped and
counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from ..schemas import PartialCovariance, RecordKey
from ..spectrum import Moments, trace_and_frobenius_sq
from .handover import Handover

log = logging.getLogger("eigenwatch.agent")

TICK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboxLimits:
    """What may wait in the training process and beside it."""

    memory_bytes: int = 1 << 30
    """Samples in this process that are not handed over yet; beyond it the oldest is dropped and counted."""
    spool_bytes: int = 2 << 30
    """Partials handed over whose records are not durable yet; beyond it the oldest is dropped and counted."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "spool_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one layer showed in one sampled step of this rank."""

    step: int
    layer: int
    site: str
    moments: Moments
    captured_at: float
    """Unix time in seconds."""

    @property
    def nbytes(self) -> int:
        return self.moments.scatter.nbytes + self.moments.mean.nbytes

    def to_partial(self, run_id: str, rank: int) -> PartialCovariance:
        """The partial, on the CPU. Its attempt is stamped on delivery, by whoever knows it."""
        scatter = self.moments.scatter.cpu()
        trace, frobenius_sq = trace_and_frobenius_sq(scatter, self.moments.width)
        finite = bool(np.isfinite(trace) and np.isfinite(frobenius_sq))
        return PartialCovariance(
            key=RecordKey(run_id, 0, self.step, self.layer, self.site, None),
            rank=rank,
            tokens=self.moments.tokens,
            mean=self.moments.mean.cpu().numpy(),
            scatter=scatter.numpy() if finite else np.empty(0, dtype=np.float32),
            trace=trace if finite else float("nan"),
            frobenius_sq=frobenius_sq if finite else float("nan"),
            captured_at=self.captured_at,
        )


class Outbox:
    """A bounded queue and the one thread that serves it."""

    def __init__(self, handover: Handover, run_id: str, rank: int, limits: OutboxLimits) -> None:
        self._run_id, self._rank, self._limits = run_id, rank, limits
        self._handover = handover
        self._queue: deque[Sample] = deque()
        self._queued_bytes = 0
        self._dropped: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        """On the monotonic clock, once closing."""
        self._in_flight = 0
        self._undelivered: int | None = None
        self._thread = threading.Thread(target=self._serve, name="eigenwatch-outbox", daemon=True)
        self._thread.start()

    def put(self, sample: Sample) -> None:
        """Takes over a sample; returns at once."""
        with self._changed:
            self._queue.append(sample)
            self._queued_bytes += sample.nbytes
            while self._queued_bytes > self._limits.memory_bytes and len(self._queue) > 1:
                self._queued_bytes -= self._queue.popleft().nbytes
                self._dropped["outbox_full"] += 1
            self._changed.notify()

    @property
    def dropped(self) -> dict[str, int]:
        """Partials lost so far in this rank, by reason."""
        return dict(self._dropped + self._handover.dropped)

    def close(self, timeout_seconds: float) -> int:
        """Waits until every record of this rank's partials is durable, at most `timeout_seconds`.

        Returns:
            How many partials are not known to be durable, those that were dropped included.
        """
        with self._changed:
            if self._deadline is None:
                self._deadline = time.monotonic() + timeout_seconds
            self._changed.notify()
        self._thread.join(timeout_seconds + 1.0)
        with self._changed:
            waiting = len(self._queue) + self._in_flight
            return (self._undelivered or 0) + waiting + sum(self.dropped.values())

    def _serve(self) -> None:
        last_tick = time.monotonic()
        while True:
            with self._changed:
                if not self._queue and self._deadline is None:
                    self._changed.wait(TICK_SECONDS)
                sample = self._queue.popleft() if self._queue else None
                self._in_flight = int(sample is not None)
                if sample is not None:
                    self._queued_bytes -= sample.nbytes
                deadline = self._deadline
            try:
                if sample is not None:
                    self._handover.send(sample.to_partial(self._run_id, self._rank))
                elif deadline is not None:
                    left = max(deadline - time.monotonic(), 0.0)
                    self._undelivered = self._handover.close(left, self.dropped)
                    return
                if time.monotonic() - last_tick >= TICK_SECONDS:
                    last_tick = time.monotonic()
                    self._handover.tick(self.dropped)
            except BaseException as error:  # noqa: BLE001 - this thread must outlive any single failure
                self._dropped["handover_error"] += 1
                if self._dropped["handover_error"] == 1:
                    log.warning("a partial could not be handed over: %s: %s", type(error).__name__, error)
                if sample is None and deadline is not None:
                    return
