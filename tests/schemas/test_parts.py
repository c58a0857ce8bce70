"""Which parts of a folder count, whatever compaction has done to it and wherever it was cut off."""

import itertools
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eigenwatch.schemas import RECORDS, TABLES
from eigenwatch.schemas.parts import (
    encode,
    footer_of,
    is_merged,
    is_part,
    merged_name,
    part_name,
    published,
    standing,
    to_be_opened,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
A, B, C, D = (part_name(NOON + timedelta(seconds=second)) for second in range(4))


def merge(*names: str, at: int) -> str:
    return merged_name(names, NOON + timedelta(seconds=at))


def test_names_sort_as_they_were_written():
    assert sorted([D, C, B, A]) == [A, B, C, D]
    assert part_name(NOON) != part_name(NOON)
    assert all(map(is_part, (A, merge(A, at=9))))
    assert not any(map(is_part, (f".{A}.tmp", "part-1.csv", "other.parquet")))


def test_a_merged_part_tells_when_it_was_published_and_stands_where_its_last_part_stood():
    merged = merge(A, B, at=60)
    assert is_merged(merged)
    assert not is_merged(A)
    assert published(merged) == NOON + timedelta(seconds=60)
    assert A < merged < C
    again = merge(merged, C, at=90)
    assert published(again) == NOON + timedelta(seconds=90)
    assert len(again) == len(merged), "names do not grow"


def test_what_a_merged_part_replaces_counts_no_more():
    merged = merge(A, B, at=60)
    found = standing([A, B, merged, C], {merged: frozenset({A, B})}.__getitem__)
    assert found.live == [merged, C]
    assert found.dead == {A: merged, B: merged}
    assert not found.void


def test_a_merged_part_that_can_replace_nothing_is_not_opened():
    merged, later = merge(A, B, at=60), merge(C, D, at=60)
    assert to_be_opened([merged, C, D]) == []
    assert set(to_be_opened([A, merged, C])) == {merged}
    assert to_be_opened([merged]) == []
    assert set(to_be_opened([merged, later])) == {merged, later}, "which may have taken over the same part"


def test_the_first_reason_stays_the_reason():
    first = merge(A, B, at=60)
    second = merge(first, C, at=120)
    replaces = {first: frozenset({A, B}), second: frozenset({A, B, C, first})}
    found = standing([A, B, C, first, second], replaces.__getitem__)
    assert found.live == [second]
    assert found.dead == {A: first, B: first, first: second, C: second}


def test_a_clock_that_was_set_back_does_not_matter():
    first = merge(A, B, at=60)
    second = merge(first, C, at=30)
    replaces = {first: frozenset({A, B}), second: frozenset({A, B, C, first})}
    found = standing([A, B, C, first, second], replaces.__getitem__)
    assert found.live == [second]
    assert not found.void


@pytest.mark.parametrize("left", list(itertools.product([True, False], repeat=3)))
def test_whatever_is_left_of_what_was_replaced_twice_does_not_count(left):
    """A listing that is not of one moment may have caught any of it."""
    first = merge(A, B, at=60)
    second = merge(first, C, at=120)
    replaces = {first: frozenset({A, B}), second: frozenset({A, B, C, first})}
    names = [name for name, there in zip((A, B, first), left, strict=True) if there]
    assert standing([*names, second, D], replaces.__getitem__).live == [second, D]


@pytest.mark.parametrize("gone", [(), (A,), (A, B), (A, B, C)])
def test_of_two_merged_parts_with_a_part_in_common_the_one_published_first_counts(gone):
    first, second = merge(A, B, at=60), merge(B, C, at=61)
    replaces = {first: frozenset({A, B}), second: frozenset({B, C})}
    names = [name for name in (A, B, C, first, second) if name not in gone]
    found = standing(names, replaces.__getitem__)
    assert set(found.live) == {first, C} - set(gone)
    assert found.void == {second}
    assert found.dead[second] == first


@pytest.mark.parametrize("table", TABLES)
def test_a_part_says_what_it_replaces_and_which_schema_it_follows(table):
    data = encode(TABLES[table].empty_table(), table, replaces=[A, B])
    footer = footer_of(pq.read_metadata(pa.BufferReader(data)).metadata)
    assert footer.replaces == {A, B}
    assert footer.version == 1
    assert footer_of(RECORDS.metadata).replaces == frozenset()
    assert footer_of(None).version == 0
