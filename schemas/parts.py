"""Parts: the Parquet files of a table, what their names say, and which of them count.

    part-<time>-<id>.parquet                          what a writer wrote
    part-<time>-<id>.merged-<published>-<id>.parquet  what compaction wrote in place of others
    ….settled.parquet                                 of records: one attempt, and each key once

A part never changes. A merged part names, in its footer, the parts whose rows it took over; from the moment in which
it is visible those do not count, and each row is in exactly one part that counts. Whoever lists the parts decides so
alone, from one listing: nothing else has to change together with it, so there is no moment in between.

A merged part's name begins like the last of those that it replaces, so it replaces nothing that sorts after it: a
folder of one merged part and what was written since is read without opening the merged part first.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .tables import TABLES

_SUFFIX = ".parquet"
_MERGED = ".merged-"
_SETTLED = ".settled"
_TIME = "%Y%m%dT%H%M%S.%f"
_REPLACES = b"eigenwatch_replaces"
_VERSION = b"eigenwatch_schema_version"
ROW_GROUP_BYTES = 8 << 20
"""Of rows in memory: small enough that a question about one layer skips most of a large part."""


class Footer(NamedTuple):
    """What a part says of itself."""

    version: int
    """Of the schema that it follows; 0 where it does not say."""
    replaces: frozenset[str]


class Standing(NamedTuple):
    """Which parts of one folder count."""

    live: list[str]
    """In the order in which they were written."""
    dead: dict[str, str]
    """Those that do not count, each with the merged part that was the first reason."""
    void: frozenset[str]
    """Merged parts among the dead whose rows another merged part had taken over already."""


def is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(_SUFFIX)


def is_merged(name: str) -> bool:
    return _MERGED in name


def is_settled(name: str) -> bool:
    """Whether the records of a run that has this part alone need not be compared with each other to be shown."""
    return name.endswith(_SETTLED + _SUFFIX)


def part_name(now: datetime) -> str:
    """A new name for a writer's file; names sort by time."""
    return f"part-{now:{_TIME}}-{uuid.uuid4().hex[:8]}{_SUFFIX}"


def merged_name(replaced: Iterable[str], now: datetime, *, settled: bool = False) -> str:
    """A new name for the part that replaces these, published now."""
    state = _SETTLED if settled else ""
    return f"{max(map(_stem, replaced))}{_MERGED}{now:{_TIME}}-{uuid.uuid4().hex[:8]}{state}{_SUFFIX}"


def published(name: str) -> datetime:
    """When a merged part became visible, by the clock of who wrote it."""
    stamp = name.partition(_MERGED)[2].rpartition("-")[0]
    return datetime.strptime(stamp, _TIME).replace(tzinfo=UTC)


def to_be_opened(names: Iterable[str]) -> list[str]:
    """The merged parts of one folder that may take rows away from another part of it."""
    names = list(names)
    merged = [name for name in names if is_merged(name)]
    first = len(merged) == 1 and all(_stem(merged[0]) < _stem(name) for name in names if name != merged[0])
    return [] if first else merged


def standing(names: Iterable[str], replaced_by: Callable[[str], frozenset[str]]) -> Standing:
    """Which parts of one folder count.

    Where two merged parts took over the same part, since two compactions ran at once, the one published first counts,
    and of the other neither its rows nor what it replaces.

    Args:
        names: of one listing.
        replaced_by: what a merged part replaces; asked only of `to_be_opened`.
    """
    names = sorted(names)
    dead: dict[str, str] = {}  # what is removed already is among them, so that it cannot be taken over again
    void: set[str] = set()
    for merged in sorted(to_be_opened(names), key=lambda name: (published(name), name)):
        replaced = replaced_by(merged)
        rival = next((dead[name] for name in sorted(replaced) if name in dead and dead[name] not in replaced), None)
        if rival is None or merged in dead:  # the latter where a clock was set back: what replaced it knows all that
            dead = dict.fromkeys(replaced, merged) | dead
        else:
            dead[merged] = rival
            void.add(merged)
    live = [name for name in names if name not in dead]
    return Standing(live, {name: dead[name] for name in names if name in dead}, frozenset(void))


def encode(table: pa.Table, name: str, replaces: Iterable[str] = ()) -> pa.Buffer:
    """The bytes of a part.

    Args:
        table: rows in the schema of `name`.
        name: of the table.
        replaces: the parts whose rows these are, for a merged part.

    Raises:
        pa.ArrowException: a value that the schema does not allow.
    """
    metadata = dict(TABLES[name].metadata)
    if replaces:
        metadata[_REPLACES] = json.dumps(sorted(replaces)).encode()
    sink = pa.BufferOutputStream()
    wide = name == "eigenvalues"
    row_bytes = max(table.nbytes // max(table.num_rows, 1), 1)
    # Spectra hardly repeat: byte-stream split lets zstd find what their exponents share.
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        use_dictionary=not wide,
        use_byte_stream_split=["eigenvalues.list.element"] if wide else False,
        row_group_size=max(ROW_GROUP_BYTES // row_bytes, 1),
    )
    return sink.getvalue()


def footer_of(metadata: dict[bytes, bytes] | None) -> Footer:
    """What a Parquet file's own metadata says."""
    metadata = metadata or {}
    return Footer(int(metadata.get(_VERSION, b"0")), frozenset(json.loads(metadata.get(_REPLACES, b"[]"))))


def _stem(name: str) -> str:
    return name.removesuffix(_SUFFIX).partition(_MERGED)[0]
