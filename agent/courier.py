"""The courier: a process beside each rank that carries its spool to the aggregator over Ray.

Why a process of its own: a Ray driver exits the moment its raylet dies (seen with Ray 2.60; no timeout setting
prevents it), and a training rank must survive that. Here only the courier dies; the outbox starts another, which
finds the spool as it was. It outlives its rank by as long as it takes to deliver what is left.

    python -m eigenwatch.agent.courier SPOOL_FOLDER ADDRESS

Standard input carries one JSON object a line from the outbox; its end means that the rank is gone.
"""

import json
import logging
import os
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ..schemas import PartialRefused, RecordKey
from .ray_session import RaySession, SessionError
from .spool import Spool

log = logging.getLogger("eigenwatch.courier")

POLL_SECONDS = 0.25
DURABILITY_SECONDS = 0.5
HEARTBEAT_SECONDS = 2.0
BATCH = 8
"""Partials in flight at once."""
HANG_SECONDS = 180
"""A call into Ray that does not return for this long (seen where the address is not a Ray) ends the process by SIGALRM;
the outbox starts another, and an orphan leaves nothing behind."""
ORPHAN_SECONDS = 30.0
"""How long a courier whose rank died goes on delivering."""


class Inbox:
    """Messages from the outbox: reports of losses, and the request to close."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._buffer = b""
        self.dropped: dict[str, int] = {}
        self.close_seconds: float | None = None
        """How long to go on delivering; None while the rank trains."""
        self.clean = False
        """Whether the rank said goodbye, rather than died."""

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or earlier when a message arrived."""
        if self.close_seconds is not None:
            time.sleep(min(seconds, 0.05))
            return
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
        if readable:
            data = os.read(sys.stdin.fileno(), 1 << 16)
            if not data:
                self._orphaned()
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        elif os.getppid() != self._parent:  # a forked child of the rank may hold the pipe open
            self._orphaned()

    def _take(self, message: dict[str, Any]) -> None:
        self.dropped = message.get("dropped", self.dropped)
        if "close" in message:
            self.clean = True
            self.close_seconds = float(message["close"])

    def _orphaned(self) -> None:
        if self.close_seconds is None:
            self.close_seconds = ORPHAN_SECONDS


class Courier:
    """Delivers every file of a spool until its record is durable."""

    def __init__(self, spool: Spool, session: RaySession, inbox: Inbox) -> None:
        self._spool = spool
        self._session = session
        self._inbox = inbox
        self._pushed: dict[int, tuple[RecordKey, str]] = {}
        """File number → the record it belongs to and the incarnation that holds it."""
        self._dropped: Counter[str] = Counter()
        self._open = False

    def run(self) -> None:
        """Returns when the rank has closed and everything is durable, or its patience is over."""
        next_poll = next_heartbeat = 0.0
        deadline = None
        while True:
            signal.alarm(HANG_SECONDS)
            self._inbox.wait(POLL_SECONDS)
            now = time.monotonic()
            if self._inbox.close_seconds is not None and deadline is None:
                deadline = now + self._inbox.close_seconds
            try:
                if not self._open:
                    self._session.open()
                    self._open, self._pushed = True, {}
                self._push_new()
                if self._pushed and now >= next_poll:
                    self._free_durable()
                    next_poll = now + DURABILITY_SECONDS
                if now >= next_heartbeat:
                    self._session.heartbeat(self._losses())
                    next_heartbeat = now + HEARTBEAT_SECONDS
                done = deadline is not None and not self._spool.numbers()
                if done or (deadline is not None and now >= deadline):
                    self._session.finish(self._inbox.clean, self._losses())
                    return
            except SessionError as error:
                log.warning("%s; will try again", error)
                self._open = False
                if deadline is not None and now >= deadline:
                    return
                time.sleep(1.0)

    def _push_new(self) -> None:
        waiting = [number for number in self._spool.numbers() if number not in self._pushed]
        for start in range(0, len(waiting), BATCH):
            batch = []
            for number in waiting[start : start + BATCH]:
                try:
                    batch.append((number, self._spool.read(number)))
                except FileNotFoundError:  # the outbox dropped it to make room
                    continue
                except PartialRefused as error:
                    self._drop(number, error.reason, str(error))
            replies = self._session.push([wire for _, wire in batch])
            busy = False
            for (number, wire), reply in zip(batch, replies, strict=True):
                if reply.status in ("merged", "duplicate"):
                    self._pushed[number] = (self._session.key(wire), reply.incarnation)
                elif reply.status == "durable":
                    self._spool.remove(number)
                elif reply.status == "refused":
                    self._drop(number, None, reply.message)  # the shard has counted it
                elif reply.status == "unknown_run":
                    raise SessionError("the aggregator restarted and does not know this run")
                else:
                    busy = True
            if busy:
                return

    def _free_durable(self) -> None:
        numbers = list(self._pushed)
        answers = self._session.durable([self._pushed[number][0] for number in numbers])
        for number, (durable, incarnation) in zip(numbers, answers, strict=True):
            if durable:
                self._spool.remove(number)
                del self._pushed[number]
            elif incarnation != self._pushed[number][1]:
                del self._pushed[number]  # the shard that held it restarted: push again

    def _drop(self, number: int, reason: str | None, message: str | None) -> None:
        log.warning("partial dropped: %s", message)
        if reason is not None:
            self._dropped[reason] += 1
        self._spool.remove(number)

    def _losses(self) -> dict[str, int]:
        return dict(self._dropped + Counter(self._inbox.dropped))


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    folder, address = sys.argv[1:3]
    os.nice(5)  # the training comes first
    spool = Spool(Path(folder))
    run, rank = spool.run()
    session = RaySession(address, run, rank)
    try:
        Courier(spool, session, Inbox()).run()
    finally:
        session.close()
    if not spool.numbers():
        spool.discard()


if __name__ == "__main__":
    main()
