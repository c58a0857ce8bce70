"""The words that a courier and the aggregator exchange about a partial."""

from typing import Literal, NamedTuple

NAMESPACE = "eigenwatch"
COORDINATOR = "coordinator"
"""Name of the coordinator actor in `NAMESPACE`."""

PushStatus = Literal["merged", "duplicate", "durable", "busy", "unknown_run", "refused"]


class PushReply(NamedTuple):
    """A shard's answer to one partial.

    merged, duplicate: the shard holds it; keep it until its record is durable. durable: its record already is.
    busy: push again later. unknown_run: announce the run, then push again. refused: never push it again.
    """

    status: PushStatus
    incarnation: str
    """Changes when the shard restarts: what was pushed to another incarnation and is not durable is pushed again."""
    reason: str | None = None
    """Label under which a refusal is counted."""
    message: str | None = None


class Durability(NamedTuple):
    """A shard's answer to "which of these records are durable?"."""

    incarnation: str
    durable: list[bool]


class Opened(NamedTuple):
    """The coordinator's answer to a launch: its attempt, and the shard that owns each layer."""

    attempt: int
    owners: dict[int, str]
