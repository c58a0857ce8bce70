"""How a layer's activations are spread over ranks, as its modules show it.

Data, context and sequence parallel ranks hold different tokens and need no word. Tensor-parallel ranks hold parts of
the same tokens' features: they form one share of the record, gather the features on sampled steps, and each takes a
block of rows of the scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Spread(NamedTuple):
    """The tensor-parallel group of one module on this rank."""

    ranks: tuple[int, ...]
    """Global ranks, in the order of their features; this rank alone where the features are whole."""
    group: Any = None
    """The process group; None for a rank alone."""


class WidthGather:
    """Brings the features of a tensor-parallel group together: a collective of the group, in the forward."""

    def __init__(self, group: Any, width: int, parts: int) -> None:
        self._group, self._width, self._parts = group, width, parts
        self._most = -(-width // parts)
        """Features of a full part; the last parts may have fewer, or none, as `torch.chunk` deals them out."""

    def __call__(self, local: Tensor) -> Tensor:
        """(..., D of this rank) → (..., D), the same on all ranks."""
        leading, width = local.shape[:-1], local.shape[-1]
        rows = local.reshape(-1, width)
        if width < self._most:
            rows = torch.nn.functional.pad(rows, (0, self._most - width))
        gathered = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self._parts)]
        dist.all_gather(gathered, rows.contiguous(), group=self._group)
        return torch.cat(gathered, dim=1)[:, : self._width].reshape(*leading, self._width)


def spread_of(module: nn.Module, rank: int, tensor_parallel: Any, sharded_by_fsdp: bool) -> Spread:
    """The tensor-parallel group over which a down-projection's input features are split.

    A DTensor weight says it itself: split over the mesh dimensions that split its input features. Others are split over
    the module's own `tp_group` (Megatron), or over the group that the user names.

    Args:
        module: the down-projection.
        rank: this process's.
        tensor_parallel: a process group, a one-dimensional device mesh, or None.
        sharded_by_fsdp: whether FSDP shards the module, which takes one mesh dimension and splits no activation.
    """
    weight = getattr(module, "weight", None)
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None:
        split = [
            dimension
            for dimension, placement in enumerate(weight.placements)  # type: ignore[union-attr]
            if placement.is_shard() and placement.dim == 1
        ]
        if not split or (sharded_by_fsdp and mesh.ndim == 1):
            return Spread((rank,))
        if len(split) > 1:
            raise ValueError(f"the features of {type(module).__name__} are split over {len(split)} mesh dimensions")
        return _spread(mesh.get_group(split[0]), rank)
    group = getattr(module, "tp_group", None) or tensor_parallel
    if group is None:
        parts = getattr(module, "input_size_per_partition", None)
        if parts is not None and parts != module.input_size:
            raise ValueError(
                f"{type(module).__name__} holds a part of its features: pass their group to attach(), "
                "parallelism=Parallelism(tensor_parallel=group)"
            )
        return Spread((rank,))
    return _spread(group, rank)


def replica_ranks(group: Any, rank: int) -> tuple[int, ...]:
    """Global ranks of the group that holds the same tokens; this rank alone where there is none."""
    return _spread(group, rank).ranks if group else (rank,)


def whole_width(local_or_whole: int, module: nn.Module, spread: Spread) -> int:
    """D of the whole layer: a plain module, without a word about its shards, only knows its own."""
    knows = hasattr(module, "input_size") or hasattr(getattr(module, "weight", None), "device_mesh")
    return local_or_whole if knows else local_or_whole * len(spread.ranks)


def fsdp_modules(models: Sequence[nn.Module]) -> set[nn.Module]:
    """All modules beneath one that `fully_shard` was applied to."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch < 2.6
        return set()
    inside: set[nn.Module] = set()
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                inside.update(module.modules())
    return inside


def _spread(group: Any, rank: int) -> Spread:
    """Of a process group or a one-dimensional device mesh."""
    group = group.get_group() if hasattr(group, "get_group") else group
    ranks = tuple(dist.get_process_group_ranks(group))
    return Spread(ranks, group) if len(ranks) > 1 else Spread((rank,))
