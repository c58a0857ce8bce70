"""The store as a place: a local folder or an object store, listed, read and written the same way.

    <store>/run_id=<id>/{records,eigenvalues,alerts,runs}/part-*.parquet

Whoever writes (`aggregator.writer`, compaction) and whoever reads (`aggregator.stored`, `history`) goes through here.
A part becomes visible whole: in a folder under a temporary name, fsynced and renamed; in an object store by one upload.
No state but what was read of files that never change; methods may be called from several threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from .object_store import connect, one_line
from .parts import Footer, Standing, footer_of, is_part, standing, to_be_opened
from .tables import SCHEMA_VERSION, TABLES, absolute_store

READERS = 8
"""Files opened at once; an object store answers each only after a while."""
LISTINGS_MAX = 5
_T = TypeVar("_T")
_S = TypeVar("_S")


class Place(NamedTuple):
    """Where the parts of one table of one run lie."""

    run_id: str
    table: str

    @property
    def folder(self) -> str:
        return f"run_id={self.run_id}/{self.table}"


def open_store(store: str | os.PathLike[str]) -> Store:
    """The store at a path or URI, which need not exist.

    Raises:
        ValueError: a URI that cannot be used; the message names it and what to do.
    """
    where = absolute_store(store)
    return ObjectStore(where) if "://" in where else LocalStore(where)


def stores_at(pattern: str | os.PathLike[str]) -> list[Store]:
    """The store of this name, or the folders that a pattern with *, ? or [ ] fits now, in order: one history.

    Raises:
        ValueError: a URI that cannot be used, or a pattern in one.
    """
    where = absolute_store(pattern)
    if "://" in where:
        if "*" in where:
            raise ValueError(f"{where!r}: an object store takes no pattern, name one BUCKET/PREFIX")
        return [ObjectStore(where)]
    if os.path.exists(where) or not glob.has_magic(where):
        return [LocalStore(where)]
    return [LocalStore(folder.rstrip("/")) for folder in sorted(glob.glob(where)) if os.path.isdir(folder)]


class Store(ABC):
    """Parts by place. Paths are relative to the store, `run_id=<id>/<table>/<name>`."""

    def __init__(self, uri: str, filesystem: fs.FileSystem, root: str) -> None:
        self.uri = uri
        """In front of every path, for people and for DuckDB."""
        self.filesystem = filesystem
        self.root = root
        """In front of every path in `filesystem`."""
        self._footers: dict[str, Footer] = {}

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything to read."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises OSError where the store cannot be written."""

    @abstractmethod
    def listed(self, run_id: str | None = None) -> dict[Place, list[str]]:
        """Names of all parts, of one run or all; places without any are left out."""

    @abstractmethod
    def put(self, path: str, data: pa.Buffer) -> None:
        """Makes a file visible and durable, or raises OSError."""

    @abstractmethod
    def remove(self, paths: list[str]) -> None:
        """Removes files, durably; one that is not there is fine."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[bool]:
        """Held by one compaction at a time: False where another holds it."""

    @abstractmethod
    def leftovers(self, before: datetime) -> list[str]:
        """Temporary files that nobody has touched since: their writers died."""

    def live(self, run_id: str | None = None) -> dict[Place, list[str]]:
        """Names of the parts that count, in the order in which they were written: each row is in exactly one of them.

        Raises:
            ValueError: a newer eigenwatch wrote them, or the store cannot be read.
        """
        return {place: found.live for place, found in self.standing(run_id).items()}

    def standing(self, run_id: str | None = None) -> dict[Place, Standing]:
        """Which parts count, by place, of one listing. Raises ValueError as `live` does."""
        try:
            for _ in range(LISTINGS_MAX):
                # A merged part that was itself replaced long ago may be removed before it is opened.
                with contextlib.suppress(FileNotFoundError):
                    return self._standing(self.listed(run_id))
        except OSError as error:
            raise ValueError(f"store {self.uri!r} cannot be read: {one_line(error)}") from None
        raise ValueError(f"store {self.uri!r} cannot be read: its files vanish while they are listed")

    def footers(self, paths: Iterable[str]) -> dict[str, Footer]:
        """What these parts say of themselves; nothing of one that is no Parquet file."""
        paths = list(paths)
        new = [path for path in paths if path not in self._footers]
        self._footers.update(zip(new, parallel(self._footer, new), strict=True))
        return {path: self._footers[path] for path in paths}

    def metadata(self, path: str) -> pq.FileMetaData:
        """The footer of a part. Raises OSError or pa.ArrowInvalid."""
        with self.filesystem.open_input_file(self.inner(path)) as file:
            return pq.read_metadata(file)

    def read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """All rows of a part, as it has them. Raises OSError or pa.ArrowInvalid."""
        with self.filesystem.open_input_file(self.inner(path)) as file:
            return pq.ParquetFile(file).read(columns)

    def address(self, path: str) -> str:
        return f"{self.uri}/{path}"

    def inner(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _footer(self, path: str) -> Footer:
        try:
            return footer_of(self.metadata(path).metadata)
        except pa.ArrowInvalid:  # whoever reads its rows says so
            return footer_of(None)

    def _standing(self, listed: dict[Place, list[str]]) -> dict[Place, Standing]:
        newest = [f"{place.folder}/{max(names)}" for place, names in listed.items()]
        merged = [f"{place.folder}/{name}" for place, names in listed.items() for name in to_be_opened(names)]
        footers = self.footers([*newest, *merged])
        for path in newest:
            check_version(self.address(path), footers[path])

        def replaced_in(place: Place) -> Callable[[str], frozenset[str]]:
            return lambda name: footers[f"{place.folder}/{name}"].replaces

        return {place: standing(names, replaced_in(place)) for place, names in listed.items()}


class LocalStore(Store):
    """A folder, on one machine or a shared file system."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, fs.LocalFileSystem(), folder)
        self._kept: set[Path] = set()
        """Folders whose entry in the folder above is known to be durable."""

    def exists(self) -> bool:
        return os.path.isdir(self.root)

    def check_writable(self) -> None:
        os.makedirs(self.root, exist_ok=True)
        probe = Path(self.root, f".writable-{os.urandom(8).hex()}")
        probe.touch()
        probe.unlink()

    def listed(self, run_id: str | None = None) -> dict[Place, list[str]]:
        runs = [run_id] if run_id is not None else self._runs()
        found = {Place(run, table): self._parts(run, table) for run in runs for table in TABLES}
        return {place: names for place, names in found.items() if names}

    def put(self, path: str, data: pa.Buffer) -> None:
        target = Path(self.root, path)
        self._make(target.parent)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(target.parent)

    def remove(self, paths: list[str]) -> None:
        targets = [Path(self.root, path) for path in paths]
        for target in targets:
            target.unlink(missing_ok=True)
        for folder in {target.parent for target in targets}:
            _fsync_folder(folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        # The kernel lets go of it when its holder dies, however it dies.
        with Path(self.root, ".compaction.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def leftovers(self, before: datetime) -> list[str]:
        found = []
        for pattern in ("run_id=*/*/.part-*.tmp", ".writable-*"):
            for path in Path(self.root).glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before.timestamp():
                        found.append(path.relative_to(self.root).as_posix())
        return found

    def _runs(self) -> list[str]:
        try:
            return [name.removeprefix("run_id=") for name in os.listdir(self.root) if name.startswith("run_id=")]
        except FileNotFoundError:
            return []

    def _parts(self, run_id: str, table: str) -> list[str]:
        try:
            return [name for name in os.listdir(Path(self.root, Place(run_id, table).folder)) if is_part(name)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _make(self, folder: Path) -> None:
        """A folder that is there after a crash, whoever made it."""
        if folder in self._kept:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder.parent, folder.parent.parent, Path(self.root).parent):
            with contextlib.suppress(PermissionError):  # above the store, it need not be ours
                _fsync_folder(parent)
        self._kept.add(folder)


class ObjectStore(Store):
    """A prefix of a bucket. A file there is visible once it is uploaded, and a listing knows of it at once."""

    def __init__(self, uri: str) -> None:
        super().__init__(*connect(uri))

    def exists(self) -> bool:
        try:
            bucket = self.root.partition("/")[0]
            return bool(self.filesystem.get_file_info(bucket).type == fs.FileType.Directory)
        except OSError as error:
            raise ValueError(f"store {self.uri!r} cannot be read: {one_line(error)}") from None

    def check_writable(self) -> None:
        probe = f".writable-{os.urandom(8).hex()}"
        self.put(probe, pa.py_buffer(b""))
        self.remove([probe])

    def listed(self, run_id: str | None = None) -> dict[Place, list[str]]:
        folder = self.root if run_id is None else self.inner(f"run_id={run_id}")
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        found: dict[Place, list[str]] = {}
        for info in self.filesystem.get_file_info(selector):
            run, _, rest = info.path.removeprefix(f"{self.root}/").partition("/")
            table, _, name = rest.partition("/")
            if run.startswith("run_id=") and table in TABLES and is_part(name):
                found.setdefault(Place(run.removeprefix("run_id="), table), []).append(name)
        return found

    def put(self, path: str, data: pa.Buffer) -> None:
        try:
            with self.filesystem.open_output_stream(self.inner(path)) as stream:
                stream.write(data)
        except pa.ArrowException as error:
            raise OSError(one_line(error)) from None

    def remove(self, paths: list[str]) -> None:
        parallel(self._remove, paths)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        yield True  # an object store has none; see `parts.standing` for two at once

    def leftovers(self, before: datetime) -> list[str]:
        return []  # an upload that broke off is no file

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.inner(path))


def check_version(address: str, footer: Footer) -> None:
    """Raises ValueError for a part that this eigenwatch cannot read."""
    if footer.version > SCHEMA_VERSION:
        raise ValueError(
            f"{address} follows version {footer.version} of the store's schema, this eigenwatch reads up to "
            f"{SCHEMA_VERSION}: upgrade eigenwatch"
        )


def parallel(function: Callable[[_S], _T], items: list[_S]) -> list[_T]:
    """The results, in order; several calls at once, which helps where each waits for a file."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
