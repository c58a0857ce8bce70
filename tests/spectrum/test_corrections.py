"""The simulation of DESIGN.md, "Finite samples", and the spectra on which the first order is known."""

import math

import pytest
import torch
from eigenwatch.spectrum import (
    corrections,
    eigenvalues,
    hard_rank,
    hard_rank_corrected,
    hard_rank_from_pairs,
    hard_rank_gaussian,
    merge,
    soft_rank,
    soft_rank_corrected,
)
from hypothesis import given

from .cases import partial_of, power_spectrum, property_test, rotation, spectra

TOKENS = (40, 80, 70, 130)
REPETITIONS = 300


def scatters(spectrum, tokens, generator, heavy_tails=False):
    """Scatters and means of REPETITIONS samples."""
    shape = (REPETITIONS, tokens, len(spectrum))
    x_RND = torch.randn(shape, dtype=torch.float64, generator=generator)
    if heavy_tails:  # each token has a norm of its own
        norm_sq = torch.empty(REPETITIONS, tokens, 1, dtype=torch.float64).exponential_(generator=generator)
        x_RND *= norm_sq.sqrt()
    x_RND *= spectrum.sqrt()
    mean_RD = x_RND.mean(1)
    x_RND -= mean_RD[:, None]
    return x_RND.mT @ x_RND, mean_RD


@pytest.fixture(scope="module", params=["gaussian", "heavy tails"])
def simulation(request):
    """What four ranks see of λ_k = k^−½, D = 120, over and over."""
    generator = torch.Generator().manual_seed(7)
    spectrum = power_spectrum(120, 0.5)
    scatter_k, mean_k = zip(
        *(scatters(spectrum, n, generator, request.param == "heavy tails") for n in TOKENS), strict=True
    )
    traces = torch.stack([s.diagonal(dim1=1, dim2=2).sum(1) for s in scatter_k])
    norms = torch.stack([s.square().sum((1, 2)) for s in scatter_k])
    within = sum(scatter_k)
    weights = torch.tensor(TOKENS, dtype=torch.float64)[:, None, None]
    means = torch.stack(mean_k)
    between = (means - (weights * means).sum(0) / sum(TOKENS)) * weights.sqrt()
    total = within + torch.einsum("kri,krj->rij", between, between)
    return request.param, traces, norms, within.square().sum((1, 2)), total


def test_the_pairs_are_unbiased_whatever_the_distribution(simulation):
    _, traces, norms, within_sq, total = simulation
    nu = [n - 1 for n in TOKENS]
    corrected = [
        hard_rank_from_pairs(nu, t, f, within)
        for t, f, within in zip(traces.T.tolist(), norms.T.tolist(), within_sq.tolist(), strict=True)
    ]
    true = hard_rank(power_spectrum(120, 0.5)).item()
    assert true == pytest.approx(78.23, abs=0.01)
    assert hard_rank(eigenvalues(total)).mean().item() < 64  # the naive one
    assert sum(corrected) / REPETITIONS == pytest.approx(true, abs=0.5)


def test_the_closed_form_is_unbiased_for_gaussian_tokens(simulation):
    tails, _, _, _, total = simulation
    nu = sum(TOKENS) - 1
    corrected = [
        hard_rank_gaussian(nu, trace, frobenius_sq)
        for trace, frobenius_sq in zip(
            total.diagonal(dim1=1, dim2=2).sum(1).tolist(), total.square().sum((1, 2)).tolist(), strict=True
        )
    ]
    if tails == "gaussian":
        assert sum(corrected) / REPETITIONS == pytest.approx(78.23, abs=0.5)
        assert hard_rank(eigenvalues(total)).mean().item() == pytest.approx(62.7, abs=0.3)
    else:  # and that is why the pairs come first
        assert sum(corrected) / REPETITIONS < 70


@pytest.mark.parametrize("simulation", ["gaussian"], indirect=True)
def test_the_soft_rank_loses_nearly_all_of_its_bias(simulation):
    *_, total = simulation
    found = eigenvalues(total)
    corrected = [math.log(soft_rank_corrected(row, sum(TOKENS))) for row in found]
    assert soft_rank(power_spectrum(120, 0.5)).log().item() == pytest.approx(4.611, abs=0.001)
    assert soft_rank(found).log().mean().item() == pytest.approx(4.440, abs=0.003)
    assert sum(corrected) / REPETITIONS == pytest.approx(4.590, abs=0.003)


@pytest.mark.parametrize(
    "spectrum", [[0.7, 0.3], [0.9] + 10 * [0.01], [0.99] + 20 * [0.0005]], ids=["D=2", "peaked", "collapsed"]
)
def test_the_soft_rank_of_a_layer_near_collapse_is_not_overcorrected(spectrum):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    tokens = 10 * len(spectrum)
    found = eigenvalues(scatters(spectrum, tokens, torch.Generator().manual_seed(3))[0])
    true, naive = soft_rank(spectrum).log().item(), soft_rank(found).log()
    corrected = torch.tensor([math.log(soft_rank_corrected(row, tokens)) for row in found], dtype=torch.float64)
    noise = naive.std().item() / math.sqrt(REPETITIONS)
    expected_bias = (corrected - naive).mean().item()
    assert expected_bias > 0
    # A variable with the same noise but without the bias would be as far off as this.
    assert abs(corrected.mean().item() - true) <= 3 * noise + 0.2 * expected_bias


