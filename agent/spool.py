"""The spool: a bounded folder of partials on their way from the training process to its courier.

The outbox's thread writes a file per partial, the courier deletes it once its record is durable, so a partial
survives the death of either process, and of Ray. Files are an Arrow IPC stream, read by memory map; never pickle. A
trailer of checksums follows the stream, where Arrow's readers do not look: Arrow trusts what a file says of itself (bit
flips in its offsets end the process), and after a power cut the end of a file may be zeros, so nothing of a file is
interpreted before it is known to be what was written. The folder lies in shared memory where there is room, so that
handing over costs one copy and no disk; what no longer fits there goes to a folder of the same name in the temporary
folder.

    <root>/<run_id>-<launch_id>-<rank>/{run.json, lock, said, told, 000000000000.arrow, …}

Rank and courier hold the lock while they live; whoever gets it alone may deliver what they left. What the rank has to
say to the courier stands on the page `said`, and what the courier answers on `told`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schemas import Partial, PartialRefused, RunDescription, WirePartial, partial_from_wire, payload_dtype
from .page import Page
from .record_lock import RecordLock

_SCHEMA = pa.schema([("header", pa.large_string()), ("mean", pa.large_binary()), ("payload", pa.large_binary())])
_TRAILER = struct.Struct("<QQQI4s")
"""Length of the stream, where the payload begins in it, the payload's sum, the CRC of all the rest, magic."""
_MAGIC = b"EWS1"
_END_OF_STREAM_BYTES = 8
_SHARED_MEMORY = Path("/dev/shm")


SPOOL_VARIABLE = "EIGENWATCH_SPOOL"


def spool_roots(room_bytes: int) -> list[Path]:
    """Where a rank puts its spool, and then where it goes on when that is full.

    `$EIGENWATCH_SPOOL` where that is set; else shared memory, if twice `room_bytes` is free there for each rank of this
    host, and the temporary folder.
    """
    if os.environ.get(SPOOL_VARIABLE):
        return all_spool_roots()
    shared, temporary = all_spool_roots()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    roomy = os.access(_SHARED_MEMORY, os.W_OK) and shutil.disk_usage(_SHARED_MEMORY).free >= 2 * room_bytes * ranks
    return [shared, temporary] if roomy else [temporary]


def all_spool_roots() -> list[Path]:
    """Where spools of this user may lie on this host."""
    chosen = os.environ.get(SPOOL_VARIABLE)
    if chosen:
        return [Path(chosen)]
    return [folder / f"eigenwatch-{os.getuid()}" for folder in (_SHARED_MEMORY, Path(tempfile.gettempdir()))]


def courier_lock(run: RunDescription) -> RecordLock:
    """Held by the one courier that carries for the ranks of this launch on this host."""
    folders = all_spool_roots()
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK):
                break
    else:
        folder = folders[-1]
    return RecordLock(folder / f".{run.run_id}-{run.launch_id}.courier")


class Destination(NamedTuple):
    """The aggregator that a spool is for."""

    address: str
    """host:port of its Ray cluster, or the path of a file that says it."""
    store: str | None = None
    """Of an embedded aggregator: its Ray has another address each time, its store is what stays."""


class Label(NamedTuple):
    """What a spool says of itself."""

    run: RunDescription
    rank: int
    destination: Destination
    created_at: float
    """Unix time in seconds."""


