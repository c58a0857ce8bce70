"""What dead jobs left: spools whose rank and courier both ended before everything was delivered.

The couriers of later jobs on the host deliver them, in pieces and only when their own rank waits for nothing, to the
launch they come from. Which aggregator is theirs: a cluster is known by its address, an embedded aggregator by its
store, and where a job with the same run id now goes to another cluster, the run has moved there. A spool that stays
where it is (another aggregator's, unreadable, or couriers died over it) is removed after `ABANDONED_SECONDS`.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..schemas import RunDescription
from .delivery import Delivery
from .ray_session import RaySession, SessionError
from .spool import Label, Spool, spools_in

log = logging.getLogger("eigenwatch.courier")

LOOK_SECONDS = 5.0
"""Between looks for spools whose owners have ended meanwhile."""
RETRY_SECONDS = 5.0
STALLED_SECONDS = 300.0
"""A launch of which nothing became durable for this long is left to the next job."""
MAX_TAKES = 5
"""A spool over which so many couriers died in a row is not touched again."""
ABANDONED_SECONDS = 7 * 86400.0


class Leftovers:
    """At most one dead launch at a time, all its spools on this host together."""

    def __init__(self, own: Label, roots: Sequence[Path], session: Callable[[RunDescription], RaySession]) -> None:
        self._label, self._roots, self._session = own, roots, session
        self._taken: dict[int, Spool] = {}
        """By rank."""
        self._run: RunDescription | None = None
        """The launch that they are of."""
        self._delivery: Delivery | None = None
        self._left_alone: set[str] = set()
        """Names of spools that this courier will not touch (again)."""
        self._next_work = 0.0
        self._least, self._progress_at = 0, 0.0
        """Fewest partials seen in what is taken, and since when."""

    def announce(self) -> None:
        """Opens the earlier launches of our run before our own: attempts are numbered in the order of opening, and one
        that never reached the aggregator in its life must not come out as the newest."""
        earlier = {
            label.run.launch_id: label
            for spool, label in self._deliverable()
            if label.run.run_id == self._label.run.run_id and label.created_at < self._label.created_at
            if spool.numbers()
        }
        for label in sorted(earlier.values(), key=lambda one: one.created_at):
            try:
                self._session(label.run).open()
            except SessionError as error:
                log.warning("launch %s could not be announced: %s", label.run.launch_id, error)

    def work(self) -> bool:
        """One round; returns whether another one would push more at once."""
        now = time.monotonic()
        if now < self._next_work:
            return False
        if self._delivery is None:
            self._take()
            if self._delivery is None:
                self._bury_abandoned()
                self._next_work = now + LOOK_SECONDS
                return False
        more = False
        try:
            more = self._delivery.work({rank: {} for rank in self._taken}, waits=False)
            if not self._undelivered():
                self._finish()
                return False
        except SessionError as error:
            log.warning("what a dead job left must wait: %s", error)
            self._next_work = now + RETRY_SECONDS
        if (undelivered := self._undelivered()) < self._least:
            self._least, self._progress_at = undelivered, now
            for spool in self._taken.values():
                spool.forget_takes()
        elif now - self._progress_at > STALLED_SECONDS:
            log.warning("%d partials of a dead job could not be delivered; a later job tries again", undelivered)
            self._left_alone |= {spool.folder.name for spool in self._taken.values()}
            self.release()
        return more

    def release(self) -> None:
        """Gives back what is not delivered yet, for another courier to take."""
        for spool in self._taken.values():
            spool.forget_takes()
            spool.unlock()
        self._taken, self._run, self._delivery = {}, None, None

    def _take(self) -> None:
        """Locks the spools of a launch none of whose ranks on this host lives."""
        launches: dict[str, list[tuple[Spool, Label]]] = {}
        for spool, label in self._deliverable():
            launches.setdefault(label.run.launch_id, []).append((spool, label))
        for spools in launches.values():
            locked = list(itertools.takewhile(lambda one: one[0].lock(alone=True), spools))
            told = any(spool.numbers() or spool.said.read().get("dropped") for spool, _ in spools)
            if len(locked) == len(spools) and not told:
                for spool, _ in spools:
                    spool.discard()
            elif len(locked) == len(spools) and all(self._may_take(spool) for spool, _ in spools):
                self._begin({label.rank: spool for spool, label in spools}, spools[0][1].run)
                return
            for spool, _ in locked:
                spool.unlock()

    def _begin(self, spools: dict[int, Spool], run: RunDescription) -> None:
        self._taken, self._run = spools, run
        self._delivery = Delivery(self._session(run), kept_seconds=0.0)
        for rank, spool in spools.items():
            self._delivery.add(rank, spool)
        self._least, self._progress_at = self._undelivered(), time.monotonic()
        log.info("delivering %d partials that launch %s of %s left", self._least, run.launch_id, run.run_id)

    def _may_take(self, spool: Spool) -> bool:
        if spool.count_take() <= MAX_TAKES:
            return True
        log.warning("%s stays where it is: %d couriers in a row ended while they delivered it", spool.folder, MAX_TAKES)
        self._left_alone.add(spool.folder.name)
        return False

    def _finish(self) -> None:
        """Everything is durable: ends the launch, also for its ranks that left nothing, and removes the spools."""
        assert self._delivery is not None
        assert self._run is not None
        ranks = range(self._run.world_size)
        losses = {rank: spool.said.read().get("dropped", {}) for rank, spool in self._taken.items()}
        self._delivery.finish({rank: rank not in self._taken or self._taken[rank].closed for rank in ranks}, losses)
        for spool in self._taken.values():
            spool.discard()
            spool.unlock()
        self._taken, self._run, self._delivery = {}, None, None

    def _undelivered(self) -> int:
        return sum(len(spool.numbers()) for spool in self._taken.values())

    def _deliverable(self) -> Iterator[tuple[Spool, Label]]:
        """Spools but our launch's, dead or alive, that belong to our aggregator and are not left alone."""
        for spool in spools_in(self._roots):
            if spool.folder.name not in self._left_alone:
                with contextlib.suppress(ValueError):
                    label = spool.label()
                    if label.run.launch_id != self._label.run.launch_id and self._is_for_us(label):
                        yield spool, label

    def _is_for_us(self, other: Label) -> bool:
        mine, theirs = self._label.destination, other.destination
        if mine.store is not None or theirs.store is not None:
            return mine.store == theirs.store
        return mine.address == theirs.address or self._label.run.run_id == other.run.run_id

    def _bury_abandoned(self) -> None:
        """Removes what nobody delivered for very long; shared memory is the host's."""
        deliverable = {spool.folder.name for spool, _ in self._deliverable()}
        own = f"{self._label.run.run_id}-{self._label.run.launch_id}-"
        for spool in spools_in(self._roots):
            if spool.folder.name.startswith(own):
                continue
            old = spool.idle_seconds() > ABANDONED_SECONDS and spool.folder.name not in deliverable
            if old and spool.lock(alone=True):
                log.warning("%s is removed, its %d partials are lost", spool.folder, len(spool.numbers()))
                spool.discard()
                spool.unlock()
