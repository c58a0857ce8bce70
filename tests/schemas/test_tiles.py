"""How a triangle is packed: every pair of features stands in it once."""

import numpy as np
import pytest
from eigenwatch.schemas import TILE_ROWS, packed_length, row_tiles
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
    lengths = [tile.length(width) for tile in tiles]
    assert [tile.offset for tile in tiles] == [sum(lengths[:index]) for index in range(len(tiles))]
    assert packed_length(width) == sum(lengths)
    assert lengths == [rows * columns for rows, columns in (tile.shape(width) for tile in tiles)]


@pytest.mark.parametrize(
    ("width", "length"), [(1, 1), (8, 64), (TILE_ROWS, TILE_ROWS**2), (512, 256 * 512 + 256 * 256)]
)
def test_the_length_of_a_packed_triangle(width, length):
    assert packed_length(width) == length


def test_a_wide_triangle_is_little_more_than_half_the_matrix():
    width = 8192
    assert packed_length(width) <= (width * width + TILE_ROWS * width) // 2
