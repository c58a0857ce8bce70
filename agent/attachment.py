"""`attach`: the door of the agent, and the handle it gives back.

Everything that can be wrong with a call is found here, before the first step, and raised as one ValueError on every
rank alike. After that nothing of ours raises, blocks or grows without bound in the training process.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import re
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from ..schemas import LayerDescription, RunDescription, check_run_id, default_store
from ..schemas.delivery import check_reachable
from .discovery import FoundLayer, find_layers
from .embedded import EmbeddedAggregator, Served
from .handover import CourierHandover, Handover, InlineHandover
from .observation import Gate, Observer
from .outbox import Outbox, OutboxLimits, Sample
from .ranks import Ranks, current_ranks, spans_hosts
from .schedule import Every
from .spool import Destination, Spool, spool_roots

log = logging.getLogger("eigenwatch.agent")

CLOSE_SECONDS = 60.0
MIN_END_SECONDS = 5.0
"""The embedded aggregator gets this long to end even where delivery has used up the time."""


def attach(
    model: nn.Module,
    *,
    run_id: str,
    every: int = 100,
    store: str | os.PathLike[str] | None = None,
    layers: str | None = None,
    aggregator: str = "embedded",
    tags: dict[str, str] | None = None,
    metrics_port: int | None = None,
    limits: OutboxLimits | None = None,
) -> Agent:
    """Observes every feed-forward layer of `model`; call it once on every rank, after the process group exists.

    Args:
        model: the decoder, wrapped (DDP) or not.
        run_id: name of the training job, `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
        every: sample each N-th optimizer step.
        store: folder of the history; default `$EIGENWATCH_STORE`, else `./eigenwatch-store`. An aggregator that runs
            elsewhere has its own, and then this must not be given.
        layers: regular expression for the paths of the down-projections, its group the layer index; default: the
            LLaMA, GPT-2 and GPT-NeoX families.
        aggregator: "embedded" (rank 0 starts one with a local Ray), "inline" (in this process, one rank, no Ray), or
            the address of the Ray cluster on which `eigenwatch serve` runs.
        tags: what to group runs by later, such as {"norm": "pre"}; stored with the run.
        metrics_port: of the Prometheus endpoint on 127.0.0.1; 0 takes a free one. Default: a free one for the embedded
            aggregator, no endpoint for the inline one.
        limits: what may wait for delivery.

    Returns:
        The agent: call `step(step)` after each optimizer step, and `close()` at the end, or use it in a `with`.

    Raises:
        ValueError: the call cannot work; the message names the argument and the remedy. Raised on every rank if on
            any.
    """
    ranks = current_ranks()
    embedded: EmbeddedAggregator | None = None
    handover: Handover | None = None

    def start() -> dict[str, Any]:
        nonlocal embedded
        check_run_id(run_id)
        schedule = Every(steps=every)
        _check_aggregator(aggregator, store, ranks)
        found = find_layers(model, layers)
        mine: dict[str, Any] = {
            "same": {"run_id": run_id, "every": every, "tags": {str(k): str(v) for k, v in (tags or {}).items()}},
            "layers": [(one.layer, one.name, one.width) for one in found],
            "local": (schedule, found),
        }
        if ranks.rank == 0:
            mine["launch_id"], mine["served"] = uuid.uuid4().hex, Served(aggregator)
            if aggregator == "embedded":
                embedded = EmbeddedAggregator(os.path.abspath(store or default_store()), metrics_port or 0)
                mine["served"] = embedded.served
            elif aggregator not in ("inline", "auto"):
                _warn_if_unreachable(aggregator)
        return mine

    def open_handover() -> dict[str, Any]:
        nonlocal handover
        if aggregator == "inline":
            handover = InlineHandover(run, ranks.rank, os.path.abspath(store or default_store()), metrics_port)
        else:
            bounds = limits or OutboxLimits()
            destination = Destination(served.address, served.store)
            spool = Spool.create(spool_roots(bounds.spool_bytes), run, ranks.rank, destination)
            handover = CourierHandover(spool, bounds.spool_bytes, embedded)
        return {}

    try:
        mine, everyone = _together(ranks, start)
        run = _describe(everyone)
        served: Served = everyone[0]["served"]
        _together(ranks, open_handover)
    except BaseException:
        if embedded is not None:
            embedded.close(10.0)
        raise
    assert handover is not None
    metrics_url = handover.metrics_url if isinstance(handover, InlineHandover) else served.metrics_url
    outbox = Outbox(handover, run_id, ranks.rank, limits or OutboxLimits())
    schedule, found = mine["local"]
    agent = Agent(run, ranks, found, schedule, outbox, embedded, metrics_url)
    log.info("%s", agent)
    return agent


def _together(ranks: Ranks, work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Does `work` on every rank; what it gave here, and on all ranks.

    Raises:
        ValueError: on every rank alike, in the words of the first rank on which it failed.
    """
    try:
        mine = work()
    except ValueError as error:
        mine = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - the other ranks wait to hear of it
        mine = {"error": f"attach() failed on rank {ranks.rank}: {type(error).__name__}: {error}"}
    everyone = ranks.gather({name: value for name, value in mine.items() if name != "local"})
    for one in everyone:
        if "error" in one:
            raise ValueError(one["error"])
    return mine, everyone


def _warn_if_unreachable(address: str) -> None:
    try:
        check_reachable(address)
    except OSError as error:
        log.warning("no Ray cluster answers at %s (%s): partials wait in the spool until one does", address, error)


def _check_aggregator(aggregator: str, store: Any, ranks: Ranks) -> None:
    if aggregator == "inline" and ranks.world_size > 1:
        raise ValueError("aggregator='inline' serves one rank: use 'embedded', or the address of `eigenwatch serve`")
    if aggregator == "embedded" and spans_hosts():
        raise ValueError(
            "aggregator='embedded' serves one host, and this job has several: run `eigenwatch serve` on a Ray "
            "cluster that spans them and pass its address"
        )
    if aggregator not in ("inline", "embedded"):
        if aggregator.startswith("ray://"):
            raise ValueError(f"aggregator {aggregator!r} is a Ray Client address: pass the cluster's host:port")
        if aggregator != "auto" and not re.fullmatch(r".+:\d+", aggregator):
            raise ValueError(
                f"aggregator {aggregator!r} is none of 'embedded', 'inline', 'auto' and the host:port of a Ray cluster"
            )
        if store is not None:
            raise ValueError("store belongs to the aggregator: leave it out here and pass it to `eigenwatch serve`")


def _describe(everyone: list[dict[str, Any]]) -> RunDescription:
    """The run's topology: which ranks observe which layer. The same on every rank, and so are its errors."""
    same = everyone[0]["same"]
    for rank, one in enumerate(everyone):
        for name, value in one["same"].items():
            if value != same[name]:
                raise ValueError(
                    f"{name} is {same[name]!r} on rank 0 and {value!r} on rank {rank}: pass the same to all"
                )
    contributors: dict[int, list[int]] = {}
    names: dict[int, tuple[str, int]] = {}
    for rank, one in enumerate(everyone):
        for layer, name, width in one["layers"]:
            contributors.setdefault(layer, []).append(rank)
            if names.setdefault(layer, (name, width))[1] != width:
                raise ValueError(
                    f"layer {layer} has width {names[layer][1]} on one rank and {width} on rank {rank}: "
                    "ranks must hold whole layers"
                )
    return RunDescription(
        run_id=same["run_id"],
        launch_id=everyone[0]["launch_id"],
        world_size=len(everyone),
        layers=tuple(
            LayerDescription(
                layer=layer, site="post", name=names[layer][0], width=names[layer][1], ranks=tuple(contributors[layer])
            )
            for layer in sorted(contributors)
        ),
        tags=same["tags"],
    )


class Agent:
    """The running observation of one model on one rank. All methods are called by the training thread."""

    def __init__(
        self,
        run: RunDescription,
        ranks: Ranks,
        found: list[FoundLayer],
        schedule: Every,
        outbox: Outbox,
        embedded: EmbeddedAggregator | None,
        metrics_url: str | None,
    ) -> None:
        self.run = run
        self.metrics_url = metrics_url
        """The Prometheus endpoint of the embedded aggregator; None where another process serves it."""
        self._ranks, self._schedule, self._outbox, self._embedded = ranks, schedule, outbox, embedded
        self._gate = Gate()
        self._observers = [Observer(one.layer, "post", one.name, one.width, one.module, self._gate) for one in found]
        self._pid = os.getpid()
        self._last_sampled: int | None = None
        self._last_step = -1
        self._undelivered: int | None = None
        self._warned = False
        atexit.register(self.close)

    def step(self, step: int) -> None:
        """Ends an optimizer step: what was captured since the last call is labelled with `step`.

        Never raises. Decides whether the coming step is sampled.
        """
        try:
            self._end_step(operator.index(step))
        except Exception as error:  # noqa: BLE001 - the training process never sees an error of ours
            self._warn_once(f"step({step!r}) was ignored: {error}")

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> int:
        """Ends the observation and waits, at most about `timeout_seconds`, until every record is durable.

        Call it on all ranks together: the embedded aggregator ends with rank 0's.

        Returns:
            How many partials of this rank are not known to be in a durable record, those that were dropped included; 0
            if all is well. May be called again.
        """
        if os.getpid() != self._pid:  # a forked DataLoader worker has neither our thread nor our children
            return 0
        if self._undelivered is not None:
            return self._undelivered
        atexit.unregister(self.close)
        for observer in self._observers:
            observer.close()
        deadline = time.monotonic() + timeout_seconds
        try:
            self._undelivered = self._outbox.close(timeout_seconds)
        finally:
            if self._embedded is not None:
                self._embedded.close(max(deadline - time.monotonic(), MIN_END_SECONDS))
        return self._undelivered

    @property
    def dropped(self) -> dict[str, int]:
        """Partials that this rank has lost so far, by reason."""
        return self._outbox.dropped

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        layers = self.run.layers
        widths = sorted({layer.width for layer in layers})
        shown = f"{layers[0].name} … {layers[-1].name}" if len(layers) > 1 else layers[0].name
        where = f", metrics at {self.metrics_url}" if self.metrics_url else ""
        return (
            f"eigenwatch: run {self.run.run_id}, {len(layers)} layers ({shown}), "
            f"D = {', '.join(map(str, widths))}, every {self._schedule.steps} steps, "
            f"{self._ranks.world_size} ranks{where}"
        )

    def _end_step(self, step: int) -> None:
        if step < 0:
            raise ValueError("a step is not negative")
        if step <= self._last_step:
            self._warn_once(
                f"step {step} came after step {self._last_step}: pass the optimizer's global step, which only rises, "
                "or later epochs are not sampled"
            )
        stride = max(step - self._last_step, 1)
        self._last_step = step
        if self._gate.open:
            captured_at = time.time()
            samples = [
                Sample(
                    step=step,
                    layer=observer.layer,
                    site=observer.site,
                    moments=moments,
                    captured_at=captured_at,
                )
                for observer in self._observers
                if (moments := observer.take()) is not None
            ]
            for sample in samples:
                self._outbox.put(sample)
            if samples:
                self._last_sampled = step
            else:
                self._warn_once(
                    f"nothing was observed in sampled step {step}: was the model in training mode, and attach() "
                    "called before the first compiled forward?"
                )
        self._gate.open = self._schedule.due(step + stride, self._last_sampled)

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", message)
