"""`eigenwatch demo`: a small LLaMA on real text with everything on, and what eigenwatch found in it.

The verb starts the training under torchrun, as a user would, follows what rank 0 prints, scrapes the endpoint while
it trains, and then reads the store: nothing in it knows more than a user could.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...schemas import check_run_id, default_store
from .training import Training, TrainingFailed

if TYPE_CHECKING:
    from rich.console import Console

    from ...history import History

COLLAPSING = ("--norm", "post", "--init-std", "0.02", "--lr", "1e-2")
HEALTHY = ("--norm", "pre", "--lr", "3e-3", "--warm-up", "30")
CLOSE_SECONDS = 90.0


@click.command(epilog="Example: eigenwatch demo --collapse --store runs/")
@click.option("--store", type=click.Path(), help="Folder of the history.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--run-id", help="Name of the run.  [demo-<date and time>]")
@click.option("--steps", default=240, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--every", default=8, show_default=True, type=click.IntRange(1), help="Sample each N-th step.")
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(1, 64), help="Data-parallel ranks.")
@click.option("--seed", default=0, show_default=True, help="Of the weights and the batches.")
@click.option("--collapse", is_flag=True, help="Post-LN without warm-up, which collapses within seconds.")
def demo(store: str | None, run_id: str | None, steps: int, every: int, ranks: int, seed: int, collapse: bool) -> None:
    """Train a small LLaMA on the Python documentation with everything on, and show what eigenwatch found."""
    from rich.console import Console

    from ...history import open_history

    console = Console()
    where = store or default_store()
    if "://" in where:
        raise click.BadParameter(f"the demo keeps its picture in a folder, got {where}", param_hint="--store")
    folder = Path(where).absolute()
    run_id = check_run_id(run_id or f"demo-{datetime.now():%Y%m%d-%H%M%S}")
    arguments = [
        *("--run-id", run_id, "--store", str(folder), "--steps", str(steps), "--every", str(every)),
        *("--seed", str(seed), *(COLLAPSING if collapse else HEALTHY)),
    ]
    console.print(
        f"Training a {'Post-LN' if collapse else 'Pre-LN'} byte-level LLaMA on {ranks} ranks; "
        "the aggregator is starting beside it. Ctrl-C ends early and keeps what there is."
    )
    exposition = _follow(console, Training(arguments, ranks), steps, run_id)
    if exposition:
        console.print("\n[bold]On the endpoint, while it trained[/] (layer 0):")
        for line in exposition.splitlines():
            if 'layer="0"' in line and f'run="{run_id}"' in line:
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        try:
            history = stack.enter_context(open_history(folder))
            _show_layers(console, history, run_id)
            _show_alerts(console, history, run_id)
        except ValueError as error:
            raise click.ClickException(f"nothing was recorded: {error}") from None
        picture = _draw(console, history, run_id, folder)
    _show_next(console, folder, run_id, picture, collapse)


def _follow(console: Console, training: Training, steps: int, run_id: str) -> str:
    """Shows the training's progress to its end; returns the last exposition of its endpoint."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    exposition, scraped_at, said_at = "", 0.0, time.monotonic()
    with training, Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps, state="starting")
        try:
            for said in training.messages():
                if "agent" in said:
                    progress.console.print(said["agent"], soft_wrap=True)
                if "step" in said:
                    if time.monotonic() - scraped_at > 1.0:
                        exposition = _scrape(training.metrics_url) or exposition
                        scraped_at = time.monotonic()
                    state = (
                        f"loss {said['loss']:.3f}  {1000 * said['seconds']:.0f} ms a step  "
                        f"{_records(exposition, run_id)} records"
                    )
                    progress.update(task, completed=said["step"] + 1, state=state)
                    if not console.is_terminal and time.monotonic() - said_at > 5.0:
                        said_at = time.monotonic()
                        console.print(f"step {said['step'] + 1}/{steps}  {state}")
                if "closing" in said:
                    progress.update(task, state="writing the last records")
        except KeyboardInterrupt:
            console.print("Ending: the last records are being written.")
            training.stop(CLOSE_SECONDS)
        except TrainingFailed as error:
            raise click.ClickException(str(error)) from None
    return exposition


