"""Every metric of a record, from its merged group and its eigenvalues: the columns of `records`, by name."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..schemas import METRIC_NAMES
from .concentration import spectral_concentration, top1_share, variance_share
from .corrections import hard_rank_corrected, soft_rank_corrected
from .merge import Group
from .power_law import power_law
from .ranks import (
    effective_dimension,
    hard_rank,
    hard_utilization,
    soft_rank,
    soft_utilization,
    utilization_index,
)

_OF_EIGENVALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "hard_rank": hard_rank,
    "soft_rank": soft_rank,
    "hard_utilization": hard_utilization,
    "soft_utilization": soft_utilization,
    "spectral_concentration": spectral_concentration,
    "utilization_index": utilization_index,
    "effective_dimension": effective_dimension,
    "top1_share": top1_share,
    "variance_10": partial(variance_share, fraction=0.1),
    "variance_25": partial(variance_share, fraction=0.25),
    "variance_50": partial(variance_share, fraction=0.5),
}


def measure(group: Group, eigenvalues: Tensor | None) -> dict[str, float | str | None]:
    """The metrics of one record, one for each name in `schemas.METRIC_NAMES`, and which correction was used.

    Args:
        group: the merged partials.
        eigenvalues: (D,) of the group's covariance, descending; None where there are none: the group is not finite, or
            has no tokens.

    Returns:
        the values by column name, `hard_rank_correction` ("pairs", "gaussian" or None) among them. None
        stands for what does not exist: every metric of a group without eigenvalues, the power law of a single
        direction, a correction that the sample does not determine, and always `js_divergence`, which needs
        two records.
    """
    values: dict[str, float | str | None] = dict.fromkeys((*METRIC_NAMES, "hard_rank_correction"))
    if eigenvalues is None:
        return values
    for name, metric in _OF_EIGENVALUES.items():
        values[name] = _finite(metric(eigenvalues))
    fit = power_law(eigenvalues)
    values["power_law_alpha"], values["power_law_r2"] = _finite(fit.alpha), _finite(fit.r2)
    values["hard_rank_corrected"], values["hard_rank_correction"] = hard_rank_corrected(group)
    values["soft_rank_corrected"] = soft_rank_corrected(eigenvalues, group.tokens)
    values["total_variance"] = _finite(group.total_variance)
    return values


def _finite(value: Tensor | float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
