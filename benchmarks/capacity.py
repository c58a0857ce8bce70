"""What a run needs of its aggregator: python benchmarks/capacity.py [--quick]

A model of a few lines (bytes that leave a node, seconds of a shard), the unit rates that it stands on, measured here,
and real Ray actors with small matrices that show whether it has the right shape: nodes that combine the partials of
their ranks and push them, shards that merge and solve. Then what it says of a run of 1 024 ranks, 80 layers and
D = 28 672. docs/capacity.md explains the result.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from eigenwatch.agent.combine import combine
from eigenwatch.aggregator.actors import ShardActor, remote
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.ownership import owners
from eigenwatch.schemas import LayerDescription, Origin, RecordKey, RunDescription, WirePartial, packed_length
from eigenwatch.spectrum import Group, Moments, partial_of
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

CPU = SolverConfig(device="cpu", own_process=True)
LIMITS = ShardLimits(deadline_seconds=600.0, memory_bytes=8 << 30)
PATIENCE_SECONDS = 600.0
ROUNDS, QUICK_ROUNDS = 5, 1
HBM_BYTES_PER_SECOND = 3.35e12
"""Of an H100 SXM, by its data sheet."""
LINK_BYTES_PER_SECOND = 50e9
"""Of a node, 400 Gb/s."""


class Layout(NamedTuple):
    """How a run's layers lie on its nodes."""

    name: str
    nodes: int
    """That hold each layer, and so send a sum of it."""
    ranks: int
    """Of one node, that contribute to one layer."""
    layers: int
    layers_of_a_node: int
    width: int
    shards: int = 1

    @property
    def record_bytes(self) -> int:
        """What a node sends of one layer: one packed sum in float32, however many ranks it has."""
        return 4 * packed_length(self.width)

    @property
    def node_bytes(self) -> int:
        """What leaves a node in one sampled step."""
        return self.layers_of_a_node * self.record_bytes

    @property
    def shard_bytes(self) -> int:
        """What reaches a shard in one sampled step."""
        return self.layers * self.nodes * self.record_bytes // self.shards


class Rates(NamedTuple):
    """Of a shard: seconds of a solve are cubic·D³ + square·D²."""

    cubic: float
    square: float

    def shard_seconds(self, one: Layout) -> float:
        return one.layers / one.shards * (self.cubic * one.width**3 + self.square * one.width**2)


@ray.remote(num_cpus=0)
class Node:
    """The courier of a host: what its ranks left, combined and pushed, layer by layer."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._wires = list[WirePartial]()

    def train(self, run_id: str, first_rank: int, ranks: int, width: int) -> None:
        """From now on its ranks are those of this run."""
        self._wires = []
        for rank in range(first_rank, first_rank + ranks):
            moments = Moments(width)
            moments.add(torch.randn(2 * width, width, generator=torch.Generator().manual_seed(rank)))
            key = RecordKey(run_id, 0, 0, 0, "post", None)
            self._wires.append(partial_of(moments, Origin(key=key, rank=rank, share=rank, captured_at=1.0)).to_wire())

    def send(self, step: int, owner: dict[int, str], shards: dict[str, Any]) -> int:
        """One sampled step of every layer; returns how many bytes of sums were sent."""
        sent = 0
        for layer, name in owner.items():
            (packet,) = combine(self._wires)
            header, mean, payload = packet.wire
            reply = shards[name].push.remote(header | {"step": step, "layer": layer}, mean, payload)
            assert ray.get(reply).status == "merged"
            sent += payload.nbytes
        return sent


class Cluster:
    """Shards and nodes, started once for all layouts."""

    def __init__(self, shards: int, nodes: int) -> None:
        self._store = tempfile.TemporaryDirectory()
        self._shards = {
            f"shard-{index}": remote(ShardActor).remote(self._store.name, CPU, LIMITS) for index in range(shards)
        }
        self._nodes = [Node.remote() for _ in range(nodes)]

    def simulate(self, one: Layout, rounds: int) -> tuple[float, int, int]:
        """Sampled steps of a run through real actors.

        Returns:
            a shard's seconds for one sampled step, the median, what left a node in it, and messages for one record.
        """
        run_id = "".join(character for character in one.name if character.isalnum())
        shares = tuple((rank,) for rank in range(one.nodes * one.ranks))
        layers = tuple(
            LayerDescription(layer=layer, site="post", name=f"h.{layer}", width=one.width, shares=shares)
            for layer in range(one.layers)
        )
        run = RunDescription(run_id=run_id, launch_id=run_id, world_size=len(shares), layers=layers)
        shards = dict(list(self._shards.items())[: one.shards])
        owner = owners(run, list(shards))
        owned = {name: [layer for layer, its in owner.items() if its == name] for name in shards}
        ray.get([shards[name].open_run.remote(run.to_wire(), 0, owned[name], 0) for name in shards])
        nodes = self._nodes[: one.nodes]
        ray.get([node.train.remote(run_id, k * one.ranks, one.ranks, one.width) for k, node in enumerate(nodes)])
        seconds, left = [], 0
        records, before = self._solved()
        for _ in range(rounds + 1):
            (left, *_) = ray.get([node.send.remote(len(seconds), owner, shards) for node in nodes])
            records += one.layers
            busy = self._seconds_of(records)
            seconds.append((busy - before) / one.shards)
            before = busy
        counters = [one.counters[run_id] for one in ray.get([shard.snapshot.remote([]) for shard in shards.values()])]
        messages = sum(one.messages for one in counters) / (len(seconds) * one.layers)
        return statistics.median(seconds[1:]), left, round(messages)

    def _solved(self) -> tuple[int, float]:
        """Records that all shards have solved so far, and the time that they have spent on it."""
        found = ray.get([shard.snapshot.remote([]) for shard in self._shards.values()])
        return sum(one.solve_seconds.counts[-1] for one in found), sum(one.solve_seconds.total_seconds for one in found)

    def _seconds_of(self, records: int) -> float:
        """Waits until so many records are solved; the time that all shards have spent so far."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            solved, seconds = self._solved()
            if solved >= records:
                return seconds
            assert time.monotonic() < deadline, f"{records - solved} records were not solved"
            time.sleep(0.02)


