"""Which shard owns which layer: a pure function of run and shards, so that a restarted coordinator says the same.

The coordinator calls it when a rank opens its launch.
"""

from __future__ import annotations

import heapq
import zlib
from collections import defaultdict
from collections.abc import Sequence

from ..schemas import RunDescription

SOLVE_SECONDS = 7e-11
"""Of a float64 eigvalsh, times D³: 2 s at D=3072 on two cores. A GPU changes the scale more than the order."""
MERGE_SECONDS = 1e-9
"""For a byte of scatter that is received, checked and added."""


def owners(run: RunDescription, shards: Sequence[str]) -> dict[int, str]:
    """The owner of each layer: both sites and all experts of a layer have one, since a pair of sites is compared.

    Layers go to the shard that has least to do, the dearest first. Where runs are many, each begins with another shard.
    """
    costs: dict[int, float] = defaultdict(float)
    for one in run.layers:
        costs[one.layer] += SOLVE_SECONDS * one.width**3 + MERGE_SECONDS * 2 * one.width**2 * len(one.shares)
    first = zlib.crc32(run.run_id.encode())
    loads = [(0.0, (place - first) % len(shards), name) for place, name in enumerate(shards)]
    heapq.heapify(loads)
    owned = {}
    for layer, cost in sorted(costs.items(), key=lambda one: (-one[1], one[0])):
        load, turn, name = heapq.heappop(loads)
        owned[layer] = name
        heapq.heappush(loads, (load + cost, turn, name))
    return owned
