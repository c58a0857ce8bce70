"""The job of the chaos test: `python -m tests.chaos.job OUT …` under torchrun, which starts it again where a rank dies.

It goes on from its last checkpoint, bit for bit, so that a step shows the same loss and the same activations whichever
launch takes it. Each rank writes what it has done: a line a step (see `Line`), and the activations of sampled steps,
from which the test computes every record again.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from torch.nn.parallel import DistributedDataParallel

LAYERS, WIDTH, EVERY = 3, 40, 2
CHECKPOINT_STEPS = 6


class Line(NamedTuple):
    """A rank has ended a step."""

    launch_id: str
    step: int
    loss: str
    """Its exact bits."""
    ended_at: float
    """Unix time in seconds."""

    @classmethod
    def read(cls, out: Path, rank: int) -> "list[Line]":
        """What a rank of the job has said so far, over all launches."""
        path = out / f"lines-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        parts = [line.split() for line in lines if line.endswith(";")]  # the last one may be half written
        return [cls(launch, int(step), loss, float(ended)) for launch, step, loss, ended, _ in parts]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--run-id", default="chaos")
    parser.add_argument("--aggregator", default="embedded", help="or 'none'")
    parser.add_argument("--store")
    parser.add_argument("--steps", type=int, default=100_000, help="unless OUT/go exists earlier")
    parser.add_argument("--tokens", type=int, default=56, help="of rank 0 in a step; rank 1 has half as many more")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="make each step last at least this long")
    parser.add_argument("--close-seconds", type=float, default=120.0)
    options = parser.parse_args()
    out: Path = options.out

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(layers=LAYERS, model_dim=16, width=WIDTH, heads=2))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = _restore(out / "checkpoint.pt", model, optimizer)
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _module, arguments, index=index: seen.update({index: arguments[0].detach().flatten(0, 1).clone()})
        )
    agent = None
    if options.aggregator != "none":
        agent = attach(wrapped, run_id=options.run_id, every=EVERY, store=options.store, aggregator=options.aggregator)
    launch_id = "none" if agent is None else agent.run.launch_id
    if agent is not None and agent.metrics_url and rank == 0:
        (out / "metrics_url").write_text(agent.metrics_url)

    with (out / f"lines-{rank}").open("a", buffering=1) as lines:
        for step in range(first, options.steps):
            started = time.monotonic()
            loss = _train_on(wrapped, optimizer, _tokens(step, rank, options.tokens))
            if agent is not None:
                agent.step(step)
            if step % EVERY == 0:
                _save(seen, out / f"activations-{step}-{rank}.pt")
            lines.write(f"{launch_id} {step} {loss.hex()} {time.time()} ;\n")
            if rank == 0 and (step + 1) % CHECKPOINT_STEPS == 0:
                state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                _save(state, out / "checkpoint.pt")
            time.sleep(max(options.step_seconds - (time.monotonic() - started), 0.0))
            if _agreed((out / "go").exists()):
                break
    undelivered = 0 if agent is None else agent.close(options.close_seconds)
    dropped = {} if agent is None else agent.dropped
    (out / f"closed-{rank}.json").write_text(json.dumps({"undelivered": undelivered, "dropped": dropped}))


def _train_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def _tokens(step: int, rank: int, count: int) -> torch.Tensor:
    """(2, T+1): drawn for this step and rank, whichever launch takes it."""
    draws = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(256, (2, count * (2 + rank) // 4 + 1), generator=draws)


def _restore(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(what: object, path: Path) -> None:
    """Appears whole or not at all."""
    new = path.with_suffix(f".{os.getpid()}")
    torch.save(what, new)
    new.rename(path)


def _agreed(here: bool) -> bool:
    """What rank 0 says; all ranks take the same number of steps."""
    said = torch.tensor(float(here))
    dist.broadcast(said, 0)
    return bool(said)


if __name__ == "__main__":
    main()
