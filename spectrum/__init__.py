"""The mathematics: merge law, eigenvalues, the metrics, finite-sample corrections, power-law fits.

Pure torch on values that are handed in: no Ray, no files, no clock. The agent accumulates with `Moments`, the
aggregator goes `merge` → `eigenvalues` → `measure`; everything else is a function of eigenvalues (..., D) in
descending order, named as its column in `records`, batched, differentiable and computed in float64.
"""

from .concentration import spectral_concentration, top1_share, variance_share
from .corrections import (
    Correction,
    Merged,
    hard_rank_corrected,
    hard_rank_from_pairs,
    hard_rank_gaussian,
    soft_rank_corrected,
)
from .divergence import js_divergence
from .eigenvalues import eigenvalues, eigenvalues_of_lower
from .gram import Gram, ShareMoments
from .measure import measure, measure_estimate, measure_together
from .merge import Group, Share, merge
from .moments import Moments
from .partial import covariance_of, partial_of, partial_of_nothing, rows_of, samples_of
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
from .slq import Estimate, estimate
from .triangle import block_length, block_views, lower_of, pack, trace_and_frobenius_sq, unpack

__all__ = [
    "Correction",
    "Estimate",
    "Gram",
    "Group",
    "Merged",
    "Moments",
    "PowerLaw",
    "Product",
    "Share",
    "ShareMoments",
    "block_length",
    "block_views",
    "covariance_of",
    "effective_dimension",
    "eigenvalues",
    "eigenvalues_of_lower",
    "entropy",
    "estimate",
    "hard_rank",
    "hard_rank_corrected",
    "hard_rank_from_pairs",
    "hard_rank_gaussian",
    "hard_utilization",
    "js_divergence",
    "lower_of",
    "measure",
    "measure_estimate",
    "measure_together",
    "merge",
    "pack",
    "partial_of",
    "partial_of_nothing",
    "power_law",
    "product_for",
    "rows_of",
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
