"""The page that `eigenwatch fit` prints for people: tables of laws, points and steps, and sentences."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..history import Advice, Fit, Law, StepFit

POINTS_SHOWN = 40
STEPS_SHOWN = 25
CANDIDATES_SHOWN = 15
FILE_COLUMNS = 160
TITLES = {
    "hard_rank": "hard rank",
    "soft_rank": "soft rank",
    "effective_dimension": "effective dimension",
    "hard_utilization": "hard utilization",
    "soft_utilization": "soft utilization",
}


def print_fit(found: Fit) -> None:
    if found.laws:
        print_laws(found.laws.values())
    for reason in dict.fromkeys(found.missing.values()):
        metrics = [TITLES[metric] for metric, why in found.missing.items() if why == reason]
        click.echo(f"No law of {', '.join(metrics)}: {reason}.")
    ranks = ("hard_rank", "soft_rank", "effective_dimension")
    shown = _table(
        "width", "run", "layers", *(TITLES[rank] for rank in ranks), "tokens/width", "to step", left=("run",)
    )
    for point in found.points[:POINTS_SHOWN]:
        values = [
            f"{value.median:.1f} [{value.lower:.1f} … {value.upper:.1f}]" if value else "–"
            for value in map(point.values.get, ranks)
        ]
        counts = (f"{point.tokens_per_width:.3g}", str(point.last_step))
        shown.add_row(*map(Text, (str(point.width), point.run_id, str(point.layers), *values, *counts)))
    kind = "corrected ranks, " if found.selection.corrected else ""
    click.echo(f"\nPoints: {kind}medians over layers [quartiles]")
    _print_table(shown)
    if len(found.points) > POINTS_SHOWN:
        click.echo(f"the first {POINTS_SHOWN} of {len(found.points)} points; --json gives all")
    click.echo()
    for sentence in found.reading:
        click.echo(sentence)


def print_laws(laws: Iterable[Law]) -> None:
    shown = _table("value ∝ D^β", "β", "95 %", "R²", "points", "widths", left=("value ∝ D^β",))
    for law in laws:
        r2 = "–" if law.r2 is None else f"{law.r2:.3f}"
        widths = f"{law.widths[0]:g} … {law.widths[-1]:g}"
        cells = (TITLES.get(law.metric, law.metric), f"{law.beta:.3f}", f"± {law.beta_ci95:.3f}", r2)
        shown.add_row(*map(Text, (*cells, str(law.points), widths)))
    _print_table(shown)


def print_steps(steps: list[StepFit]) -> None:
    from ..history.fits import STABLE_R2, stable_from

    if not steps:
        return
    ranks = ("hard_rank", "soft_rank")
    shown = _table("step", *(f"{TITLES[metric]} {value}" for metric in ranks for value in ("β", "R²")))
    every = math.ceil(len(steps) / STEPS_SHOWN)
    for at in steps[(len(steps) - 1) % every :: every]:
        cells = [str(at.step)]
        for metric in ranks:
            law = at.laws.get(metric)
            cells += ["–", "–"] if law is None else [f"{law.beta:.3f} ± {law.beta_ci95:.3f}", f"{law.r2 or 0:.3f}"]
        shown.add_row(*map(Text, cells))
    click.echo("\nOver training")
    _print_table(shown)
    if every > 1:
        click.echo(f"every {every}. of {len(steps)} common steps; --json gives all")
    for metric in ranks:
        since = stable_from(steps, metric)
        said = (
            f"stays above {STABLE_R2} from step {since} on"
            if since is not None
            else f"is not above {STABLE_R2} at the end"
        )
        click.echo(f"R² of the {TITLES[metric]} {said}.")


def print_advice(said: Advice) -> None:
    _print_list("Width", [said.knee.text if said.knee else f"No knee: {said.knee_missing}."])
    if said.knee is not None:
        shown = _table("width", "directions for one more unit", "95 %")
        for gain in said.knee.gains:
            shown.add_row(f"{gain.width:g}", f"{gain.value:.3g}", f"{gain.low:.2g} … {gain.high:.2g}")
        _print_table(shown)
    for title, candidates in (
        ("Layers to prune: persistently little of their width", said.prune),
        ("Layers that can use more width: persistently much of it, and rising", said.widen),
    ):
        more = len(candidates) - CANDIDATES_SHOWN
        texts = [candidate.text for candidate in candidates[:CANDIDATES_SHOWN]]
        _print_list(title, [*texts, *([f"and {more} more; --json gives all"] if more > 0 else [])] or ["none"])


def print_limits(found: Fit) -> None:
    _print_list("What these data cannot tell", found.limits)


def _print_list(title: str, sentences: Iterable[str]) -> None:
    click.echo(f"\n{title}")
    for sentence in sentences:
        click.echo(f"  - {sentence}")


def _table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="left" if column in left else "right")
    return table


def _print_table(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else FILE_COLUMNS).print(table)
