import itertools

import pytest
import torch
from eigenwatch.schemas import packed_length, packed_offset
from eigenwatch.spectrum import block_views, pack, trace_and_frobenius_sq, unpack
from hypothesis import given
from hypothesis import strategies as st

from .cases import property_test

WIDTHS = (1, 2, 255, 256, 257, 512, 600)


def symmetric(width, dtype=torch.float64):
    matrix = torch.randn(width, width, dtype=dtype, generator=torch.Generator().manual_seed(width))
    return matrix + matrix.T


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_and_unpacking_gives_the_matrix_back(width):
    matrix = symmetric(width)
    packed = pack(matrix)
    assert packed.shape == (packed_length(width),)
    assert torch.equal(unpack(packed, width), matrix)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_written_into_the_views_is_in_the_matrix(width):
    matrix = symmetric(width)
    packed = torch.zeros(packed_length(width), dtype=torch.float64)
    for tile, view in block_views(packed, width, (0, width)):
        assert view.is_contiguous()
        view += matrix[tile.start : tile.stop, tile.start :]
    assert torch.equal(unpack(packed, width), matrix)


def test_an_unpacked_matrix_is_symmetric_where_rounding_is_not():
    packed = torch.randn(packed_length(300))
    matrix = unpack(packed, 300)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_and_frobenius_norm_count_every_entry_once(width, dtype):
    matrix = symmetric(width, dtype)
    trace, frobenius_sq = trace_and_frobenius_sq(pack(matrix), width)
    assert trace == pytest.approx(matrix.double().trace().item(), rel=1e-12, abs=1e-10)
    assert frobenius_sq == pytest.approx(matrix.double().square().sum().item(), rel=1e-12)


@property_test
@given(st.sampled_from(WIDTHS[2:]), st.data())
def test_blocks_of_rows_add_up_to_the_trace_and_norm_of_the_whole(width, data):
    cuts = data.draw(st.lists(st.integers(1, width - 1), max_size=4, unique=True))
    packed = pack(symmetric(width))
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in itertools.pairwise([0, *sorted(cuts), width]):
        block = packed[packed_offset(width, rows[0]) : packed_offset(width, rows[1])]
        sums += torch.tensor(trace_and_frobenius_sq(block, width, rows), dtype=torch.float64)
    assert sums.tolist() == pytest.approx(trace_and_frobenius_sq(packed, width), rel=1e-12, abs=1e-9)


def test_sums_of_float32_do_not_overflow():
    trace, frobenius_sq = trace_and_frobenius_sq(pack(torch.full((3, 3), 3e38)), 3)
    assert trace == pytest.approx(9e38, rel=1e-6)
    assert frobenius_sq == pytest.approx(81e76, rel=1e-6)
