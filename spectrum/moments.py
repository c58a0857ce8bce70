"""What one rank accumulates of one layer over the forwards of one step: tokens, mean and scatter.

The agent calls `add` inside the training step, on the device of the activations. Every forward is centred on
its own mean and folded in by the update of Chan, Golub & LeVeque 1979, whose rank-one term goes into the
product as one more row. So the scatter is a sum of squares and nothing else: it stays positive semidefinite
up to rounding, and no mean is ever subtracted from raw moments. The products go into the packed triangle in
place: beyond it there is one float32 copy of at most `CHUNK_ROWS` rows of activations, and nothing of the
size D×D.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..schemas import packed_length
from .triangle import tile_views

CHUNK_ROWS = 4096
"""Rows that are copied at a time; at 4096 a product reads and writes the triangle at no cost that shows."""


class Moments:
    """Tokens, mean and scatter of the rows seen so far.

    NaN and Inf propagate into mean and scatter; no pass looks for them here, the trace will show them.
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.width = width
        self.tokens = 0
        """Rows seen, N."""
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        """(D,) float64."""
        self.scatter = torch.zeros(packed_length(width), dtype=torch.float32, device=device)
        """(packed_length(D),) float32: Σ (x−mean)(x−mean)ᵀ, see `schemas.tiles`."""

    def add(self, x_ND: Tensor) -> None:
        """Adds the rows of one forward, in any floating dtype; bf16 and fp16 count as exact numbers.

        Args:
            x_ND: (N, D) on the device of this object; it is read only. N = 0 changes nothing.
        """
        assert x_ND.ndim == 2, x_ND.shape
        assert x_ND.shape[1] == self.width, (x_ND.shape, self.width)
        with torch.no_grad():
            for start in range(0, x_ND.shape[0], CHUNK_ROWS):
                self._fold(x_ND[start : start + CHUNK_ROWS])

    def _fold(self, x_ND: Tensor) -> None:
        count = x_ND.shape[0]
        rows = x_ND.new_empty((count + 1, self.width), dtype=torch.promote_types(x_ND.dtype, torch.float32))
        centred = rows[:count]
        centred.copy_(x_ND)
        # Twice: the first mean is off by its rounding, up to 1e-7·|mean|, which counts where |mean| ≫ std.
        # The second finds that remainder, and the two together are the mean to float64's satisfaction.
        centre = centred.mean(0)
        centred -= centre
        remainder = centred.mean(0)
        centred -= remainder
        shift = centre.double() + remainder.double() - self.mean

        total = self.tokens + count
        rows[count] = shift * math.sqrt(self.tokens * count / total)
        self.mean += shift * (count / total)
        self.tokens = total

        rows = rows.float()
        with _ieee_float32_products():
            for tile, view in tile_views(self.scatter, self.width):
                view.addmm_(rows[:, tile.start : tile.stop].T, rows[:, tile.start :])


@contextmanager
def _ieee_float32_products() -> Iterator[None]:
    """Full float32 products, whatever the training job chose for its own.

    Under TF32 or bf16 products (`torch.set_float32_matmul_precision`) the scatter would be wrong by 5e-4.
    """
    torch_backends: Any = torch.backends
    backends = (torch_backends.cuda.matmul, torch_backends.mkldnn.matmul)
    if not hasattr(backends[0], "fp32_precision"):  # torch < 2.9
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    chosen_each = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, chosen_each, strict=True):
            backend.fp32_precision = precision
