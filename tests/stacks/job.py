"""Runs stacks one after the other under torchrun, each with eigenwatch and once more without: `python -m … OUT ADDRESS`.

Writes the losses of both as exact bits, and what was not delivered.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from eigenwatch.agent import attach

from .plain import EVERY, STEPS
from .stacks import STACKS


def main() -> None:
    out, address, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    steps = int(os.environ.get("EIGENWATCH_TEST_STEPS", STEPS))
    for name in names or STACKS:
        results: dict[str, object] = {}
        for observed in (True, False):
            torch.manual_seed(1)
            stack = STACKS[name](rank, world)
            agent = None
            if observed and address != "none":
                agent = attach(stack.models, run_id=name, every=EVERY, aggregator=address, **stack.options)
            losses = []
            for step in range(steps):
                losses.append(stack.train(step).hex())
                if agent is not None:
                    agent.step(step)
            results["observed" if observed else "alone"] = losses
            if agent is not None:
                results["undelivered"] = agent.close(30.0)
        (Path(out) / f"{name}-{rank}.json").write_text(json.dumps(results))
        if rank == 0:
            print(name, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
