import pytest
import torch
from eigenwatch.schemas import packed_length
from eigenwatch.spectrum import pack, tile_views, trace_and_frobenius_sq, unpack

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
    for tile, view in tile_views(packed, width):
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


def test_sums_of_float32_do_not_overflow():
    trace, frobenius_sq = trace_and_frobenius_sq(pack(torch.full((3, 3), 3e38)), 3)
    assert trace == pytest.approx(9e38, rel=1e-6)
    assert frobenius_sq == pytest.approx(81e76, rel=1e-6)
