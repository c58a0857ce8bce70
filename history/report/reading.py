"""All that a report says of one run, read once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..measured import (
    SPECTRUM_POINTS,
    Grid,
    Spectrum,
    evenly,
    has_site,
    observed_site,
    read_grid,
    read_spectra,
    spectrum_steps,
)
from ..points import Point, points_of
from ..session import History
from ..width_use import LayerVerdict, layer_verdicts

SPECTRA_MOST = 1_200
"""In one report, each of at most 48 points, shared evenly by its runs. What is beyond it is thinned out by steps, then
by layers."""
ALERTS_MOST = 200


class Reading(NamedTuple):
    """One run, as a report needs it."""

    grid: Grid
    pre: Grid | None
    """Of the pre-activation, where it was observed."""
    uses: list[LayerVerdict]
    spectra: dict[tuple[int, int], Spectrum]
    """(layer, step) → spectrum."""
    pre_spectra: dict[tuple[int, int], Spectrum]
    attempt: dict[str, Any]
    """The newest attempt's row of `runs`; empty where nothing is known of it."""
    attempts: int
    dropped: dict[str, int]
    """Partials lost or refused in all attempts, by reason."""
    alerts: list[dict[str, Any]]
    """Firing ones first, then by step; at most ALERTS_MOST."""
    alerts_total: int
    points: list[Point]
    """Its ranks at its widths, as a fit takes them."""


def read_run(history: History, run_id: str, *, runs: int = 1) -> Reading:
    """One run of a report on `runs` runs.

    Raises:
        ValueError: the run has no records.
    """
    site = observed_site(history, run_id)
    grid = read_grid(history, run_id, site)
    pre = read_grid(history, run_id, "pre") if site == "post" and has_site(history, run_id, "pre") else None
    layers, steps = _with_spectra(history, grid, SPECTRA_MOST // (runs * (2 if pre is not None else 1)))
    attempts = history.query(
        "SELECT * EXCLUDE (counters, losses, ranks_ended) FROM runs WHERE run_id = ? ORDER BY attempt", [run_id]
    ).to_pylist()
    dropped: dict[str, int] = {}
    for attempt in attempts:
        for reason, count in attempt["dropped"] or []:
            dropped[reason] = dropped.get(reason, 0) + count
    alerts = history.query(
        "SELECT * REPLACE (CASE WHEN state = 'firing' AND attempt < ? THEN 'ended' ELSE state END AS state) "
        "FROM alerts WHERE run_id = ? ORDER BY state = 'firing' DESC, since_step, layer, kind",
        [attempts[-1]["attempt"] if attempts else 0, run_id],
    ).to_pylist()
    return Reading(
        grid=grid,
        pre=pre,
        uses=layer_verdicts(grid),
        spectra=read_spectra(history, run_id, layers=layers, steps=steps, site=site, points=SPECTRUM_POINTS),
        pre_spectra={} if pre is None else read_spectra(history, run_id, layers=layers, steps=steps, site="pre"),
        attempt=attempts[-1] if attempts else {},
        attempts=len(attempts),
        dropped=dropped,
        alerts=alerts[:ALERTS_MOST],
        alerts_total=len(alerts),
        points=points_of(history, [run_id], site),
    )


def _with_spectra(history: History, grid: Grid, most: int) -> tuple[Sequence[int], Sequence[int]]:
    """Layers and steps whose spectra are shown: all layers where the room allows four steps of each."""
    stored = spectrum_steps(history, grid.run_id, grid.site)
    layers = grid.layers[evenly(len(grid.layers), max(1, most // 4))]
    steps = stored[evenly(len(stored), max(2, most // len(layers)))] if len(stored) else stored
    return layers.tolist(), steps.tolist()
