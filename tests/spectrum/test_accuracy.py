"""The promise about numbers, from float32 or bf16 activations on several ranks to every metric.

Against a float64 two-pass reference: eigenvalues within 1e-5·λ_1 and every metric within 1e-4 relative, up to
|mean|/std = 1000.
"""

import math

import pytest
import torch
from eigenwatch.schemas import METRIC_NAMES
from eigenwatch.spectrum import (
    Group,
    Share,
    eigenvalues,
    measure,
    merge,
    pack,
)

from .cases import partial_of, power_spectrum, rotation, two_pass_covariance, two_pass_scatter

WIDTH = 300
DEALT = ((100, 300, 1), (250, 150), (4, 396), (400,))  # forwards of each of four ranks


def activations(alpha, mean_to_std, dtype):
    """1601 correlated tokens, each feature with its own mean, `mean_to_std` times its deviation or less."""
    generator = torch.Generator().manual_seed(11)
    basis = rotation(WIDTH) * power_spectrum(WIDTH, alpha).sqrt()
    tokens = sum(map(sum, DEALT))
    x_ND = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator) @ basis.T
    lean = 1 - 2 * torch.rand(WIDTH, dtype=torch.float64, generator=generator)
    lean[0] = 1
    return (x_ND + mean_to_std * lean * x_ND.std(0)).to(dtype)


def deal(x_ND):
    per_rank = x_ND.split([sum(forwards) for forwards in DEALT])
    return [rows.split(list(forwards)) for rows, forwards in zip(per_rank, DEALT, strict=True)]


def reference_group(x_ND):
    """The same group in float64 throughout, two passes over the tokens of each rank."""
    within, shares = 0, {}
    for rank, forwards in enumerate(deal(x_ND)):
        rows = torch.cat(forwards).double()
        scatter = two_pass_scatter(rows)
        within = within + scatter
        shares[rank] = Share(
            tokens=len(rows),
            mean=rows.mean(0),
            rows={rank: (0, WIDTH)},
            trace=scatter.trace().item(),
            frobenius_sq=scatter.square().sum().item(),
        )
    return Group(width=WIDTH, within=pack(within), shares=shares)


@pytest.mark.parametrize("alpha", [0.5, 1.2, 2.0])
@pytest.mark.parametrize(
    ("dtype", "mean_to_std"),
    [
        (torch.float32, 0),
        (torch.float32, 30),
        (torch.float32, 1000),
        (torch.bfloat16, 0),
        (torch.bfloat16, 30),
        (torch.bfloat16, 1000),
    ],
)
def test_every_metric_is_within_1e_4_of_float64(alpha, dtype, mean_to_std):
    x_ND = activations(alpha, mean_to_std, dtype)
    group = merge(partial_of(*forwards, rank=rank) for rank, forwards in enumerate(deal(x_ND)))
    found, true = eigenvalues(group.covariance()), eigenvalues(two_pass_covariance(x_ND))
    assert group.tokens == len(x_ND)
    assert ((found - true).abs().max() / true[0]).item() <= 1e-5

    values, reference = measure(group, found), measure(reference_group(x_ND), true)
    for name in METRIC_NAMES:
        if name != "js_divergence":
            assert math.isfinite(reference[name]), name
            assert values[name] == pytest.approx(reference[name], rel=1e-4), name


def test_a_collapsed_layer_is_measured_as_well_as_a_healthy_one():
    x_ND = activations(1.2, 1000, torch.float32)
    x_ND += 500 * torch.randn(len(x_ND), 1, generator=torch.Generator().manual_seed(1)) * x_ND.std(0)
    group = merge(partial_of(*forwards, rank=rank) for rank, forwards in enumerate(deal(x_ND)))
    found, true = eigenvalues(group.covariance()), eigenvalues(two_pass_covariance(x_ND))
    assert ((found - true).abs().max() / true[0]).item() <= 1e-5
    values, reference = measure(group, found), measure(reference_group(x_ND), true)
    for name in ("hard_rank", "soft_rank", "spectral_concentration", "top1_share", "variance_10"):
        assert values[name] == pytest.approx(reference[name], rel=1e-4), name
