"""How the upper triangle of a symmetric D×D matrix is packed: full rows of tiles, one after the other.

Tile t holds rows [start, stop) and columns [start, D), row-major, so each tile is one contiguous matrix that
a product can write into, and nothing is copied on the way to the wire. The square on the diagonal is stored
whole; the waste is TILE_ROWS/(2D) of the triangle. 256 rows keep a tile's product efficient.

Any rows [a, b) of the matrix are one contiguous slice too, so a tensor-parallel group deals the triangle out to its
ranks in blocks of rows, and a block travels as that slice.
"""

from bisect import bisect_left
from typing import NamedTuple

TILE_ROWS = 256


class Tile(NamedTuple):
    """Rows [start, stop) and columns [start, width) of the matrix, from `packed_offset(width, start)` on."""

    start: int
    stop: int


def row_tiles(width: int) -> list[Tile]:
    """The tiles of a (width, width) matrix, top to bottom."""
    return [Tile(start, min(start + TILE_ROWS, width)) for start in range(0, width, TILE_ROWS)]


def packed_offset(width: int, row: int) -> int:
    """Where a row begins in the packed triangle: rows [a, b) are packed[packed_offset(a) : packed_offset(b)].

    Args:
        width: D.
        row: between 0 and D; for D it is the whole length.
    """
    tiles, rows = divmod(row, TILE_ROWS)
    above = TILE_ROWS * (tiles * width - TILE_ROWS * (tiles * (tiles - 1) // 2))
    return above + rows * (width - tiles * TILE_ROWS)


def packed_length(width: int) -> int:
    """How many numbers the packed upper triangle of a (width, width) matrix holds."""
    return packed_offset(width, width)


def row_blocks(width: int, parts: int) -> list[tuple[int, int]]:
    """Rows [start, stop) of each of `parts` ranks that share one matrix: all rows once, about the same numbers each.

    Raises:
        ValueError: there are more parts than rows.
    """
    if not 1 <= parts <= width:
        raise ValueError(f"a matrix of width {width} is dealt out in 1 to {width} blocks of rows, got {parts}")
    stops: list[int] = []
    for part in range(1, parts + 1):
        even = bisect_left(range(width), packed_length(width) * part / parts, key=lambda row: packed_offset(width, row))
        least = stops[-1] + 1 if stops else 1  # nobody's block is empty
        stops.append(min(max(even, least), width - (parts - part)))
    return list(zip([0, *stops[:-1]], stops, strict=True))
