"""What one rank accumulates of one layer over the forwards of one step: tokens, mean and scatter.

`add` runs in the agent, on the device of the activations. Rows are centred on a pilot, the mean of a few hundred of
them, in one pass: the subtraction is exact to the last place of the small result, and what the pilot missed, δ, is a
fraction of a standard deviation. So S = Σ(x−pilot)(x−pilot)ᵀ − n·δδᵀ takes away a small part of what stands, never a
mean's square from raw moments; the update of Chan, Golub & LeVeque 1979, of rank one too, joins forwards of one step.
Products go into the packed triangle in place: beyond it there is one float32 copy of at most `CHUNK_ROWS` rows of
activations, and nothing of the size D×D.
"""

import torch
from torch import Tensor

from .products import Product, add_product, factors
from .triangle import block_length, block_views

CHUNK_ROWS = 4096
"""Rows that are copied at a time; at 4096 a product reads and writes the triangle at no cost that shows."""
PILOT_ROWS = 256
"""Rows, evenly spaced, whose mean is the pilot. n·δδᵀ is then about 1/256 of S, and n/256 of it at the very worst."""


class Moments:
    """Tokens, mean and scatter of the rows seen so far.

    NaN and Inf propagate into mean and scatter; no pass looks for them here, the trace will show them.
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str | None = None,
        rows: tuple[int, int] | None = None,
        scatter: Tensor | None = None,
        product: Product = Product.EXACT,
    ) -> None:
        self.width = width
        self._product = product
        self.rows = rows if rows is not None else (0, width)
        """Which rows [start, stop) of the scatter are formed: a tensor-parallel rank has a block."""
        self.tokens = 0
        """Rows of activations seen, N."""
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        """(D,) float64."""
        if scatter is None:
            scatter = torch.zeros(block_length(width, self.rows), dtype=torch.float32, device=device)
        self.scatter = scatter
        """Σ (x−mean)(x−mean)ᵀ, float32, the block's part of the packed triangle; see `schemas.tiles`. Given, it is
        written to, and must be zero."""

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

    def include(self, tokens: int, mean: Tensor, scatter: Tensor) -> None:
        """Adds the moments of other rows: their number, mean (D,) float64 and scatter, a block of the same rows."""
        total = self.tokens + tokens
        shift = mean - self.mean
        self.scatter += scatter
        right_1D = shift.float()[None]
        left_1D = right_1D * (tokens * self.tokens / total)
        for block, view in block_views(self.scatter, self.width, self.rows):
            add_product(view, left_1D[:, block.start : block.stop], right_1D[:, block.first_column :])
        self.mean += shift * (tokens / total)
        self.tokens = total

    def mean_to_variance(self) -> float:
        """n‖mean‖²/tr S over the rows of the block; 0 where nothing varies. On a GPU it waits for the device."""
        trace = sum(
            float(view.diagonal(block.start - block.first_column).double().sum())
            for block, view in block_views(self.scatter, self.width, self.rows)
        )
        return self.tokens * float(self.mean[slice(*self.rows)].square().sum()) / trace if trace > 0 else 0.0

    def _fold(self, x_ND: Tensor) -> None:
        count = x_ND.shape[0]
        total = self.tokens + count
        if self._product is Product.RAW:  # a pilot of zero
            rows, missed = x_ND, x_ND.mean(0, dtype=torch.float32)
            shift = missed.double() - self.mean
        else:
            dtype = torch.promote_types(x_ND.dtype, torch.float32)
            pilot = x_ND[:: max(count // PILOT_ROWS, 1)].to(dtype).mean(0)
            rows = x_ND - pilot
            missed = rows.mean(0)
            rows, shift = rows.float(), pilot.double() + missed.double() - self.mean
        # −n·δδᵀ and Chan's n·N/(n+N)·shift·shiftᵀ, as one product of rank two.
        right_2D = torch.stack((missed.double(), shift)).float()
        left_2D = right_2D * right_2D.new_tensor([[-count], [count * self.tokens / total]])
        self.mean += shift * (count / total)
        self.tokens = total
        pairs = factors(rows, self._product)
        for block, view in block_views(self.scatter, self.width, self.rows):
            own, beside = slice(block.start, block.stop), slice(block.first_column, None)
            for left, right in pairs:
                add_product(view, left[:, own], right[:, beside], self._product)
            add_product(view, left_2D[:, own], right_2D[:, beside])
