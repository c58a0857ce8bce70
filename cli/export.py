"""`eigenwatch export`: the records and alerts of runs, for TensorBoard, Weights & Biases or MLflow."""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from ..history import History, open_history
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
    done = [Exported(run, "unknown") for run in dict.fromkeys(runs)]
    try:
        opener = _opener(to, out, project or "eigenwatch", tracking_uri)
        with contextlib.ExitStack() as stack:
            if out is not None:
                stack.enter_context(only_export(out))
            history = stack.enter_context(open_history(store))
            _export(history, opener, done, interval if follow else None)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        if not follow:
            raise
    if as_json:
        click.echo(json.dumps({"where": opener.where, "runs": [asdict(one) for one in done]}))
        return
    for one in done:
        click.echo(f"{one.run_id}: {one.records} records and {one.alerts} alerts exported" + _waiting(one))
    click.echo(f"In {opener.where}")


def _export(history: History, opener: Opener, done: list[Exported], interval_seconds: float | None) -> None:
    """Adds to `done` what was exported; once, or at each interval until the runs have ended."""
    with contextlib.ExitStack() as stack:
        exports = [stack.enter_context(contextlib.closing(Export(history, one.run_id, opener))) for one in done]
        while True:
            _look(exports, done)
            if interval_seconds is None or all(one.status != "running" for one in done):
                return
            time.sleep(interval_seconds)


def _look(exports: list[Export], done: list[Exported]) -> None:
    for one, total in zip(exports, done, strict=True):
        new = one.run()
        total.status, total.waiting = new.status, new.waiting
        total.records += new.records
        total.alerts += new.alerts


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
