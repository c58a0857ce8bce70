"""Whether what arrives is what its run announced: the shard asks before it merges anything. Values in, refusals out."""

from __future__ import annotations

import time

from ..schemas import Arrived, LayerDescription, PartialGroup, PartialRefused

FUTURE_SECONDS = 86400.0
"""How far ahead of our clock a partial may have been captured. Time zones and drifting clocks stay within a day; what
lies further ahead would look like fresh telemetry for as long, whatever the run does. The past has no bound: spools are
delivered days later, and nothing is judged by it."""


def check_clock(arrived: Arrived) -> None:
    """Raises PartialRefused, "future", where the sender's clock is far ahead of ours."""
    ahead = arrived.captured_at - time.time()
    if ahead > FUTURE_SECONDS:
        raise PartialRefused(
            "future",
            f"rank {arrived.rank} of run {arrived.key.run_id} captured step {arrived.key.step} "
            f"{ahead / 86400:.1f} days from now: set its host's clock",
        )


def check_announced(layers: dict[tuple[int, str, int | None], LayerDescription], arrived: Arrived) -> None:
    """Whether a run announced what arrived of it.

    Raises:
        PartialRefused: "unexpected" or "width", where the run announced something else.
    """
    key = arrived.key
    layer = layers.get((key.layer, key.site, key.expert))
    if layer is None or not arrived.ranks <= set(layer.ranks):
        expert = "" if key.expert is None else f", expert {key.expert}"
        ranks = ", ".join(map(str, sorted(arrived.ranks)))
        raise PartialRefused(
            "unexpected",
            f"run {key.run_id} announced no layer {key.layer} ({key.site}{expert}) on rank {ranks}",
        )
    if arrived.width != layer.width:
        raise PartialRefused(
            "width",
            f"layer {key.layer} of run {key.run_id} has width {layer.width}, got {arrived.width}",
        )
    if isinstance(arrived, PartialGroup):
        announced = {tuple(sorted(share)) for share in layer.shares}
        if not {part.ranks for part in arrived.parts} <= announced:
            raise PartialRefused("unexpected", f"layer {key.layer} of run {key.run_id} has other shares than the group")
    elif (arrived.share, arrived.rows) != (block := layer.block_of(arrived.rank)):
        assert block is not None, "its rank is one of the layer's"
        raise PartialRefused(
            "unexpected",
            f"rank {arrived.rank} of run {key.run_id} holds rows {block.rows} of share {block.share} of layer "
            f"{key.layer}, got rows {arrived.rows} of share {arrived.share}",
        )
