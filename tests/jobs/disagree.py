"""A job whose ranks make up their own run ids."""

import os

import torch.distributed as dist
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig

dist.init_process_group("gloo")
try:
    attach(Decoder(DecoderConfig(layers=1)), run_id=f"run-{os.environ['RANK']}", aggregator="127.0.0.1:1")
except ValueError as error:
    os.write(1, f"rank {dist.get_rank()}: {error}\n".encode())  # in one piece: the ranks share the pipe
dist.destroy_process_group()
