"""A training job for the tests: the demo's decoder in a plain loop, with a witness beside eigenwatch.

The witness is a hook of its own that keeps the raw activations of each forward, so that a test can compute every record
again from nothing but them. Losses are kept as exact bits.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from eigenwatch.cli.demo.text import documentation_bytes, random_windows
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader


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
    parser.add_argument("--until-go", action="store_true", help="end training, before --steps, once OUT/go exists")
    parser.add_argument("--close-seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=0, help="forked processes that load data")
    parser.add_argument("--forks", action="store_true", help="fork a child that ends in order, and one that stays")
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
    if options.forks:
        _fork(options.out)
    load = _loader(options.workers) if options.workers else (lambda: None)
    losses = []
    for step in range(options.steps):
        started = time.monotonic()
        witness.clear()
        optimizer.zero_grad()
        load()
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
        if options.until_go and _agreed((options.out / "go").exists()):
            break
    (options.out / f"losses-{rank}.json").write_text(json.dumps(losses))
    (options.out / f"trained-{rank}").touch()
    while options.hold and not (options.out / "go").exists():
        time.sleep(0.05)
    closing = time.monotonic()
    undelivered = agent.close(options.close_seconds) if agent is not None else 0
    (options.out / f"closed-{rank}.json").write_text(
        json.dumps({"undelivered": undelivered, "seconds": time.monotonic() - closing})
    )


def _agreed(here: bool) -> bool:
    """What rank 0 says; all ranks must take the same number of steps."""
    said = torch.tensor(float(here))
    if dist.is_initialized():
        dist.broadcast(said, 0)
    return bool(said)


def _loader(workers: int) -> Callable[[], object]:
    """A call that takes the next batch from forked workers, which are there from now on."""
    numbers = torch.arange(10_000_000)
    batches = iter(DataLoader(numbers, batch_size=4, num_workers=workers, multiprocessing_context="fork"))
    next(batches)
    return lambda: next(batches)


def _fork(out: Path) -> None:
    if os.fork() == 0:
        sys.exit(0)  # its atexit handlers run, ours among them
    os.wait()
    stays = os.fork()
    if stays == 0:
        signal.pause()
    (out / "forked").write_text(str(stays))


def _keep(witness: dict[int, list[torch.Tensor]], index: int):
    def keep(_module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        witness.setdefault(index, []).append(arguments[0].detach().flatten(0, 1).clone())

    return keep


if __name__ == "__main__":
    main()
