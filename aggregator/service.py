"""The service: an aggregator on a Ray cluster, its own or an existing one, and the endpoint in front of it.

Runs in the process of `eigenwatch serve`, which is the driver of the actors: they end with it, so nothing is left on a
shared cluster. The port and the store are checked before Ray is touched, since they fail most often.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from typing import Any

import ray
import ray.exceptions
import ray.util

from ..schemas.delivery import COORDINATOR, NAMESPACE, check_reachable
from .actors import CoordinatorActor, ShardActor, remote
from .config import ServiceConfig
from .exporter import Endpoint
from .fleet import Fleet
from .snapshot import Launch, RunState, Snapshot, counted_by
from .writer import StoreWriter

log = logging.getLogger("eigenwatch.aggregator")

SNAPSHOT_SECONDS = 1.0
SCHEDULE_SECONDS = 60.0
"""How long an actor may wait for its resources before starting counts as failed."""
FLUSH_SECONDS = 120.0
CALL_SECONDS = 30.0
OBJECT_STORE_BYTES = 1 << 30


class Service:
    """A running aggregator: started on construction, ended by `close`."""

    def __init__(self, config: ServiceConfig) -> None:
        """Raises ValueError, with the remedy, where store, port, cluster or resources cannot be had."""
        StoreWriter(config.store)
        self._snapshot = Snapshot(0.0, [], [])
        self._endpoint = Endpoint(lambda: self._snapshot, config.metrics_host, config.metrics_port)
        try:
            self.address = _connect(config)
            self._coordinator, self._shards = _start_actors(config)
            self._fleet = _fleet(config, self._coordinator, self._shards)
        except BaseException:
            self._endpoint.close()
            ray.shutdown()
            raise
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="eigenwatch-snapshot", daemon=True)
        self._poller.start()

    @property
    def metrics_url(self) -> str:
        return self._endpoint.url

    def running(self) -> list[RunState]:
        """Launches under way whose couriers speak to this aggregator."""
        runs: list[RunState] = ray.get(self._coordinator.running.remote(), timeout=CALL_SECONDS)
        return [run for run in runs if run.heard]

    def ended(self) -> list[Launch]:
        """Launches that have ended lately."""
        launches: list[Launch] = ray.get(self._coordinator.ended.remote(), timeout=CALL_SECONDS)
        return launches

    def close(self) -> bool:
        """Writes everything that was received and ends the actors; False if not all could be written in time."""
        self._stop.set()
        self._poller.join()
        flushed = False
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            closing = [shard.close.remote(FLUSH_SECONDS) for shard in self._shards.values()]
            flushed = not any(ray.get(closing, timeout=FLUSH_SECONDS + CALL_SECONDS))
            counted = self._take_snapshot().counted
            ray.get(self._coordinator.close.remote(counted), timeout=CALL_SECONDS)
        self._endpoint.close()
        for actor in (self._coordinator, *self._shards.values()):
            ray.kill(actor)
        ray.shutdown()
        return flushed

    def _poll(self) -> None:
        while not self._stop.wait(SNAPSHOT_SECONDS):
            try:
                self._snapshot = self._take_snapshot()
            except (ray.exceptions.RayError, TimeoutError) as error:
                # The old snapshot stays, with its age in it, so the staleness alert tells.
                log.warning("no snapshot from the shards: %s", error)

    def _take_snapshot(self) -> Snapshot:
        ended: list[Launch] = ray.get(self._coordinator.ended.remote(), timeout=CALL_SECONDS)
        shards = self._fleet.snapshots(ended)
        asked = self._coordinator.running.remote(counted_by(shards), self._snapshot.counted)
        runs: list[RunState] = ray.get(asked, timeout=CALL_SECONDS)
        return Snapshot(self._fleet.heard_at, runs, shards, len(self._fleet.away))


def _connect(config: ServiceConfig) -> str:
    """Joins the cluster, or starts one; returns its address."""
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        ray.init(
            address="local",
            num_cpus=config.shards,
            num_gpus=0 if config.solver.device == "cpu" else None,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **common,
        )
    else:
        if config.address.startswith("ray://"):
            raise ValueError(f"address {config.address!r} is a Ray Client address: pass the cluster's host:port")
        try:
            check_reachable(config.address)
            ray.init(address=config.address, **common)
        except (OSError, RuntimeError, ValueError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"no Ray cluster at {config.address} ({first_line}): start one with `ray start --head`, or leave "
                "--address out"
            ) from None
    return str(ray.get_runtime_context().gcs_address)


def _start_actors(config: ServiceConfig) -> tuple[Any, dict[str, Any]]:
    if COORDINATOR in ray.util.list_named_actors():
        raise ValueError("an aggregator runs on this Ray cluster already: use it, or stop it first")
    gpus = _gpus_of_a_shard(config)
    names = [f"shard-{index}" for index in range(config.shards)]
    coordinator = _actor(CoordinatorActor, name=COORDINATOR, num_cpus=0).remote(config.store, names)
    shards = {
        name: _actor(ShardActor, name=name, num_cpus=1, num_gpus=gpus).remote(
            config.store, config.solver, config.limits
        )
        for name in names
    }
    return coordinator, shards


def _fleet(config: ServiceConfig, coordinator: Any, shards: dict[str, Any]) -> Fleet:
    fleet = Fleet(coordinator, shards, config.away_seconds)
    try:
        ray.get(coordinator.running.remote(), timeout=SCHEDULE_SECONDS)
        fleet.start(SCHEDULE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        raise ValueError(
            f"none of {config.shards} shards (1 CPU, {_gpus_of_a_shard(config):g} GPU each) was scheduled in "
            f"{SCHEDULE_SECONDS:.0f} s: free resources on the cluster, or ask for fewer with --shards"
        ) from None
    return fleet


def _gpus_of_a_shard(config: ServiceConfig) -> float:
    """Its part of the cluster's GPUs, one at most; none where the solver shall not use them, or there are none."""
    if config.solver.device == "cpu":
        return 0.0
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return min(1.0, math.floor(100 * resources.get("GPU", 0.0) / config.shards) / 100)


def _actor(kind: type, **options: Any) -> Any:
    """A Ray actor class that Ray starts again when it dies."""
    return remote(kind, max_restarts=-1, **options)
