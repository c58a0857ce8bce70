"""A job of two ranks whose calls of `attach` cannot work, one after the other; each rank says what it heard."""

import os

import torch
import torch.distributed as dist
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)  # replicas
model = Decoder(DecoderConfig(layers=1))
for wrong in (
    {"run_id": f"run-{rank}"},
    {"model": model if rank == 0 else None},
    {"limits": None if rank == 0 else 7},
    {"layers": [0, 9]},
):
    try:
        attach(**{"model": model, "run_id": "run", "aggregator": "127.0.0.1:1", **wrong})
    except ValueError as error:
        os.write(1, f"{rank}: {error}\n".encode())  # in one piece: the ranks share the pipe
dist.destroy_process_group()
