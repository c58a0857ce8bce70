"""The node combiner's arithmetic: the partials of one record that the ranks of this host left become one group.

The courier calls it with what lies mapped in the spool, so nothing is copied but the sum itself. Added in float64, a
piece at a time, and sent in float32, as every scatter is. numpy only: torch would cost the courier seconds and 200 MB,
and is imported where rows must become a scatter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import multimode
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..schemas import (
    MIXED,
    Part,
    Partial,
    PartialCovariance,
    PartialGroup,
    PartialSamples,
    WirePartial,
    packed_length,
    packed_offset,
    partial_from_wire,
)

PIECE = 1 << 18
"""Numbers that are added at a time: 2 MiB of float64, which stays in the processor's cache."""
FOLD_OPERATIONS = 1e11
"""Σ N·D² up to which rows become a scatter here: some seconds of one processor. Beyond it the aggregator does it."""
MOST = float(np.finfo(np.float32).max)


class Packet(NamedTuple):
    """What is pushed at once."""

    wire: WirePartial
    ranks: tuple[int, ...]
    """Whose partials are in it."""


def combine(wires: Sequence[WirePartial]) -> list[Packet]:
    """Packs the partials of one record: at most one group, and beside it what is better off, or only right, alone.

    Alone stay blocks of a share whose other blocks are not here, what is not finite, and rows whose product would take
    this host long, or that are together fewer bytes than a scatter: these may spare the aggregator the scatter too.

    Args:
        wires: partials of one record, each of another rank, that have been checked.
    """
    alone = [Packet(wire, (wire.header["rank"],)) for wire in wires]
    if len(wires) == 1:
        return alone
    partials = [partial_from_wire(wire) for wire in wires]
    width = multimode(one.width for one in partials)[0]  # the shard will refuse a rank that says otherwise
    shares: dict[int, list[Partial]] = defaultdict(list)
    for partial in partials:
        if partial.width == width:
            shares[partial.share].append(partial)
    rows = [one for share in shares.values() for one in share if isinstance(one, PartialSamples)]
    cheap = sum(one.tokens for one in rows) * width**2 <= FOLD_OPERATIONS
    fold = bool(rows) and cheap and sum(one.nbytes for one in rows) > 4 * packed_length(width)
    chosen = []
    for share in shares.values():
        scatters = [_covariance(one) if fold else one for one in share]
        whole = [one for one in scatters if isinstance(one, PartialCovariance) and one.finite]
        if len(whole) == len(share) and _is_whole(whole):
            chosen.append(whole)
    inside = {one.rank for share in chosen for one in share}
    if len(inside) < 2 or sum(one.trace for share in chosen for one in share) >= MOST:
        return alone
    given = [one for share in shares.values() for one in share if one.rank in inside]
    packet = Packet(_group_of(chosen, given).to_wire(), tuple(sorted(inside)))
    return [packet, *(one for one in alone if one.ranks[0] not in inside)]


def _is_whole(share: Sequence[PartialCovariance]) -> bool:
    """Whether all rows of a share are here, once, and of the same tokens."""
    reached = 0
    for start, stop in sorted(one.rows for one in share):
        if start != reached:
            return False
        reached = stop
    return reached == share[0].width and len({one.tokens for one in share}) == 1


def _covariance(partial: Partial) -> PartialCovariance:
    if isinstance(partial, PartialCovariance):
        return partial
    from ..spectrum import covariance_of  # torch

    return covariance_of(partial)


def _group_of(shares: Sequence[Sequence[PartialCovariance]], given: Sequence[Partial]) -> PartialGroup:
    first, width = given[0], given[0].width
    forms = {one.form for one in given if one.tokens} or {first.form}
    parts = [
        Part(
            tuple(sorted(one.rank for one in share)),
            share[0].tokens,
            float(sum(one.trace for one in share)),
            float(sum(one.frobenius_sq for one in share)),
        )
        for share in shares
    ]
    lowest = min(part.ranks[0] for part in parts)
    return PartialGroup(
        key=first.key,
        rank=lowest,
        share=lowest,
        captured_at=max(one.captured_at for one in given),
        sampling_steps=max((one.sampling_steps for one in given if one.sampling_steps is not None), default=None),
        overhead_ratio=max((one.overhead_ratio for one in given if one.overhead_ratio is not None), default=None),
        parts=tuple(parts),
        means=np.stack([share[0].mean for share in shares]),
        scatter=_sum(width, [one for share in shares for one in share if one.tokens]),
        forms=MIXED if len(forms) > 1 else forms.pop(),
    )


def _sum(width: int, partials: Iterable[PartialCovariance]) -> NDArray[np.float32]:
    """The packed sum of whole scatters and blocks, each at its place."""
    placed = [(packed_offset(width, one.rows[0]), one.scatter) for one in partials]
    if not placed:
        return np.empty(0, np.float32)
    total = np.empty(packed_length(width), np.float32)
    for start in range(0, total.size, PIECE):
        piece = np.zeros(min(PIECE, total.size - start))
        for offset, scatter in placed:
            first, last = max(offset, start), min(offset + scatter.size, start + piece.size)
            if first < last:
                piece[first - start : last - start] += scatter[first - offset : last - offset]
        total[start : start + piece.size] = piece
    return total
