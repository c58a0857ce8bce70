"""`eigenwatch export`: the records and alerts of runs, for TensorBoard, Weights & Biases or MLflow."""

import contextlib
import json
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import click

from ..history import open_history
from ..history.export import Export, Exported, Opener, only_export

EPILOG = """
\b
Run it again for what is new since; killed at any moment, it loses nothing and writes nothing twice.
Each attempt of a run is a run of its own there, with a curve eigenwatch/METRIC/layer_NN for each layer.
\b
Needs: pip install 'eigenwatch[tensorboard]', or [wandb], or [mlflow].
\b
Examples:
  eigenwatch export llama-130m --to tensorboard --out tb/ --store runs/
  eigenwatch export llama-130m --to tensorboard --out tb/ --store runs/ --follow
  eigenwatch export llama-130m --to wandb --out wb/ --project widths
  eigenwatch export llama-130m llama-250m --to mlflow --tracking-uri http://127.0.0.1:5000 --project widths
"""
FOLDERS = ("tensorboard", "wandb")
"""Targets that are written below --out."""


@click.command("export", epilog=EPILOG)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--to", "to", required=True, type=click.Choice([*FOLDERS, "mlflow"]), help="What they are exported to.")
@click.option("--store", metavar="STORE", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for tensorboard and wandb.")
@click.option("--project", help="Of wandb, or the experiment of mlflow.  [eigenwatch]")
@click.option("--tracking-uri", metavar="URI", help="Of mlflow.  [$MLFLOW_TRACKING_URI]")
@click.option("--follow", is_flag=True, help="Go on until the runs have ended, or Ctrl-C.")
@click.option(
    "--interval", default=30.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds, with --follow."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def export(
    runs: tuple[str, ...],
    to: str,
    store: str | None,
    out: Path | None,
    project: str | None,
    tracking_uri: str | None,
    follow: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Export the records and alerts of RUN to where people already look."""
    if (out is None) == (to in FOLDERS):
        raise click.UsageError(f"--to {to} needs --out DIR" if to in FOLDERS else f"--to {to} takes no --out")
    if project is not None and to == "tensorboard":
        raise click.UsageError("--to tensorboard takes no --project")
    if tracking_uri is not None and to != "mlflow":
        raise click.UsageError(f"--to {to} takes no --tracking-uri")
    try:
        opener = _opener(to, out, project or "eigenwatch", tracking_uri)
        with contextlib.ExitStack() as stack:
            if out is not None:
                stack.enter_context(only_export(out))
            history = stack.enter_context(open_history(store))
            exports = [Export(history, run, opener) for run in dict.fromkeys(runs)]
            for one in exports:
                stack.enter_context(contextlib.closing(one))
                one.run()
            if follow:
                _follow(exports, interval)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps({"where": opener.where, "runs": [asdict(one.done) for one in exports]}))
        return
    for done in (one.done for one in exports):
        click.echo(f"{done.run_id}: {done.records} records and {done.alerts} alerts exported" + _waiting(done))
    click.echo(f"In {opener.where}")


def _follow(exports: list[Export], interval_seconds: float) -> None:
    """Until the runs have ended. Ctrl-C and SIGTERM end it after the look under way, a second one at once."""
    ended = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(one.done.status == "running" for one in exports) and not ended.wait(interval_seconds):
            for one in exports:
                one.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _waiting(one: Exported) -> str:
    return f"; {one.waiting} records wait for their last ranks: run it again later" if one.waiting else ""


def _opener(to: str, out: Path | None, project: str, tracking_uri: str | None) -> Opener:
    if to == "mlflow":
        from ..history.export_mlflow import MLflow

        return MLflow(tracking_uri, project)
    assert out is not None
    if to == "wandb":
        from ..history.export_wandb import WeightsAndBiases

        return WeightsAndBiases(out, project)
    from ..history.export_tensorboard import TensorBoard

    return TensorBoard(out)
