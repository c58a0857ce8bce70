"""Compaction: many small parts become few large ones, while runs write, queries read and anything may be killed.

Why no reader ever misses a row or sees one twice:

1. Parts never change, and a merged part becomes visible whole (`schemas.store`). It names the parts whose rows it has
   (`schemas.parts`), so the one act that makes it visible also makes those count no more. Before it, the old parts
   count; after it, the new one does. A kill before it leaves a temporary file that no reader looks at; a kill after it
   leaves a store that is done.
2. A reader lists the parts once and reads just those that count by that listing. If the listing caught the merged part,
   it passes over what that replaces; if not, the old parts are still there:
3. What is replaced is removed only `grace_seconds` after the part that replaced it was published. A reader that still
   wants it has listed before that, so a query that takes less than the grace never meets a file that has gone.
4. A merged part that is merged again passes on the names of all that is left of what it replaced. So every replaced
   part is named by a part that counts for as long as it is there: whatever a removal has left that was cut off, and
   whatever a listing has caught that is not of one moment, is passed over.
5. Writers only add parts with names of their own. What they add meanwhile is not in the listing from which compaction
   works, so it is neither merged nor replaced, and counts.
6. Compactions exclude each other by a lock of the kernel on the store's folder, which dies with its holder. An object
   store has no such lock. Two at once that took over the same part are told apart by all readers alike: the first
   published counts, the other is void as a whole, and until the grace has passed and it is removed nothing more is
   merged there. Only a compaction that stalls in its upload for longer than the grace could still do harm,
   so let one at a time run there.

Rows are laid out by layer, site, expert and step, in row groups of a few MB, so that the smallest and greatest values
that Parquet keeps of each let a question about one layer skip the rest. A part of records that has one attempt and each
key once says so in its name: the view `records` then shows its rows as they are. Retention drops spectra by the same
one act: a merged part without them replaces the parts that have them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ..schemas import SCHEMA_VERSION, TABLES
from ..schemas.object_store import one_line
from ..schemas.parts import Standing, encode, footer_of, is_merged, merged_name, published
from ..schemas.store import Place, Store, parallel

log = logging.getLogger("eigenwatch.history")

LEFTOVER_SECONDS = 3600.0
"""A temporary file that nobody has touched for so long has no writer any more."""
_SERIES_ORDER = ("layer", "site", "expert", "step", "attempt", "written_at")
ORDER = {"runs": ("attempt", "written_at")} | dict.fromkeys(("records", "eigenvalues", "alerts"), _SERIES_ORDER)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactionConfig:
    """What `eigenwatch compact` was asked for."""

    part_bytes: int = 128 << 20
    """Of rows in one merged part, uncompressed; a part of half of it or more is left as it is."""
    grace_seconds: float = 3600.0
    """How long a replaced part stays for queries under way: longer than any query takes."""
    keep_eigenvalues_seconds: float | None = None
    """Spectra written longer ago are dropped, their records stay; None keeps all."""
    dry_run: bool = False
    """Count what would be done, and do nothing."""

    def __post_init__(self) -> None:
        if self.part_bytes <= 0:
            raise ValueError(f"part_bytes must be positive, got {self.part_bytes}")
        if self.grace_seconds < 0:
            raise ValueError(f"grace_seconds must be 0 or more, got {self.grace_seconds}")
        if self.keep_eigenvalues_seconds is not None and self.keep_eigenvalues_seconds <= 0:
            raise ValueError(f"keep_eigenvalues_seconds must be positive, got {self.keep_eigenvalues_seconds}")


class Compacted(NamedTuple):
    """What was done, or would be."""

    merged: int = 0
    """Parts whose rows are in new parts now."""
    into: int = 0
    """New parts."""
    removed: int = 0
    """Replaced parts whose grace had passed, and temporary files of writers that died."""
    waiting: int = 0
    """Replaced parts that a later compaction removes."""
    spectra_dropped: int = 0
    unreadable: int = 0
    """Parts left alone because they cannot be read; the log names them."""

    def plus(self, other: Compacted) -> Compacted:
        return Compacted(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class _Part(NamedTuple):
    name: str
    rows: int
    bytes: int
    mergeable: bool
    """Whether it has this version's columns; one of an older version stays as it is."""
    oldest: datetime | None
    newest: datetime | None
    """Of `written_at`; None where there is no row."""


