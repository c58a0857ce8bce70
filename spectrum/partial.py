"""From what was seen to the partial that is merged: the one place that decides what is finite.

The agent's outbox calls `partial_of` with what a rank accumulated, the aggregator `covariance_of` with rows that came
as they are; both on threads of their own, never in the training step.
"""

import math

import numpy as np
import torch

from ..schemas import Origin, PartialCovariance, PartialSamples
from .moments import Moments
from .triangle import trace_and_frobenius_sq


def partial_of(moments: Moments, origin: Origin, rows: tuple[int, int] | None = None) -> PartialCovariance:
    """The partial of these moments, on the CPU.

    Args:
        moments: of one share, on any device; its scatter may be the block `rows` only.
        origin: what the partial is about and whose it is.
        rows: [start, stop) of the scatter that `moments.scatter` holds; all where not given.
    """
    scatter, mean = moments.scatter.cpu(), moments.mean.cpu().numpy()
    rows = rows or (0, moments.width)
    trace, frobenius_sq = trace_and_frobenius_sq(scatter, moments.width, rows)
    # The mean too: a bad feature above a block's rows does not show in the block.
    finite = math.isfinite(trace) and math.isfinite(frobenius_sq) and bool(np.isfinite(mean).all())
    return PartialCovariance(
        **origin.fields(),
        rows=rows,
        tokens=moments.tokens,
        mean=mean,
        scatter=scatter.numpy() if finite and moments.tokens else np.empty(0, dtype=np.float32),
        trace=trace if finite else math.nan,
        frobenius_sq=frobenius_sq if finite else math.nan,
    )


def covariance_of(samples: PartialSamples) -> PartialCovariance:
    """The partial in its other form: the scatter of its rows."""
    x_ND = torch.from_numpy(samples.samples.copy())  # a copy, since torch warns of memory that is read-only
    moments = Moments(samples.width)
    moments.add(x_ND.view(torch.bfloat16) if samples.samples.dtype == np.uint16 else x_ND)
    return partial_of(moments, samples)
