"""How a triangle is packed: every pair of features stands in it once."""

import numpy as np
import pytest
from eigenwatch.schemas import TILE_ROWS, packed_length, packed_offset, row_blocks, row_tiles
from hypothesis import example, given, settings
from hypothesis import strategies as st

widths = st.integers(1, 3 * TILE_ROWS + 5)


@given(widths)
@example(TILE_ROWS)
@example(TILE_ROWS + 1)
@example(2 * TILE_ROWS)
@settings(deadline=None, max_examples=25)
def test_tiles_cover_the_upper_triangle_exactly_once(width):
    covered_DD = np.zeros((width, width), dtype=np.int8)
    for tile in row_tiles(width):
        covered_DD[tile.start : tile.stop, tile.start :] += 1
    same_tile_DD = np.equal.outer(np.arange(width) // TILE_ROWS, np.arange(width) // TILE_ROWS)
    assert (covered_DD == (np.triu(np.ones_like(covered_DD)) | same_tile_DD)).all()


@given(widths)
def test_tiles_follow_one_another_without_a_gap(width):
    tiles = row_tiles(width)
    assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
    assert tiles[-1].stop == width
    lengths = [(tile.stop - tile.start) * (width - tile.start) for tile in tiles]
    assert [packed_offset(width, tile.start) for tile in tiles] == [sum(lengths[:index]) for index in range(len(tiles))]
    assert packed_length(width) == sum(lengths)


@pytest.mark.parametrize(
    ("width", "length"), [(1, 1), (8, 64), (TILE_ROWS, TILE_ROWS**2), (512, 256 * 512 + 256 * 256)]
)
def test_the_length_of_a_packed_triangle(width, length):
    assert packed_length(width) == length


def test_a_wide_triangle_is_little_more_than_half_the_matrix():
    width = 8192
    assert packed_length(width) <= (width * width + TILE_ROWS * width) // 2


@given(widths)
@settings(deadline=None, max_examples=25)
def test_every_row_is_one_slice_of_the_packed_triangle(width):
    start = 0
    for tile in row_tiles(width):
        for row in range(tile.start, tile.stop):
            assert packed_offset(width, row) == start + (row - tile.start) * (width - tile.start)
        start += (tile.stop - tile.start) * (width - tile.start)
    assert packed_offset(width, width) == packed_length(width)


@given(widths, st.data())
@settings(deadline=None)
def test_blocks_cover_all_rows_in_order_and_none_is_empty(width, data):
    parts = data.draw(st.integers(1, min(width, 40)) | st.just(width))
    blocks = row_blocks(width, parts)
    assert len(blocks) == parts
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == width
    assert all(start < stop for start, stop in blocks)


@pytest.mark.parametrize("width", [256, 300, 2048, 11008])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_blocks_are_about_the_same_number_of_numbers(width, parts):
    lengths = [packed_offset(width, stop) - packed_offset(width, start) for start, stop in row_blocks(width, parts)]
    assert max(lengths) - packed_length(width) / parts <= width, "within one row"
    assert sum(lengths) == packed_length(width)


@pytest.mark.parametrize("parts", [0, 9])
def test_a_matrix_is_not_dealt_out_to_nobody_or_to_more_ranks_than_it_has_rows(parts):
    with pytest.raises(ValueError, match=f"1 to 8 blocks of rows, got {parts}"):
        row_blocks(8, parts)
