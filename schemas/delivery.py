"""The words that a courier and the aggregator exchange about a partial."""

import socket
from typing import Literal, NamedTuple

NAMESPACE = "eigenwatch"
COORDINATOR = "coordinator"
"""Name of the coordinator actor in `NAMESPACE`."""

MESSAGE_BYTES = 256 << 20
"""What is larger travels in pieces."""
OPEN_AGAIN = 0
"""A heartbeat's answer where the launch is to be opened again; else it is the stretch of its cadence, 1 or more."""

PushStatus = Literal["merged", "duplicate", "overlap", "durable", "dropped", "busy", "unknown_run", "refused"]
Fate = Literal["unknown", "held", "partly", "durable", "dropped"]
"""Of one rank's partial: unknown to the shard, and so to be pushed (again); merged; in a record that is stored without
some of its ranks, and that should be kept for a while, since a shard which restarts needs it again if they come; in a
durable record that is complete; in one that never will be stored."""


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
    """A shard's answer to one partial, or to a group of them.

    merged, duplicate: the shard holds it; keep it until its record is durable. overlap: it holds some ranks of the
    group, and has merged none; ask which, and push the others. durable: its record already is. dropped: its record was
    given up, as the shard has counted. busy: push again later. unknown_run: announce the run, then push again. refused:
    never push it again.
    """

    status: PushStatus
    reason: str | None = None
    """Label under which a refusal is counted."""
    message: str | None = None


class Opened(NamedTuple):
    """The coordinator's answer to a launch: its attempt, and the shard that owns each layer."""

    attempt: int
    owners: dict[int, str]
    shards: list[str]
    """All that own layers of some run; each hears what it owns of this one."""
    epoch: int
    """Of this ownership: a later one has a greater number."""