def compact(
    store: Store,
    config: CompactionConfig,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compacted:
    """Merges what is small, drops spectra that are too old, removes what was replaced long enough ago.

    May be repeated at any time: what is done already is not done again.

    Args:
        store: which must exist.
        config: how.
        clock: the time now.
        progress: told how many of all places are done.

    Raises:
        ValueError: another compaction is at work, the store cannot be read, or a newer eigenwatch wrote it.
        OSError: the store refused; what is done so far is done.
    """
    if config.dry_run:
        return _compact(store, config, clock, progress)
    with store.lock() as held:
        if not held:
            raise ValueError(f"another compaction of {store.uri} is under way: let it finish")
        return _compact(store, config, clock, progress)


def _compact(
    store: Store, config: CompactionConfig, clock: Callable[[], datetime], progress: Callable[[int, int], None]
) -> Compacted:
    leftovers = store.leftovers(clock() - timedelta(seconds=LEFTOVER_SECONDS))
    if not config.dry_run:
        store.remove(leftovers)
    total = Compacted(removed=len(leftovers))
    places = sorted(store.standing().items())
    for done, (place, found) in enumerate(places):
        progress(done, len(places))
        total = total.plus(_remove(store, place, found, config, clock()))
        if not found.void:
            total = total.plus(_merge(store, place, found, config, clock))
    progress(len(places), len(places))
    return total


def _remove(store: Store, place: Place, found: Standing, config: CompactionConfig, now: datetime) -> Compacted:
    """Removes the dead whose grace has passed."""

    def dead_since(name: str) -> datetime:
        reason = published(found.dead[name])
        return max(reason, published(name)) if is_merged(name) else reason

    due = [name for name in found.dead if (now - dead_since(name)).total_seconds() >= config.grace_seconds]
    if not config.dry_run:
        store.remove([f"{place.folder}/{name}" for name in due])
    return Compacted(removed=len(due), waiting=len(found.dead) - len(due))


def _merge(
    store: Store, place: Place, found: Standing, config: CompactionConfig, clock: Callable[[], datetime]
) -> Compacted:
    cutoff = None
    if place.table == "eigenvalues" and config.keep_eigenvalues_seconds is not None:
        cutoff = clock() - timedelta(seconds=config.keep_eigenvalues_seconds)
    parts = parallel(lambda name: _look(store, place, name), found.live)
    done = Compacted(unreadable=parts.count(None))
    for group in _groups([part for part in parts if part is not None and part.mergeable], config.part_bytes, cutoff):
        if config.dry_run:
            dropped = sum(_expired(store, place, part, cutoff) for part in group)
        else:
            dropped = _replace(store, place, group, found, cutoff, clock)
        done = done.plus(Compacted(len(group), 1, waiting=len(group), spectra_dropped=dropped))
    return done


def _look(store: Store, place: Place, name: str) -> _Part | None:
    path = f"{place.folder}/{name}"
    try:
        metadata = store.metadata(path)
    except (OSError, pa.ArrowInvalid) as error:
        log.warning("%s is left alone, it cannot be read: %s", store.address(path), one_line(error))
        return None
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    same = set(metadata.schema.to_arrow_schema().names) == set(TABLES[place.table].names)
    written = [
        group.column(index).statistics
        for group in groups
        for index in range(group.num_columns)
        if group.num_rows and group.column(index).path_in_schema == "written_at"
    ]
    return _Part(
        name,
        metadata.num_rows,
        sum(group.total_byte_size for group in groups),
        same and footer_of(metadata.metadata).version == SCHEMA_VERSION,
        min((one.min for one in written), default=None),
        max((one.max for one in written), default=None),
    )


def _groups(parts: list[_Part], part_bytes: int, cutoff: datetime | None) -> list[list[_Part]]:
    """Parts to replace, those of one new part together: neighbours in time that are small or hold what is too old."""
    groups: list[list[_Part]] = [[]]
    for part in parts:
        if part.bytes * 2 >= part_bytes and not _is_old(part, cutoff):
            continue
        if groups[-1] and sum(one.bytes for one in groups[-1]) + part.bytes > part_bytes:
            groups.append([])
        groups[-1].append(part)
    return [group for group in groups if len(group) > 1 or any(_is_old(part, cutoff) for part in group)]


def _is_old(part: _Part, cutoff: datetime | None) -> bool:
    return cutoff is not None and part.oldest is not None and part.oldest < cutoff


def _replace(
    store: Store,
    place: Place,
    group: list[_Part],
    found: Standing,
    cutoff: datetime | None,
    clock: Callable[[], datetime],
) -> int:
    """Publishes the part that takes the place of these; returns how many rows it left out."""
    schema = TABLES[place.table]
    paths = [f"{place.folder}/{part.name}" for part in group]
    table = pa.concat_tables(one.select(schema.names).cast(schema) for one in parallel(store.read, paths))
    rows: int = table.num_rows
    if cutoff is not None:
        table = table.filter(pc.greater_equal(table["written_at"], pa.scalar(cutoff, schema.field("written_at").type)))
    table = table.sort_by([(column, "ascending") for column in ORDER[place.table]])
    names = {part.name for part in group}
    data = encode(table, place.table, replaces=_with_what_they_replace(names, found.dead))
    if not names.issubset(store.live(place.run_id).get(place, [])):
        raise ValueError(f"another compaction of {store.uri} is under way: let one at a time run")
    settled = place.table == "records" and _is_settled(table)
    store.put(f"{place.folder}/{merged_name(names, clock(), settled=settled)}", data)
    return rows - int(table.num_rows)


def _is_settled(records: pa.Table) -> bool:
    """Whether the view `records` shows all of them: one attempt, and no second revision of any."""
    keys = records.group_by(["step", "layer", "site", "expert"]).aggregate([])
    return bool(keys.num_rows == records.num_rows and pc.count_distinct(records["attempt"]).as_py() == 1)


def _with_what_they_replace(names: set[str], dead: dict[str, str]) -> set[str]:
    found = set(names)
    while more := {name for name, reason in dead.items() if reason in found} - found:
        found |= more
    return found


def _expired(store: Store, place: Place, part: _Part, cutoff: datetime | None) -> int:
    if cutoff is None or not _is_old(part, cutoff):
        return 0
    assert part.newest is not None
    if part.newest < cutoff:
        return part.rows
    written = store.read(f"{place.folder}/{part.name}", ["written_at"])["written_at"]
    return int(pc.sum(pc.less(written, pa.scalar(cutoff, written.type))).as_py())
