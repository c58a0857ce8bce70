"""`eigenwatch watch`: a live table of a run's layers and alerts in the terminal, or line by line into a pipe."""

import json
import os
import sys
import time

import click
from rich.console import Console

from ...schemas import METRIC_NAMES, default_store
from .view import SeveralRuns, Source

EPILOG = """
\b
States: ok; the kind of an alert (collapse, …); not finite; stale: no record for 15 minutes;
incomplete: ranks are missing; skipped: a newer step was solved instead; no record: none yet.
Keys: q or Ctrl-C ends.
\b
Examples:
  eigenwatch watch --store runs/
  eigenwatch watch llama-130m --store s3://telemetry/runs --metric soft_utilization
  eigenwatch watch --url http://10.0.0.1:9845/metrics
  eigenwatch watch llama-130m --once --json
"""


@click.command(epilog=EPILOG)
@click.argument("run", required=False)
@click.option("--store", metavar="STORE", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--url", help="An exporter's metrics instead of a store, such as http://127.0.0.1:9845/metrics.")
@click.option(
    "--metric",
    default="hard_utilization",
    show_default=True,
    metavar="METRIC",
    type=click.Choice(METRIC_NAMES),
    help="Whose history is drawn: any metric of a record.",
)
@click.option(
    "--interval", default=2.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print what is there now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each look.")
def watch(
    run: str | None, store: str | None, url: str | None, metric: str, interval: float, once: bool, as_json: bool
) -> None:
    """Follow a run: its layers, alerts and the health of the telemetry.

    Without RUN it is the one under way, else the newest.
    """
    if store is not None and url is not None:
        raise click.UsageError("choose one of --store and --url")
    if url is not None and not url.startswith(("http://", "https://")):
        raise click.UsageError(
            f"--url {url!r} is no http:// or https:// address, such as http://127.0.0.1:9845/metrics"
        )
    where = url or store or default_store()
    try:
        source = _source(where, url is not None, run, metric)
        if sys.stdout.isatty() and not once and not as_json:
            from .screen import show

            show(source, where, metric, interval)
        else:
            _print(source, interval, once, as_json)
    except SeveralRuns as error:
        raise click.UsageError(f"{error}, such as: eigenwatch watch {error.runs[0]}") from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        return
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _source(where: str, exporter: bool, run: str | None, metric: str) -> Source:
    if exporter:
        from .scraped import ScrapedSource

        return ScrapedSource(where, run, metric)
    from .stored import StoredSource

    return StoredSource(where, run, metric)


def _print(source: Source, interval_seconds: float, once: bool, as_json: bool) -> None:
    """Prints a view for each look, all layers of it."""
    from .table import draw

    while True:
        now = time.time()
        view = source.read(now)
        if once and view.run_id is None:
            raise ValueError("; ".join(view.waiting_for))
        if as_json:
            click.echo(json.dumps(view.to_json(), allow_nan=False))
        else:
            console = Console()
            console.print(draw(view, now, console.width, None))
            click.echo()
        sys.stdout.flush()
        if once:
            return
        time.sleep(interval_seconds)
