"""Which ranks there are, and what each of them observes.

Every rank must know the whole topology before the first partial, or the aggregator could take a part for the whole.
One gather over the process group at `attach` tells it; nothing is exchanged afterwards.
"""

import os
from typing import Any, NamedTuple

import torch.distributed as dist


class Ranks(NamedTuple):
    """This process's place in the job."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank; a collective of the default process group."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def current_ranks() -> Ranks:
    """Rank and world size of the default process group, or a single rank.

    Raises:
        ValueError: a launcher started several ranks but the process group does not exist yet.
    """
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but no process group exists: call "
            "torch.distributed.init_process_group() before attach()"
        )
    return Ranks(0, 1)


def spans_hosts() -> bool:
    """Whether the launcher says that ranks run on more than one host."""
    world, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    return world is not None and local is not None and int(local) < int(world)
