"""A shard that one run floods while another goes on calmly; prints what it cost them, as JSON.

Started by its test as a process of its own, since it is that process's memory that is measured.
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.shard import Shard
from eigenwatch.schemas import LayerDescription, Origin, RecordKey, RunDescription, WirePartial
from eigenwatch.spectrum import Moments, partial_of

LIMIT_BYTES = 24 << 20
LAYERS, WIDTH, CALM_WIDTH = 4, 512, 64
RECORDS = 240
"""Of the flood; ten times what the shard may hold, and more."""
CALM_STEPS = 8
FULL = threading.Event()
"""Set when somebody has been told that there is no room."""


class Calm(NamedTuple):
    """One record of the calm run."""

    busy: int
    """How often it was told that there is no room."""
    solved_before: int
    """Records of the flood that were solved while it waited, from its push until it was solved."""


def main() -> None:
    torch.set_num_threads(1)
    limits = ShardLimits(memory_bytes=LIMIT_BYTES)
    shard = Shard(str(Path(sys.argv[1])), SolverConfig(device="cpu"), limits)
    shard.open_run(described("flood", LAYERS, WIDTH).to_wire(), 0)
    shard.open_run(described("calm", 1, CALM_WIDTH).to_wire(), 0)
    wide, narrow = wire(WIDTH), wire(CALM_WIDTH)
    push(shard, wide, "flood", 0, 0)
    push(shard, narrow, "calm", 0, 0)
    shard.flush(120.0)
    before = peak_bytes()
    flood = threading.Thread(target=push_all, args=(shard, wide))
    flood.start()
    FULL.wait()
    calm = [one_calm(shard, narrow, step) for step in range(1, CALM_STEPS + 1)]
    still_flooding = flood.is_alive()
    flood.join()
    unwritten = shard.close(120.0)
    report = {
        "calm": [one._asdict() for one in calm],
        "still_flooding": still_flooding,
        "unwritten": unwritten,
        "grown_bytes": peak_bytes() - before,
        "record_bytes": 8 * (WIDTH * (WIDTH + 1) // 2),
        "limit_bytes": LIMIT_BYTES,
    }
    print(json.dumps(report))


def push_all(shard: Shard, wide: WirePartial) -> None:
    for number in range(RECORDS):
        push(shard, wide, "flood", 1 + number // LAYERS, number % LAYERS)
    FULL.set()  # it never was: the test will say what that cost


def one_calm(shard: Shard, narrow: WirePartial, step: int) -> Calm:
    solved = solved_of_all(shard)
    busy = push(shard, narrow, "calm", step, 0)
    key = ("calm", 0, step, 0, "post", None)
    while shard._open.unsolved(RecordKey(*key)):
        time.sleep(0.001)
    return Calm(busy, solved_of_all(shard) - solved)


def solved_of_all(shard: Shard) -> int:
    return shard.snapshot([]).solve_seconds.counts[-1]


def push(shard: Shard, one: WirePartial, run_id: str, step: int, layer: int) -> int:
    """Until it is merged, as a courier would; how often it was told to come again."""
    busy = 0
    while push_once(shard, one, run_id, step, layer) == "busy":
        busy += 1
        FULL.set()
        time.sleep(0.01)
    return busy


def push_once(shard: Shard, one: WirePartial, run_id: str, step: int, layer: int) -> str:
    return shard.push(one.header | {"run_id": run_id, "step": step, "layer": layer}, one.mean, one.payload).status


def described(run_id: str, layers: int, width: int) -> RunDescription:
    each = (
        LayerDescription(layer=layer, site="post", name=f"h.{layer}", width=width, shares=((0,),))
        for layer in range(layers)
    )
    return RunDescription(run_id=run_id, launch_id=run_id, world_size=1, layers=tuple(each))


def wire(width: int) -> WirePartial:
    moments = Moments(width)
    moments.add(torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0)))
    key = RecordKey("run", 0, 0, 0, "post", None)
    return partial_of(moments, Origin(key=key, rank=0, share=0, captured_at=time.time())).to_wire()


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
