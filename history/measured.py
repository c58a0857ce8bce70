"""What the pictures are drawn from: the records of one run and site as layer × step arrays, and chosen spectra.

Read once with a query each, on the calling thread; figures, report and verdicts take these values and ask nothing more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .session import History

Floats = NDArray[np.float64]

COLUMNS = (
    "hard_utilization",
    "soft_utilization",
    "spectral_concentration",
    "hard_rank",
    "soft_rank",
    "effective_dimension",
    "variance_10",
    "power_law_alpha",
    "js_divergence",
    "hard_rank_corrected",
    "soft_rank_corrected",
    "tokens_per_width",
)
"""Of `records`; in a mixture of experts the median over the experts."""


class Grid(NamedTuple):
    """The records of one run and site."""

    run_id: str
    site: str
    layers: NDArray[np.int64]  # (L,)
    steps: NDArray[np.int64]  # (S,)
    widths: NDArray[np.int64]  # (L,)
    values: dict[str, Floats]  # column → (L, S), NaN where null
    recorded: NDArray[np.bool_]  # (L, S)
    finite: NDArray[np.bool_]  # (L, S)
    complete: NDArray[np.bool_]  # (L, S)
    experts: bool

    @property
    def missing(self) -> NDArray[np.bool_]:
        return ~self.recorded

    @property
    def not_finite(self) -> NDArray[np.bool_]:
        return self.recorded & ~self.finite

    def lately(self, column: str) -> Floats:
        """(L,) the median over the last quarter of the sampled steps, which one noisy step does not move."""
        return medians(self.values[column][:, -max(1, len(self.steps) // 4) :])


def read_grid(history: History, run_id: str, site: str = "post") -> Grid:
    """The records of a run.

    Raises:
        ValueError: it has none of that site; the message names some runs that have.
    """
    medians = ", ".join(f"median({column}) AS {column}" for column in COLUMNS)
    table = history.query(
        f"SELECT layer, step, max(width) AS width, count(expert) > 0 AS experts, bool_and(finite) AS finite, "
        f"bool_and(complete) AS complete, {medians} FROM records WHERE run_id = ? AND site = ? GROUP BY layer, step",
        [run_id, site],
    )
    if table.num_rows == 0:
        known = history.query("SELECT DISTINCT run_id FROM records ORDER BY run_id LIMIT 10")
        names = ", ".join(known.column("run_id").to_pylist()) or "no records yet"
        raise ValueError(f"no records of run {run_id!r} at site {site!r}; the store has {names}")
    layers, rows = np.unique(table.column("layer").to_numpy(), return_inverse=True)
    steps, columns = np.unique(table.column("step").to_numpy(), return_inverse=True)

    def flags(values: object) -> NDArray[np.bool_]:
        flags_LS = np.zeros((len(layers), len(steps)), dtype=bool)
        flags_LS[rows, columns] = values
        return flags_LS

    values = {}
    for column in COLUMNS:
        values[column] = np.full((len(layers), len(steps)), np.nan)
        values[column][rows, columns] = table.column(column).to_numpy()
    widths = np.zeros(len(layers), dtype=np.int64)
    np.maximum.at(widths, rows, table.column("width").to_numpy())
    return Grid(
        run_id,
        site,
        layers.astype(np.int64),
        steps.astype(np.int64),
        widths,
        values,
        recorded=flags(True),
        finite=flags(table.column("finite").to_numpy(zero_copy_only=False)),
        complete=flags(table.column("complete").to_numpy(zero_copy_only=False)),
        experts=any(table.column("experts").to_pylist()),
    )


def observed_site(history: History, run_id: str) -> str:
    """Post, unless the run observed nothing but pre."""
    return "pre" if has_site(history, run_id, "pre") and not has_site(history, run_id, "post") else "post"


def has_site(history: History, run_id: str, site: str) -> bool:
    """Whether the run has any record of that site."""
    found = history.query("SELECT 1 FROM records_raw WHERE run_id = ? AND site = ? LIMIT 1", [run_id, site])
    return bool(found.num_rows)


class Spectrum(NamedTuple):
    """One spectrum at chosen directions, as shares of the variance."""

    width: int
    direction: NDArray[np.int64]  # (K,) 1 … D, about evenly spaced in the logarithm
    share: Floats  # (K,) p_k = λ_k / Σλ
    cumulative: Floats  # (K,) Σ_{i≤k} p_i
    alpha: float
    """Of the fitted power law p_k = exp(level)·k^−alpha; NaN where there is none."""
    level: float
    expert: int | None
    """In a mixture of experts this is the spectrum of the expert whose hard rank is the median."""


SPECTRUM_POINTS = 48


def spectrum_steps(history: History, run_id: str, site: str = "post") -> NDArray[np.int64]:
    """The sampled steps whose spectra are still in the store."""
    table = history.query(
        "SELECT DISTINCT step FROM eigenvalues WHERE run_id = ? AND site = ? ORDER BY step", [run_id, site]
    )
    return np.asarray(table.column("step").to_numpy(), dtype=np.int64)


def read_spectra(
    history: History,
    run_id: str,
    *,
    layers: Sequence[int],
    steps: Sequence[int],
    site: str = "post",
    points: int = SPECTRUM_POINTS,
) -> dict[tuple[int, int], Spectrum]:
    """(layer, step) → its spectrum, of those that the store has; without variance there is none."""
    table = history.query(
        "WITH ranked AS (SELECT run_id, site, layer, step, expert, row_number() OVER nth AS nth, "
        "count(*) OVER (PARTITION BY layer, step) AS experts FROM records "
        "WHERE run_id = $run AND site = $site AND finite AND list_contains($layers, layer) "
        "AND list_contains($steps, step) WINDOW nth AS (PARTITION BY layer, step ORDER BY hard_rank, expert)) "
        "SELECT layer, step, expert, eigenvalues FROM eigenvalues AS spectrum WHERE run_id = $run AND site = $site "
        "AND EXISTS (FROM ranked WHERE nth = (experts + 1) // 2 AND ranked.layer = spectrum.layer "
        "AND ranked.step = spectrum.step AND ranked.expert IS NOT DISTINCT FROM spectrum.expert)",
        {"run": run_id, "site": site, "layers": [int(one) for one in layers], "steps": [int(one) for one in steps]},
    )
    found = {}
    for batch in table.to_batches():
        keys = zip(*(batch.column(name).to_pylist() for name in ("layer", "step", "expert")), strict=True)
        for key, values in zip(keys, batch.column("eigenvalues"), strict=True):
            spectrum = thinned(values.values.to_numpy(), points, key[2])
            if spectrum is not None:
                found[key[0], key[1]] = spectrum
    return found


def thinned(eigenvalues: NDArray[np.float32], points: int, expert: int | None = None) -> Spectrum | None:
    """A spectrum at about `points` directions, with its power law; None where all variance is zero."""
    from ..spectrum.power_law import NOISE_FLOOR

    values_D = np.maximum(eigenvalues.astype(np.float64), 0.0)
    if not values_D.sum() > 0:
        return None
    share_D = values_D / values_D.sum()
    width = len(share_D)
    index = np.unique(np.round(np.geomspace(1, width, min(points, width))).astype(np.int64))
    used = int((share_D > NOISE_FLOOR * share_D[0]).sum())
    alpha = level = float("nan")
    if used >= 2:
        x, y = np.log(np.arange(1, used + 1)), np.log(share_D[:used])
        slope, level = (float(one) for one in np.polyfit(x, y, 1))
        alpha = -slope
    return Spectrum(width, index, share_D[index - 1], np.cumsum(share_D)[index - 1], alpha, level, expert)


def over_layers(values_LS: Floats) -> Floats:
    """(S,) the median over the layers that have a value, NaN where none has."""
    return medians(values_LS.T)


def medians(rows: Floats) -> Floats:
    """(A,) of (A, B): the median of what each row has, NaN where it has nothing."""
    found = np.full(len(rows), np.nan)
    known = ~np.isnan(rows).all(axis=1)
    found[known] = np.nanmedian(rows[known], axis=1)
    return found


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` positions of `count`, first and last among them."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, most))).astype(np.int64))


def template_cumulative(width: int, alpha: float) -> tuple[Floats, Floats]:
    """(share of the directions, cumulative share of the variance) of an exact power law λ_k = k^−alpha."""
    index = np.unique(np.round(np.geomspace(1, width, min(64, width))).astype(np.int64))
    power_D = np.arange(1, width + 1, dtype=np.float64) ** -alpha
    return index / width, (np.cumsum(power_D) / power_D.sum())[index - 1]


TEMPLATES = (0.8, 1.2, 1.5)
"""Exponents that the paper compares with: dilution, healthy, incipient collapse."""
