"""What may name a run: it becomes a folder, a Prometheus label and an SQL literal."""

import json

import pytest
from eigenwatch.schemas import SITES, LayerDescription, RecordKey, RunDescription, SeriesKey, check_run_id


@pytest.mark.parametrize("run_id", ["a", "7", "llama-130m", "2026-01-01_seed.0", "A" * 128, "a..b", "a-", "a_"])
def test_run_ids_that_are_allowed(run_id):
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "run_id",
    [
        "", "a" * 129, "a/b", "/a", "..", ".a", "-a", "_a", "a b", " a", "a\n", "\na", "a\0", "a\\b", "a'b", 'a"b',
        "a=b", "a%2Fb", "é", "aé", "１", "a\N{ZERO WIDTH SPACE}", "run:1", None, 7, b"a",
    ],
)  # fmt: skip
def test_run_ids_that_are_refused_in_one_line_that_names_them(run_id):
    with pytest.raises(ValueError, match="run_id") as refused:
        check_run_id(run_id)
    assert repr(run_id) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_cannot_be_described_under_another_name():
    with pytest.raises(ValueError, match="'a/b'"):
        RunDescription(run_id="a/b", launch_id="0", world_size=1, layers=())


def test_a_record_belongs_to_the_series_that_differs_only_by_step():
    key = RecordKey("run", 1, 500, 3, "post", 7)
    assert key.series == SeriesKey("run", 1, 3, "post", 7)
    assert key._replace(step=501).series == key.series


def test_a_run_description_survives_json_and_the_wire():
    layers = tuple(
        LayerDescription(layer=index, site=site, expert=expert, name=f"h.{index}", width=8, shares=((0, 2), (5,)))
        for index, site, expert in [(0, "post", None), (1, "pre", 3)]
    )
    run = RunDescription(run_id="run", launch_id="l", world_size=3, layers=layers, tags={"norm": "pre"})
    assert RunDescription.from_wire(json.loads(json.dumps(run.to_wire()))) == run


def test_a_layer_is_observed_at_a_known_site():
    with pytest.raises(ValueError, match="site must be one of"):
        LayerDescription(layer=0, site="middle", name="h.0", width=8, shares=((0,),))
    assert SITES == ("post", "pre")


def test_a_layer_says_which_rows_of_which_share_each_rank_sends():
    layer = LayerDescription(layer=0, site="post", name="h.0", width=8, shares=((4, 1), (0,)))
    assert layer.ranks == (0, 1, 4)
    assert [layer.block_of(rank) for rank in (4, 1, 0)] == [(1, (0, 4)), (1, (4, 8)), (0, (0, 8))]
    assert layer.block_of(2) is None


def test_a_rank_holds_one_share():
    with pytest.raises(ValueError, match="one share"):
        LayerDescription(layer=0, site="post", name="h.0", width=8, shares=((0, 1), (1, 2)))