class Spool:
    """One rank's folder, or folders. The training process writes, the courier reads and removes; each file has one
    writer."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        """In the order in which they are filled; the first exists."""
        self._lock = RecordLock(self.folder / "lock")
        self.said = Page(self.folder / "said")
        """Of the rank: what it has lost, and until when it waits once it closes."""
        self.told = Page(self.folder / "told")
        """Of the courier: what the aggregator asks for, and that it is done with this spool."""

    @classmethod
    def create(cls, roots: Sequence[Path], run: RunDescription, rank: int, destination: Destination) -> Spool:
        """A new spool below the first of `roots` that takes it, locked for this process; the others are for when that
        one is full.

        Raises:
            OSError: every file system refused.
        """
        spool = cls(*(root / f"{run.run_id}-{run.launch_id}-{rank}" for root in roots))
        folders = [str(folder) for folder in spool._folders]
        label = {"run": run.to_wire(), "rank": rank, "destination": destination, "created_at": time.time()}
        try:
            spool._make(json.dumps(label | {"folders": folders}))
        except OSError:
            if len(roots) == 1:
                raise
            return cls.create(roots[1:], run, rank, destination)
        return spool

    @classmethod
    def at(cls, folder: Path) -> Spool:
        """The spool whose first folder is this.

        Raises:
            OSError, ValueError: there is none.
        """
        return cls(*map(Path, json.loads((folder / "run.json").read_text())["folders"]))

    @property
    def folder(self) -> Path:
        """The first folder, where its logs are too."""
        return self._folders[0]

    @property
    def roots(self) -> list[Path]:
        """What its folders lie in."""
        return [folder.parent for folder in self._folders]

    def label(self) -> Label:
        """Whose partials lie here, and where they belong.

        Raises:
            ValueError: nothing readable says so.
        """
        try:
            said: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
            run, destination = RunDescription.from_wire(said["run"]), Destination(*said["destination"])
            return Label(run, int(said["rank"]), destination, float(said["created_at"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.folder}/run.json is not readable: {type(error).__name__}: {error}") from error

    def lock(self, alone: bool = False) -> bool:
        """Says that this process uses the spool until `unlock` or its end; False where others do.

        Rank and courier hold it together; whoever delivers what they left holds it `alone`.
        """
        try:
            return self._lock.take(alone)
        except OSError:
            return False

    @property
    def rank_lives(self) -> bool:
        """Whether another process holds the lock that the courier, who asks, shares."""
        return not self._lock.only_ours()

    def unlock(self) -> None:
        self._lock.release()

    def write(self, number: int, partial: Partial) -> None:
        """Stores a partial under `number`, in the first folder that has room; it appears whole or not at all.

        Raises:
            OSError: every file system refused.
        """
        for folder in self._folders:
            try:
                if folder != self.folder and not folder.is_dir():
                    with _folder_in_the_making(folder, (self.folder / "run.json").read_text()) as new:
                        new.rename(folder)
                self._write(folder / f"{number:012d}.arrow", partial)
                return
            except OSError:
                if folder == self._folders[-1]:
                    raise

    def _write(self, path: Path, partial: Partial) -> None:
        header, mean, payload = partial.to_wire()
        columns = [pa.array([json.dumps(header)], pa.large_string()), _one_binary(mean), _one_binary(payload)]
        temporary = path.with_suffix(".tmp")
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            with temporary.open("ab") as file:
                file.write(_trailer(_mapped(temporary), payload.nbytes))
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, number: int) -> WirePartial:
        """The partial stored under `number`, its arrays mapped from the file.

        Raises:
            FileNotFoundError: it was removed meanwhile.
            PartialRefused: the file is not a partial, or not as it was written.
        """
        try:
            batch = pa.ipc.open_stream(pa.BufferReader(_verified(_mapped(self._path(number))))).read_next_batch()
            if batch.schema != _SCHEMA or batch.num_rows != 1:
                raise PartialRefused("malformed", f"spool file {number} holds no partial, but {batch.schema.names}")
            header = json.loads(batch.column(0)[0].as_py())
            mean = _numbers(batch.column(1), np.dtype(np.float64))
            wire = WirePartial(header, mean, _numbers(batch.column(2), payload_dtype(header)))
            partial_from_wire(wire)
            return wire
        except FileNotFoundError:
            raise
        except PartialRefused as refused:
            raise PartialRefused(refused.reason, f"spool file {number}: {refused}") from None
        except (pa.ArrowException, ValueError, OSError, StopIteration, TypeError, RecursionError) as error:
            raise PartialRefused("malformed", f"spool file {number} is not readable: {error}") from error

    def remove(self, number: int) -> bool:
        """Whether it was still there."""
        try:
            self._path(number).unlink()
        except FileNotFoundError:
            return False
        return True

    def numbers(self) -> list[int]:
        """The stored partials, oldest first."""
        return sorted({int(path.stem) for folder in self._folders for path in folder.glob("*.arrow")})

    def size_bytes(self, number: int) -> int:
        try:
            return self._path(number).stat().st_size
        except FileNotFoundError:
            return 0

    def oldest_seconds(self) -> float:
        """Age of the oldest stored partial; 0 where there is none."""
        for number in self.numbers():
            try:
                return max(time.time() - self._path(number).stat().st_mtime, 0.0)
            except FileNotFoundError:
                continue
        return 0.0

    @property
    def closed(self) -> bool:
        """Whether the rank said goodbye, rather than died."""
        return (self.folder / "closed").exists()

    def close(self) -> None:
        """The rank says goodbye, and leaves what is here to a later job."""
        with contextlib.suppress(OSError):
            (self.folder / "closed").touch()
        self.unlock()

    def count_take(self) -> int:
        """How often this spool was taken over without being given back, this time included."""
        with contextlib.suppress(OSError), (self.folder / "takes").open("ab") as takes:
            takes.write(b".")
            return takes.tell()
        return 1

    def forget_takes(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / "takes").unlink(missing_ok=True)

    def count_lost(self) -> None:
        """A partial of this spool will never be in a record: the rank shall hear of it when it closes."""
        with contextlib.suppress(OSError), (self.folder / "lost").open("ab") as lost:
            lost.write(b".")

    def lost(self) -> int:
        """How often that was counted."""
        with contextlib.suppress(OSError):
            return (self.folder / "lost").stat().st_size
        return 0

    def idle_seconds(self) -> float:
        """Time since the last partial, or the spool itself, was written."""
        files = [self.folder / "run.json", *map(self._path, self.numbers()[-1:])]
        times = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                times.append(file.stat().st_mtime)
        return time.time() - max(times, default=time.time())

    def discard(self) -> None:
        """Removes the folders and whatever is in them."""
        for folder in reversed(self._folders):
            shutil.rmtree(folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        paths = [folder / f"{number:012d}.arrow" for folder in self._folders]
        return next((path for path in paths if path.exists()), paths[0])

    def _make(self, label: str) -> None:
        with _folder_in_the_making(self.folder, label) as new:
            for name in ("said", "told"):
                Page(new / name).write({})  # its room is taken now
            lock = RecordLock(new / "lock")
            if not lock.take(alone=False):
                raise OSError(f"{new} cannot be locked")
            new.rename(self.folder)
        lock.moved_to(self.folder / "lock")
        self._lock = lock


def spools_in(roots: Iterable[Path]) -> list[Spool]:
    """Every spool of this user below these roots; folders of one name are one spool."""
    found: dict[str, list[Path]] = {}
    for root in dict.fromkeys(roots):
        with contextlib.suppress(OSError):
            for folder in root.iterdir():
                if not folder.name.startswith(".") and _is_ours(folder):
                    found.setdefault(folder.name, []).append(folder)
    return [Spool(*folders) for _, folders in sorted(found.items())]


def _is_ours(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return ours and (folder / "lock").is_file()  # nothing that is not a spool is ever touched


@contextlib.contextmanager
def _folder_in_the_making(folder: Path, label: str) -> Iterator[Path]:
    """A spool's folder under another name, labelled, to be renamed: it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))  # only its owner may look into it
    try:
        (new / "lock").touch(mode=0o600)
        (new / "run.json").write_text(label)
        yield new
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _one_binary(array: NDArray[Any]) -> pa.Array:
    offsets = pa.py_buffer(np.array([0, array.nbytes], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(array)])


