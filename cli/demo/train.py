"""The demo's training script, one process a rank; `eigenwatch demo` starts it under torchrun.

    torchrun --nproc-per-node 2 -m eigenwatch.cli.demo.train --run-id my-run --store runs/

A plain loop with eigenwatch attached. Rank 0 prints a line of JSON for each step. SIGINT and SIGTERM end it after the
step under way, on all ranks together.
"""

import argparse
import json
import os
import signal
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ...agent import attach
from .decoder import Decoder, DecoderConfig
from .text import documentation_bytes, random_windows


def main() -> None:
    """Trains until `--steps` or a signal."""
    arguments = _arguments()
    stop = torch.zeros(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.fill_(1))
    torch.set_num_threads(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
    dist.init_process_group("gloo")
    torch.manual_seed(arguments.seed)
    model = Decoder(
        DecoderConfig(norm=arguments.norm, width=arguments.width, layers=arguments.layers, init_std=arguments.init_std)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / max(arguments.warm_up, 1), 1.0, arguments.warm_up)
    wrapped = DistributedDataParallel(model)
    text = documentation_bytes()
    draws = torch.Generator().manual_seed(1000 * arguments.seed + dist.get_rank())

    with attach(
        wrapped,
        run_id=arguments.run_id,
        every=arguments.every,
        store=arguments.store,
        tags={"norm": arguments.norm, "seed": str(arguments.seed)},
    ) as agent:
        _say(run_id=arguments.run_id, agent=str(agent), metrics_url=agent.metrics_url)
        for step in range(arguments.steps):
            started = time.perf_counter()
            inputs, targets = random_windows(text, arguments.batch, arguments.length, draws)
            loss = F.cross_entropy(wrapped(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            warm_up.step()
            agent.step(step)
            _say(step=step, loss=loss.item(), seconds=time.perf_counter() - started)
            everyone = stop.clone()
            dist.all_reduce(everyone, dist.ReduceOp.MAX)
            if everyone.item():
                break
        _say(closing=True)
    dist.destroy_process_group()


def _say(**message: object) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(message), flush=True)  # noqa: T201 - the protocol with `eigenwatch demo`


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small byte-level decoder with eigenwatch attached.")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--store")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--norm", choices=["pre", "post"], default="pre")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="windows a rank and step")
    parser.add_argument("--length", type=int, default=128, help="bytes a window")
    parser.add_argument("--init-std", type=float, help="of every weight matrix")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warm-up", type=int, default=0, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
