"""A training job for the tests: the demo's decoder in a plain loop, with a witness beside eigenwatch.

The witness is a hook of its own that keeps the raw activations of each forward, so that a test can compute every record
again from nothing but them. Losses are kept as exact bits.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from eigenwatch.cli.demo.text import documentation_bytes, random_windows
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run-id", default="job")
    parser.add_argument("--aggregator", default="embedded", help="or 'none'")
    parser.add_argument("--store")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--hold", action="store_true", help="before closing, wait until OUT/go exists")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="make each step last at least this long")
    options = parser.parse_args()

    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(layers=3, model_dim=32, width=96, heads=2))
    witness: dict[int, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(_keep(witness, index))
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text, draws = documentation_bytes(), torch.Generator().manual_seed(rank)
    agent = None
    if options.aggregator != "none":
        agent = attach(
            wrapped,
            run_id=options.run_id,
            every=options.every,
            store=options.store,
            aggregator=options.aggregator,
            tags={"norm": "pre"},
        )
    losses = []
    for step in range(options.steps):
        started = time.monotonic()
        witness.clear()
        optimizer.zero_grad()
        for _ in range(options.micro_batches):
            inputs, targets = random_windows(text, 4, 64 + 16 * rank, draws)  # ranks have different tokens
            loss = F.cross_entropy(wrapped(inputs).flatten(0, 1), targets.flatten())
            (loss / options.micro_batches).backward()
            losses.append(loss.item().hex())
        optimizer.step()
        if agent is not None:
            agent.step(step)
        if step % options.every == 0:
            torch.save(witness, options.out / f"witness-{step}-{rank}.pt")
        (options.out / f"step-{rank}").write_text(str(step))
        while time.monotonic() - started < options.step_seconds:
            time.sleep(0.01)
    (options.out / f"losses-{rank}.json").write_text(json.dumps(losses))
    (options.out / f"trained-{rank}").touch()
    while options.hold and not (options.out / "go").exists():
        time.sleep(0.05)
    closing = time.monotonic()
    undelivered = agent.close(20.0) if agent is not None else 0
    (options.out / f"closed-{rank}.json").write_text(
        json.dumps({"undelivered": undelivered, "seconds": time.monotonic() - closing})
    )


def _keep(witness: dict[int, list[torch.Tensor]], index: int):
    def keep(_module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        witness.setdefault(index, []).append(arguments[0].detach().flatten(0, 1).clone())

    return keep


if __name__ == "__main__":
    main()
