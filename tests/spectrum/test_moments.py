import math

import pytest
import torch
from eigenwatch.schemas import packed_length, packed_offset
from eigenwatch.spectrum import Moments, moments, unpack
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .cases import property_test, samples, two_pass_scatter


def scatter_of(accumulated):
    return unpack(accumulated.scatter.double(), accumulated.width)


def accumulate(*forwards):
    accumulated = Moments(forwards[0].shape[1])
    for x_ND in forwards:
        accumulated.add(x_ND)
    return accumulated


@property_test
@given(st.lists(samples(width=7), min_size=1, max_size=5))
def test_several_forwards_are_as_good_as_one(forwards):
    accumulated = accumulate(*forwards)
    together = torch.cat(forwards)
    reference = two_pass_scatter(together)
    assert accumulated.tokens == len(together)
    assert ((accumulated.mean - together.double().mean(0)).abs() <= 2e-7 * together.abs().amax(0)).all()
    error = (scatter_of(accumulated) - reference).abs()
    deviation = reference.diagonal().sqrt()
    assert (error <= 3e-6 * deviation[:, None] * deviation + 1e-12 * reference.abs().max()).all()


@pytest.mark.parametrize("width", [255, 256, 257, 600])
def test_the_triangle_is_right_around_the_edges_of_tiles(width):
    x_ND = torch.randn(50, width, generator=torch.Generator().manual_seed(0)) + 3
    torch.testing.assert_close(scatter_of(accumulate(x_ND)), two_pass_scatter(x_ND), rtol=1e-5, atol=1e-4)


def test_more_rows_than_are_copied_at_a_time_make_no_difference(monkeypatch):
    x_ND = torch.randn(100, 9, generator=torch.Generator().manual_seed(0)) + 5
    at_once = accumulate(x_ND)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 32)
    in_chunks = accumulate(x_ND)
    assert in_chunks.tokens == 100
    torch.testing.assert_close(in_chunks.scatter, at_once.scatter, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_count_as_exact_numbers(dtype):
    x_ND = (3 + torch.randn(200, 12, generator=torch.Generator().manual_seed(0))).to(dtype)
    accumulated = accumulate(x_ND[:70], x_ND[70:])
    reference = two_pass_scatter(x_ND)
    assert accumulated.scatter.dtype == torch.float32
    assert (scatter_of(accumulated) - reference).abs().max() <= 3e-7 * reference.diagonal().max()


def test_float64_is_centred_before_it_is_rounded():
    x_ND = 1e9 + torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = two_pass_scatter(x_ND)
    assert (scatter_of(accumulate(x_ND)) - reference).abs().max() <= 1e-6 * reference.diagonal().max()


def test_a_mean_of_ten_thousand_deviations_costs_no_accuracy():
    x_ND = 1e4 + torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    reference = two_pass_scatter(x_ND)
    accumulated = accumulate(x_ND[:1000], x_ND[1000:1001], x_ND[1001:])
    assert (scatter_of(accumulated) - reference).abs().max() <= 1e-6 * reference.diagonal().max()


def test_the_scatter_stays_positive_semidefinite():
    forwards = [1000 + torch.randn(3, 40, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    eigenvalues = torch.linalg.eigvalsh(scatter_of(accumulate(*forwards)))
    assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]


def test_no_rows_change_nothing():
    accumulated = Moments(3)
    accumulated.add(torch.empty(0, 3))
    assert accumulated.tokens == 0
    assert not accumulated.scatter.any()


def test_one_token_has_its_mean_and_no_scatter():
    accumulated = accumulate(torch.tensor([[0.1, 7e8]]))
    assert accumulated.tokens == 1
    assert torch.equal(accumulated.mean, torch.tensor([[0.1, 7e8]]).double()[0])
    assert torch.equal(accumulated.scatter, torch.zeros(packed_length(2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_diagonal_even_if_more_follows(bad):
    x_ND = torch.randn(5, 3)
    x_ND[2, 1] = bad
    accumulated = accumulate(x_ND, torch.randn(5, 3))
    assert accumulated.tokens == 10
    assert math.isnan(scatter_of(accumulated).trace().item())


def test_the_activations_are_left_alone_and_no_graph_is_kept():
    x_ND = torch.randn(6, 4, requires_grad=True)
    before = x_ND.detach().clone()
    accumulated = accumulate(x_ND)
    assert torch.equal(x_ND, before)
    assert not accumulated.scatter.requires_grad
    assert not accumulated.mean.requires_grad


def test_rows_may_be_strided():
    x_ND = torch.randn(4, 60).T
    torch.testing.assert_close(scatter_of(accumulate(x_ND)), two_pass_scatter(x_ND), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_job_keeps_its_choice_of_product_precision_and_the_scatter_does_not_suffer(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x_ND = torch.randn(1024, 300, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulated = accumulate(x_ND)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    error = (scatter_of(accumulated) - two_pass_scatter(x_ND)).abs().max()
    assert error <= 2e-6 * 1024


def test_rows_of_which_the_pilot_saw_the_worst_cost_little_accuracy():
    """Massive activations, as of first tokens, exactly where the pilot looks: n·δδᵀ is bounded by n/PILOT_ROWS·S."""
    x_ND = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    x_ND[:: 4096 // moments.PILOT_ROWS, 0] += 1e4
    reference = two_pass_scatter(x_ND)
    deviation = reference.diagonal().sqrt()
    error = (scatter_of(accumulate(x_ND)) - reference).abs()
    assert (error <= 1e-5 * deviation[:, None] * deviation).all()


@pytest.mark.parametrize("rows", [(0, 300), (0, 100), (100, 256), (200, 600), (256, 512), (599, 600), (40, 40)])
def test_a_block_of_rows_is_that_part_of_the_triangle(rows):
    forwards = [torch.randn(50, 600, generator=torch.Generator().manual_seed(k)) + k for k in range(2)]
    whole, block = accumulate(*forwards), Moments(600, rows=rows)
    for x_ND in forwards:
        block.add(x_ND)
    start, stop = (packed_offset(600, row) for row in rows)
    assert torch.equal(block.mean, whole.mean)
    torch.testing.assert_close(block.scatter, whole.scatter[start:stop], rtol=1e-5, atol=1e-4)


def test_a_product_beside_the_training_never_touches_the_settings_of_the_process(monkeypatch):
    """They are the whole process's, and the outbox's thread forms scatters while the training computes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    seen, add = [], Tensor.__iadd__

    def looking(view, product):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return add(view, product)

    monkeypatch.setattr(Tensor, "__iadd__", looking)
    try:
        accumulate(torch.randn(64, 40))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert set(seen) == {"bf16"}
