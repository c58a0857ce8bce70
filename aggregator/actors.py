"""The Ray actors: what couriers and the service call, one thin class for each, around the object that does the work.

Ray imports an actor's class in every process that looks the actor up by name, couriers among them. So nothing heavy
is imported here before an actor is built: torch would cost each courier two seconds of a CPU and 200 MB.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from ray import ObjectRef

    from ..schemas.delivery import Fate, Opened, PushReply
    from .config import ShardLimits, SolverConfig
    from .coordinator import Counted
    from .snapshot import Launch, RunState, ShardSnapshot


PIECES_SECONDS = 45.0
"""Less than a courier waits for the answer."""
THREADS = 8
"""For pushes."""


def remote(kind: type, **options: Any) -> Any:
    """A Ray actor class whose methods run in several threads. Runs are announced in a thread of their own: that reads
    the store, after a restart for every courier at once, and the rest goes on meanwhile. Questions do not wait behind
    pushes, of which large ones take long."""
    with_groups = ray.remote(concurrency_groups={"announcing": 1, "asking": 2})  # type: ignore[call-overload]
    return with_groups(kind).options(max_concurrency=THREADS, **options)


class CoordinatorActor:
    """See `Coordinator`."""

    def __init__(self, store: str, shard_names: list[str]) -> None:
        from .coordinator import Coordinator

        self._coordinator = Coordinator(store, shard_names)

    @ray.method(concurrency_group="announcing")
    def open_run(self, run_wire: dict[str, Any]) -> Opened:
        return self._coordinator.open_run(run_wire)

    def set_shards(self, shards: dict[str, str], stretch: dict[str, int]) -> None:
        self._coordinator.set_shards(shards, stretch)

    @ray.method(concurrency_group="asking")
    def heartbeat(self, run_id: str, attempt: int, rank: int, dropped: dict[str, int], epoch: int | None = None) -> int:
        return self._coordinator.heartbeat(run_id, attempt, rank, dropped, epoch)

    @ray.method(concurrency_group="asking")
    def finish(self, run_id: str, attempt: int, rank: int, clean: bool, dropped: dict[str, int]) -> None:
        self._coordinator.finish(run_id, attempt, rank, clean, dropped)

    @ray.method(concurrency_group="asking")
    def running(self, counted: Counted | None = None, before: Counted | None = None) -> list[RunState]:
        return self._coordinator.running(counted, before)

    def close(self, counted: Counted) -> None:
        self._coordinator.close(counted)

    @ray.method(concurrency_group="asking")
    def ended(self) -> list[Launch]:
        return self._coordinator.ended()


class ShardActor:
    """See `Shard`."""

    def __init__(self, store: str, solver: SolverConfig, limits: ShardLimits) -> None:
        from .shard import Shard

        self._shard = Shard(store, solver, limits)
        self._assembling = threading.Lock()

    @ray.method(concurrency_group="announcing")
    def open_run(self, run_wire: dict[str, Any], attempt: int, owned: list[int] | None = None, epoch: int = 0) -> None:
        self._shard.open_run(run_wire, attempt, owned, epoch)

    def push(
        self, header: dict[str, Any], mean: NDArray[np.float64], payload: NDArray[Any] | list[ObjectRef[Any]]
    ) -> PushReply:
        if not isinstance(payload, list):
            return self._shard.push(header, mean, payload)
        import numpy

        from ..schemas.delivery import MESSAGE_BYTES, PushReply
        from ..schemas.wire import MAX_PAYLOAD_BYTES

        if len(payload) > MAX_PAYLOAD_BYTES // MESSAGE_BYTES:
            return PushReply("refused", "too_large", f"{len(payload)} pieces, more than any payload has")
        with self._assembling:  # one at a time, so that memory is bounded
            try:
                whole = numpy.concatenate(ray.get(payload, timeout=PIECES_SECONDS))
            except (TimeoutError, MemoryError):  # their host is cut off, or there is no room
                return PushReply("busy")
            return self._shard.push(header, mean, whole)

    @ray.method(concurrency_group="asking")
    def fates(self, asked: list[tuple[tuple[Any, ...], list[int]]]) -> list[list[Fate]]:
        return self._shard.fates(asked)

    @ray.method(concurrency_group="asking")
    def snapshot(self, ended: list[Launch]) -> ShardSnapshot:
        return self._shard.snapshot(ended)

    def close(self, timeout_seconds: float) -> int:
        return self._shard.close(timeout_seconds)
