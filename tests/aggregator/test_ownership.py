"""Layers are shared out over shards by what they cost."""

from collections import Counter

import pytest
from eigenwatch.aggregator.ownership import owners
from eigenwatch.schemas import LayerDescription, RunDescription


def run(widths: list[int], run_id: str = "run", sites: tuple[str, ...] = ("post",)) -> RunDescription:
    layers = tuple(
        LayerDescription(layer=layer, site=site, name="down", width=width, shares=((0,),))
        for layer, width in enumerate(widths)
        for site in sites
    )
    return RunDescription(run_id=run_id, launch_id="launch", world_size=1, layers=layers)


def loads(run: RunDescription, shards: list[str]) -> Counter[str]:
    """Cubes of widths by shard."""
    owned = owners(run, shards)
    return sum((Counter({owned[one.layer]: one.width**3}) for one in run.layers), Counter())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_equal_layers_are_shared_out_evenly(count):
    shards = [f"shard-{k}" for k in range(count)]
    counted = Counter(owners(run([1024] * 80), shards).values())
    assert counted.keys() == set(shards)
    assert max(counted.values()) - min(counted.values()) <= 1


def test_a_dear_layer_has_a_shard_for_itself_while_the_others_share_the_rest():
    widths = [4096] + [1024] * 40
    shares = loads(run(widths), ["a", "b"])
    assert max(shares.values()) == 4096**3
    assert owners(run(widths), ["a", "b"])[0] not in {owners(run(widths), ["a", "b"])[k] for k in range(1, 41)}


@pytest.mark.parametrize("seed", range(5))
def test_no_shard_has_a_third_more_than_its_part(seed):
    widths = [256 * (1 + (seed + 7 * k) % 11) for k in range(60)]
    shares = loads(run(widths), ["a", "b", "c"])
    assert max(shares.values()) <= 4 / 3 * sum(shares.values()) / 3


def test_runs_of_one_layer_do_not_all_go_to_one_shard():
    assert {owners(run([512], run_id=f"run-{k}"), ["a", "b", "c"])[0] for k in range(30)} == {"a", "b", "c"}


def test_the_answer_is_the_same_in_every_process():
    assert owners(run([512, 1024, 2048], "fixed"), ["a", "b"]) == {2: "a", 1: "b", 0: "b"}


def test_both_sites_count_and_have_one_owner():
    owned = owners(run([1024] * 4, sites=("post", "pre")), ["a", "b"])
    assert Counter(owned.values()) == {"a": 2, "b": 2}
