"""Concentration of a spectrum: how much of the variance sits in its first directions.

The ranks count directions, these say where the variance is; a collapse shows as a concentration near 1. They
read the spectrum in descending order, as `eigenvalues` gives it.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from .shares import variance_shares


def spectral_concentration(eigenvalues: Tensor) -> Tensor:
    """How front-loaded the variance is: (2/D)·Σ_k (Σ_{i≤k} p_i − k/D), twice the area above the diagonal.

    Summed by parts it is Σ_i p_i·(D+1−2i)/D, in which a flat spectrum cancels pair by pair.

    Args:
        eigenvalues: (..., D), non-negative, descending, any scale.

    Returns:
        (...), between 0 for a flat spectrum and (D−1)/D for one direction or no variance at all.

    Source: Jha & Reagen 2025, Table 1.
    """
    share = variance_shares(eigenvalues)
    width = share.shape[-1]
    weight_D = torch.arange(width - 1, -width, -2, dtype=share.dtype, device=share.device) / width
    return (share * weight_D).sum(-1)


def top1_share(eigenvalues: Tensor) -> Tensor:
    """The share of the variance in the first direction.

    Args:
        eigenvalues: (..., D), non-negative, descending, any scale.

    Returns:
        (...), between 1/D and 1; 1 where all variance is zero.
    """
    return variance_shares(eigenvalues)[..., 0]


def variance_share(eigenvalues: Tensor, fraction: float) -> Tensor:
    """The share of the variance in the first ⌈fraction·D⌉ directions.

    The fraction is taken as the decimal that it prints as: in floating point 0.1·30 lies above 3 and would
    count a fourth direction.

    Args:
        eigenvalues: (..., D), non-negative, descending, any scale.
        fraction: of the directions, in (0, 1].

    Returns:
        (...), between fraction and 1.

    Raises:
        ValueError: the fraction lies outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction!r}")
    directions = math.ceil(Fraction(str(fraction)) * eigenvalues.shape[-1])
    return variance_shares(eigenvalues)[..., :directions].sum(-1)
