"""The page: what the report says in words and tables, around the charts.

Jinja2 escapes whatever comes from the store. The policy in the page's head lets only the two scripts run whose hashes
it names, so that nothing else could run even if something slipped through, and nothing can be loaded from anywhere.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...schemas.thresholds import COLLAPSE
from ..figures.quality import quality_words
from ..measured import evenly
from ..width_use import BEHIND_RATIO, FRONT_LOADED_SHARE, IN_USE, WASTEFUL, answer
from .payload import as_json, payload
from .reading import Reading

LIBRARY = "plotly-cartesian-4.1.1.min.js"
"""Plotly's own bundle for cartesian charts, MIT; its licence lies beside it and is in its first lines."""
SPARK_POINTS = 60


class Fact(NamedTuple):
    name: str
    value: str


def report_html(readings: Sequence[Reading], *, made_at: datetime | None = None) -> str:
    """The whole report.

    Args:
        readings: one a run, in the order in which they are shown.
        made_at: the time that the page names; now, where not given.

    Returns:
        HTML that needs no other file and no network.
    """
    assert readings
    library, script = _static(LIBRARY), _static("report.js")
    # A script may only run if the policy names its hash; data is no script.
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(library)} {_hash(script)}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = short
    return environment.from_string(_static("report.html")).render(
        title=_title(readings),
        policy=policy,
        # Our own files, as they are:
        css=Markup(_static("report.css")),
        library=Markup(library),
        script=Markup(script),
        data=Markup(as_json(payload(readings))),  # escaped for a script element
        runs=[_run(reading) for reading in readings],
        compared=_compared(readings),
        several_widths=len({reading.grid.site for reading in readings}) == 1
        and len({int(width) for reading in readings for width in reading.grid.widths}) > 1,
        has_pre=any(reading.pre is not None for reading in readings),
        made_at=f"{made_at or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=_version(),
        thresholds={"collapse": COLLAPSE, "front": 100 * FRONT_LOADED_SHARE, "behind": BEHIND_RATIO},
    )


def short(value: float | None) -> str:
    """Three digits, as a person writes them; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _run(reading: Reading) -> dict[str, Any]:
    order = {state: place for place, state in enumerate((*WASTEFUL, IN_USE))}
    sparks = _sparks(reading)
    return {
        "id": reading.grid.run_id,
        "answer": answer(reading.uses),
        "facts": _facts(reading),
        "tags": dict(reading.attempt.get("tags") or []),
        "layers": [
            {"use": use, "spark": sparks[use.layer], "mark": use.state.replace(" ", "-")}
            for use in sorted(reading.uses, key=lambda use: (order[use.state], use.layer))
        ],
        "alerts": reading.alerts,
        "alerts_total": reading.alerts_total,
        "quality": quality_words(reading.grid),
        "dropped": reading.dropped,
    }


def _facts(reading: Reading) -> list[Fact]:
    grid, attempt = reading.grid, reading.attempt
    widths = sorted(set(grid.widths.tolist()))
    facts = [
        Fact("layers", f"{len(grid.layers)}" + (", experts by their median" if grid.experts else "")),
        Fact("width", " and ".join(map(str, widths)) if len(widths) < 4 else f"{widths[0]} to {widths[-1]}"),
        Fact("steps", f"{grid.steps[0]} to {grid.steps[-1]}, {len(grid.steps)} sampled"),
    ]
    if grid.site != "post":
        facts.append(Fact("site", grid.site))
    if attempt:
        facts += [
            Fact("state", attempt["status"]),
            Fact("ranks", str(attempt["world_size"])),
            Fact("started", f"{attempt['started_at']:%Y-%m-%d %H:%M} UTC"),
        ]
    if reading.attempts > 1:
        facts.append(Fact("attempts", str(reading.attempts)))
    return facts


def _sparks(reading: Reading) -> dict[int, str]:
    """layer → points of a line 100 wide and 20 high: its effective dimension from 0 to the run's greatest."""
    values_LS = reading.grid.values["effective_dimension"]
    kept = evenly(len(reading.grid.steps), SPARK_POINTS)
    greatest = np.nanmax(values_LS) if not np.isnan(values_LS).all() else 1.0
    steps = reading.grid.steps[kept]
    span = max(1, int(steps[-1] - steps[0]))
    sparks = {}
    for layer, values in zip(reading.grid.layers.tolist(), values_LS[:, kept], strict=True):
        points = zip(steps, values, strict=True)
        sparks[layer] = " ".join(
            f"{100 * (step - steps[0]) / span:.1f},{19 - 18 * value / greatest:.1f}"
            for step, value in points
            if not math.isnan(value)
        )
    return sparks


def _compared(readings: Sequence[Reading]) -> str:
    """Two or more runs in one sentence, at the last step that all have sampled."""
    if len(readings) < 2:
        return ""
    common = set.intersection(*(set(reading.grid.steps.tolist()) for reading in readings))
    if not common:
        return "These runs have no sampled step in common; compare them by the shape of their lines."
    step = max(common)
    medians = []
    for reading in readings:
        values = reading.grid.values["effective_dimension"][:, reading.grid.steps == step]
        medians.append(float(np.nanmedian(values)) if not np.isnan(values).all() else math.nan)
    parts = [f"{reading.grid.run_id} {short(value)}" for reading, value in zip(readings, medians, strict=True)]
    return f"At step {step} the median layer has this effective dimension: {', '.join(parts)}."


def _title(readings: Sequence[Reading]) -> str:
    names = [reading.grid.run_id for reading in readings]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _static(name: str) -> str:
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _version() -> str:
    try:
        return version("eigenwatch")
    except PackageNotFoundError:
        return "from source"
