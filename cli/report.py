"""`eigenwatch report`: one HTML file with the pictures of some runs, and the same pictures for a paper."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..schemas import check_run_id

if TYPE_CHECKING:
    from ..history import History
    from ..history.report import Reading

NEWEST = "SELECT run_id FROM records_raw GROUP BY run_id ORDER BY max(written_at) DESC LIMIT 1"
RUNS_MOST = 16


@click.command(epilog="Example: eigenwatch report llama-130m llama-130m-wide -o compare.html --figures figures/")
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--store", metavar="STORE", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="The report.  [RUN.html]")
@click.option("--figures", metavar="DIR", type=click.Path(file_okay=False), help="Each figure too, as PNG and SVG.")
@click.option("--open", "show", is_flag=True, help="Show it in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print what it says of each layer as JSON.")
def report(
    runs: tuple[str, ...], store: str | None, output: str | None, figures: str | None, show: bool, as_json: bool
) -> None:
    """Write one HTML file on these runs, or on the newest: which layers waste their width, and since when.

    The file needs no network and no other file. Two or more runs are compared too.
    """
    from ..history import open_history
    from ..history.report import read_run, report_html

    names = list(dict.fromkeys(runs))
    if len(names) > RUNS_MOST:
        raise click.UsageError(f"a report shows at most {RUNS_MOST} runs, got {len(names)}: name fewer")
    try:
        for name in names:
            check_run_id(name)
        with open_history(store) as history:
            names = names or _newest(history)
            readings = [read_run(history, name, runs=len(names)) for name in names]
            path = Path(output or f"{names[0]}{f'-and-{len(names) - 1}-more' if len(names) > 1 else ''}.html")
            _write(path, report_html(readings))
            written = [] if figures is None else _write_figures(history, readings, Path(figures))
    except (ValueError, ImportError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(_findings(readings, path, written), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _say(readings, path, written)
    if show:
        click.launch(path.absolute().as_uri())


def _newest(history: History) -> list[str]:
    found: list[str] = history.query(NEWEST).column("run_id").to_pylist()
    if not found:
        raise ValueError("the store has no records yet: train a while, or run `eigenwatch demo`")
    return found


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _write_figures(history: History, readings: list[Reading], folder: Path) -> list[Path]:
    from ..history.figures.files import write_figures

    try:
        return write_figures(
            history,
            [reading.grid.run_id for reading in readings],
            folder,
        )
    except OSError as error:
        raise ValueError(f"cannot write figures to {folder}: {error.strerror}") from None


def _say(readings: list[Reading], path: Path, written: list[Path]) -> None:
    from ..history.width_use import answer

    for reading in readings:
        click.echo(f"{reading.grid.run_id}: {answer(reading.uses)}")
    click.echo(f"Report: {path}")
    if written:
        click.echo(f"Figures: {len(written)} files in {written[0].parent}")


def _findings(readings: list[Reading], path: Path, written: list[Path]) -> dict[str, object]:
    from ..history.width_use import answer

    def plain(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "report": str(path),
        "figures": [str(one) for one in written],
        "runs": [
            {
                "run_id": reading.grid.run_id,
                "answer": answer(reading.uses),
                "layers": [{name: plain(value) for name, value in use._asdict().items()} for use in reading.uses],
                "alerts": reading.alerts_total,
            }
            for reading in readings
        ],
    }
