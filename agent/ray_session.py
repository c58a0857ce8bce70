"""The courier's side of the conversation with the aggregator, over Ray.

Only a courier process uses this: it makes the process a Ray driver. Actors are found by name and called with builtin
values and arrays, so no code of the aggregator is needed here. Ray Client (`ray://`) is never used.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from numpy.typing import NDArray

from ..schemas import RecordKey, RunDescription, WirePartial
from ..schemas.delivery import (
    COORDINATOR,
    MESSAGE_BYTES,
    NAMESPACE,
    OPEN_AGAIN,
    Fate,
    Opened,
    PushReply,
    check_reachable,
)
from .compatibility import why_not_joined

CALL_SECONDS = 60.0

_T = TypeVar("_T")


class SessionError(Exception):
    """The aggregator could not be reached; trying again may help."""

    lasting = False
    """Whether it will not, until somebody changes something."""


class _NotLetIn(ValueError):
    """The cluster answers, and this process cannot join it."""


class RaySession:
    """A launch's session: opened again after every failure, so each method may raise SessionError."""

    def __init__(self, address: str, run: RunDescription) -> None:
        """`address` is host:port or auto, or the path of a file that says it anew whenever it changes."""
        self._address = address
        self._run = run
        self._ranks = {(one.layer, one.site, one.expert): frozenset(one.ranks) for one in run.layers}
        self._attempt = self._epoch = 0
        self._owners: dict[int, str] = {}
        self._actors: dict[str, Any] = {}

    def connect(self) -> None:
        """Joins the cluster, another one than before where the address has changed, and finds the coordinator."""

        def connecting() -> None:
            moves = self._address.startswith("/")
            address = Path(self._address).read_text() if moves else self._address
            if moves and ray.is_initialized() and ray.get_runtime_context().gcs_address != address:
                ray.shutdown()
            if not ray.is_initialized():
                check_reachable(address)
                self._join(address)
            self._actors = {COORDINATOR: ray.get_actor(COORDINATOR, namespace=NAMESPACE)}

        self._calling(connecting)

    def _join(self, address: str) -> None:
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
            why = why_not_joined(address, error)
            if why is not None:
                raise _NotLetIn(why) from error
            raise

    def open(self) -> None:
        """Connects, announces the run, learns its attempt and who owns which layer."""
        self.connect()

        def opening() -> None:
            opening = self._actors[COORDINATOR].open_run.remote(self._run.to_wire())
            self._attempt, self._owners, shards, self._epoch = Opened(*ray.get(opening, timeout=CALL_SECONDS))
            self._actors |= {name: ray.get_actor(name, namespace=NAMESPACE) for name in shards}
            owned = {name: [layer for layer, owner in self._owners.items() if owner == name] for name in shards}
            told = [
                self._actors[name].open_run.remote(self._run.to_wire(), self._attempt, layers, self._epoch)
                for name, layers in owned.items()
            ]
            ray.get(told, timeout=CALL_SECONDS)

        self._calling(opening)

    def knows(self, layer: int) -> bool:
        """Whether the run has this layer."""
        return layer in self._owners

    def ranks(self, key: RecordKey) -> frozenset[int]:
        """The ranks that contribute to this record."""
        return self._ranks.get((key.layer, key.site, key.expert), frozenset())

    def key(self, wire: WirePartial) -> RecordKey:
        """The record that a partial belongs to under this launch's attempt."""
        header = wire.header
        return RecordKey(
            header["run_id"], self._attempt, header["step"], header["layer"], header["site"], header["expert"]
        )

    def push(self, wires: list[WirePartial]) -> list[PushReply]:
        """Pushes partials to the shards that own them; stamps them with this launch's attempt."""

        def pushing() -> list[PushReply]:
            answers: list[Any] = []
            for wire in wires:
                owner = self._actors[self._owners[wire.header["layer"]]]
                header = wire.header | {"attempt": self._attempt}
                answers.append(owner.push.remote(header, wire.mean, _pieces(wire.payload)))
            return list(ray.get(answers, timeout=CALL_SECONDS))

        return self._calling(pushing)

    def fates(self, asked: dict[RecordKey, list[int]]) -> dict[RecordKey, list[Fate]]:
        """What became of ranks' partials: for each record, for each rank asked about."""

        def asking() -> dict[RecordKey, list[Fate]]:
            by_owner: dict[str, list[RecordKey]] = {}
            for key in asked:
                by_owner.setdefault(self._owners[key.layer], []).append(key)
            answers = {
                owner: self._actors[owner].fates.remote([(tuple(key), asked[key]) for key in keys])
                for owner, keys in by_owner.items()
            }
            fates: dict[RecordKey, list[Fate]] = {}
            for owner, keys in by_owner.items():
                fates |= zip(keys, ray.get(answers[owner], timeout=CALL_SECONDS), strict=True)
            return fates

        return self._calling(asking)

    def heartbeat(self, dropped: dict[int, dict[str, int]]) -> int:
        """Says which ranks live, and what each has lost so far by reason; how far the cadence is to be stretched."""
        answers = self._tell([("heartbeat", rank, losses, self._epoch) for rank, losses in dropped.items()])
        if OPEN_AGAIN in answers:
            raise SessionError("the coordinator does not know this run, or its layers have other owners now")
        stretch: int = max(answers)
        return stretch

    def finish(self, ranks: list[tuple[int, bool, dict[str, int]]]) -> None:
        """Says that ranks send nothing more: whether each closed (True) or died, and what it lost by reason."""
        self._tell([("finish", *one) for one in ranks])

    def close(self) -> None:
        ray.shutdown()

    def _tell(self, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Calls methods of the coordinator, each given with its arguments after the run and attempt."""

        def telling() -> list[Any]:
            coordinator, launch = self._actors[COORDINATOR], (self._run.run_id, self._attempt)
            answers = [getattr(coordinator, method).remote(*launch, *arguments) for method, *arguments in calls]
            return list(ray.get(answers, timeout=CALL_SECONDS))

        return self._calling(telling)

    def _calling(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed = SessionError(f"aggregator at {self._address}: {first_line}")
            failed.lasting = isinstance(error, _NotLetIn)
            raise failed from error


def _pieces(payload: NDArray[Any]) -> Any:
    """A payload as it is sent: what is large goes as a list of objects, so that no message is larger than one."""
    numbers = MESSAGE_BYTES // payload.itemsize
    if payload.size <= numbers:
        return payload
    return [ray.put(payload[start : start + numbers]) for start in range(0, payload.size, numbers)]
