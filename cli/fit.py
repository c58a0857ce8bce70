"""`eigenwatch fit`: the scaling laws of runs, for people and as JSON, and what they advise."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .fit_page import print_advice, print_fit, print_laws, print_limits, print_steps

if TYPE_CHECKING:
    from ..history import Advice, Fit

EPILOG = """
\b
Examples:
  eigenwatch fit 'llama-*' --store runs/
  eigenwatch fit --by norm --advice
  eigenwatch fit --by-step --json
  eigenwatch fit --csv ranks.csv

A law is rank = e^c · D^β over runs of at least three widths D. docs/laws.md says how it is fitted.
"""


class Steps(click.ParamType):  # type: ignore[type-arg]
    """FROM:TO, both included."""

    name = "steps"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", str(value))
        if found is None or int(found[1]) > int(found[2]):
            self.fail(f"{value!r} is no window of steps: write FROM:TO, such as 4000:5000", param, ctx)
        return int(found[1]), int(found[2])


@click.command(epilog=EPILOG)
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@click.option("--store", metavar="STORE", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--steps", type=Steps(), metavar="FROM:TO", help="Use these steps.  [the last tenth of the samples]")
@click.option(
    "--last",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="PERCENT",
    help="Use the last PERCENT of the samples.",
)
@click.option("--site", type=click.Choice(["post", "pre"]), default="post", show_default=True)
@click.option("--corrected", is_flag=True, help="Use the ranks without their finite-sample bias.")
@click.option("--by", metavar="NAME", help="A fit for each value of a tag, or of a column of runs.")
@click.option("--by-step", is_flag=True, help="β and R² at each step that all runs have sampled.")
@click.option("--advice", is_flag=True, help="Where width stops paying, which layers need less or more of it.")
@click.option(
    "--gain", type=click.FloatRange(0, min_open=True), metavar="G",
    help="With --advice: too little, in directions for one more unit of width.  [half the narrowest width's gain]",
)  # fmt: skip
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False), help="Fit a CSV of (width, rank); - is standard input."
)
@click.option("--column", metavar="NAME", help="With --csv: the column that is the rank.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(
    runs: tuple[str, ...],
    store: str | None,
    steps: tuple[int, int] | None,
    last: float | None,
    site: str,
    corrected: bool,
    by: str | None,
    by_step: bool,
    advice: bool,
    gain: float | None,
    csv_file: str | None,
    column: str | None,
    as_json: bool,
) -> None:
    """Fit rank against width over RUNs (ids, or patterns such as 'llama-*'; all runs where none is named)."""
    if csv_file is not None and (runs or store or steps or last or corrected or by or by_step or advice):
        raise click.UsageError("--csv stands by itself: it takes --column and --json only")
    if column is not None and csv_file is None:
        raise click.UsageError("--column goes with --csv")
    if gain is not None and not advice:
        raise click.UsageError("--gain goes with --advice")
    if steps is not None and last is not None:
        raise click.UsageError("choose one of --steps and --last")
    try:
        if csv_file is not None:
            _fit_csv(csv_file, column, as_json)
            return
        from dataclasses import replace

        from ..history import Selection, advise, fit, fit_by_step, open_history

        selection = Selection(runs=runs, site=site, steps=steps, last=(last or 10) / 100, corrected=corrected)
        with open_history(store) as history:
            fits = fit(history, selection, by=by)
            if not advice and not any(found.laws for found in fits):
                raise ValueError(_why_none(fits))
            over_training = []
            for found in fits if by_step else ():
                mine = replace(selection, runs=tuple(sorted({layer.run_id for layer in found.layers})))
                over_training.append(fit_by_step(history, mine) if found.laws else [])
        advices = [advise(found, gain=gain) for found in fits] if advice else []
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        objects = [_fit_json(found) for found in fits]
        for this, stepped in zip(objects, over_training, strict=False):
            this["steps"] = [_plain(at) for at in stepped]
        for this, said in zip(objects, advices, strict=False):
            this["advice"] = _advice_json(said)
        click.echo(json.dumps(objects if by else objects[0], ensure_ascii=False, allow_nan=False, indent=1))
        return
    for number, found in enumerate(fits):
        if by is not None:
            click.echo(("\n" if number else "") + f"── {by}: {found.value or 'not set'} ──")
        print_fit(found)
        if over_training:
            print_steps(over_training[number])
        if advices:
            print_advice(advices[number])
        print_limits(found)


def _fit_csv(path: str, column: str | None, as_json: bool) -> None:
    from ..history.csv_points import read_csv_points
    from ..history.laws import growth, width_law

    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"cannot read {path}: it is no UTF-8 text; save it as CSV in UTF-8") from None
    points = read_csv_points(text.splitlines(), column=column, name=path)
    law = width_law(points.widths, points.values, metric=points.metric)
    if as_json:
        click.echo(json.dumps(_plain(law), ensure_ascii=False, allow_nan=False))
        return
    print_laws([law])
    click.echo(f"{law.metric}: × {2**law.beta:.2f} where the width doubles; it {growth(law)}.")


def _why_none(fits: list[Fit]) -> str:
    from ..history.laws import LEAST_WIDTHS, too_few_widths

    widths = [sorted({point.width for point in found.points}) for found in fits]
    most = max(widths, key=len)
    if len(most) < LEAST_WIDTHS:
        where = f" for one {fits[0].by}" if fits[0].by else ""
        return f"{too_few_widths(most)}{where}; --advice says what these runs tell of their layers"
    return next(iter(fits[widths.index(most)].missing.values()))


def _fit_json(found: Fit) -> dict[str, Any]:
    shown = ("by", "value", "laws", "missing", "points", "reading", "limits")
    return {"corrected": found.selection.corrected} | {name: _plain(getattr(found, name)) for name in shown}


def _advice_json(said: Advice) -> dict[str, Any]:
    knee = {"text": said.knee.text} | _plain(said.knee) if said.knee else None
    return {"knee": knee} | {name: _plain(getattr(said, name)) for name in ("knee_missing", "prune", "widen")}


def _plain(value: Any) -> Any:
    """What JSON can say: named tuples as objects, infinities as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
