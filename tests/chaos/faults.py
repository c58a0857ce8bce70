"""The faults of a storm: what they are, and which ones a seed draws."""

import random
from typing import NamedTuple

from tests.chaos.aggregators import DEADLINE_SECONDS

PROCESSES = {
    "shard": "ray::Shard",
    "coordinator": "ray::Coordinator",
    "solver": "eigenwatch.aggregator.solver_process",
    "courier": "eigenwatch.agent.courier",
    "rank": "tests.chaos.job",
    "serve": "eigenwatch.cli serve",
}
"""Words of the command line by which a process is found."""

KILL, STOP = "kill", "stop"
ECHO = "echo pushes"
"""A second client pushes the job's partials again: at once, later, and in another order."""
FILL = "fill the disk"
LOSE_HEAD = "kill Ray"
"""Its head, every actor and `serve`, until the supervisor starts them again."""
SPOIL = "spoil a partial"
"""Garbage in the place of one that waits in a spool: the one loss that there may be, and it must be counted."""


class Fault(NamedTuple):
    """What happens, `after_steps` of training since the fault before."""

    after_steps: int
    action: str
    process: str = ""
    """A key of PROCESSES, for kill and stop."""
    choice: int = 0
    """Which one, of several."""
    hold_seconds: float = 0.0
    """After which it is undone; training and other faults go on meanwhile."""

    def __str__(self) -> str:
        held = f" for {self.hold_seconds:.1f} s" if self.hold_seconds else ""
        which = f" {self.process} {self.choice}" if self.process else ""
        return f"{self.action}{which}{held}, {self.after_steps} steps after the one before"


TOKENS = (56, 12)
"""Of rank 0, in a step: many, which travel as a scatter, or few, as rows."""

_LIKELINESS = {
    (KILL, "shard"): 3,
    (KILL, "coordinator"): 2,
    (KILL, "solver"): 2,
    (KILL, "courier"): 2,
    (KILL, "rank"): 2,
    (KILL, "serve"): 1,
    (STOP, "shard"): 2,
    (STOP, "coordinator"): 1,
    (STOP, "solver"): 2,
    (STOP, "courier"): 3,
    (STOP, "rank"): 1,
    (ECHO, ""): 3,
    (FILL, ""): 2,
    (LOSE_HEAD, ""): 2,
    (SPOIL, ""): 2,
}


def tokens_of(seed: int) -> int:
    """Seeds take turns."""
    return TOKENS[seed % len(TOKENS)]


def draw(seed: int, form: str, count: int) -> list[Fault]:
    """`count` faults for an aggregator of this form; the same for the same arguments."""
    draws = random.Random(f"{seed} {form}")
    possible = dict(_LIKELINESS)
    if form != "cluster":
        del possible[LOSE_HEAD, ""]  # their Ray has another address each time
    if form == "own":
        del possible[KILL, "serve"]  # as above
    kinds, weights = list(possible), list(possible.values())
    faults = []
    for _ in range(count):
        action, process = draws.choices(kinds, weights)[0]
        hold = 0.0 if action in (KILL, SPOIL) else DEADLINE_SECONDS + draws.uniform(0.5, 3.0)
        faults.append(Fault(draws.choice([1, 2, 4, 8, 16]), action, process, draws.randrange(8), hold))
    return faults
