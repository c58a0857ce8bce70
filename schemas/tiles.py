"""How the upper triangle of a symmetric D×D matrix is packed: full rows of tiles, one after the other.

Tile t holds rows [start, stop) and columns [start, D), row-major, so each tile is one contiguous matrix that
a product can write into, and nothing is copied on the way to the wire. The square on the diagonal is stored
whole; the waste is TILE_ROWS/(2D) of the triangle. 256 rows keep a tile's product efficient.
"""

from typing import NamedTuple

TILE_ROWS = 256


class Tile(NamedTuple):
    """Rows [start, stop) and columns [start, width) of the matrix, at `offset` of the packed array."""

    start: int
    stop: int
    offset: int

    def shape(self, width: int) -> tuple[int, int]:
        return self.stop - self.start, width - self.start

    def length(self, width: int) -> int:
        rows, columns = self.shape(width)
        return rows * columns


def row_tiles(width: int) -> list[Tile]:
    """The tiles of a (width, width) matrix, top to bottom."""
    tiles: list[Tile] = []
    offset = 0
    for start in range(0, width, TILE_ROWS):
        tile = Tile(start, min(start + TILE_ROWS, width), offset)
        tiles.append(tile)
        offset += tile.length(width)
    return tiles


def packed_length(width: int) -> int:
    """How many numbers the packed upper triangle of a (width, width) matrix holds."""
    return sum(tile.length(width) for tile in row_tiles(width))


def packed_offset(width: int, row: int) -> int:
    """Where a row begins in the packed triangle: rows [a, b) are the slice between the offsets of a and b."""
    if row == width:
        return packed_length(width)
    tile = row_tiles(width)[row // TILE_ROWS]
    return tile.offset + (row - tile.start) * (width - tile.start)
