"""The solver in a process of its own, because a failed solve on a GPU can poison the process that made it.

Both ends of the conversation. `SolverProcess` is the shard's: it moves bytes, and waits. The child, `main`, does all
that needs torch. Matrices lie in one memory file that both map; what goes over the socket is small. The child holds
nothing that is needed again: whoever kills it, at whatever moment, costs one try of one job. It dies with the thread
that started it, the shard's worker, even by SIGKILL and even while it is stopped (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..schemas import PartialSamples, RecordKey
from ..spectrum import Group, Share
from .config import SolverConfig
from .solver import Job, Rung, RungFailed, Solved, climb, ladder, solve_at

log = logging.getLogger("eigenwatch.aggregator")

START_SECONDS = 120.0
"""How long a child may take to import torch and find its GPU."""
CUBIC_SECONDS = {"cpu": 1e-9, "cuda": 2e-11}
"""What a solve may take for each n³, over `timeout_seconds`: ten times what a slow core, or a GPU, needs."""
DEAD_TRIES, SLOW_TRIES = 3, 2
"""How often the last rung is tried with a child that dies, which somebody else may have killed, or does not answer,
which holds up everybody for long."""
KEPT_BYTES = 256 << 20
"""A larger memory file is given back after its job; up to here its pages stay, since new ones cost more than a copy."""
ALLOCATION = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES)}
"""The same for what the child allocates: new pages for each matrix would cost it 5 % of its time at D = 2048."""
ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1


class Place(NamedTuple):
    """Where an array lies in the memory file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class JobHeader(NamedTuple):
    """A job, its arrays by place."""

    key: RecordKey
    width: int
    within: Place
    means: Place
    """(K, D) of the finished shares that saw a token."""
    shares: list[tuple[int, int, float, float]]
    """Number, tokens, trace and frobenius_sq of each of them."""
    rows: list[tuple[int, Place]]
    """By rank."""
    eigenvalues: Place
    """(D,) float32: where the answer goes."""


class MemoryFile:
    """Memory without a name, mapped by whoever has its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    def grow(self, nbytes: int) -> None:
        """Makes it at least this long; only the end that writes may."""
        if nbytes > self._length:
            os.ftruncate(self.descriptor, nbytes)

    def trim(self) -> None:
        """Gives it back if it is too long to keep."""
        if self._length > KEPT_BYTES:
            os.ftruncate(self.descriptor, 0)

    @property
    def _length(self) -> int:
        return os.fstat(self.descriptor).st_size

    def array(self, place: Place) -> NDArray[Any]:
        """What lies there, without a copy; mapped anew where the file has grown or shrunk."""
        if self._map is None or len(self._map) != self._length:
            self._map = mmap.mmap(self.descriptor, self._length)
        return np.ndarray(place.shape, place.dtype, buffer=self._map, offset=place.offset)


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    connection: Connection


class SolverProcess:
    """A solver that solves in a child of this process, and has another when that one dies."""

    def __init__(self, config: SolverConfig) -> None:
        self._config = config
        self._memory = MemoryFile(os.memfd_create("eigenwatch-solver"))
        self._child: _Child | None = None
        self._greeted = False
        self._gpu: bool | None = None
        """None until the first child has said."""

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.process.pid

    def start(self) -> None:
        """Starts a child; it will be heard of when it is needed."""
        if self._child is not None:
            return
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a stopped child may stop in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(self._config.timeout_seconds) + 1, 0))
        with theirs:
            descriptors = (theirs.fileno(), self._memory.descriptor)
            arguments = [str(one) for one in (*descriptors, os.getpid())]
            command = [sys.executable, "-m", __name__, *arguments]
            process = subprocess.Popen(command, pass_fds=descriptors, env=os.environ | ALLOCATION)
        self._child = _Child(process, Connection(ours.detach()))
        self._greeted = False

    def solve(self, jobs: Sequence[Job]) -> list[Solved]:
        if self._gpu is None:
            for _ in range(2):
                with contextlib.suppress(RungFailed):
                    self._ready()
                    break
        return climb(jobs, ladder(self._config, bool(self._gpu)), self._attempt)

    def close(self) -> None:
        """Ends the child, whatever it does."""
        if self._child is not None:
            self._end()
        os.close(self._memory.descriptor)

    def _attempt(self, jobs: Sequence[Job], rung: Rung) -> list[Solved]:
        connection = self._ready()
        try:
            headers = self._lay_out(jobs)
            seconds = self._config.timeout_seconds + CUBIC_SECONDS[rung.device] * sum(job.order**3 for job in jobs)
            answer = self._ask(connection, seconds, (headers, rung, self._config))
            if isinstance(answer, str):
                raise RungFailed(answer)
            found = [self._memory.array(header.eigenvalues).copy() for header in headers]
        finally:
            self._memory.trim()
        return [
            solved if solved.path is None else solved._replace(eigenvalues=spectrum)
            for solved, spectrum in zip(answer, found, strict=True)
        ]

    def _ready(self) -> Connection:
        self.start()
        assert self._child is not None
        if not self._greeted:
            self._gpu = self._ask(self._child.connection, START_SECONDS)
            self._greeted = True
        return self._child.connection

    def _ask(self, connection: Connection, seconds: float, message: Any = None) -> Any:
        """The child's answer; where none comes, the child is ended."""
        try:
            if message is not None:
                connection.send(message)
            if connection.poll(seconds):
                return connection.recv()
            why = f"no answer within {seconds:.0f} s"
        except (EOFError, OSError):
            why = ""
        code = self._end()
        tries = SLOW_TRIES if why else DEAD_TRIES
        why = why or f"the solver process died ({_exit(code)})"
        log.warning("%s: it is started again", why)
        raise RungFailed(why, tries)

    def _end(self) -> int:
        assert self._child is not None
        self._child.process.kill()
        self._child.connection.close()
        code = self._child.process.wait()
        self._child = None
        return code

    def _lay_out(self, jobs: Sequence[Job]) -> list[JobHeader]:
        """Copies the jobs' arrays into the memory file."""
        arrays: list[tuple[Place, NDArray[Any]]] = []
        end = 0

        def place(shape: tuple[int, ...], dtype: np.dtype[Any] | type, content: NDArray[Any] | None = None) -> Place:
            nonlocal end
            found = Place(end, shape, np.dtype(dtype).str)
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
            if content is not None and content.size:
                arrays.append((found, content))
            return found

        headers = []
        for job in jobs:
            group = job.group
            shares = [(number, one) for number, one in group.shares.items() if one.finished and one.tokens]
            within = group.within.numpy()
            means = [one.mean.numpy() for _, one in shares]
            headers.append(
                JobHeader(
                    key=job.key,
                    width=group.width,
                    within=place(within.shape, within.dtype, within),
                    means=place((len(means), group.width), np.float64, np.stack(means) if means else None),
                    shares=[(number, one.tokens, one.trace, one.frobenius_sq) for number, one in shares],
                    rows=[(one.rank, place(one.samples.shape, one.samples.dtype, one.samples)) for one in job.rows],
                    eigenvalues=place((group.width,), np.float32),
                )
            )
        self._memory.grow(end)
        for where, content in arrays:
            np.copyto(self._memory.array(where), content)
        return headers


