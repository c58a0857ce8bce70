"""The spool: a bounded folder of partials on their way from the training process to its courier.

The outbox's thread writes a file per partial, the courier deletes it once its record is durable, so a partial
survives the death of either process, and of Ray. Files are Arrow IPC, read by memory map; never pickle. The folder
lies in shared memory where there is room, so that handing over costs one copy and no disk.

    <root>/<run_id>-<launch_id>-<rank>/{run.json, 000000000000.arrow, …}
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..schemas import Partial, PartialRefused, RunDescription, WirePartial, partial_from_wire, payload_dtype

_SCHEMA = pa.schema([("header", pa.large_string()), ("mean", pa.large_binary()), ("payload", pa.large_binary())])
_SHARED_MEMORY = Path("/dev/shm")


def default_root(room_bytes: int) -> Path:
    """A folder for spools: in shared memory if twice `room_bytes` is free there, else in the temporary folder."""
    roomy = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    roomy = roomy and shutil.disk_usage(_SHARED_MEMORY).free >= 2 * room_bytes
    return (_SHARED_MEMORY if roomy else Path(tempfile.gettempdir())) / f"eigenwatch-{os.getuid()}"


class Spool:
    """One rank's folder. The training process writes, the courier reads and removes; each file has one writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, root: Path, run: RunDescription, rank: int) -> Spool:
        folder = root / f"{run.run_id}-{run.launch_id}-{rank}"
        folder.mkdir(parents=True, mode=0o700)
        (folder / "run.json").write_text(json.dumps({"run": run.to_wire(), "rank": rank}))
        return cls(folder)

    def run(self) -> tuple[RunDescription, int]:
        """The run whose partials lie here, and the rank."""
        description: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return RunDescription.from_wire(description["run"]), int(description["rank"])

    def write(self, number: int, partial: Partial) -> None:
        """Stores a partial under `number`; it appears whole or not at all.

        Raises:
            OSError: the file system refused.
        """
        header, mean, payload = partial.to_wire()
        columns = [pa.array([json.dumps(header)], pa.large_string()), _one_binary(mean), _one_binary(payload)]
        path = self._path(number)
        temporary = path.with_suffix(".tmp")
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, number: int) -> WirePartial:
        """The partial stored under `number`, its arrays mapped from the file.

        Raises:
            FileNotFoundError: it was removed meanwhile.
            PartialRefused: the file is not a partial.
        """
        try:
            with pa.memory_map(str(self._path(number))) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            header = json.loads(batch.column(0)[0].as_py())
            mean = _numbers(batch.column(1), np.dtype(np.float64))
            wire = WirePartial(header, mean, _numbers(batch.column(2), payload_dtype(header)))
            partial_from_wire(wire)
            return wire
        except (FileNotFoundError, PartialRefused):
            raise
        except (pa.ArrowException, ValueError, OSError, IndexError, TypeError, AttributeError) as error:
            raise PartialRefused("malformed", f"spool file {number} is not readable: {error}") from error

    def remove(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)

    def numbers(self) -> list[int]:
        """The stored partials, oldest first."""
        return sorted(int(path.stem) for path in self.folder.glob("*.arrow"))

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

    def discard(self) -> None:
        """Removes the folder and whatever is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:012d}.arrow"


def _one_binary(array: NDArray[Any]) -> pa.Array:
    offsets = pa.py_buffer(np.array([0, array.nbytes], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(array)])


def _numbers(column: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    start, stop = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset : column.offset + 2]
    data = column.buffers()[2]
    if data is None:
        return np.empty(0, dtype=dtype)
    return np.frombuffer(data.slice(int(start), int(stop - start)), dtype=dtype)
