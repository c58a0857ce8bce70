"""`eigenwatch compact`: merges the store's small files, and drops spectra that are too old."""

import json
import re
import sys

import click

from ..schemas import STORE_VARIABLE, default_store
from ..schemas.object_store import one_line
from ..schemas.store import open_store

UNITS_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

EPILOG = """
\b
Run it every hour or day, for example from cron; the service goes on writing and queries go on reading.
What it replaced is removed by a later compaction, an hour after it was replaced.
\b
Examples:
  eigenwatch compact --store runs/
  eigenwatch compact --store s3://telemetry/runs --keep-eigenvalues 30d
  eigenwatch compact --dry-run --json
"""


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds, written as 90s, 15m, 12h, 30d or 4w."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", str(value))
        if found is None:
            self.fail(f"{value!r} is no duration: write 90s, 15m, 12h, 30d or 4w", param, ctx)
        return float(found[1]) * UNITS_SECONDS[found[2]]


@click.command(epilog=EPILOG)
@click.option("--store", metavar="STORE", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--keep-eigenvalues", type=Duration(), metavar="AGE", help="Drop spectra older than this; records stay.")
@click.option(
    "--grace",
    type=Duration(),
    default="1h",
    show_default=True,
    metavar="AGE",
    help="Keep replaced files this long for queries under way.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def compact(store: str | None, keep_eigenvalues: float | None, grace: float, dry_run: bool, as_json: bool) -> None:
    """Merge the small files of each run into few large ones."""
    from ..history.compaction import CompactionConfig, compact

    if keep_eigenvalues == 0:
        raise click.UsageError("--keep-eigenvalues must be more than nothing: leave it out to keep all")
    config = CompactionConfig(grace_seconds=grace, keep_eigenvalues_seconds=keep_eigenvalues, dry_run=dry_run)
    try:
        found = open_store(store or default_store())
        if not found.exists():
            raise ValueError(f"no store at {found.uri}: pass --store, or set {STORE_VARIABLE}")
        done = compact(found, config, progress=_progress)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"store {found.uri!r} refused: {one_line(error)}; run it again later") from None
    if as_json:
        click.echo(json.dumps(done._asdict() | {"dry_run": dry_run}))
        return
    would = "would be " if dry_run else ""
    click.echo(f"{done.merged} files {would}merged into {done.into}; {done.removed} replaced before {would}removed")
    if done.waiting:
        click.echo(f"{done.waiting} replaced files {'would ' if dry_run else ''}stay for queries under way")
    if keep_eigenvalues is not None:
        click.echo(f"{done.spectra_dropped} spectra {would}dropped")
    if done.unreadable:
        click.echo(f"{done.unreadable} files cannot be read and were left alone", err=True)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done} of {total} tables", nl=done == total, err=True)
