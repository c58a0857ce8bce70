"""Fewer tokens than directions: the N×N products give the record that the whole matrix gives."""

import math

import numpy as np
import pytest
import torch
from eigenwatch.schemas import METRIC_NAMES, Origin, PartialCovariance
from eigenwatch.spectrum import Gram, Group, eigenvalues_of_lower, measure, pack, rows_of, samples_of
from hypothesis import given
from hypothesis import strategies as st

from .cases import KEY, property_test, samples, two_pass_scatter

WIDTH = 24


def partial_of_float64(x_ND, rank):
    """A partial that was never rounded to float32: what the merge law gives in float64 alone."""
    scatter = two_pass_scatter(x_ND)
    return PartialCovariance(
        key=KEY, rank=rank, share=rank, captured_at=1.0, rows=(0, x_ND.shape[1]), tokens=len(x_ND),
        mean=x_ND.double().mean(0).numpy() if len(x_ND) else np.zeros(x_ND.shape[1]),
        scatter=pack(scatter).numpy() if len(x_ND) else np.empty(0),
        trace=float(scatter.trace()) if len(x_ND) else 0.0,
        frobenius_sq=float(scatter.square().sum()) if len(x_ND) else 0.0,
    )  # fmt: skip


def by_the_matrix(ranks):
    group = Group(width=ranks[0].shape[1])
    for rank, x_ND in enumerate(ranks):
        group.add_(partial_of_float64(x_ND, rank))
    found = eigenvalues_of_lower(group.lower()) / max(group.tokens - 1, 1)
    return found, measure(group, found)


def by_the_rows(ranks):
    gram = Gram.of([x_ND for x_ND in ranks if len(x_ND)])
    found = torch.zeros(gram.width, dtype=torch.float64)
    found[: gram.tokens] = eigenvalues_of_lower(gram.products) / max(gram.tokens - 1, 1)
    return found, measure(gram, found)


def assert_the_same_record(ranks, tolerance=1e-8):
    (matrix_D, of_matrix), (rows_D, of_rows) = by_the_matrix(ranks), by_the_rows(ranks)
    largest = max(float(matrix_D[0]), 1e-300)
    assert float((matrix_D - rows_D).abs().max()) <= tolerance * largest
    assert of_matrix["hard_rank_correction"] == of_rows["hard_rank_correction"]
    for name in METRIC_NAMES:
        if name.startswith("power_law"):
            continue  # ln λ of eigenvalues that lie at the cut-off at 1e-6
        expected, found = of_matrix[name], of_rows[name]
        assert (found is None) == (expected is None), name
        assert expected is None or found == pytest.approx(expected, rel=tolerance, abs=tolerance), name


@property_test
@given(st.lists(samples(WIDTH, min_tokens=0, max_tokens=7), min_size=1, max_size=3).filter(lambda r: any(map(len, r))))
def test_rows_of_any_ranks_give_the_record_of_the_matrix(ranks):
    assert_the_same_record(ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_count_as_exact_numbers_in_every_dtype(dtype):
    ranks = [(torch.randn(n, WIDTH) + 3 * n).to(dtype) for n in (4, 0, 9)]
    assert_the_same_record(ranks)
    for x_ND in ranks:
        sent = samples_of(x_ND, Origin(key=KEY, rank=0, share=0, captured_at=1.0))
        assert torch.equal(rows_of(sent), x_ND)


@pytest.mark.parametrize(
    "ranks",
    [
        [torch.randn(1, WIDTH)],
        [torch.randn(1, WIDTH), torch.randn(1, WIDTH)],
        [torch.randn(WIDTH - 1, WIDTH)],
        [torch.randn(10, WIDTH), torch.empty(0, WIDTH), torch.randn(13, WIDTH)],
        [torch.zeros(5, WIDTH)],
    ],
    ids=["one token", "one token a rank", "one token less than the width", "a rank without tokens", "silence"],
)
def test_the_edges_are_records_too(ranks):
    assert_the_same_record(ranks)


def test_tokens_that_are_all_the_same_have_rank_1_and_no_correction():
    _, of_rows = by_the_rows([torch.randn(1, WIDTH).expand(6, WIDTH), torch.empty(0, WIDTH)])
    assert (of_rows["hard_rank"], of_rows["total_variance"], of_rows["hard_rank_corrected"]) == (1, 0, None)


def test_means_that_lie_a_million_deviations_apart_cost_the_correction_nothing():
    ranks = [torch.randn(8, WIDTH, dtype=torch.float64) + 1e6 * rank for rank in range(2)]
    _, of_rows = by_the_rows(ranks)
    _, near = by_the_rows([x_ND - 1e6 * rank for rank, x_ND in enumerate(ranks)])
    assert of_rows["hard_rank_corrected"] == pytest.approx(near["hard_rank_corrected"], rel=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_noticed(bad):
    x_ND = torch.randn(5, WIDTH)
    assert Gram.of([x_ND, torch.randn(3, WIDTH)]).finite
    x_ND[2, 7] = bad
    assert not Gram.of([torch.randn(3, WIDTH), x_ND]).finite
