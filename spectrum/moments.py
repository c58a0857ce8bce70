"""What one rank accumulates of one layer over the forwards of one step: tokens, mean and scatter.

`add` runs in the agent, on the device of the activations. Rows are centred on a pilot, the mean of a few hundred of
them, in one pass: the subtraction is exact to the last place of the small result, and what the pilot missed, δ, is a
fraction of a standard deviation. So S = Σ(x−pilot)(x−pilot)ᵀ − n·δδᵀ takes away a small part of what stands, never a
mean's square from raw moments; the update of Chan, Golub & LeVeque 1979, of rank one too, joins forwards of one step.
Products go into the packed triangle in place: beyond it there is one float32 copy of at most `CHUNK_ROWS` rows of
activations, and nothing of the size D×D.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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
    ) -> None:
        self.width = width
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
            _add_product(view, left_1D[:, block.start : block.stop], right_1D[:, block.first_column :])
        self.mean += shift * (tokens / total)
        self.tokens = total

    def _fold(self, x_ND: Tensor) -> None:
        count = x_ND.shape[0]
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        pilot = x_ND[:: max(count // PILOT_ROWS, 1)].to(dtype).mean(0)
        rows = x_ND - pilot
        missed = rows.mean(0)
        rows, total = rows.float(), self.tokens + count
        shift = pilot.double() + missed.double() - self.mean
        # −n·δδᵀ and Chan's n·N/(n+N)·shift·shiftᵀ, as one product of rank two.
        right_2D = torch.stack((missed.double(), shift)).float()
        left_2D = right_2D * right_2D.new_tensor([[-count], [count * self.tokens / total]])
        self.mean += shift * (count / total)
        self.tokens = total
        for block, view in block_views(self.scatter, self.width, self.rows):
            own, beside = slice(block.start, block.stop), slice(block.first_column, None)
            _add_product(view, rows[:, own], rows[:, beside])
            _add_product(view, left_2D[:, own], right_2D[:, beside])


def _add_product(view: Tensor, left: Tensor, right: Tensor) -> None:
    """view += leftᵀ·right in full float32, whatever precision the training job chose for its own products.

    Under TF32 or bf16 products (`torch.set_float32_matmul_precision`) the scatter would be wrong by 5e-4. On the CPU
    that is float64 then, and never a change of the setting: it is the whole process's, and this may be a thread beside
    the training's. On a GPU only the training thread forms products, and sets it for as long as that takes.
    """
    if _float32_is_exact(view.device):
        view.addmm_(left.T, right)
    elif view.device.type == "cpu":
        view += (left.double().T @ right.double()).float()
    else:
        with _exact_float32():
            view.addmm_(left.T, right)


def _float32_is_exact(device: torch.device) -> bool:
    torch_backends: Any = torch.backends
    backend = torch_backends.mkldnn if device.type == "cpu" else torch_backends.cuda
    if not hasattr(backend.matmul, "fp32_precision"):  # torch < 2.9
        return torch.get_float32_matmul_precision() == "highest"
    chosen = [one.fp32_precision for one in (backend.matmul, torch_backends)]
    return all(precision in ("none", "ieee") for precision in chosen)


@contextmanager
def _exact_float32() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # torch < 2.9
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        yield
    finally:
        matmul.fp32_precision = precision
