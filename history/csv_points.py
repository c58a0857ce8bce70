"""Points of a law from a CSV file: measured elsewhere, or copied from a paper."""

import csv
from collections.abc import Iterable
from typing import NamedTuple

WIDTH_NAMES = ("width", "d", "d_ff", "dff", "d_ffn", "ffn_width", "ffn_dim", "intermediate_size")
"""How a header may call the width, in any case."""


class CsvPoints(NamedTuple):
    """Each row a point."""

    metric: str
    widths: list[float]
    values: list[float]


def read_csv_points(lines: Iterable[str], *, column: str | None = None, name: str = "CSV") -> CsvPoints:
    """The widths, and the ranks of one column.

    Args:
        lines: with a header; one column is the width, by its name.
        column: which other one is the rank; not needed where there is only one.
        name: of the file, for messages.

    Raises:
        ValueError: a column is not there, or it is not clear which one; a value is no number.

    Example:
        >>> read_csv_points(["width,rank", "256,20", "512,28"])
        CsvPoints(metric='rank', widths=[256.0, 512.0], values=[20.0, 28.0])
    """
    rows = csv.reader(lines)
    header = [cell.strip().removeprefix("\ufeff") for cell in next(rows, [])]
    columns = ", ".join(header) or "none"
    width_at = next((at for at, cell in enumerate(header) if cell.lower() in WIDTH_NAMES), None)
    if width_at is None:
        raise ValueError(f"{name} needs a header with a column named width (or D, d_ff, …), got: {columns}")
    others = [cell for at, cell in enumerate(header) if at != width_at]
    if column is None:
        if len(others) != 1:
            raise ValueError(f"{name} has columns {columns}: say which one is the rank with --column")
        column = others[0]
    if column not in others:
        raise ValueError(f"{name} has no column {column!r} beside the width, only {', '.join(others) or 'the width'}")
    value_at = header.index(column)
    points = CsvPoints(column, [], [])
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        for at, into in ((width_at, points.widths), (value_at, points.values)):
            into.append(_number(row, at, f"{name} line {rows.line_num}: {header[at]}"))
    return points


def _number(row: list[str], at: int, place: str) -> float:
    text = row[at] if at < len(row) else ""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{place} is no number: {text!r}; correct it or leave that row out") from None
