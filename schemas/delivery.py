"""The words that a courier and the aggregator exchange about a partial."""

import socket
from typing import Literal, NamedTuple

NAMESPACE = "eigenwatch"
COORDINATOR = "coordinator"
"""Name of the coordinator actor in `NAMESPACE`."""

PushStatus = Literal["merged", "duplicate", "durable", "dropped", "busy", "unknown_run", "refused"]
Fate = Literal["held", "durable", "dropped"]


def check_reachable(address: str, timeout_seconds: float = 5.0) -> None:
    """Opens a connection to a Ray cluster's address and closes it; Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there.
        ValueError: it is not host:port.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is not host:port")
    socket.create_connection((host, int(port)), timeout_seconds).close()


class PushReply(NamedTuple):
    """A shard's answer to one partial.

    merged, duplicate: the shard holds it; keep it until its record is durable. durable: its record already is. dropped:
    its record was given up, as the shard has counted. busy: push again later. unknown_run: announce the run, then push
    again. refused: never push it again.
    """

    status: PushStatus
    incarnation: str
    """Changes when the shard restarts: what was pushed to another incarnation and is not durable is pushed again."""
    reason: str | None = None
    """Label under which a refusal is counted."""
    message: str | None = None


class Fates(NamedTuple):
    """A shard's answer to "what became of this rank's partials of these records?"."""

    incarnation: str
    fates: list[Fate]
    """held: not durable yet, or not known. dropped: merged, and then given up."""


class Opened(NamedTuple):
    """The coordinator's answer to a launch: its attempt, and the shard that owns each layer."""

    attempt: int
    owners: dict[int, str]
