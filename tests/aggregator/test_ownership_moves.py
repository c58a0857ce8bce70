"""A layer moves from one shard to another on the same store: who answers what, and who shows it."""

from eigenwatch.schemas import RunDescription

from tests.aggregator.test_shard import (  # noqa: F401 - a fixture
    FLUSH_SECONDS,
    KEY,
    fates,
    layer,
    open_shard,
    partial,
    push,
    run,
    stored,
    wait_for_rows,
)
from tests.processes import wait_until


def two_layers() -> RunDescription:
    return run(layer(layer=0), layer(layer=1))


def own(shard, layers: list[int], epoch: int) -> None:
    shard.open_run(two_layers().to_wire(), 0, layers, epoch)


def test_a_layer_that_moved_is_pushed_to_its_new_owner_and_stored_once(open_shard, tmp_path):  # noqa: F811
    old, new = open_shard(two_layers()), open_shard(two_layers())
    own(old, [0, 1], 1)
    own(new, [], 1)
    assert push(old, partial(0)) == ["merged"]
    assert push(new, partial(0)) == ["unknown_run"], "the courier asks anew who owns it"
    own(old, [1], 2)
    own(new, [0], 2)
    assert push(old, partial(0), partial(1)) == ["unknown_run"] * 2
    assert fates(old) == ["unknown"]
    assert push(new, partial(0), partial(1)) == ["merged"] * 2
    (record,) = wait_for_rows(tmp_path, 1)
    assert (record["complete"], record["tokens"]) == (True, 80)
    assert old.close(FLUSH_SECONDS) == 0
    assert len(stored(tmp_path)) == 1, "what the old owner had of it is gone"


def test_the_new_owner_knows_what_is_stored_and_shows_the_series_the_old_one_shows_no_longer(open_shard, tmp_path):  # noqa: F811
    old, new = open_shard(two_layers()), open_shard(two_layers())
    own(old, [0, 1], 1)
    own(new, [], 1)
    push(old, partial(0), partial(1))
    wait_until(lambda: fates(old) == ["durable"], "its durability")
    assert [one.series.layer for one in old.snapshot([]).latest] == [0]
    assert new.snapshot([]).latest == []
    own(old, [1], 2)
    own(new, [0], 2)
    assert old.snapshot([]).latest == []
    assert [(one.series.layer, one.step) for one in new.snapshot([]).latest] == [(0, KEY.step)]
    assert fates(new) == ["durable"]
    assert push(new, partial(0)) == ["durable"]


def test_an_ownership_that_is_older_changes_nothing(open_shard):  # noqa: F811
    shard = open_shard(two_layers())
    own(shard, [0], 5)
    own(shard, [1], 4)
    assert push(shard, partial(0)) == ["merged"]
    own(shard, [0, 1], 6)
    assert push(shard, partial(1)) == ["merged"], "what was merged of a layer that stayed is kept"
