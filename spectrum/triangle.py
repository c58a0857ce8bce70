"""The packed upper triangle in torch: the layout of `schemas.tiles` as views, and what is read off in place.

The agent writes products straight into the views; the aggregator unpacks once, to solve.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..schemas import TILE_ROWS, packed_offset, row_tiles


class Block(NamedTuple):
    """Rows [start, stop) of one tile, whose columns begin at `first_column`."""

    start: int
    stop: int
    first_column: int


def block_length(width: int, rows: tuple[int, int]) -> int:
    """How many numbers the rows [start, stop) of a packed (width, width) triangle hold."""
    return packed_offset(width, rows[1]) - packed_offset(width, rows[0])


def block_views(packed: Tensor, width: int, rows: tuple[int, int]) -> list[tuple[Block, Tensor]]:
    """The rows [start, stop) of a packed triangle, tile by tile.

    Args:
        packed: (block_length(width, rows),): the part of the packed triangle that holds these rows.

    Returns:
        pairs of a block and a contiguous (stop−start, D−first_column) view.
    """
    assert packed.shape == (block_length(width, rows),), (packed.shape, width, rows)
    first, views = packed_offset(width, rows[0]), []
    for tile in row_tiles(width):
        start, stop = max(tile.start, rows[0]), min(tile.stop, rows[1])
        if start < stop:
            flat = packed[packed_offset(width, start) - first : packed_offset(width, stop) - first]
            views.append((Block(start, stop, tile.start), flat.view(stop - start, width - tile.start)))
    return views


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (D, D), packed by row tiles, as a copy (packed_length(D),)."""
    width = matrix.shape[-1]
    return torch.cat([matrix[tile.start : tile.stop, tile.start :].flatten() for tile in row_tiles(width)])


def unpack(packed: Tensor, width: int) -> Tensor:
    """The whole symmetric matrix (D, D) of a packed triangle, in its dtype.

    A tile's square on the diagonal holds both of its triangles; where rounding made them differ, their
    average is taken, so that the result is symmetric to the last bit.
    """
    matrix = packed.new_empty((width, width))
    for block, view in block_views(packed, width, (0, width)):
        rows = block.stop - block.start
        square, beside = view[:, :rows], view[:, rows:]
        matrix[block.start : block.stop, block.start : block.stop] = (square + square.T) / 2
        matrix[block.start : block.stop, block.stop :] = beside
        matrix[block.stop :, block.start : block.stop] = beside.T
    return matrix


def lower_of(packed: Tensor, width: int) -> Tensor:
    """A matrix (D, D) whose lower triangle is that of the packed symmetric one; above the diagonal stands anything.

    It is all that an eigenvalue solver reads, and costs a quarter of `unpack`, which writes across rows. The columns
    are contiguous, as LAPACK wants them.
    """
    matrix = packed.new_empty((width, width))
    for block, view in block_views(packed, width, (0, width)):
        square = view[:, : block.stop - block.start]
        matrix[block.start : block.stop, block.start :] = view
        matrix[block.start : block.stop, block.start : block.stop] = (square + square.T) / 2
    return matrix.mT


def trace_and_frobenius_sq(packed: Tensor, width: int, rows: tuple[int, int] | None = None) -> tuple[float, float]:
    """tr S and ‖S‖²_F of the symmetric matrix S that is packed, summed in float64, a tile at a time.

    Outside the squares on the diagonal a packed number stands for two entries of the matrix and counts twice.
    On a GPU it waits for the device, once.

    Args:
        packed: the packed triangle, or the slice of it that holds `rows`.
        width: D.
        rows: [start, stop) of the matrix; all where not given. What the blocks of a matrix give adds up to the whole.
    """
    trace = torch.zeros((), dtype=torch.float64, device=packed.device)
    frobenius_sq = torch.zeros((), dtype=torch.float64, device=packed.device)
    for block, view in block_views(packed, width, rows or (0, width)):
        square = min(TILE_ROWS, width - block.first_column)
        squares_of_columns = view.to(torch.float64).square().sum(0)
        trace += view.diagonal(block.start - block.first_column).double().sum()
        frobenius_sq += squares_of_columns[:square].sum() + 2 * squares_of_columns[square:].sum()
    trace_value, frobenius_value = torch.stack((trace, frobenius_sq)).tolist()
    return trace_value, frobenius_value