def _scrape(url: str | None) -> str:
    if url is None:
        return ""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
        return str(response.read().decode())
    return ""


def _records(exposition: str, run_id: str) -> int:
    name = f'eigenwatch_records_written_total{{run="{run_id}"}} '
    lines = [line for line in exposition.splitlines() if line.startswith(name)]
    return int(float(lines[0].removeprefix(name))) if lines else 0


def _show_layers(console: Console, history: History, run_id: str) -> None:
    from rich.table import Table

    rows = history.query(
        """
        SELECT layer, width, count(*) AS samples, count(*) FILTER (complete) AS complete, max(step) AS step,
               max_by(hard_rank, step) AS hard_rank, max_by(soft_rank, step) AS soft_rank,
               max_by(hard_utilization, step) AS hard_utilization, max_by(soft_utilization, step) AS soft_utilization,
               max_by(spectral_concentration, step) AS concentration, max_by(effective_dimension, step) AS edim
        FROM records WHERE run_id = ? AND site = 'post' GROUP BY layer, width ORDER BY layer
        """,
        [run_id],
    ).to_pylist()
    if not rows:
        raise ValueError(f"the store has no record of run {run_id}")
    table = Table(title=f"{run_id}: each layer at its last sampled step, out of DuckDB")
    for heading in (
        "layer", "D", "samples", "hard rank", "soft rank", "hard util", "soft util", "conc.", "eDim",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        samples = f"{row['complete']}" if row["complete"] == row["samples"] else f"{row['complete']}/{row['samples']}"
        table.add_row(
            str(row["layer"]), str(row["width"]), samples, _shown(row["hard_rank"], 1), _shown(row["soft_rank"], 1),
            _shown(row["hard_utilization"], 4), _shown(row["soft_utilization"], 4), _shown(row["concentration"], 3),
            _shown(row["edim"], 0),
        )  # fmt: skip
    console.print(table)


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _show_alerts(console: Console, history: History, run_id: str) -> None:
    alerts = history.query(
        "SELECT layer, kind, state, reason FROM alerts WHERE run_id = ? ORDER BY layer, written_at", [run_id]
    ).to_pylist()
    console.print(f"Alerts: {len(alerts)}" if alerts else "Alerts: none.")
    for alert in alerts:
        console.print(
            f"  layer {alert['layer']}: {alert['kind']} {alert['state']}: {alert['reason']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _draw(console: Console, history: History, run_id: str, store: Path) -> Path | None:
    from ...history.figures import layer_step_heatmaps

    path = store / f"run_id={run_id}" / "heatmaps.png"
    try:
        layer_step_heatmaps(history, run_id).savefig(path, dpi=150)
    except (ImportError, ValueError) as error:
        console.print(f"No picture: {error}", soft_wrap=True)
        return None
    return path


def _show_next(console: Console, store: Path, run_id: str, picture: Path | None, collapse: bool) -> None:
    shown = os.path.relpath(store)
    console.print(f"\nThe records: {shown}/run_id={run_id}/", soft_wrap=True, highlight=False)
    if picture is not None:
        console.print(f"The paper's heatmaps: {os.path.relpath(picture)}", soft_wrap=True, highlight=False)
    console.print("\nNext:", highlight=False)
    installed = os.path.relpath(Path(sys.executable).with_name("eigenwatch"))
    command = "eigenwatch" if shutil.which("eigenwatch") else installed
    for line in (
        f"{command} query --store {shown} \"SELECT step, layer, hard_rank FROM records WHERE run_id = '{run_id}'\"",
        f'{command} query --store {shown} "SELECT * FROM runs"',
        f"{command} demo" if collapse else f"{command} demo --collapse",
    ):
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
