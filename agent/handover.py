"""Where the outbox's thread hands its partials over: a courier process, or an aggregator in the same process."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import entry_points
from typing import Protocol

from ..schemas import Partial, RunDescription
from ..schemas.ray_token import token_environment
from .child_log import ChildLog
from .embedded import EmbeddedAggregator
from .spool import Spool, courier_lock

log = logging.getLogger("eigenwatch.agent")

RESTART_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before a courier is started again, by the number of starts."""
UNDELIVERED_SECONDS = 150.0
"""A partial that waits longer than this for its record is worth a warning."""
HEALTHY_SECONDS = 60.0
"""A courier that ran this long is forgiven its earlier deaths."""
GRACE_SECONDS = 3.0
"""A host's first rank starts the courier; the others look after it only when it had time to."""
KILL_SECONDS = 1.0
"""A killed courier is gone sooner, unless the kernel holds it."""


class Handover(Protocol):
    """Called by the outbox's thread only; owns the partial once `send` returns."""

    dropped: Counter[str]
    """Partials lost here, by reason."""
    stretch: int
    """How far the aggregator asks for the cadence to be stretched."""

    def send(self, partial: Partial) -> None: ...

    def tick(self, dropped: dict[str, int]) -> None:
        """Called about every second, with all that this rank has lost so far."""

    def close(self, timeout_seconds: float, dropped: dict[str, int]) -> int:
        """Waits until all is durable, at most `timeout_seconds`; returns how many partials are not."""


