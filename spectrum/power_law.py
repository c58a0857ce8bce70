"""The power law of a spectrum: how fast the eigenvalues fall with their index.

A healthy LLaMA sits at α ≈ 1.1–1.3; α ≥ 1.5 is the road to a collapse, α ≈ 0.8 to dilution (Jha & Reagen
2025).
"""

from typing import NamedTuple

import torch
from torch import Tensor

NOISE_FLOOR = 1e-6
"""Eigenvalues at or below this part of the first are left out: the scatter is float32 on the wire, so what
lies there is rounding noise, and in ln λ noise near zero outweighs everything else."""

FLAT_SPREAD = 1e-12
"""Standard deviation of ln λ up to which a spectrum is flat, the rounding of float64 and no structure."""


class PowerLaw(NamedTuple):
    """λ_k ∝ k^−α: the exponent and the share of ln λ's variance that the line explains."""

    alpha: Tensor
    r2: Tensor


def power_law(eigenvalues: Tensor) -> PowerLaw:
    """Ordinary least squares of ln λ_k on ln k over the eigenvalues above the noise, λ_k > 1e−6·λ_1.

    Args:
        eigenvalues: (..., D), non-negative, descending, any scale.

    Returns:
        alpha and r2, both (...) in float64. A flat spectrum is the power law of exponent 0, with R² 1; fewer
        than two eigenvalues above the noise (D = 1, one direction, no variance) have none, so both are NaN.

    Source: Jha & Reagen 2025.
    """
    eigenvalues = eigenvalues.to(torch.float64)
    largest = eigenvalues.detach()[..., :1]
    used = eigenvalues > NOISE_FLOOR * largest
    count = used.sum(-1, keepdim=True)

    index_D = torch.arange(1, eigenvalues.shape[-1] + 1, dtype=torch.float64, device=eigenvalues.device)
    # ln 1 = 0 stands in for what is left out, before the logarithm, so that no gradient meets ln 0.
    y = (torch.where(used, eigenvalues, 1.0) / torch.where(used, largest, 1.0)).log()
    x = torch.where(used, index_D.log(), 0.0)
    x = torch.where(used, x - x.sum(-1, keepdim=True) / count, 0.0)
    y = torch.where(used, y - y.sum(-1, keepdim=True) / count, 0.0)
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)

    count = count[..., 0]
    fitted, flat = count >= 2, yy <= count * FLAT_SPREAD**2
    alpha = torch.where(flat, 0.0, -xy / torch.where(fitted, xx, 1.0))
    r2 = torch.where(flat, 1.0, xy * xy / torch.where(fitted & ~flat, xx * yy, 1.0))
    return PowerLaw(torch.where(fitted, alpha, torch.nan), torch.where(fitted, r2, torch.nan))
