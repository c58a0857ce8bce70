"""Which product rows get, and what its rounding costs; the arithmetic of a GPU's products is done here on a CPU."""

import math

import pytest
import torch
from eigenwatch.agent.capture import Capture, Memory, Room, Scratch
from eigenwatch.spectrum import Moments, Product, eigenvalues, product_for, products, unpack
from eigenwatch.spectrum.products import RAW_LIMIT

from .cases import two_pass_scatter

N, D = 4096, 64


@pytest.mark.parametrize(
    ("dtype", "device", "known", "expected"),
    [
        (torch.bfloat16, "cuda", 0.5, Product.RAW),
        (torch.float16, "cuda", RAW_LIMIT, Product.RAW),
        (torch.bfloat16, "cuda", 1.01 * RAW_LIMIT, Product.TF32),
        (torch.bfloat16, "cuda", math.inf, Product.TF32),
        (torch.bfloat16, "cuda", math.nan, Product.TF32),
        (torch.bfloat16, "cuda", None, Product.TF32),
        (torch.float32, "cuda", 0.5, Product.EXACT),
        (torch.bfloat16, "cpu", 0.5, Product.EXACT),
    ],
)
def test_the_product_follows_from_dtype_device_and_the_last_sample(dtype, device, known, expected):
    assert product_for(dtype, torch.device(device), known) is expected


def rows(mean_to_variance: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of a power-law spectrum whose mean is so large, in that dtype."""
    draws = torch.Generator().manual_seed(0)
    x_ND = torch.randn(N, D, generator=draws) * torch.arange(1, D + 1) ** -0.5
    x_ND = x_ND @ torch.linalg.qr(torch.randn(D, D, generator=draws))[0]
    mean = torch.randn(D, generator=draws)
    return (x_ND + mean * (mean_to_variance * x_ND.var(0).sum() / mean.square().sum()).sqrt()).to(dtype)


def moments(x_ND: torch.Tensor, product: Product) -> Moments:
    accumulated = Moments(D, product=product)
    for part in x_ND.split(N // 2):
        accumulated.add(part)
    return accumulated


def error(scatter: torch.Tensor, x_ND: torch.Tensor) -> float:
    """Largest, of S_ij over √(S_ii·S_jj)."""
    true = two_pass_scatter(x_ND)
    deviation = true.diagonal().sqrt()
    return float(((scatter - true).abs() / (deviation[:, None] * deviation)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_as_they_are_give_the_scatter_up_to_the_limit(dtype):
    x_ND = rows(0.9 * RAW_LIMIT, dtype)
    accumulated = moments(x_ND, Product.RAW)
    assert accumulated.tokens == N
    assert (accumulated.mean - x_ND.double().mean(0)).abs().max() <= 1e-6
    scatter = unpack(accumulated.scatter.double(), D)
    assert error(scatter, x_ND) <= (1 + RAW_LIMIT) * 8 * math.sqrt(N) * 2**-24
    found, true = (eigenvalues(one / (N - 1)) for one in (scatter, two_pass_scatter(x_ND)))
    assert ((found - true).abs() <= 1e-4 * true).all()


def test_beyond_the_limit_they_would_not():
    x_ND = rows(1e4, torch.float16)
    assert error(unpack(moments(x_ND, Product.RAW).scatter.double(), D), x_ND) > 1e-4
    assert error(unpack(moments(x_ND, Product.EXACT).scatter.double(), D), x_ND) <= 1e-5


def rounded_by_the_device(view, left, right, product=Product.EXACT):
    """TF32 drops what is behind the tenth bit."""
    if product is Product.TF32:
        left, right = ((one.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32) for one in (left, right))
    view.addmm_(left.T, right)


def test_centred_rows_in_two_parts_give_the_scatter_in_three_tf32_products(monkeypatch):
    monkeypatch.setattr("eigenwatch.spectrum.moments.add_product", rounded_by_the_device)
    x_ND = rows(100.0)
    scatter = unpack(moments(x_ND, Product.TF32).scatter.double(), D)
    assert error(scatter, x_ND) <= 1e-5
    monkeypatch.setattr("eigenwatch.spectrum.moments.factors", lambda rows_ND, _: [(rows_ND, rows_ND)])
    assert error(unpack(moments(x_ND, Product.TF32).scatter.double(), D), x_ND) > 1e-4, "and in one they would not"


@pytest.mark.parametrize("product", list(Product))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_under_every_product(product, bad):
    x_ND = rows(1.0)
    x_ND[7, 3] = bad
    assert not math.isfinite(float(moments(x_ND, product).scatter.view(D, D)[3, 3]))


def test_the_ratio_of_mean_and_variance_is_that_of_all_rows():
    x_ND = rows(7.0, torch.float32)
    reference = N * x_ND.double().mean(0).square().sum() / two_pass_scatter(x_ND).trace()
    assert moments(x_ND, Product.EXACT).mean_to_variance() == pytest.approx(float(reference), rel=1e-5)
    assert Moments(D).mean_to_variance() == 0.0


def test_a_place_remembers_the_ratio_of_its_last_sample():
    memory = Memory()
    for ratio in (3.0, 0.1):
        capture = Capture(D, (0, D), Room(1 << 30), Scratch(torch.device("cpu")), memory)
        capture.add(rows(ratio, torch.float32))
        capture.moments()
        assert memory.mean_to_variance == pytest.approx(ratio, rel=0.1)


def test_the_jobs_own_choice_for_the_gpu_comes_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with products._gpu_precision("tf32", "high"):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
