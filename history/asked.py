"""Which runs a statement asks about, read from the statement: only their files are listed and named to DuckDB.

DuckDB skips the files of other runs by itself, but only once it has heard of every one of them, and thousands of runs
take longer to list than one to read. So where each view of a statement stands alone in a FROM, with `run_id = 'a'` or
`run_id IN ('a', 'b')` among the conditions of its WHERE, and each macro names its runs, no other run is looked at.
Whatever is not plainly so asks about all of them. Pure: a parsed statement in, names out.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..schemas import RUN_ID_PATTERN
from ..schemas.views import VIEWS, table_macros

Parameters = Sequence[Any] | dict[str, Any] | None
Parsed = dict[str, Any]
"""An object of DuckDB's JSON of a statement."""

VIEWLESS = frozenset(
    {"duckdb_functions", "duckdb_settings", "generate_series", "json_each", "json_tree", "range", "unnest"}
)
"""Functions in FROM that read no view."""
_RUN_ARGUMENTS = {"compare": ("run_a", "run_b"), "alert_evidence": ("", "run")}
"""The arguments of a macro that name runs, by place; of all others it is the first."""


def asked_runs(statement: Parsed, parameters: Parameters = None) -> frozenset[str] | None:
    """The runs that a statement can show, or None for all.

    Args:
        statement: as `json_serialize_sql` gives it.
        parameters: the values for `?` or `$name` in it.
    """
    confined: dict[int, set[str]] = {}  # by the id() of the table in FROM
    for part in parts(statement):
        table = part.get("from_table")
        renamed = isinstance(table, dict) and table.get("column_name_alias")  # `run_id` may then be any column
        if isinstance(table, dict) and _view(table) and part.get("where_clause") and not renamed:
            name = table.get("alias") or table["table_name"]
            for condition in _conditions(part["where_clause"]):
                runs = _compared(condition, name, parameters)
                if runs is not None:
                    confined[id(table)] = runs & confined.get(id(table), runs)
    asked: set[str] = set()
    for part in parts(statement):
        kind = part.get("type")
        if kind == "SHOW_REF":
            return None
        runs = set()
        if _view(part):
            runs = confined.get(id(part))
        elif kind == "TABLE_FUNCTION":
            runs = _arguments(part["function"], parameters)
        if runs is None:
            return None
        asked |= runs
    return frozenset(asked) if all(re.fullmatch(RUN_ID_PATTERN, run) for run in asked) else None


def parts(node: Any) -> Iterator[Parsed]:
    """Every object of a parsed statement. A loop, since expressions nest deeply."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _view(part: Parsed) -> bool:
    return part.get("type") == "BASE_TABLE" and part["table_name"].lower() in VIEWS


def _conditions(where: Parsed) -> Iterator[Parsed]:
    """What must hold at the same time."""
    if where["type"] == "CONJUNCTION_AND":
        for child in where["children"]:
            yield from _conditions(child)
    else:
        yield where


def _compared(condition: Parsed, table: str, parameters: Parameters) -> set[str] | None:
    match condition:
        case {"type": "COMPARE_EQUAL", "left": column, "right": value} if _is_run_id(column, table):
            return _texts([value], parameters)
        case {"type": "COMPARE_EQUAL", "left": value, "right": column} if _is_run_id(column, table):
            return _texts([value], parameters)
        case {"type": "COMPARE_IN", "children": [column, *values]} if _is_run_id(column, table):
            return _texts(values, parameters)
    return None


def _is_run_id(expression: Parsed, table: str) -> bool:
    """Of this table, not of one around it."""
    if expression["type"] != "COLUMN_REF":
        return False
    *qualifier, column = (name.lower() for name in expression["column_names"])
    return bool(column == "run_id" and qualifier in ([], [table.lower()]))


def _arguments(function: Parsed, parameters: Parameters) -> set[str] | None:
    name = function["function_name"].lower()
    if name in VIEWLESS:
        return set()
    if name not in table_macros():
        return None
    named = _RUN_ARGUMENTS.get(name, ("run",))
    found: list[Parsed] = []
    for place, argument in enumerate(function.get("arguments", ())):
        if argument.get("name", "").lower() in ("run", "runs", "run_a", "run_b") or (
            not argument.get("name") and place < len(named) and named[place]
        ):
            found.append(argument["expression"])
    return _texts(found, parameters) if len(found) == len([one for one in named if one]) else None


def _texts(values: list[Parsed], parameters: Parameters) -> set[str] | None:
    """The texts that these expressions are, lists of texts among them; None where one is anything else."""
    texts: set[str] = set()
    for value in values:
        match value:
            case {"type": "VALUE_CONSTANT", "literal": {"kind": "STRING", "text": str(text)}}:
                texts.add(text)
            case {"type": "FUNCTION", "function_name": "list_value", "arguments": arguments}:
                within = _texts([argument["expression"] for argument in arguments], parameters)
                if within is None:
                    return None
                texts |= within
            case {"type": "VALUE_PARAMETER", "identifier": identifier}:
                given = _given(identifier, parameters)
                if not given or not all(isinstance(text, str) for text in given):
                    return None
                texts.update(given)
            case _:
                return None
    return texts


def _given(identifier: str, parameters: Parameters) -> list[Any]:
    if isinstance(parameters, dict):
        value = parameters.get(identifier)
    elif parameters is not None and identifier.isdigit() and int(identifier) <= len(parameters):
        value = parameters[int(identifier) - 1]
    else:
        value = None
    return list(value) if isinstance(value, list | tuple) else [value]
