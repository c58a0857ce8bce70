"""A store with runs worth a report: power-law spectra and the metrics that follow from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from eigenwatch import spectrum as measures

from tests.history.stored import alert, record, run, spectrum, write

HOSTILE = '</script><img src=x onerror="window.pwned = 1"><!-- \' & \u2028'
LAYERS, STEPS = 4, (0, 10, 20, 30, 40, 50)


def power_law(width: int, alpha: float) -> list[float]:
    return (np.arange(1, width + 1) ** -alpha).tolist()


def measured(eigenvalues: list[float]) -> dict[str, Any]:
    """The metrics of a spectrum, as a record has them."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    names = ("hard_rank", "soft_rank", "hard_utilization", "soft_utilization", "spectral_concentration")
    found = {name: float(getattr(measures, name)(values)) for name in (*names, "effective_dimension")}
    return found | {
        "variance_10": float(measures.variance_share(values, 0.1)),
        "power_law_alpha": float(measures.power_law(values).alpha),
        "hard_rank_corrected": 1.1 * found["hard_rank"],
        "soft_rank_corrected": 1.05 * found["soft_rank"],
        "width": len(eigenvalues),
    }


def healthy(layer: int, step: int) -> float:
    """α of a layer at a step."""
    return 1.1 - 0.1 * layer + 0.002 * step


def collapsing(layer: int, step: int) -> float:
    """Layer 0 funnels its variance into one direction from step 20 on."""
    return 9.0 if layer == 0 and step >= 20 else healthy(layer, step)


def train(
    store: Path,
    run_id: str,
    alpha: Any = healthy,
    *,
    width: int = 64,
    pre: bool = False,
    tags: dict[str, str] | None = None,
) -> None:
    """A run of four layers and six sampled steps whose spectra are power laws of `alpha(layer, step)`."""
    records, spectra = [], []
    for step in STEPS:
        for layer in range(LAYERS):
            sites = {"post": alpha(layer, step)} | ({"pre": 0.6} if pre else {})
            for site, exponent in sites.items():
                values = power_law(width, exponent)
                divergence = {"js_divergence": 0.02 * (1 + layer)} if pre and site == "post" else {}
                records.append(record(step, layer, site=site, **measured(values), **divergence))
                spectra.append(spectrum(step, layer, site=site, eigenvalues=values))
    write(store, run_id, "runs", run(written=0, status="finished", tags=tags or {}))
    write(store, run_id, "eigenvalues", *spectra)
    write(store, run_id, "records", *records)


def alarm(store: Path, run_id: str, reason: str, **columns: Any) -> None:
    write(store, run_id, "alerts", alert(f"{run_id}-a", 40, written=50, since_step=20, reason=reason, **columns))
