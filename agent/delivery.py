"""A delivery: carries the spools of one launch on this host to the aggregator until every partial's record is durable.

The node combiner: partials of one record that lie here together leave as one group. A sum cannot be taken apart again,
so after every interruption the aggregator is first asked which ranks it holds. The courier calls it, for the ranks of
its own launch and for what dead jobs left.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..schemas import PartialRefused, RecordKey, SeriesKey, WirePartial
from ..schemas.delivery import Fate, PushReply
from .combine import Packet, combine
from .ray_session import RaySession, SessionError
from .spool import Spool

log = logging.getLogger("eigenwatch.courier")

DURABILITY_SECONDS = 0.5
HEARTBEAT_SECONDS = 2.0
COMBINE_SECONDS = 2.0
"""How long the first partial of a record waits for those of the host's other ranks."""
BUSY_SECONDS = 0.2
"""After which a shard that had no room is asked again."""
BATCH = 8
"""Records whose partials are in flight at once."""
BATCH_BYTES = 1 << 29
"""No record is added to a batch of more than this."""
KEPT_SECONDS = 120.0
"""A partial in a record that was stored without some ranks is kept for so long, in case they come to a shard that has
restarted, and knows the record but not the sum any more."""
READ_AHEAD = 64
"""Files of one spool that are mapped at once, and that no shard has refused for lack of room."""
MAPPED = 1024
"""The same, those included."""


class File(NamedTuple):
    """A partial in a spool."""

    rank: int
    number: int


@dataclass(slots=True)
class _Waiting:
    """What is to be pushed for one record."""

    since: float
    files: dict[int, File] = field(default_factory=dict)
    """By rank."""
    sent: set[int] = field(default_factory=set)
    """Ranks of which the aggregator has it already."""
    not_before: float = 0.0
    """The shard had no room."""
    apart: bool = False
    """The group was refused: each rank's partial is now judged alone."""