def main() -> None:
    """The child: answers one question after the other until the other end is gone."""
    socket_descriptor, memory_descriptor, parent = map(int, sys.argv[1:])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that lets us finish
    connection, memory = Connection(socket_descriptor), MemoryFile(memory_descriptor)
    connection.send(torch.cuda.is_available())
    with contextlib.suppress(EOFError, OSError):
        while True:
            headers, rung, config = connection.recv()
            connection.send(_answer(headers, rung, config, memory))
            if rung.device == "cuda" and not _gpu_is_sane():
                return


def _answer(headers: list[JobHeader], rung: Rung, config: SolverConfig, memory: MemoryFile) -> list[Solved] | str:
    try:
        answers = solve_at([_job(header, memory) for header in headers], rung, config)
    except Exception as error:  # noqa: BLE001 - whatever it is, the next rung is tried
        return f"{type(error).__name__}: {error}"
    for header, solved in zip(headers, answers, strict=True):
        if solved.eigenvalues is not None:
            np.copyto(memory.array(header.eigenvalues), solved.eigenvalues)
    return [solved._replace(eigenvalues=None) for solved in answers]


def _job(header: JobHeader, memory: MemoryFile) -> Job:
    means_KD = memory.array(header.means)
    whole = (0, header.width)
    shares = {
        number: Share(
            tokens=tokens, mean=torch.from_numpy(mean), rows={number: whole}, trace=trace, frobenius_sq=frobenius_sq
        )
        for (number, tokens, trace, frobenius_sq), mean in zip(header.shares, means_KD, strict=True)
    }
    group = Group(width=header.width, within=torch.from_numpy(memory.array(header.within)), shares=shares)
    rows = [
        PartialSamples(key=header.key, rank=rank, share=rank, captured_at=0.0, samples=memory.array(place))
        for rank, place in header.rows
    ]
    return Job(header.key, group, tuple(rows))


def _gpu_is_sane() -> bool:
    """Whether this process can still use its GPU; after an illegal access it never can again."""
    try:
        torch.cuda.synchronize()
        return float(torch.ones(1, device="cuda")) == 1.0
    except RuntimeError:
        return False


def _die_with(parent: int) -> None:
    """Asks the kernel for SIGKILL when the thread that started this process ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it went before the kernel was asked
        os._exit(1)


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    main()
