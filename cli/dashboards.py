"""`eigenwatch dashboards`: push the committed Grafana dashboards, write them to a folder, or check them."""

import json
import os
import shutil
from pathlib import Path

import click

from ..deploy.dashboards import GRAFANA, committed_dashboards, load_dashboard, unknown_metrics
from ..deploy.grafana_push import TOKEN_VARIABLE, GrafanaAddress, GrafanaPushError, push


@click.group(name="dashboards", epilog="Example: eigenwatch dashboards push --url http://localhost:3000")
def dashboards() -> None:
    """Write, check or push the Grafana dashboards.

    \b
    Example:
        GRAFANA_TOKEN=... eigenwatch dashboards push --url http://127.0.0.1:3000
    """


@dashboards.command(name="push")
@click.option("--url", default="http://127.0.0.1:3000", show_default=True, help="Where Grafana listens.")
@click.option("--folder", default="eigenwatch", show_default=True, help="Title of the folder they go into.")
@click.option(
    "--prometheus-url",
    help="Also make the data source 'eigenwatch' point at this Prometheus, as Grafana reaches it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would change and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as JSON.")
def push_command(url: str, folder: str, prometheus_url: str | None, dry_run: bool, as_json: bool) -> None:
    """Push the dashboards to a running Grafana; a second push changes nothing.

    The token of a Grafana service account is read from GRAFANA_TOKEN. It needs the role Editor, with
    --prometheus-url Admin.

    \b
    Example:
        GRAFANA_TOKEN=... eigenwatch dashboards push --prometheus-url http://prometheus:9090 --dry-run
    """
    try:
        address = GrafanaAddress(url=url, token=os.environ.get(TOKEN_VARIABLE, "").strip())
        changes = push(address, committed_dashboards(), folder=folder, prometheus_url=prometheus_url, dry_run=dry_run)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except GrafanaPushError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "changes": [change._asdict() for change in changes]}, indent=2))
        return
    for change in changes:
        action = f"would be {change.action}" if dry_run and change.action != "unchanged" else change.action
        click.echo(f"{change.kind} {change.name}: {action}")


@dashboards.command(name="write")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def write_command(directory: Path) -> None:
    """Copy the dashboards and Grafana's provisioning files into DIRECTORY, over older copies.

    DIRECTORY is laid out as /etc/grafana: dashboards/ and provisioning/.

    \b
    Example:
        eigenwatch dashboards write ./grafana
    """
    for source in sorted(path for path in GRAFANA.rglob("*") if path.is_file()):
        target = directory / source.relative_to(GRAFANA)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            raise click.ClickException(f"cannot write {target}: {error.strerror}") from None
        click.echo(str(target))


@dashboards.command(name="check")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check_command(files: tuple[Path, ...]) -> None:
    """Check that every expression names only metrics that the exporter shows.

    Without FILES the dashboards that ship with eigenwatch are checked; give your own to check those.

    \b
    Example:
        eigenwatch dashboards check my-dashboard.json
    """
    try:
        checked = [load_dashboard(path) for path in files] if files else committed_dashboards()
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    problems = [problem for dashboard in checked for problem in unknown_metrics(dashboard)]
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise click.ClickException(f"{len(problems)} unknown metric names")
    count = sum(1 for dashboard in checked for _ in dashboard.expressions())
    click.echo(f"{count} expressions in {len(checked)} dashboards name only known metrics")
