"""The mathematics: merge law, eigenvalues, the metrics, finite-sample corrections, power-law fits.

Pure torch on values that are handed in: no Ray, no files, no clock. The agent accumulates with `Moments`, the
aggregator goes `merge` → `eigenvalues` → `measure`; everything else is a function of eigenvalues (..., D) in
descending order, named as its column in `records`, batched, differentiable and computed in float64.
"""

from .concentration import spectral_concentration, top1_share, variance_share
from .corrections import (
    Correction,
    hard_rank_corrected,
    hard_rank_from_pairs,
    hard_rank_gaussian,
    soft_rank_corrected,
)
from .divergence import js_divergence
from .eigenvalues import eigenvalues
from .measure import measure
from .merge import Group, Share, merge
from .moments import Moments
from .partial import covariance_of, partial_of, partial_of_nothing, samples_of
from .power_law import PowerLaw, power_law
from .products import Product, product_for
from .ranks import (
    effective_dimension,
    hard_rank,
    hard_utilization,
    soft_rank,
    soft_utilization,
    utilization_index,
)
from .shares import entropy, variance_shares
from .triangle import block_length, block_views, pack, trace_and_frobenius_sq, unpack

__all__ = [
    "Correction",
    "Group",
    "Moments",
    "PowerLaw",
    "Product",
    "Share",
    "block_length",
    "block_views",
    "covariance_of",
    "effective_dimension",
    "eigenvalues",
    "entropy",
    "hard_rank",
    "hard_rank_corrected",
    "hard_rank_from_pairs",
    "hard_rank_gaussian",
    "hard_utilization",
    "js_divergence",
    "measure",
    "merge",
    "pack",
    "partial_of",
    "partial_of_nothing",
    "power_law",
    "product_for",
    "samples_of",
    "soft_rank",
    "soft_rank_corrected",
    "soft_utilization",
    "spectral_concentration",
    "top1_share",
    "trace_and_frobenius_sq",
    "unpack",
    "utilization_index",
    "variance_share",
    "variance_shares",
]