def test_one_single_direction_has_a_corrected_soft_rank_of_1():
    assert soft_rank_corrected(torch.tensor([3.0]), 10) == pytest.approx(1, abs=1e-15)
    assert soft_rank_corrected(torch.tensor([3.0, 0, 0, 0]), 10) == pytest.approx(1, abs=1e-15)
    assert soft_rank_corrected(torch.zeros(4), 10) == pytest.approx(1, abs=1e-15)


def plain_first_order(spectrum, tokens):
    share = (spectrum / spectrum.sum()).tolist()
    entropy = -sum(p * math.log(p) for p in share if p)
    bias = 1.0
    for i, p in enumerate(share):
        bias -= 2 * p * p * (entropy + 0.5 + math.log(p)) if p else 0
        for q in share[i + 1 :]:
            bias += 0 if not q else p if p == q else p * q * math.log1p((p - q) / q) / (p - q)
    return math.exp(entropy + bias / (tokens - 1))


@property_test
@given(spectra(min_width=2, max_width=12).filter(lambda s: s.sum() > 0))
def test_the_formula_holds_with_equal_and_with_vanishing_eigenvalues(spectrum):
    assert soft_rank_corrected(spectrum, 100) == pytest.approx(plain_first_order(spectrum, 100), rel=1e-9)


def test_nearly_equal_and_far_apart_eigenvalues_do_not_upset_the_formula():
    equal = soft_rank_corrected(torch.ones(4, dtype=torch.float64), 50)
    nearly = torch.tensor([1 + 3e-15, 1 + 1e-15, 1.0, 1 - 1e-15], dtype=torch.float64)
    assert soft_rank_corrected(nearly, 50) == pytest.approx(equal, rel=1e-12)
    apart = torch.tensor([1.0, 1e-17, 1e-300, 5e-324], dtype=torch.float64)
    assert soft_rank_corrected(apart, 50) == pytest.approx(1, abs=1e-12)


def test_how_many_pairs_are_in_memory_makes_no_difference(monkeypatch):
    spectrum = power_spectrum(50, 1)
    at_once = soft_rank_corrected(spectrum, 200)
    monkeypatch.setattr(corrections, "CHUNK_PAIRS", 170)
    assert soft_rank_corrected(spectrum, 200) == pytest.approx(at_once, rel=1e-14)


def test_the_soft_rank_is_not_corrected_below_two_tokens_a_direction():
    assert soft_rank_corrected(power_spectrum(10, 1), 19) is None
    assert soft_rank_corrected(power_spectrum(10, 1), 20) is not None
    assert soft_rank_corrected(torch.ones(1), 1) is None


def sampled_group(tokens, width=20):
    generator = torch.Generator().manual_seed(5)
    mixing = rotation(width) * power_spectrum(width, 0.5).sqrt()
    ranks = [(torch.randn(n, width, generator=generator).double() @ mixing.T).float() for n in tokens]
    return ranks, merge(partial_of(x_ND, rank=k) for k, x_ND in enumerate(ranks))


def test_two_or_more_partials_are_corrected_by_pairs():
    ranks, group = sampled_group((30, 50, 20))
    scatter_k = [(x - x.mean(0)).T @ (x - x.mean(0)) for x in (x_ND.double() for x_ND in ranks)]
    b = a = pairs = 0.0
    for j, s in enumerate(scatter_k):
        for k, t in enumerate(scatter_k):
            if j != k:
                a += (s.trace() * t.trace()).item()
                b += (s * t).sum().item()
                pairs += (len(ranks[j]) - 1) * (len(ranks[k]) - 1)
    correction = hard_rank_corrected(group)
    assert correction.method == "pairs"
    assert correction.value == pytest.approx((a / pairs) / (b / pairs), rel=1e-6)


def test_one_partial_is_corrected_by_the_closed_form():
    ranks, group = sampled_group((60,))
    correction = hard_rank_corrected(group)
    s, nu = torch.cov(ranks[0].double().T), 59
    b = nu**2 / ((nu - 1) * (nu + 2)) * ((s @ s).trace() - s.trace() ** 2 / nu).item()
    assert correction.method == "gaussian"
    assert correction.value == pytest.approx((s.trace().item() ** 2 - 2 * b / nu) / b, rel=1e-6)


@pytest.mark.parametrize("tokens", [(1,), (2,), (1, 1), (1, 40), (40, 1)])
def test_too_few_tokens_for_a_correction_give_none(tokens):
    assert hard_rank_corrected(sampled_group(tokens)[1]) == (None, None)


def test_rounding_does_not_make_a_pair_of_one_partial():
    assert hard_rank_from_pairs([39, 0], [5.0, 0.0], [4.0, 0.0], 4.0 + 1e-12) is None, "one of them has one token"


def test_no_variance_and_no_finite_numbers_give_none():
    constant = [partial_of(torch.ones(5, 3), rank=rank) for rank in range(2)]
    assert hard_rank_corrected(merge(constant)) == (None, None)
    assert hard_rank_corrected(merge(constant[:1])) == (None, None)
    assert hard_rank_corrected(merge([partial_of(torch.full((5, 3), math.nan))])) == (None, None)
