"""`attach`: the door of the agent, and the handle it gives back.

Everything that can be wrong with a call is found here, before the first step, and raised as one ValueError on every
rank alike. After that nothing of ours raises, blocks or grows without bound in the training process.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..schemas import absolute_store, check_run_id, default_store
from ..schemas.delivery import check_reachable
from .cadence import Cadence
from .capture import Room
from .embedded import EmbeddedAggregator, Served
from .handle import Agent
from .handover import CourierHandover, Handover, InlineHandover
from .observation import Shared, mask_position
from .outbox import Outbox, OutboxLimits
from .padding import Padding
from .ranks import Ranks, current_ranks, spans_hosts
from .schedule import Schedule
from .spool import Destination, Spool, spool_roots
from .topology import Declared, Parallelism, Watch, announced, deciding_rank, describe, observed_places, tight_room

log = logging.getLogger("eigenwatch.agent")


def attach(
    model: nn.Module | Sequence[nn.Module],
    *,
    run_id: str,
    every: int | None = None,
    schedule: Schedule | None = None,
    layers: str | Sequence[int] | None = None,
    sites: Sequence[str] = ("post",),
    watch: Sequence[Watch] | None = None,
    declared: Sequence[Declared] = (),
    parallelism: Parallelism | None = None,
    mask_argument: str | None = None,
    samples: bool = True,
    store: str | os.PathLike[str] | None = None,
    aggregator: str = "embedded",
    tags: dict[str, str] | None = None,
    latest_only: bool = False,
    metrics_port: int | None = None,
    limits: OutboxLimits | None = None,
) -> Agent:
    """Observes the feed-forward layers of `model`; call it once on every rank, after the process group exists.

    The model may be wrapped, sharded or compiled already, but must not have run compiled yet: hooks that come after the
    first compiled forward are not in its code, which the first sampled step then reports.

    Args:
        model: the decoder; the chunks of this rank's pipeline stages where it has several.
        run_id: name of the training job, `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
        every: sample each N-th optimizer step, 100 if nothing is said.
        schedule: in place of `every`, when to sample, and the overhead contract.
        layers: regular expression for the paths of the down-projections, its groups `layer` and `expert` the indices;
            or indices of decoder layers; default: all layers of the families that are known (`register_family`).
        sites: "post" (input of the down-projection), "pre" (output of the gate or up projection), or both, which gives
            their divergence too.
        watch: in place of `every`, `schedule`, `layers` and `sites`, several selections, each with its own cadence.
        declared: places that no module shows; the model's forward gives them to `agent.observe`.
        parallelism: what the modules do not show of how the model is spread over ranks.
        mask_argument: name of the argument of the model's forward that is the padding mask, (batch, time) of 0 and 1.
        samples: whether activation rows may leave the training process where they are fewer bytes than their scatter.
        store: folder of the history; default `$EIGENWATCH_STORE`, else `./eigenwatch-store`. An aggregator that runs
            elsewhere has its own, and then this must not be given.
        aggregator: "embedded" (rank 0 starts one with a local Ray), "inline" (in this process, one rank, no Ray), or
            the address of the Ray cluster on which `eigenwatch serve` runs.
        tags: what to group runs by later, such as {"norm": "pre"}; stored with the run.
        latest_only: whether an aggregator that falls behind may leave out a layer's older steps once a newer one waits.
            Their records are stored, with `solver` "skipped" and no metrics.
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
    bounds = limits if limits is not None else OutboxLimits()
    models: list[nn.Module] = []
    embedded: EmbeddedAggregator | None = None
    handover: Handover | None = None

    def start() -> dict[str, Any]:
        nonlocal embedded
        check_run_id(run_id)
        models.extend(_modules(model))
        _check_kind("limits", bounds, OutboxLimits)
        _check_kind("samples", samples, bool)
        _check_kind("latest_only", latest_only, bool)
        _check_kind("aggregator", aggregator, str)
        _check_kind("store", store, str, os.PathLike, type(None))
        places = list(_iterable("declared", declared))
        for place in places:
            _check_kind("each of declared", place, Declared)
        _check_kind("parallelism", parallelism, Parallelism, type(None))
        _check_kind("tags", tags, Mapping, type(None))
        _check_port(metrics_port)
        watches = _watches(every, schedule, layers, sites, watch)
        _check_aggregator(aggregator, store, ranks)
        if mask_argument is not None:
            for one in models:
                mask_position(one, mask_argument)
        alone = ranks.world_size == 1
        observed = observed_places(models, watches, places, parallelism or Parallelism(), ranks.rank, alone)
        tight = tight_room(observed, bounds.memory_bytes // 2)
        if tight is not None and any(p.device.type != "cpu" for one in models for p in one.parameters()):
            log.warning("%s", tight)
        mine: dict[str, Any] = {
            "same": {
                "run_id": run_id,
                "schedule": [one.schedule for one in watches],
                "tags": {str(k): str(v) for k, v in (tags or {}).items()},
                "latest_only": latest_only,
            },
            "layers": announced(observed),
            "chosen": sorted({index for one in watches for index in one.indices}),
            "local": observed,
        }
        if ranks.rank == 0:
            mine["launch_id"], mine["served"] = uuid.uuid4().hex, Served(aggregator)
            if aggregator == "embedded":
                embedded = EmbeddedAggregator(absolute_store(store or default_store()), metrics_port or 0)
                mine["served"] = embedded.served
            elif aggregator not in ("inline", "auto"):
                _warn_if_unreachable(aggregator)
        return mine

    def open_handover() -> dict[str, Any]:
        nonlocal handover
        if aggregator == "inline":
            handover = InlineHandover(run, ranks.rank, absolute_store(store or default_store()), metrics_port)
        else:
            destination = Destination(served.address, served.store)
            spool = Spool.create(spool_roots(bounds.spool_bytes), run, ranks.rank, destination)
            handover = CourierHandover(spool, bounds.spool_bytes, embedded)
        return {}

    try:
        mine, everyone = _together(ranks, start)
        same = _the_same([one["same"] for one in everyone])
        chosen = sorted({index for one in everyone for index in one["chosen"]})
        run = describe(same, everyone[0]["launch_id"], [one["layers"] for one in everyone], chosen)
        served: Served = everyone[0]["served"]
        _together(ranks, open_handover)
    except BaseException:
        if embedded is not None:
            embedded.close(10.0)
        raise
    assert handover is not None
    contracts = [one.max_overhead for one in mine["same"]["schedule"] if one.max_overhead is not None]
    cadence = Cadence(ranks, run.launch_id, decider=deciding_rank([one["layers"] for one in everyone]))
    agent = Agent(
        run=run,
        ranks=ranks,
        models=models,
        observed=mine["local"],
        shared=Shared(room=Room(bounds.memory_bytes // 2), padding=Padding(), scratch={}),
        outbox=Outbox(handover, run_id, ranks.rank, bounds, rows_allowed=samples, tick=cadence.exchange),
        cadence=cadence,
        embedded=embedded,
        metrics_url=handover.metrics_url if isinstance(handover, InlineHandover) else served.metrics_url,
        mask_argument=mask_argument,
        max_overhead=min(contracts, default=None),
    )
    log.info("%s", agent)
    return agent


def _watches(
    every: int | None,
    schedule: Schedule | None,
    layers: str | Sequence[int] | None,
    sites: Sequence[str],
    watch: Sequence[Watch] | None,
) -> list[Watch]:
    said = {"every": every, "schedule": schedule, "layers": layers}
    given = [name for name, value in said.items() if value is not None]
    if every is not None and schedule is not None:
        raise ValueError("every and schedule exclude each other: write schedule=Schedule(every=…)")
    if watch is not None:
        if given or list(_iterable("sites", sites)) != ["post"]:
            raise ValueError(f"watch takes the place of {', '.join(given) or 'sites'}: say it inside of Watch(…)")
        watches = list(_iterable("watch", watch))
        if not watches:
            raise ValueError("watch is empty: leave it out to observe every layer")
        for one in watches:
            _check_kind("each of watch", one, Watch)
        return watches
    return [Watch(layers=layers, sites=sites, schedule=schedule or Schedule(every=100 if every is None else every))]


def _modules(model: Any) -> list[nn.Module]:
    models = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Iterable) else []
    if not models or not all(isinstance(one, nn.Module) for one in models):
        raise ValueError(
            f"model is {_shown(model)}: pass the module that is trained, or the list of this rank's pipeline chunks"
        )
    return models


def _check_kind(name: str, value: Any, *kinds: type) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} must be {wanted}, got {_shown(value)}")


def _iterable(name: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise ValueError(f"{name} must be a sequence, got {_shown(value)}")
    return value


def _check_port(port: Any) -> None:
    if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535):
        raise ValueError(f"metrics_port must be None or a port, 0 to 65535, got {_shown(port)}")


def _shown(value: Any) -> str:
    """In a message: short, whatever it is."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"


def _the_same(said: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks said alike.

    Raises:
        ValueError: two ranks were told different things.
    """
    for rank, one in enumerate(said):
        for name, value in one.items():
            if value != said[0][name]:
                raise ValueError(
                    f"{name} is {said[0][name]!r} on rank 0 and {value!r} on rank {rank}: pass the same to all"
                )
    return said[0]


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
