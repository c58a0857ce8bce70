"""`eigenwatch serve`: an aggregator until it is told to stop."""

import json
import logging
import os
import select
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

import click

from ..schemas import absolute_store, default_store
from ..schemas.ray_token import token_environment

if TYPE_CHECKING:
    from ..aggregator.service import Service

ORPHAN_SECONDS = 35.0
"""After its trainer died: how long couriers may take to deliver what they hold."""
CHILD_NICENESS = 5


@click.command(epilog="Example: eigenwatch serve --store runs/ --address 10.0.0.1:6379")
@click.option("--store", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--address", help="An existing Ray cluster (host:port or auto); without it a local one is started.")
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Where Prometheus may reach it.")
@click.option("--metrics-port", default=9845, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--shards", default=1, show_default=True, type=click.IntRange(1), help="Actors that share the layers.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Of the solver.",
)
@click.option(
    "--precision",
    default="float64",
    show_default=True,
    type=click.Choice(["float64", "float32"]),
    help="Of the solver's first try on a GPU.",
)
@click.option(
    "--solver",
    default="exact",
    show_default=True,
    type=click.Choice(["exact", "slq"]),
    help="slq: estimate wide layers by stochastic Lanczos quadrature; their records say with which error.",
)
@click.option(
    "--away",
    default=30.0,
    show_default=True,
    help="Seconds without an answer after which the others take over a shard's layers.",
)
@click.option("--memory", default=4.0, show_default=True, help="GiB of partials that a shard merges at once.")
@click.option(
    "--behind",
    default=30.0,
    show_default=True,
    help="Seconds that a record may wait for the solver before its run is asked to sample less.",
)
@click.option("--deadline", default=60.0, show_default=True, help="Seconds that a record waits for its last rank.")
@click.option("--json", "as_json", is_flag=True, help="Say where it serves as one line of JSON.")
@click.option("--follow-stdin", is_flag=True, hidden=True, help="End when standard input does: an embedded aggregator.")
def serve(
    store: str | None,
    address: str | None,
    metrics_host: str,
    metrics_port: int,
    shards: int,
    device: str,
    precision: str,
    solver: str,
    away: float,
    memory: float,
    behind: float,
    deadline: float,
    as_json: bool,
    follow_stdin: bool,
) -> None:
    """Merge, solve, store and expose the telemetry of any number of runs.

    Runs until SIGTERM or Ctrl-C, then writes everything that it has received.
    """
    os.environ.update(token_environment(os.environ, starts_ray=address is None))
    from ..aggregator.config import ServiceConfig, ShardLimits, SolverConfig
    from ..aggregator.service import Service

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if follow_stdin:
        os.nice(CHILD_NICENESS)  # the training beside it comes first
    stop = Stop()
    service = Service(
        ServiceConfig(
            store=absolute_store(store or default_store()),
            address=address,
            metrics_host=metrics_host,
            metrics_port=metrics_port,
            shards=shards,
            away_seconds=away,
            solver=SolverConfig(device=device, precision=precision, method=solver, own_process=True),
            limits=ShardLimits(deadline_seconds=deadline, memory_bytes=int(memory * 2**30), behind_seconds=behind),
        )
    )
    stop.install()  # Ray has set handlers of its own by now
    where = {"address": service.address, "metrics_url": service.metrics_url, "pid": os.getpid()}
    if as_json:
        click.echo(json.dumps(where))
    else:
        click.echo(f"Serving on Ray at {service.address}; metrics at {service.metrics_url}")
        click.echo(f"In the training: attach(model, run_id=…, aggregator={service.address!r}). Ctrl-C ends.")
        if address is None:
            click.echo("Processes of another user or host need this Ray's token: ~/.ray/auth_token, or RAY_AUTH_TOKEN.")
    try:
        _serve_until(stop, service, follow_stdin)
    finally:
        flushed = service.close()
    if not flushed:
        raise click.ClickException("not everything could be written in time; agents still hold what is missing")


def _serve_until(stop: "Stop", service: "Service", follow_stdin: bool) -> None:
    parent = os.getppid()
    while not stop.requested:
        if follow_stdin:
            readable = bool(select.select([sys.stdin], [], [], 0.5)[0])
            said = os.read(sys.stdin.fileno(), 1024) if readable else b""
            orphaned = (readable and not said) or os.getppid() != parent  # a forked child may hold the pipe open
            if said or orphaned:
                _wait_for_couriers(service, stop, orphaned)
                return
        else:
            stop.wait(0.5)


class Stop:
    """Whether SIGTERM or SIGINT has come."""

    def __init__(self) -> None:
        self.requested = False
        self.install()

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def wait(self, seconds: float) -> None:
        """Sleeps, at most `seconds`; a signal cuts it short."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.05)

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True


def _wait_for_couriers(service: "Service", stop: Stop, orphaned: bool) -> None:
    """Returns when every launch has ended. The couriers of a trainer that died early may not have come yet."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline and not stop.requested:
        if not service.running() and (service.ended() or not orphaned):
            return
        stop.wait(0.2)
