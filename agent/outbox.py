"""The outbox: where a training step leaves what it saw and goes on.

`put` runs on the training thread and returns at once, whatever the network, the disk or Ray do. One daemon thread
turns samples into partials and hands them over. What waits here is bounded; when it is full the oldest is dropped and
counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..schemas import Origin, Partial, RecordKey, packed_length
from ..spectrum import partial_of, partial_of_nothing, samples_of
from .capture import Capture
from .handover import Handover
from .observation import Place

log = logging.getLogger("eigenwatch.agent")

TICK_SECONDS = 1.0
NICENESS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class OutboxLimits:
    """What may wait in the training process and beside it."""

    memory_bytes: int = 1 << 30
    """Samples in this process that are not handed over yet; beyond it the oldest is dropped and counted. Half of it
    may be activation rows; layers whose rows found no room hold their packed scatter instead, on top of it while the
    step lasts: at most about 2·D² bytes for each observed place."""
    spool_bytes: int = 2 << 30
    """Partials handed over whose records are not durable yet; beyond it the oldest is dropped and counted."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "spool_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What one place showed in one sampled step of this rank."""

    step: int
    place: Place
    capture: Capture | None
    """None: the rank trained and no token came here."""
    captured_at: float
    """Unix time in seconds."""
    sampling_steps: int
    overhead_ratio: float | None

    @property
    def nbytes(self) -> int:
        return 0 if self.capture is None else self.capture.nbytes

    def release(self) -> None:
        """Gives back the memory; the sample is done with."""
        if self.capture is not None:
            self.capture.release()

    def to_partial(self, run_id: str, rank: int, rows_allowed: bool) -> Partial:
        """The partial, in the form that takes fewer bytes. Its attempt is stamped on delivery, by whoever knows it.

        The cost model: activation rows are N·D numbers in the training's dtype, a scatter about D²/2 in float32. Where
        the rows are fewer bytes, forming the scatter would cost this host time and the network bytes.
        """
        place = self.place
        key = RecordKey(run_id, 0, self.step, place.layer, place.site, place.expert)
        origin = Origin(
            key=key,
            rank=rank,
            share=place.share,
            captured_at=self.captured_at,
            sampling_steps=self.sampling_steps,
            overhead_ratio=self.overhead_ratio,
        )
        if self.capture is None:
            return partial_of_nothing(place.width, place.block, origin)
        if rows_allowed and place.block == (0, place.width):
            rows_ND = self.capture.rows_ND(most_bytes=4 * packed_length(place.width))
            if rows_ND is not None and rows_ND.dtype in (torch.float32, torch.float16, torch.bfloat16):
                return samples_of(rows_ND, origin)
        return partial_of(self.capture.moments(), origin)


class Outbox:
    """A bounded queue and the one thread that serves it."""

    def __init__(
        self,
        handover: Handover,
        run_id: str,
        rank: int,
        limits: OutboxLimits,
        rows_allowed: bool,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`tick` is called about every second by the thread, beside the hand-over's own."""
        self._run_id, self._rank, self._limits = run_id, rank, limits
        self._handover, self._rows_allowed, self._tick = handover, rows_allowed, tick
        self._queue: deque[Sample] = deque()
        self._queued_bytes = 0
        self._dropped: Counter[str] = Counter()
        self._warned: set[str] = set()
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
                oldest = self._queue.popleft()
                self._queued_bytes -= oldest.nbytes
                oldest.release()
                self._dropped["outbox_full"] += 1
            self._changed.notify()

    def lost(self, reason: str, samples: int) -> None:
        """Counts samples that never came here."""
        with self._changed:
            self._dropped[reason] += samples

    @property
    def dropped(self) -> dict[str, int]:
        """Partials lost so far in this rank, by reason."""
        return dict(self._dropped + self._handover.dropped)

    @property
    def stretch(self) -> int:
        """How far the aggregator asks for the cadence to be stretched; 1 where it keeps up."""
        return self._handover.stretch

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
        with contextlib.suppress(OSError):  # the training comes first, on the CPU too; Linux knows niceness by thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
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
                    try:
                        self._handover.send(sample.to_partial(self._run_id, self._rank, self._rows_allowed))
                    finally:
                        sample.release()
                elif deadline is not None:
                    left = max(deadline - time.monotonic(), 0.0)
                    self._undelivered = self._handover.close(left, self.dropped)
                    return
            except BaseException as error:  # noqa: BLE001 - this thread must outlive any single failure
                self._dropped["handover_error"] += 1
                if sample is None:
                    self._warn_once("what was handed over may not be durable", error)
                    return
                self._warn_once("a partial could not be handed over", error)
            if time.monotonic() - last_tick >= TICK_SECONDS:
                last_tick = time.monotonic()
                try:
                    self._handover.tick(self.dropped)
                    self._tick()
                except BaseException as error:  # noqa: BLE001 - as above
                    self._warn_once("the outbox's housekeeping failed", error)

    def _warn_once(self, what: str, error: BaseException) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("%s: %s: %s", what, type(error).__name__, error)