def _numbers(column: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    start, stop = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset : column.offset + 2]
    data = column.buffers()[2]
    if data is None:
        return np.empty(0, dtype=dtype)
    return np.frombuffer(data.slice(int(start), int(stop - start)), dtype=dtype)


def _mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, which stay when it is removed.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is empty.
    """
    return np.memmap(path, np.uint8, "r")


def _trailer(stream: NDArray[np.uint8], payload_bytes: int) -> bytes:
    """What follows a stream whose last buffer is the payload, padded by Arrow to a multiple of 8 bytes."""
    start = stream.size - _END_OF_STREAM_BYTES - (payload_bytes + 7) // 8 * 8
    return _TRAILER.pack(stream.size, start, *_checksums(stream, start), _MAGIC)


def _verified(file: NDArray[np.uint8]) -> pa.Buffer:
    """The stream of a file, without its trailer.

    Raises:
        PartialRefused: it is not what was written.
    """
    if file.size <= _TRAILER.size:
        raise PartialRefused("malformed", f"{file.size} bytes are no partial")
    stream, trailer = file[: -_TRAILER.size], file[-_TRAILER.size :]
    length, start, *checksums, magic = _TRAILER.unpack(trailer.data)
    if magic != _MAGIC or length != stream.size:
        raise PartialRefused("malformed", "its end is missing, or it was not written by this version")
    if not 0 <= start <= length - _END_OF_STREAM_BYTES or checksums != _checksums(stream, start):
        raise PartialRefused("malformed", "its bytes are not those that were written")
    return pa.py_buffer(stream)


def _checksums(stream: NDArray[np.uint8], start: int) -> list[int]:
    """The sum of the payload's words, and the CRC of everything that Arrow interprets.

    A CRC of a large payload would cost as much as writing it (1.7 GB/s; the sum: 6.4 GB/s). The payload is numbers,
    which may be wrong but break nothing, and what happens to files, lost pages and flipped bits, changes the sum.
    """
    payload, rest = stream[start:-_END_OF_STREAM_BYTES], stream[-_END_OF_STREAM_BYTES:]
    whole = payload.size // 8 * 8
    words = int(payload[:whole].view(np.uint64).sum())
    crc = 0
    for part in (stream[:start], payload[whole:], rest):
        crc = zlib.crc32(part.data, crc)
    return [words, crc]
