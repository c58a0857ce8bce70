"""Who observes what: this rank's places, and from those of all ranks the run's description.

Every rank must know the whole topology before the first partial, or the aggregator could take a part for the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..schemas import SITES, LayerDescription, RunDescription, row_blocks
from ..spectrum import block_length
from .discovery import FoundLayer, find_layers
from .observation import Place
from .parallel import Spread, WidthGather, fsdp_modules, replica_ranks, spread_of, whole_width
from .schedule import Schedule

FINGERPRINT_NUMBERS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Layers and sites that share a schedule."""

    layers: str | Iterable[int] | None = None
    """Regular expression for the paths of the down-projections, or decoder-layer indices; None: all that are found."""
    sites: Sequence[str] = ("post",)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        sites = tuple(self.sites) if isinstance(self.sites, Iterable) and not isinstance(self.sites, str) else ()
        object.__setattr__(self, "sites", sites or self.sites)
        if not sites or not all(one in SITES for one in sites):
            raise ValueError(
                f"sites={self.sites!r} must be a sequence of 'post', 'pre' or both, such as ('post', 'pre')"
            )
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, such as Schedule(every=100), got {self.schedule!r}")
        if self.layers is None or isinstance(self.layers, str):
            return
        indices = list(self.layers) if isinstance(self.layers, Iterable) else []
        if not indices or not all(type(one) is int and one >= 0 for one in indices):
            raise ValueError(
                f"layers={self.layers!r} must hold layer indices (int, from 0), or be a regular expression"
            )
        object.__setattr__(self, "layers", tuple(indices))  # an iterator could be read once only

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers that are chosen by index."""
        return self.layers if isinstance(self.layers, tuple) else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """A place that no module shows, whose activations the model's forward gives to `agent.observe`."""

    layer: int
    width: int
    site: str = "post"
    expert: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("width", 1), ("expert", 0)):
            value = getattr(self, name)
            if (type(value) is not int or value < least) and not (name == "expert" and value is None):
                raise ValueError(f"declared: {name} must be an integer, at least {least}, got {value!r}")
        if self.site not in SITES:
            raise ValueError(f"declared: site must be one of {', '.join(SITES)}, got {self.site!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """What the modules of a rank do not show of their place in the whole model."""

    tensor_parallel: Any = None
    """Process group, or one-dimensional device mesh, over whose ranks the features of plain modules are split."""
    layer_offset: int | Sequence[int] = 0
    """Global index of the first decoder layer of this rank's pipeline stage; one for each model chunk."""
    expert_offset: int = 0
    """Global index of this rank's first expert."""
    replicas: Any = None
    """Process group whose ranks hold the same tokens in layers that are whole on each, such as a tensor-parallel group
    whose feed-forward layers are not split: its first rank alone observes them."""


class Observed(NamedTuple):
    """A place on this rank, and how it is come by."""

    place: Place
    module: nn.Module | None
    """None: the model's forward calls `agent.observe`."""
    schedule: Schedule
    spread: Spread
    fingerprint: float | None


def observed_places(
    models: Sequence[nn.Module],
    watches: Sequence[Watch],
    declared: Sequence[Declared],
    parallelism: Parallelism,
    rank: int,
    alone: bool,
) -> list[Observed]:
    """This rank's places, by layer; `alone`: no other rank can have what is not found here.

    Raises:
        ValueError: nothing is found, a place is chosen twice, or what is found cannot be observed.
    """
    offsets = _offsets(parallelism.layer_offset, len(models))
    within_fsdp = fsdp_modules(models)
    replicas = replica_ranks(parallelism.replicas, rank)
    places: dict[tuple[int, str, int | None], Observed] = {}
    required = alone and not declared and len(models) == 1
    for watch in watches:
        sites = tuple(dict.fromkeys(("post", *watch.sites)))
        for model, offset in zip(models, offsets, strict=True):
            found = _found(model, watch.layers, sites, offset, required=required, declared=bool(declared))
            spreads: dict[tuple[int, int | None], Spread] = {}
            for one in found:
                if one.site == "post":
                    spreads[one.layer, one.expert] = spread_of(
                        one.module, rank, parallelism.tensor_parallel, one.module in within_fsdp
                    )
                if one.site in watch.sites:
                    spread = spreads[one.layer, one.expert]
                    if len(spread.ranks) == 1 and rank != min(replicas):
                        continue
                    place = _place(one, spread, offset, parallelism.expert_offset, rank)
                    _add(places, Observed(place, one.module, watch.schedule, spread, _fingerprint(one.module)))
    schedule = watches[0].schedule
    for one_declared in declared:
        place = Place(
            layer=one_declared.layer,
            site=one_declared.site,
            expert=one_declared.expert,
            name="agent.observe",
            width=one_declared.width,
            share=rank,
            block=(0, one_declared.width),
        )
        if rank == min(replicas):
            _add(places, Observed(place, None, schedule, Spread((rank,)), None))
    return [places[key] for key in sorted(places, key=lambda k: (k[0], -1 if k[2] is None else k[2], k[1]))]


def tight_room(observed: Sequence[Observed], room_bytes: int) -> str | None:
    """What to say where the scatters of one sampled step do not fit into host memory together; None where they do.

    On an accelerator what does not fit is dropped; on a CPU it is folded, which takes only time.
    """
    needed = sum(4 * block_length(one.place.width, one.place.block) / one.schedule.rotate for one in observed)
    if needed <= room_bytes:
        return None
    rotate = max(one.schedule.rotate for one in observed) * math.ceil(needed / room_bytes)
    return (
        f"a sample of {len(observed)} places may take {needed / 2**30:.1f} GiB of host memory, and limits allow "
        f"{room_bytes / 2**30:.1f}: what does not fit is dropped; pass OutboxLimits(memory_bytes="
        f"{2 * math.ceil(needed)}) or Schedule(rotate={rotate})"
    )


def announced(observed: Sequence[Observed]) -> list[tuple[Any, ...]]:
    """What a rank tells the others of its places."""
    return [
        (one.place.layer, one.place.site, one.place.expert, one.place.name, one.place.width, one.spread.ranks,
         one.fingerprint, one.schedule)
        for one in observed
    ]  # fmt: skip


def deciding_rank(by_rank: Sequence[Sequence[tuple[Any, ...]]]) -> int:
    """Who measures and proposes changes of cadence: the first rank with a place under contract, else with any."""
    under_contract = [rank for rank, places in enumerate(by_rank) if any(one[-1].max_overhead for one in places)]
    return min(under_contract or [rank for rank, places in enumerate(by_rank) if places])


def describe(
    same: dict[str, Any], launch_id: str, by_rank: Sequence[Sequence[tuple[Any, ...]]], chosen: Sequence[int] = ()
) -> RunDescription:
    """The run, from what every rank announced: the same on every rank, and so are its errors.

    Args:
        same: what all ranks were told alike.
        launch_id: of this start of the job.
        by_rank: what each rank `announced`.
        chosen: layers that were chosen by index on any rank.

    Raises:
        ValueError: nobody found anything, or ranks contradict each other.
    """
    layers: dict[tuple[int, str, int | None], _Seen] = {}
    for rank, places in enumerate(by_rank):
        for layer, site, expert, name, width, share, fingerprint, schedule in places:
            seen = layers.setdefault((layer, site, expert), _Seen(name, width, rank, {}, {}, schedule))
            what = f"layer {layer}" + ("" if expert is None else f", expert {expert}")
            if seen.width != width:
                raise ValueError(
                    f"{what} has width {seen.width} on rank {seen.rank} and {width} on rank {rank}: if its features "
                    "are split over ranks, pass parallelism=Parallelism(tensor_parallel=their group)"
                )
            part = share.index(rank)
            if fingerprint is not None and seen.fingerprints.setdefault(part, fingerprint) != fingerprint:
                raise ValueError(
                    f"{what} ({name}) has other weights on rank {rank} than on another: if these are pipeline stages "
                    "pass parallelism=Parallelism(layer_offset=…), if expert-parallel ranks expert_offset=…; replicas "
                    "must have loaded or broadcast their weights before attach()"
                )
            seen.shares[min(share)] = share
    missing = set(chosen) - {layer for layer, _, _ in layers}
    if missing:
        raise ValueError(f"layers={list(chosen)}: no rank has layer {', '.join(map(str, sorted(missing)))}")
    if not layers:
        raise ValueError("no rank found a layer to observe: pass layers=r'…(\\d+)…' matching the down-projections")
    return RunDescription(
        run_id=same["run_id"],
        launch_id=launch_id,
        world_size=len(by_rank),
        layers=tuple(
            LayerDescription(
                layer=key[0],
                site=key[1],
                expert=key[2],
                name=seen.name,
                width=seen.width,
                shares=tuple(seen.shares[first] for first in sorted(seen.shares)),
                paired=all(
                    (key[0], site, key[2]) in layers and layers[key[0], site, key[2]].schedule.samples_as(seen.schedule)
                    for site in SITES
                ),
            )
            for key, seen in sorted(layers.items(), key=lambda one: (one[0][0], one[0][1], one[0][2] or 0))
        ),
        tags=same["tags"],
        latest_only=same["latest_only"],
    )


class _Seen(NamedTuple):
    name: str
    width: int
    rank: int
    shares: dict[int, tuple[int, ...]]
    """By lowest rank."""
    fingerprints: dict[int, float]
    """By part of the features."""
    schedule: Schedule


def _offsets(offset: int | Sequence[int], models: int) -> list[int]:
    offsets = [offset] if isinstance(offset, int) else list(offset)
    if len(offsets) == 1 and models > 1 and offsets[0] == 0:
        return [0] * models  # chunks whose module paths carry the global index
    if len(offsets) != models or any(not isinstance(one, int) or one < 0 for one in offsets):
        raise ValueError(f"layer_offset must be a non-negative index for each of {models} model chunks, got {offset!r}")
    return offsets


def _found(
    model: nn.Module,
    layers: str | Iterable[int] | None,
    sites: tuple[str, ...],
    offset: int,
    *,
    required: bool,
    declared: bool,
) -> list[FoundLayer]:
    """The chosen places of one model, by local index; a pipeline stage may have none of the chosen layers."""
    fused: Literal["refuse", "skip"] = "skip" if declared else "refuse"
    if layers is None or isinstance(layers, str):
        return find_layers(model, layers, sites, required=required, fused=fused)
    chosen = [layer - offset for layer in layers if layer >= offset]
    return find_layers(model, chosen, sites, required=required and offset == 0, fused=fused) if chosen else []


def _place(found: FoundLayer, spread: Spread, layer_offset: int, expert_offset: int, rank: int) -> Place:
    parts = len(spread.ranks)
    width = whole_width(found.width, found.module, spread)
    if parts > 1 and found.columns is not None:
        raise ValueError(
            f"{found.name} fuses gate and up projection and its features are split over ranks: observe site 'post' only"
        )
    return Place(
        layer=found.layer + layer_offset,
        site=found.site,
        expert=None if found.expert is None else found.expert + expert_offset,
        name=found.name,
        width=width,
        share=min(spread.ranks),
        block=row_blocks(width, parts)[spread.ranks.index(rank)] if parts > 1 else (0, width),
        columns=found.columns,
        gather=WidthGather(spread.group, width, parts) if parts > 1 else None,
    )


def _add(places: dict[tuple[int, str, int | None], Observed], one: Observed) -> None:
    key = one.place.key
    if key in places:
        raise ValueError(
            f"layer {key[0]} (site {key[1]}) is chosen twice, as {places[key].place.name} and {one.place.name}: choose "
            "each place in one Watch, and give chunks of a pipeline their layer_offset"
        )
    places[key] = one


def _fingerprint(module: nn.Module) -> float | None:
    """A number that replicas of a module share and other modules do not; None where weights are sharded."""
    weight: Any = getattr(module, "weight", None)
    whole = type(weight) in (nn.Parameter, torch.Tensor) and weight.ndim == 2 and weight.numel() > 0
    if not whole or weight.is_meta:
        return None
    number = float(weight.detach()[0, :FINGERPRINT_NUMBERS].double().sum())
    return number if math.isfinite(number) else None


def shown(places: Sequence[LayerDescription]) -> str:
    """The layers in a few words."""
    layers = sorted({one.layer for one in places})
    names = list(dict.fromkeys(re.sub(r"\d+", "N", one.name) for one in places))
    experts = len({one.expert for one in places} - {None})
    widths = ", ".join(map(str, sorted({one.width for one in places})))
    what = f"{len(layers)} layer{'s' * (len(layers) > 1)} ({', '.join(names)})" + (
        f" with {experts} experts" if experts else ""
    )
    sites = sorted({one.site for one in places})
    return f"{what}, D = {widths}, site{'s' * (len(sites) > 1)} {', '.join(sites)}"
