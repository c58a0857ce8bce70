"""A delivery: carries one spool to the aggregator, in small rounds, until the record of every partial is durable.

The courier calls it, for the spool of its own rank and for what dead jobs left.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable

from ..schemas import PartialRefused, RecordKey, WirePartial
from .ray_session import RaySession, SessionError
from .spool import Spool

log = logging.getLogger("eigenwatch.courier")

DURABILITY_SECONDS = 0.5
HEARTBEAT_SECONDS = 2.0
BATCH = 8
"""Partials in flight at once."""


class Delivery:
    """What of a spool has been pushed, and to whom."""

    def __init__(self, spool: Spool, session: RaySession) -> None:
        self.spool = spool
        self.dropped: Counter[str] = Counter()
        """Partials of the spool that can never be delivered, by reason."""
        self._session = session
        self._pushed: dict[int, tuple[RecordKey, str]] = {}
        """File number → the record it belongs to and the incarnation that holds it."""
        self._open = False
        self._next_poll = self._next_heartbeat = 0.0

    def work(self, losses: dict[str, int]) -> bool:
        """One round: pushes a batch, asks what is durable, says that the rank has lost `losses` so far.

        Returns:
            Whether another round would push more.

        Raises:
            SessionError: the next round begins anew.
        """
        try:
            if not self._open:
                self._session.open()
                self._open, self._pushed = True, {}
            more = self._push_batch()
            now = time.monotonic()
            if self._pushed and now >= self._next_poll:
                self._free()
                self._next_poll = now + DURABILITY_SECONDS
            if now >= self._next_heartbeat:
                self._session.heartbeat(dict(self.dropped + Counter(losses)))
                self._next_heartbeat = now + HEARTBEAT_SECONDS
        except SessionError:
            self._open = False
            raise
        return more

    def finish(self, clean: bool, losses: dict[str, int], silent: Iterable[int] = ()) -> None:
        """Says that the rank sends nothing more, and neither do the `silent` ranks.

        Raises:
            SessionError: it could not be said.
        """
        self._session.finish(clean, dict(self.dropped + Counter(losses)), silent)

    def _push_batch(self) -> bool:
        waiting = [number for number in self.spool.numbers() if number not in self._pushed]
        batch = []
        for number in waiting[:BATCH]:
            try:
                batch.append((number, self._read(number)))
            except FileNotFoundError:  # the outbox dropped it to make room
                continue
            except PartialRefused as error:
                self._drop(number, error.reason, str(error))
        busy = False
        for (number, wire), reply in zip(batch, self._session.push([wire for _, wire in batch]), strict=True):
            if reply.status in ("merged", "duplicate"):
                self._pushed[number] = (self._session.key(wire), reply.incarnation)
            elif reply.status == "durable":
                self.spool.remove(number)
            elif reply.status in ("refused", "dropped"):
                self._drop(number, None, reply.message)  # the shard has counted it
            elif reply.status == "unknown_run":
                raise SessionError("the aggregator restarted and does not know this run")
            else:
                busy = True
        return len(waiting) > BATCH and not busy

    def _read(self, number: int) -> WirePartial:
        wire = self.spool.read(number)
        layer = wire.header["layer"]
        if not self._session.knows(layer):
            raise PartialRefused("unexpected", f"spool file {number} is of layer {layer}, which its run has not")
        return wire

    def _free(self) -> None:
        """Removes what is durable, and what never will be."""
        numbers = list(self._pushed)
        answers = self._session.fates([self._pushed[number][0] for number in numbers])
        for number, (fate, incarnation) in zip(numbers, answers, strict=True):
            if fate == "durable":
                self.spool.remove(number)
                del self._pushed[number]
            elif fate == "dropped":
                key, _ = self._pushed.pop(number)
                self._drop(number, None, f"layer {key.layer} of step {key.step} was given up, see the aggregator's log")
            elif incarnation != self._pushed[number][1]:
                del self._pushed[number]  # the shard that held it restarted: push again

    def _drop(self, number: int, reason: str | None, message: str | None) -> None:
        log.warning("partial dropped: %s", message)
        if reason is not None:
            self.dropped[reason] += 1
        if self.spool.remove(number):  # else the outbox dropped it to make room, and counted it
            self.spool.count_lost()
