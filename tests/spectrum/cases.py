"""What the tests of the mathematics share: spectra, samples, and the way from activations to a partial."""

import dataclasses
from collections.abc import Sequence

import torch
from eigenwatch import spectrum
from eigenwatch.schemas import Origin, PartialCovariance, RecordKey, packed_offset, row_blocks
from eigenwatch.spectrum import Moments
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

KEY = RecordKey("run", 0, 100, 3, "post", None)

property_test = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def spectra(draw, min_width=1, max_width=24):
    """Descending eigenvalues over seven orders of magnitude, zeros among them."""
    value = st.one_of(st.just(0.0), st.floats(1e-4, 1e3))
    values = draw(st.lists(value, min_size=min_width, max_size=max_width))
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@st.composite
def samples(draw, width, min_tokens=1, max_tokens=30):
    """Activation rows of float32 with their own scale and mean per feature."""
    tokens = draw(st.integers(min_tokens, max_tokens))
    generator = torch.Generator().manual_seed(draw(seeds))
    scale = 10 ** torch.empty(width).uniform_(-2, 2, generator=generator)
    shift = draw(st.sampled_from([0.0, 1.0, 100.0]))
    return (torch.randn(tokens, width, generator=generator) + shift) * scale


def power_spectrum(width: int, alpha: float) -> Tensor:
    return torch.arange(1, width + 1, dtype=torch.float64) ** -alpha


def rotation(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]


def partial_of(*forwards: Tensor, rank: int = 0, key: RecordKey = KEY) -> PartialCovariance:
    """What a rank sends after these forwards of one step."""
    moments = Moments(forwards[0].shape[1])
    for x_ND in forwards:  # a forward may have no row: the rank then saw no token
        moments.add(x_ND)
    return spectrum.partial_of(moments, Origin(key=key, rank=rank, share=rank, captured_at=1.0))


def blocks_of(partial: PartialCovariance, ranks: Sequence[int]) -> list[PartialCovariance]:
    """The same share as the ranks of a tensor-parallel group would send it."""
    packed, width = torch.from_numpy(partial.scatter), partial.width
    blocks = []
    for rank, rows in zip(ranks, row_blocks(width, len(ranks)), strict=True):
        block = (
            packed[packed_offset(width, rows[0]) : packed_offset(width, rows[1])] if partial.scatter.size else packed
        )
        trace, frobenius_sq = partial.trace, partial.frobenius_sq
        if partial.scatter.size:
            trace, frobenius_sq = spectrum.trace_and_frobenius_sq(block, width, rows)
        blocks.append(
            dataclasses.replace(
                partial,
                rank=rank,
                share=min(ranks),
                rows=rows,
                scatter=block.numpy(),
                trace=trace,
                frobenius_sq=frobenius_sq,
            )
        )
    return blocks


def two_pass_scatter(x_ND: Tensor) -> Tensor:
    """The reference: float64, the mean first."""
    x_ND = x_ND.double()
    centred = x_ND - x_ND.mean(0)
    return centred.T @ centred


def two_pass_covariance(x_ND: Tensor) -> Tensor:
    return two_pass_scatter(x_ND) / max(x_ND.shape[0] - 1, 1)