class Delivery:
    """What of a launch's spools has been pushed."""

    def __init__(self, session: RaySession, kept_seconds: float = KEPT_SECONDS) -> None:
        self.stretch: int | None = None
        """How far the aggregator asks for the cadence to be stretched; None until it has said so."""
        self._session, self._kept_seconds = session, kept_seconds
        self._spools: dict[int, Spool] = {}
        self._dropped: dict[int, Counter[str]] = defaultdict(Counter)
        """Partials that can never be delivered, by rank and reason."""
        self._mapped: dict[File, WirePartial] = {}
        """What has been read and not been pushed."""
        self._waiting: OrderedDict[RecordKey, _Waiting] = OrderedDict()
        self._pushed: dict[File, RecordKey] = {}
        self._partly: dict[File, float] = {}
        """Files whose record is stored without some ranks, and until when they are kept."""
        self._again: set[RecordKey] = set()
        """Records of which a shard has lost what it had: pushed as soon as it is read, for the rest may be there, and
        their deadline runs."""
        self._doubtful: set[File] = set()
        """Files that may have been pushed before the session was opened."""
        self._open = False
        self._next_poll = self._next_heartbeat = 0.0

    def add(self, rank: int, spool: Spool) -> None:
        """A rank's spool is delivered from now on."""
        self._spools[rank] = spool
        self._doubtful |= set(self._files(rank))

    def undelivered(self, rank: int) -> int:
        """Partials of a rank that are not known to be durable."""
        return sum(file not in self._partly for file in self._files(rank))

    def work(self, losses: Mapping[int, Mapping[str, int]], waits: bool) -> bool:
        """One round: pushes a batch, asks what is durable, says that ranks live and what they have lost so far.

        Args:
            losses: of the ranks that live, by reason.
            waits: whether more may come from the ranks that have nothing here yet.

        Returns:
            Whether another round would push more.

        Raises:
            SessionError: the next round begins anew.
        """
        try:
            if not self._open:
                self._session.open()
                self._begin()
            more = self._push_batch(set(losses) if waits else set())
            now = time.monotonic()
            if self._pushed and now >= self._next_poll:
                self._free()
                self._next_poll = now + DURABILITY_SECONDS
            if losses and now >= self._next_heartbeat:
                self.stretch = self._session.heartbeat(
                    {rank: self._losses(rank, of_rank) for rank, of_rank in losses.items()}
                )
                self._next_heartbeat = now + HEARTBEAT_SECONDS
        except SessionError:
            self._open = False
            raise
        return more

    def finish(self, clean: Mapping[int, bool], losses: Mapping[int, Mapping[str, int]]) -> None:
        """Says that ranks send nothing more, each whether it closed (`clean`) or died, and lets their spools go.

        Raises:
            SessionError: it could not be said.
        """
        for file in [one for one in self._partly if one.rank in clean]:
            self._remove(file)
        self._session.finish([(rank, it_is, self._losses(rank, losses.get(rank, {}))) for rank, it_is in clean.items()])
        for rank in clean:
            self.remove(rank)

    def remove(self, rank: int) -> None:
        """A rank's spool is delivered no longer."""
        self._spools.pop(rank, None)
        self._mapped = {file: wire for file, wire in self._mapped.items() if file.rank != rank}
        self._pushed = {file: key for file, key in self._pushed.items() if file.rank != rank}
        self._partly = {file: until for file, until in self._partly.items() if file.rank != rank}
        self._doubtful = {file for file in self._doubtful if file.rank != rank}
        for key, waiting in list(self._waiting.items()):
            waiting.files.pop(rank, None)
            if not waiting.files:
                del self._waiting[key]

    def _losses(self, rank: int, others: Mapping[str, int]) -> dict[str, int]:
        return dict(self._dropped[rank] + Counter(others))

    def _begin(self) -> None:
        """Nothing is known to be pushed: the attempt may be another, and so may be the shards."""
        self._open = True
        self._mapped.clear()
        self._waiting.clear()
        self._pushed.clear()
        self._partly.clear()
        self._again.clear()
        self._doubtful = {file for rank in self._spools for file in self._files(rank)}

    def _files(self, rank: int) -> list[File]:
        return [File(rank, number) for number in self._spools[rank].numbers()]

    def _push_batch(self, alive: set[int]) -> bool:
        unread = self._read_ahead()
        ready = self._ready(alive)
        if not ready:
            return False
        self._ask_about([file for key in ready for file in self._waiting[key].files.values() if file in self._doubtful])
        packets = [
            (key, packet) for key in ready if key in self._waiting for packet in self._packets(self._waiting[key])
        ]
        replies = self._session.push([packet.wire for _, packet in packets])
        overlaps = [self._settle(key, packet, reply) for (key, packet), reply in zip(packets, replies, strict=True)]
        self._ask_about([file for files in overlaps for file in files])
        progress = any(reply.status != "busy" for reply in replies)
        return bool(self._ready(alive)) or (unread and progress)

    def _read_ahead(self) -> bool:
        """Maps files that are not known yet, a bounded number; whether there are more."""
        now = time.monotonic()
        unread = False
        for rank in self._spools:
            mapped = {file for file in self._mapped if file.rank == rank}
            held_up = sum(bool(waiting.not_before) and rank in waiting.files for waiting in self._waiting.values())
            for file in self._files(rank):
                if file in mapped or file in self._pushed:
                    continue
                if len(mapped) >= min(READ_AHEAD + held_up, MAPPED):
                    unread = True
                    break
                try:
                    wire = self._read(file)
                except FileNotFoundError:  # the outbox dropped it to make room
                    continue
                except PartialRefused as error:
                    self._drop(file, error.reason, str(error))
                    continue
                key = self._session.key(wire)
                waiting = self._waiting.setdefault(key, _Waiting(-math.inf if key in self._again else now))
                if waiting.files.setdefault(rank, file) == file:  # else it comes twice, and its turn with it
                    self._mapped[file] = wire
                    mapped.add(file)
        self._again &= self._waiting.keys()
        return unread

    def _read(self, file: File) -> WirePartial:
        wire = self._spools[file.rank].read(file.number)
        layer = wire.header["layer"]
        if not self._session.knows(layer):
            raise PartialRefused("unexpected", f"spool file {file.number} is of layer {layer}, which its run has not")
        if wire.header["rank"] != file.rank:
            raise PartialRefused("unexpected", f"spool file {file.number} of rank {file.rank} is of another rank")
        return wire

    def _ready(self, alive: set[int]) -> list[RecordKey]:
        """Records to push now, the oldest first: every rank has come that may, or has been waited for long enough.

        One of each series, so that steps of a layer come in their order, as whoever judges them would have it.
        """
        now, ready, size = time.monotonic(), list[RecordKey](), 0
        seen: set[SeriesKey] = set()
        for key, waiting in self._waiting.items():
            if key.series in seen:
                continue
            seen.add(key.series)
            awaited = (alive & self._session.ranks(key)) - waiting.sent
            come = awaited <= waiting.files.keys() or now >= waiting.since + COMBINE_SECONDS
            if come and now >= waiting.not_before:
                size += sum(self._mapped[file].payload.nbytes for file in waiting.files.values())
                ready.append(key)
            if len(ready) == BATCH or size >= BATCH_BYTES:
                break
        return ready

    def _packets(self, waiting: _Waiting) -> list[Packet]:
        wires = [self._mapped[file] for file in waiting.files.values()]
        if waiting.apart:
            return [packet for wire in wires for packet in combine([wire])]
        return combine(wires)

    def _settle(self, key: RecordKey, packet: Packet, reply: PushReply) -> list[File]:
        """Notes the answer to a packet; returns the files of which some are held already, and it is not known which."""
        waiting = self._waiting[key]
        files = [waiting.files[rank] for rank in packet.ranks]
        if reply.status in ("merged", "duplicate"):
            self._pushed |= dict.fromkeys(files, key)
            self._done_with(key, files)
        elif reply.status == "durable":
            for file in files:
                self._remove(file)
            self._done_with(key, files)
        elif reply.status == "overlap":
            return files
        elif reply.status in ("refused", "dropped") and len(files) > 1:
            waiting.apart = True
        elif reply.status in ("refused", "dropped"):
            self._drop(files[0], None, reply.message)  # the shard has counted it
            self._done_with(key, files)
        elif reply.status == "unknown_run":
            raise SessionError("the aggregator restarted and does not know this run")
        else:  # busy: what other shards own does not wait behind it
            waiting.not_before = time.monotonic() + BUSY_SECONDS
        return []

    def _done_with(self, key: RecordKey, files: Iterable[File]) -> None:
        waiting = self._waiting[key]
        for file in files:
            del waiting.files[file.rank]
            del self._mapped[file]
            waiting.sent.add(file.rank)
        if not waiting.files:
            del self._waiting[key]

    def _ask_about(self, files: list[File]) -> None:
        """Of waiting files: does not push what the aggregator has already."""
        if not files:
            return
        keys = {file: self._session.key(self._mapped[file]) for file in files}
        for file, fate in self._fates(keys).items():
            self._doubtful.discard(file)
            if fate in ("held", "partly"):
                self._pushed[file] = keys[file]
            elif fate != "unknown":
                self._end(file, keys[file], fate)
            if fate != "unknown":
                self._done_with(keys[file], [file])

    def _free(self) -> None:
        """Removes what is durable, and what never will be; what a shard has lost is pushed again."""
        now = time.monotonic()
        for file, fate in self._fates(self._pushed).items():
            if fate == "partly" and now < self._partly.setdefault(file, now + self._kept_seconds):
                continue
            if fate != "partly":
                self._partly.pop(file, None)
            if fate == "unknown":
                self._again.add(self._pushed.pop(file))
            elif fate != "held":
                self._end(file, self._pushed.pop(file), fate)

    def _fates(self, keys: Mapping[File, RecordKey]) -> dict[File, Fate]:
        by_key: dict[RecordKey, list[File]] = defaultdict(list)
        for file, key in keys.items():
            by_key[key].append(file)
        fates = self._session.fates({key: [one.rank for one in files] for key, files in by_key.items()})
        return {file: fate for key, files in by_key.items() for file, fate in zip(files, fates[key], strict=True)}

    def _end(self, file: File, key: RecordKey, fate: Fate) -> None:
        if fate in ("durable", "partly"):
            self._partly.pop(file, None)
            self._remove(file)
        elif fate == "dropped":
            self._drop(file, None, f"layer {key.layer} of step {key.step} was given up, see the aggregator's log")

    def _remove(self, file: File) -> bool:
        return self._spools[file.rank].remove(file.number)

    def _drop(self, file: File, reason: str | None, message: str | None) -> None:
        log.warning("partial dropped: %s", message)
        if reason is not None:
            self._dropped[file.rank][reason] += 1
        if self._remove(file):  # else the outbox dropped it to make room, and counted it
            self._spools[file.rank].count_lost()
