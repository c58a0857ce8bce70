"""The courier: a process beside the ranks of one host that carries their spools to the aggregator over Ray.

Why a process of its own: a Ray driver exits the moment its raylet dies (seen with Ray 2.60; no timeout setting
prevents it), and a training rank must survive that. Here only the courier dies; an outbox starts another, which
finds the spools as they were. One for all ranks of a launch on a host, so that their partials leave it merged: whoever
holds the launch's lock carries, and what a second one does is to end. It outlives its ranks by as long as it takes to
deliver what is left.

    python -m eigenwatch.agent.courier SPOOL_FOLDER
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .spool import Spool, all_spool_roots, courier_lock, spools_in

if TYPE_CHECKING:
    from ..schemas import RunDescription
    from .delivery import Delivery
    from .leftovers import Leftovers
    from .ray_session import RaySession

log = logging.getLogger("eigenwatch.courier")

POLL_SECONDS = 0.2
HANG_SECONDS = 180
"""A call into Ray that does not return for this long (seen where the address is not a Ray) ends the process by SIGALRM;
an outbox starts another, and an orphan leaves nothing behind."""
REJOIN_FAILURES = 3
"""After so many failures in a row the courier leaves the cluster and joins anew: where Ray's processes die together, a
driver may live on with a connection to nobody, even when another Ray answers at the same address (seen with 2.60)."""
RETRY_SECONDS = 1.0
ORPHAN_SECONDS = 30.0
"""How long what a dead rank left is delivered here; then it is for the courier of a later job."""
LOCK_TRIES = 5
"""An outbox that looks whether somebody carries holds the lock for an instant."""


@dataclass(slots=True)
class Member:
    """A rank of the launch on this host."""

    spool: Spool
    dropped: dict[str, int] = field(default_factory=dict)
    """What it says that it has lost, by reason."""
    clean: bool = False
    """Whether it said goodbye, rather than died."""
    deadline: float | None = None
    """Until when to deliver, as a Unix time; None while it trains."""
    told: int | str | None = None
    """What it has been told last by this courier: the stretch, or what keeps its partials from being delivered."""

    def look(self, now: float) -> None:
        """Learns what the rank says, or that it died."""
        said = self.spool.said.read()
        self.dropped = said.get("dropped", self.dropped)
        if self.deadline is None and "close_at" in said:
            self.clean, self.deadline = True, float(said["close_at"])
        elif self.deadline is None and not self.spool.rank_lives:
            self.deadline = now + ORPHAN_SECONDS


class Courier:
    """Delivers every spool of its launch on this host, and what dead jobs left when there is time."""

    def __init__(
        self, run: RunDescription, roots: list[Path], session: RaySession, delivery: Delivery, leftovers: Leftovers
    ) -> None:
        self._run, self._roots = run, roots
        self._session, self._delivery, self._leftovers = session, delivery, leftovers
        self._members: dict[int, Member] = {}
        self._done: set[str] = set()
        """Names of spools that this courier is done with."""

    def run(self) -> None:
        """Returns when every rank has closed or died, and everything is durable or their patience is over."""
        from .ray_session import SessionError

        announced = more = False
        failures = 0
        while True:
            signal.alarm(HANG_SECONDS)
            time.sleep(0.0 if more else POLL_SECONDS)
            more = False
            self._look()
            if not self._members:
                return
            ending = any(one.deadline is not None for one in self._members.values())
            if ending:
                self._leftovers.release()
            try:
                if not announced:
                    self._session.connect()
                    self._leftovers.announce()
                    announced = True
                losses = {rank: one.dropped for rank, one in self._members.items()}
                more = self._delivery.work(losses, waits=not ending)
                failures = 0
                self._tell()
                self._end_members()
                if not ending and not more:
                    signal.alarm(HANG_SECONDS)
                    more = self._leftovers.work()
            except SessionError as error:
                log.warning("%s; will try again", error)
                failures += 1
                if error.lasting or failures >= REJOIN_FAILURES:
                    self._tell_trouble(str(error))
                if failures % REJOIN_FAILURES == 0:
                    self._session.close()
                for rank in self._overdue():
                    self._let_go(rank)
                    self._delivery.remove(rank)
                time.sleep(RETRY_SECONDS)

    def _look(self) -> None:
        for spool, rank in self._new_spools():
            if spool.lock():
                self._members[rank] = Member(spool)
                self._delivery.add(rank, spool)
        now = time.time()
        for member in self._members.values():
            member.look(now)

    def _new_spools(self) -> Iterator[tuple[Spool, int]]:
        known = self._done | {member.spool.folder.name for member in self._members.values()}
        for spool in spools_in(self._roots):
            ours = spool.folder.name.startswith(f"{self._run.run_id}-{self._run.launch_id}-")
            if ours and spool.folder.name not in known and not spool.closed:
                with contextlib.suppress(ValueError, OSError):
                    yield Spool.at(spool.folder), spool.label().rank

    def _tell(self) -> None:
        for member in self._members.values():
            if self._delivery.stretch is not None and member.told != self._delivery.stretch:
                member.told = self._delivery.stretch
                member.spool.told.write({"stretch": member.told})

    def _tell_trouble(self, words: str) -> None:
        """Ranks say it where people look, in the log of the job."""
        for member in self._members.values():
            if member.told != words:
                member.told = words
                member.spool.told.write({"trouble": words})

    def _end_members(self) -> None:
        overdue = self._overdue()
        ended = {
            rank: one
            for rank, one in self._members.items()
            if rank in overdue or (one.deadline is not None and not self._delivery.undelivered(rank))
        }
        if ended:
            self._delivery.finish(
                {rank: one.clean for rank, one in ended.items()}, {rank: one.dropped for rank, one in ended.items()}
            )
        for rank in ended:
            self._let_go(rank)

    def _overdue(self) -> list[int]:
        now = time.time()
        return [rank for rank, one in self._members.items() if one.deadline is not None and now >= one.deadline]

    def _let_go(self, rank: int) -> None:
        """A rank that lives reads on: it hears that it was the end. What a dead one left empty is removed."""
        spool = self._members.pop(rank).spool
        self._done.add(spool.folder.name)
        spool.told.write({"finished": True})
        if not spool.numbers() and not spool.rank_lives:
            spool.discard()
        spool.unlock()


def main() -> None:
    """Entry point of the process."""
    spool = Spool.at(Path(sys.argv[1]))
    label = spool.label()
    lock = courier_lock(label.run)
    for _ in range(LOCK_TRIES):
        if lock.take(alone=True):
            break
        time.sleep(0.05)
    else:
        return  # another carries for this host
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    os.nice(5)  # the training comes first
    from .delivery import Delivery  # Ray, whose import costs what a courier that is not needed would pay too
    from .leftovers import Leftovers
    from .ray_session import RaySession

    def session(run: RunDescription) -> RaySession:
        return RaySession(label.destination.address, run)

    roots = list(dict.fromkeys([*spool.roots, *all_spool_roots()]))
    own = session(label.run)
    try:
        Courier(label.run, roots, own, Delivery(own), Leftovers(label, roots, session)).run()
    finally:
        own.close()
        lock.remove()


if __name__ == "__main__":
    main()