def fitted(cluster: Cluster, widths: tuple[int, ...], rounds: int) -> Rates:
    """One layer at several widths gives the constants of a solve: none is negative, and relative errors count."""
    seconds = np.array([cluster.simulate(Layout(f"unit {width}", 1, 1, 1, 1, width), rounds)[0] for width in widths])
    powers = np.array([[width**3, width**2] for width in widths], dtype=np.float64) / seconds[:, None]
    cubic, square = nnls(powers, np.ones(len(widths)))[0]
    return Rates(float(cubic), float(square))


def added_bytes_per_second(width: int, rounds: int) -> float:
    """How fast one thread of a shard adds up partials of one record, four at a time as they wait for it."""
    moments = Moments(width)
    moments.add(torch.randn(width // 4, width))
    key = RecordKey("adding", 0, 0, 0, "post", None)
    group, seconds = Group(width=width), []
    for first in range(0, 4 * (rounds + 1), 4):
        for rank in range(first, first + 4):
            group.take_(partial_of(moments, Origin(key=key, rank=rank, share=rank, captured_at=1.0)))
        started = time.perf_counter()
        group.fold_()
        seconds.append(time.perf_counter() - started)
    return 4 * 4 * packed_length(width) / statistics.median(seconds[1:])  # the first also touches new memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small matrices: it shows that the benchmark runs")
    quick = parser.parse_args().quick
    console = Console(width=120)
    known, middle, large = ((32, 64, 96), 48, 128) if quick else ((512, 1024, 1536), 896, 2048)
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=2 << 30, log_to_driver=False,
             logging_level="ERROR")  # fmt: skip
    rounds = QUICK_ROUNDS if quick else ROUNDS
    cluster = Cluster(shards=2, nodes=4)
    rates = fitted(cluster, known, rounds)
    table = Table(title=f"The model and real actors: {platform.machine()}, {os.cpu_count()} cores, torch "
                  f"{torch.__version__}, medians of {rounds} sampled steps")  # fmt: skip
    for heading in ("", "messages a record", "MB a node: measured", "model", "s a shard: measured", "model", "ratio"):
        table.add_column(heading)
    for one in (
        Layout("one rank", 1, 1, 4, 4, middle),
        Layout("8 ranks of a node", 1, 8, 4, 4, middle),
        Layout("4 nodes", 4, 2, 4, 4, middle),
        Layout("8 layers", 2, 2, 8, 8, middle),
        Layout("wider than what was fitted", 2, 2, 4, 4, large),
        Layout("2 shards", 2, 2, 8, 8, middle, shards=2),
    ):
        seconds, left, messages = cluster.simulate(one, rounds)
        predicted = rates.shard_seconds(one)
        table.add_row(one.name, str(messages), f"{left / 1e6:.2f}", f"{one.node_bytes / 1e6:.2f}", f"{seconds:.3g}",
                      f"{predicted:.3g}", f"{seconds / predicted:.2f}")  # fmt: skip
    ray.shutdown()
    console.print(table)
    console.print(f"One solve here: {rates.cubic:.2e}·D³ + {rates.square:.2e}·D² seconds, by widths {known}.")
    rate = added_bytes_per_second(large, rounds)
    console.print(f"One thread adds {rate / 1e9:.2g} GB of partials a second.")
    console.print(large_runs(rate))


def large_runs(bytes_per_second: float) -> Table:
    """What the model says of 1 024 ranks, 80 layers and D = 28 672 on 8 shards, of which one thread adds so much."""
    table = Table(title="1 024 ranks, 80 layers, D = 28 672, 8 shards: one sampled step of all layers")
    for heading in ("layout", "GB a node", "s of its link", "GB a shard", "s of its link", "s to add up, one thread",
                    "s to solve: GPU, at least"):  # fmt: skip
        table.add_column(heading)
    for one in (
        Layout("data parallel, 128 nodes", 128, 8, 80, 80, 28672, shards=8),
        Layout("tensor 8, pipeline 16, data 8", 8, 8, 80, 5, 28672, shards=8),
    ):
        gpu = one.layers / one.shards * 8 / 3 * one.width**3 / HBM_BYTES_PER_SECOND
        table.add_row(
            one.name,
            f"{one.node_bytes / 1e9:.0f}",
            f"{one.node_bytes / LINK_BYTES_PER_SECOND:.2g}",
            f"{one.shard_bytes / 1e9:.0f}",
            f"{one.shard_bytes / LINK_BYTES_PER_SECOND:.2g}",
            f"{one.shard_bytes / bytes_per_second:.0f}",
            f"{gpu:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
