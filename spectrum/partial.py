"""From what was seen to the partial that is merged: the one place that decides what is finite.

The agent's outbox calls `partial_of` with what a rank accumulated, the aggregator `covariance_of` with rows that came
as they are; both on threads of their own, never in the training step.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..schemas import Origin, PartialCovariance, PartialSamples
from .moments import Moments
from .triangle import trace_and_frobenius_sq


def partial_of(moments: Moments, origin: Origin) -> PartialCovariance:
    """The partial of these moments, on the CPU.

    Args:
        moments: of one share, on any device; whole, or a block of rows.
        origin: what the partial is about and whose it is.
    """
    scatter, mean = moments.scatter.cpu(), moments.mean.cpu().numpy()
    trace, frobenius_sq = trace_and_frobenius_sq(scatter, moments.width, moments.rows)
    # The mean too: a bad feature above a block's rows does not show in the block.
    finite = math.isfinite(trace) and math.isfinite(frobenius_sq) and bool(np.isfinite(mean).all())
    return PartialCovariance(
        **origin.fields(),
        rows=moments.rows,
        tokens=moments.tokens,
        mean=mean,
        scatter=scatter.numpy() if finite and moments.tokens else np.empty(0, dtype=np.float32),
        trace=trace if finite else math.nan,
        frobenius_sq=frobenius_sq if finite else math.nan,
    )


def partial_of_nothing(width: int, rows: tuple[int, int], origin: Origin) -> PartialCovariance:
    """The partial of a rank that trained and saw no token here."""
    return PartialCovariance(
        **origin.fields(),
        rows=rows,
        tokens=0,
        mean=np.zeros(width),
        scatter=np.empty(0, dtype=np.float32),
        trace=0.0,
        frobenius_sq=0.0,
    )


def samples_of(x_ND: Tensor, origin: Origin) -> PartialSamples:
    """Activation rows (N, D) of float32, float16 or bfloat16 on the CPU, as the other form of a partial."""
    bits_ND = x_ND.view(torch.uint16) if x_ND.dtype == torch.bfloat16 else x_ND
    return PartialSamples(**origin.fields(), samples=bits_ND.numpy())


def rows_of(samples: PartialSamples) -> Tensor:
    """The activation rows (N, D) in their own dtype, a copy."""
    x_ND = torch.from_numpy(samples.samples.copy())  # since torch warns of memory that is read-only
    return x_ND.view(torch.bfloat16) if samples.samples.dtype == np.uint16 else x_ND


def covariance_of(samples: PartialSamples) -> PartialCovariance:
    """The partial in its other form: the scatter of its rows."""
    moments = Moments(samples.width)
    moments.add(rows_of(samples))
    return partial_of(moments, samples)
