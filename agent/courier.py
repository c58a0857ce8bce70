"""The courier: a process beside each rank that carries its spool to the aggregator over Ray.

Why a process of its own: a Ray driver exits the moment its raylet dies (seen with Ray 2.60; no timeout setting
prevents it), and a training rank must survive that. Here only the courier dies; the outbox starts another, which
finds the spool as it was. It outlives its rank by as long as it takes to deliver what is left.

    python -m eigenwatch.agent.courier SPOOL_FOLDER RANK_PID

Standard input carries one JSON object a line from the outbox; its end means that the rank is gone.
"""

import json
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..schemas import RunDescription
from .delivery import Delivery
from .leftovers import Leftovers
from .ray_session import RaySession, SessionError
from .spool import Spool, all_spool_roots

log = logging.getLogger("eigenwatch.courier")

POLL_SECONDS = 0.25
HANG_SECONDS = 180
"""A call into Ray that does not return for this long (seen where the address is not a Ray) ends the process by SIGALRM;
the outbox starts another, and an orphan leaves nothing behind."""
REJOIN_FAILURES = 3
"""After so many failures in a row the courier leaves the cluster and joins anew: where Ray's processes die together, a
driver may live on with a connection to nobody, even when another Ray answers at the same address (seen with 2.60)."""
ORPHAN_SECONDS = 30.0
"""How long a courier whose rank died goes on delivering."""


class Inbox:
    """Messages from the outbox: reports of losses, and the request to close."""

    def __init__(self, rank_pid: int) -> None:
        self._rank_pid = rank_pid
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
        elif os.getppid() != self._rank_pid:  # a forked child of the rank may hold the pipe open
            self._orphaned()

    @property
    def read_on(self) -> bool:
        """Whether the rank closes, and will read in the spool what was lost."""
        return self.clean and os.getppid() == self._rank_pid

    def _take(self, message: dict[str, Any]) -> None:
        self.dropped = message.get("dropped", self.dropped)
        if "close" in message:
            self.clean = True
            self.close_seconds = float(message["close"])

    def _orphaned(self) -> None:
        if self.close_seconds is None:
            self.close_seconds = ORPHAN_SECONDS


class Courier:
    """Delivers every file of its rank's spool, and what dead jobs left when there is time."""

    def __init__(self, spool: Spool, session: RaySession, leftovers: Leftovers, inbox: Inbox) -> None:
        self._spool, self._session, self._leftovers, self._inbox = spool, session, leftovers, inbox
        self._delivery = Delivery(spool, session)

    def run(self) -> None:
        """Returns when the rank has closed and everything is durable, or its patience is over."""
        announced = more = False
        deadline = None
        failures = 0
        while True:
            signal.alarm(HANG_SECONDS)
            self._inbox.wait(0.0 if more else POLL_SECONDS)
            now, more = time.monotonic(), False
            if self._inbox.close_seconds is not None and deadline is None:
                deadline = now + self._inbox.close_seconds
                self._leftovers.release()
            try:
                if not announced:
                    self._session.connect()
                    self._leftovers.announce()
                    announced = True
                more = self._delivery.work(self._inbox.dropped)
                failures = 0
                done = deadline is not None and not self._spool.numbers()
                if done or (deadline is not None and now >= deadline):
                    self._delivery.finish(self._inbox.clean, self._inbox.dropped)
                    return
                if deadline is None and not more:
                    signal.alarm(HANG_SECONDS)
                    more = self._leftovers.work()
            except SessionError as error:
                log.warning("%s; will try again", error)
                if deadline is not None and now >= deadline:
                    return
                failures += 1
                if failures % REJOIN_FAILURES == 0:
                    self._session.close()
                time.sleep(1.0)


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    os.nice(5)  # the training comes first
    spool = Spool.at(Path(sys.argv[1]))
    if not spool.lock():
        return  # the rank died meanwhile, and another job's courier has taken its spool
    label = spool.label()

    def session(run: RunDescription, rank: int) -> RaySession:
        return RaySession(label.destination.address, run, rank)

    own = session(label.run, label.rank)
    inbox = Inbox(int(sys.argv[2]))
    try:
        Courier(spool, own, Leftovers(spool, [*spool.roots, *all_spool_roots()], session), inbox).run()
    finally:
        own.close()
    if not spool.numbers() and not inbox.read_on:
        spool.discard()


if __name__ == "__main__":
    main()
