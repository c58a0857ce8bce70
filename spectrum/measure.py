"""Every metric of a record, from its merged group and its eigenvalues: the columns of `records`, by name."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ..schemas import METRIC_NAMES
from .concentration import spectral_concentration, top1_share, variance_share
from .corrections import Merged, hard_rank_corrected, soft_rank_corrected
from .power_law import power_law
from .ranks import (
    effective_dimension,
    hard_rank,
    hard_utilization,
    soft_rank,
    soft_utilization,
    utilization_index,
)
from .slq import Estimate

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


def measure(group: Merged, eigenvalues: Tensor | None) -> dict[str, float | str | None]:
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
    if eigenvalues is None:
        return dict.fromkeys((*METRIC_NAMES, "hard_rank_correction"))
    return measure_together([group], eigenvalues[None])[0]


def measure_together(groups: Sequence[Merged], eigenvalues_KD: Tensor) -> list[dict[str, float | str | None]]:
    """`measure` of K records of one width at once: small layers cost more calls than arithmetic.

    Args:
        groups: the merged partials of each record.
        eigenvalues_KD: (K, D) of the groups' covariances, each descending.
    """
    fit = power_law(eigenvalues_KD)
    of_all = {name: metric(eigenvalues_KD).tolist() for name, metric in _OF_EIGENVALUES.items()}
    of_all |= {"power_law_alpha": fit.alpha.tolist(), "power_law_r2": fit.r2.tolist()}
    return [
        dict.fromkeys(METRIC_NAMES)
        | {name: _finite(values[index]) for name, values in of_all.items()}
        | _corrections(group, eigenvalues_KD[index])
        | {"total_variance": _finite(group.total_variance)}
        for index, group in enumerate(groups)
    ]


def measure_estimate(group: Merged, estimate: Estimate) -> dict[str, float | str | None]:
    """`measure` of a spectrum that was estimated.

    The ranks, and what is made of them, are the estimate's own, which know more than its eigenvalues do; the hard rank,
    its correction and the total variance are exact. A correction of the soft rank would be one of an estimate: None.
    """
    values = measure(group, estimate.eigenvalues)
    least = max(group.width - 1, 1)
    hard, soft = (estimate.hard_rank - 1) / least, (estimate.soft_rank - 1) / least
    index = 2 * hard * soft / (hard + soft) if hard + soft else 0.0
    return values | {
        "hard_rank": estimate.hard_rank,
        "soft_rank": estimate.soft_rank,
        "hard_utilization": hard,
        "soft_utilization": soft,
        "utilization_index": index,
        "effective_dimension": 1 + (group.width - 1) * index,
        "soft_rank_corrected": None,
    }


def _corrections(group: Merged, eigenvalues: Tensor) -> dict[str, float | str | None]:
    hard = hard_rank_corrected(group)
    return {
        "hard_rank_corrected": hard.value,
        "hard_rank_correction": hard.method,
        "soft_rank_corrected": soft_rank_corrected(eigenvalues, group.tokens),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
