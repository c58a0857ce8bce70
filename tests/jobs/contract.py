"""Two ranks for `tests.agent.test_contract`: `python -m … OUT ADDRESS` under torchrun.

First a mixture of experts of which one gets tokens of rank 1 only, then a layer so wide against its step that the
overhead contract must stretch the cadence: whole on each rank, and split over both.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from eigenwatch.agent import Parallelism, Schedule, attach
from torch import Tensor, nn

WIDTH, ROWS, EXPERTS, STEPS = 48, 200, 3, 3
EVERY, WIDE, MANY, SECONDS = 20, 128, 8192, 150.0


class Layers(nn.Module):
    """Down-projections alone, under the names of a decoder's experts."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        one = nn.ModuleDict({str(k): nn.ModuleDict({"down_proj": nn.Linear(width, 1)}) for k in range(experts)})
        dense = nn.ModuleDict({"down_proj": nn.Linear(width, 1)})
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"experts": one}) if experts else dense})])


def routed(step: int, rank: int) -> dict[int, Tensor]:
    """Rows by expert: the first gets tokens on both ranks, the second on rank 1 alone, the third on none in step 1."""
    draws = torch.Generator().manual_seed(10 * step + rank)
    rows = {0: torch.randn(ROWS, WIDTH, generator=draws)}
    if rank == 1:
        rows[1] = torch.randn(ROWS, WIDTH, generator=draws)
    if step != 1:
        rows[2] = torch.randn(ROWS + rank, WIDTH, generator=draws)
    return rows


def until_stretched(run_id: str, width: int, parallelism: Parallelism, address: str) -> int:
    """Trains until two samples were taken under a longer cadence; how many partials were not delivered."""
    model, x = Layers(width, 0), torch.randn(MANY, width)
    schedule = Schedule(every=EVERY, max_overhead=0.01)
    step, began, stretched = 0, time.monotonic(), 0
    with (
        torch.no_grad(),
        attach(model, run_id=run_id, schedule=schedule, parallelism=parallelism, aggregator=address) as agent,
    ):
        going = torch.ones(())
        while going:
            model.layers[0]["mlp"]["down_proj"](x)
            agent.step(step)
            stretch = agent._cadence.stretch_at(step)  # the store knows it too late for this loop
            stretched += stretch > 1 and step % (EVERY * stretch) == 0
            step += 1
            going.fill_(stretched < 2 and time.monotonic() - began < SECONDS)
            dist.broadcast(going, 0)  # ranks of a job step together
    return agent.close()


def main() -> None:
    out, address = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Layers(WIDTH, EXPERTS)
    with torch.no_grad(), attach(model, run_id="two-experts", every=1, aggregator=address) as agent:
        for step in range(STEPS):
            for expert, rows_ND in routed(step, rank).items():
                model.layers[0]["mlp"]["experts"][str(expert)]["down_proj"](rows_ND)
            agent.step(step)
    undelivered = agent.close()

    undelivered += until_stretched("contract", WIDE, Parallelism(), address)
    undelivered += until_stretched("contract-split", WIDE // 2, Parallelism(tensor_parallel=dist.group.WORLD), address)
    (out / f"rank-{rank}.json").write_text(json.dumps({"undelivered": undelivered}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
