"""Nothing lost, nothing twice, whatever fails: storms of a few seeds.

Many more by hand: `make chaos ARGS="--seeds 20"`. A failure prints its faults, and `make chaos ARGS="--seed N"` draws
the same again.
"""

import pytest

from tests.chaos.faults import draw, tokens_of
from tests.chaos.storm import Storm


@pytest.mark.parametrize(("seed", "form"), [(10, "cluster"), (11, "own")])
def test_after_a_storm_every_sampled_step_is_there_once_and_right(seed, form, tmp_path):
    with Storm(tmp_path, form=form, schedule=draw(seed, form, 5), tokens=tokens_of(seed)) as storm:
        storm.run()
        assert storm.judged() == []
