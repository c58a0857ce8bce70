import math

import pytest
import torch
from eigenwatch.schemas import METRIC_NAMES
from eigenwatch.spectrum import eigenvalues, hard_rank, measure, merge, variance_share

from .cases import partial_of, power_spectrum, rotation

SPECTRAL = [name for name in METRIC_NAMES if name not in ("js_divergence", "total_variance")]


def measured(*ranks):
    group = merge(partial_of(x_ND, rank=k) for k, x_ND in enumerate(ranks))
    return measure(group, eigenvalues(group.covariance()))


def tokens_of(spectrum, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, len(spectrum), generator=generator) * spectrum.sqrt()).float()


def test_every_name_of_the_catalogue_has_a_value():
    spectrum = power_spectrum(30, 1)
    values = measured(tokens_of(spectrum, 50), tokens_of(spectrum, 40, seed=1))
    assert set(values) == {*METRIC_NAMES, "hard_rank_correction"}
    assert values["js_divergence"] is None
    assert values["hard_rank_correction"] == "pairs"
    for name in METRIC_NAMES:
        assert name == "js_divergence" or math.isfinite(values[name])


def test_columns_hold_what_their_functions_say():
    x_ND = tokens_of(power_spectrum(30, 1), 100)
    group = merge([partial_of(x_ND)])
    found = eigenvalues(group.covariance())
    values = measure(group, found)
    assert values["hard_rank"] == hard_rank(found).item()
    assert values["variance_10"] == variance_share(found, 0.1).item()
    assert values["variance_25"] == variance_share(found, 0.25).item()
    assert values["variance_50"] == variance_share(found, 0.5).item()
    assert values["total_variance"] == pytest.approx(torch.cov(x_ND.double().T).trace().item(), rel=1e-6)
    assert values["hard_rank_correction"] == "gaussian"


def test_metrics_do_not_change_with_rotation_or_scale():
    x_ND = tokens_of(power_spectrum(30, 1), 200)
    turned = (x_ND.double() @ rotation(30) * 1e3).float()
    values, of_turned = (measured(x[:90], x[90:]) for x in (x_ND, turned))
    for name in SPECTRAL:
        assert of_turned[name] == pytest.approx(values[name], rel=1e-5), name
    assert of_turned["total_variance"] == pytest.approx(1e6 * values["total_variance"], rel=1e-5)


@pytest.mark.parametrize(
    "x_ND",
    [torch.randn(1, 8), torch.randn(1, 8).expand(50, 8), torch.zeros(50, 8)],
    ids=["one token", "one token repeated", "silence"],
)
def test_no_variance_is_a_record_with_rank_1(x_ND):
    values = measured(x_ND)
    for name in ("hard_rank", "soft_rank", "effective_dimension", "top1_share", "variance_10"):
        assert values[name] == 1, name
    for name in ("hard_utilization", "soft_utilization", "utilization_index", "total_variance"):
        assert values[name] == 0, name
    assert values["spectral_concentration"] == 7 / 8
    assert values["power_law_alpha"] is values["power_law_r2"] is values["hard_rank_corrected"] is None


def test_width_1_is_a_record():
    values = measured(torch.randn(20, 1))
    assert values["hard_rank"] == values["soft_rank"] == values["top1_share"] == 1
    assert values["hard_utilization"] == values["utilization_index"] == values["spectral_concentration"] == 0
    assert values["soft_rank_corrected"] == pytest.approx(1)
    assert values["power_law_alpha"] is None


def test_fewer_tokens_than_the_width_are_a_record():
    values = measured(torch.randn(4, 40), torch.randn(6, 40))
    assert 1 < values["hard_rank"] <= values["soft_rank"] <= 9
    assert values["soft_rank_corrected"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_activations_that_are_not_finite_or_overflow_have_no_metrics(bad):
    x_ND = torch.randn(10, 4)
    x_ND[3, 2] = bad
    group = merge([partial_of(torch.randn(10, 4), rank=0), partial_of(x_ND, rank=1)])
    assert not group.finite
    assert set(measure(group, None).values()) == {None}
