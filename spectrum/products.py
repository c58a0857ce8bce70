"""Products of activations into a scatter, and how exact they are on which device.

| activations | on | product | error of S_ij, n rows |
|---|---|---|---|
| any | CPU | float32, of float32 copies | of the sums: √n·2⁻²⁴ of Σ|x_i x_j|, n·2⁻²⁴ at the worst |
| float32 | GPU | float32, whatever the job chose for itself | the same |
| bf16, fp16 | GPU | rows as they are, float32 sums | (1+r) times the same; the products are exact |
| bf16, fp16 | GPU | centred rows in two parts, three TF32 products | 2⁻²⁰ of √(S_ii·S_jj) at the worst, and the same |

The third needs no copy of the rows and is the fastest. It takes n·mean·meanᵀ away afterwards, so it is chosen only
where the layer's last sample had r = n‖mean‖²/tr S ≤ `RAW_LIMIT`, which bounds what cancels; else the fourth. One TF32
product alone would be wrong by 4e-4: centred bf16 rows have few different values, so that their rounding does not
average out. (No GPU has run these two; their arithmetic was checked on a CPU.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor

RAW_LIMIT = 4.0
"""Largest n‖mean‖²/tr S at which rows are multiplied as they are: the error is then five times that of centred ones."""
HALVES = (torch.bfloat16, torch.float16)


class Product(Enum):
    """How rows are multiplied."""

    EXACT = "float32"
    TF32 = "centred rows in two parts, three products in TF32"
    RAW = "half-precision rows as they are, float32 sums"


def product_for(dtype: torch.dtype, device: torch.device, mean_to_variance: float | None) -> Product:
    """Which product rows of this kind get.

    Args:
        dtype: of the rows.
        device: where they are.
        mean_to_variance: n‖mean‖²/tr S of the layer's last sample; None where that is not known.
    """
    if device.type != "cuda" or dtype not in HALVES:
        return Product.EXACT
    known_small = mean_to_variance is not None and mean_to_variance <= RAW_LIMIT
    mixed = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm(…, out_dtype=…), since 2.8
    return Product.RAW if known_small and mixed else Product.TF32


def factors(rows_ND: Tensor, product: Product) -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices whose products add up to rowsᵀ·rows."""
    if product is not Product.TF32:
        return [(rows_ND, rows_ND)]
    # Rounded to the ten bits behind the point that TF32 has, so that the device rounds the rest alone: what is left out
    # is the square of that, 2⁻²² of each number.
    high = ((rows_ND.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)
    high = torch.where(rows_ND.isfinite(), high, rows_ND)
    low = torch.where(rows_ND.isfinite(), rows_ND - high, 0.0)
    return [(high, high), (high, low), (low, high)]


def add_product(view: Tensor, left: Tensor, right: Tensor, product: Product = Product.EXACT) -> None:
    """view += leftᵀ·right.

    EXACT is full float32 whatever precision the training job chose for its own products: under TF32 or bf16 products
    (`torch.set_float32_matmul_precision`) the scatter of float32 rows would be wrong by 5e-4. On the CPU that is
    float64 then, and never a change of the setting: it is the whole process's, and this may be a thread beside the
    training's. On a GPU only the training thread forms products, and sets it for as long as that takes.
    """
    if view.device.type == "cpu":
        left, right = left.float(), right.float()
        if _float32_is_exact(view.device):
            view.addmm_(left.T, right)
        else:
            view += (left.double().T @ right.double()).float()
    elif product is Product.RAW:
        view += torch.mm(left.T, right, out_dtype=torch.float32)
    elif product is Product.TF32:
        with _gpu_precision("tf32", "high"):
            view.addmm_(left.T, right)
    elif _float32_is_exact(view.device):
        view.addmm_(left.T, right)
    else:
        with _gpu_precision("ieee", "highest"):
            view.addmm_(left.T, right)


def _float32_is_exact(device: torch.device) -> bool:
    torch_backends: Any = torch.backends
    backend = torch_backends.mkldnn if device.type == "cpu" else torch_backends.cuda
    if not hasattr(backend.matmul, "fp32_precision"):  # torch < 2.9
        return torch.get_float32_matmul_precision() == "highest"
    chosen = [one.fp32_precision for one in (backend.matmul, torch_backends)]
    return all(precision in ("none", "ieee") for precision in chosen)


@contextmanager
def _gpu_precision(wanted: str, wanted_before_2_9: str) -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(wanted_before_2_9)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = wanted
        yield
    finally:
        matmul.fp32_precision = precision