class CourierHandover:
    """Hands over through the spool. Sees to it that a courier runs on this host, on rank 0 the embedded aggregator
    too."""

    def __init__(self, spool: Spool, spool_bytes: int, embedded: EmbeddedAggregator | None = None) -> None:
        self.dropped: Counter[str] = Counter()
        self.stretch = 1
        self._spool = spool
        self._spool_bytes = spool_bytes
        self._embedded = embedded
        self._logs = [ChildLog(spool.folder / name) for name in ("courier.log", "courier.err")]
        self._sent = 0
        self._sizes: dict[int, int] = {}
        """Of what was written and may still be there."""
        self._warned: str | None = None
        self._carried = courier_lock(spool.label().run)
        self._starts = 0
        self._started_at = 0.0
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._next_start = time.monotonic() + (0.0 if first else GRACE_SECONDS)
        self._courier: subprocess.Popen[bytes] | None = None
        self._supervise()

    def send(self, partial: Partial) -> None:
        self._make_room(partial.nbytes)
        try:
            self._spool.write(self._sent, partial)
        except OSError as error:
            self.dropped["spool_error"] += 1
            if self.dropped["spool_error"] == 1:
                log.warning("partials are being dropped: %s is not writable: %s", self._spool.folder, error)
            return
        self._sizes[self._sent] = partial.nbytes
        self._sent += 1

    def tick(self, dropped: dict[str, int]) -> None:
        self._supervise()
        for child_log in self._logs:
            child_log.trim()
        told = self._spool.told.read()
        self.stretch = int(told.get("stretch", self.stretch))
        self._warn(told.get("trouble"))
        self._spool.said.write({"dropped": dropped})

    def close(self, timeout_seconds: float, dropped: dict[str, int]) -> int:
        deadline = time.monotonic() + timeout_seconds
        self._spool.said.write({"dropped": dropped, "close_at": time.time() + max(timeout_seconds - 1.0, 0.0)})
        finished = False
        while not finished and time.monotonic() < deadline:
            self._supervise()
            time.sleep(0.05)
            finished = bool(self._spool.told.read().get("finished"))
        if not finished and self._courier is not None:  # it does not listen: the host's other ranks start another
            self._courier.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._courier.wait(KILL_SECONDS)
        waiting, lost = len(self._spool.numbers()), self._spool.lost()
        if lost:
            log.warning("%d partials were given up by the aggregator, see its log: %s", lost, self._last_words())
        if waiting == 0:
            self._spool.discard()
        else:
            log.warning(
                "%d partials were not delivered and remain in %s, where the next job of this run on this host finds "
                "them; the courier's last words: %s",
                waiting, self._spool.folder, self._last_words(),
            )  # fmt: skip
        self._spool.close()
        return waiting + lost

    def _warn(self, trouble: str | None) -> None:
        """Of whatever keeps partials waiting, once, and again when it is something else."""
        waiting = self._spool.oldest_seconds()
        said = trouble
        if trouble is None and waiting > UNDELIVERED_SECONDS:
            trouble, said = f"none was delivered for {waiting:.0f} s: {self._last_words()}", "for long"
        if said is not None and said != self._warned:
            log.warning("partials wait in %s, training goes on: %s", self._spool.folder, trouble)
        self._warned = said

    def _make_room(self, needed: int) -> None:
        """Drops the oldest where the spool would be too large. Looks into it only where all that was ever written, but
        for what was gone at the last look, would be too much."""
        if sum(self._sizes.values()) + needed > self._spool_bytes:
            there = set(self._spool.numbers())
            self._sizes = {number: size for number, size in self._sizes.items() if number in there}
        total = sum(self._sizes.values())
        for number, size in list(self._sizes.items()):
            if total + needed <= self._spool_bytes:
                return
            del self._sizes[number]
            total -= size
            if self._spool.remove(number):
                self.dropped["outbox_full"] += 1

    def _supervise(self) -> None:
        if self._embedded is not None:
            self._embedded.supervise()
        now = time.monotonic()
        if self._courier is not None:
            status = self._courier.poll()
            if status is None:
                return
            if now - self._started_at > HEALTHY_SECONDS:
                self._starts = 0
            wait = RESTART_SECONDS[min(self._starts, len(RESTART_SECONDS) - 1)]
            if status != 0:
                log.warning("courier ended (%s); starting another in %.0f s", self._last_words(), wait)
            self._courier, self._next_start = None, now + wait
        if now < self._next_start or self._carried.held_elsewhere:
            return
        self._starts += 1
        self._started_at = now
        try:
            self._courier = self._start_courier()
        except OSError as error:  # no room for its log, no memory for a process
            self._next_start = now + RESTART_SECONDS[min(self._starts, len(RESTART_SECONDS) - 1)]
            if self._starts == 1:
                log.warning("no courier can be started, partials wait in %s: %s", self._spool.folder, error)

    def _start_courier(self) -> subprocess.Popen[bytes]:
        with self._logs[0].open() as out, self._logs[1].open() as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "eigenwatch.agent.courier", str(self._spool.folder)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,  # Ctrl-C reaches the rank, which closes; the courier then delivers the rest
                env=_courier_environment(),
            )

    def _last_words(self) -> str:
        lines = self._logs[0].lines() or self._logs[1].lines()  # Ray writes much into the second
        return lines[-1] if lines else "no message"


class InlineHandover:
    """Hands over to an aggregator in this process: tests and notebooks, one rank."""

    def __init__(self, run: RunDescription, rank: int, store: str, metrics_port: int | None) -> None:
        self.dropped: Counter[str] = Counter()
        self.stretch = 1
        (entry,) = entry_points(group="eigenwatch.aggregators", name="inline")
        self.aggregator = entry.load()(store=store, metrics_port=metrics_port)
        self.metrics_url: str | None = self.aggregator.metrics_url
        self._run, self._rank = run, rank
        self._attempt: int = self.aggregator.open(run)

    def send(self, partial: Partial) -> None:
        header, mean, payload = partial.to_wire()
        reply = self.aggregator.push(header | {"attempt": self._attempt}, mean, payload)
        if reply.status not in ("merged", "duplicate", "durable"):
            self.dropped[reply.reason or reply.status] += 1

    def tick(self, dropped: dict[str, int]) -> None:
        self.aggregator.heartbeat(self._run.run_id, self._attempt, self._rank, dropped)

    def close(self, timeout_seconds: float, dropped: dict[str, int]) -> int:
        return int(self.aggregator.finish(self._run.run_id, self._attempt, self._rank, dropped, timeout_seconds))


def _courier_environment() -> dict[str, str]:
    # The courier is not a rank: variables that would make its libraries use many threads or join the job go.
    environment = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment | token_environment(environment) | {"OMP_NUM_THREADS": "1"}
