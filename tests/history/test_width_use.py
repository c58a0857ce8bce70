"""The verdict on each layer, and the opening question answered in words."""

from pathlib import Path

import numpy as np
import pytest
from eigenwatch.history import open_history
from eigenwatch.history.measured import read_grid
from eigenwatch.history.width_use import LayerVerdict, answer, held_since, layer_verdicts, named

from tests.history.reported import collapsing, train
from tests.history.stored import NOT_FINITE, record, write

YES, NO = True, False


def uses(store: Path, run_id: str = "r") -> list[LayerVerdict]:
    with open_history(store) as history:
        return layer_verdicts(read_grid(history, run_id))


def healthy(step: int, layer: int = 0, **columns: object) -> dict[str, object]:
    return record(step, layer, effective_dimension=60.0, variance_10=0.5, **columns)


@pytest.mark.parametrize(
    ("enter", "leave", "since"),
    [
        ([NO, YES, YES, YES], [YES, NO, NO, NO], 1),
        ([NO, NO, YES, YES], [YES, YES, NO, NO], None),
        ([YES, YES, YES, NO, NO], [NO, NO, NO, YES, YES], 0),
        ([YES, YES, YES, NO, NO, NO], [NO, NO, NO, YES, YES, YES], None),
        ([YES, YES, YES, NO, NO, NO], [NO, NO, NO, NO, NO, NO], 0),
        ([YES, YES, YES, NO, NO, NO, YES, YES, YES], [NO, NO, NO, YES, YES, YES, NO, NO, NO], 6),
        ([YES, YES], [NO, NO], 0),
        ([], [], None),
    ],
)
def test_a_state_needs_three_samples_in_a_row_to_begin_and_to_end(
    enter: list[bool], leave: list[bool], since: int | None
) -> None:
    assert held_since(np.array(enter, dtype=bool), np.array(leave, dtype=bool), 3) == since


def test_a_layer_that_collapses_is_named_with_the_step_from_which_on_it_does(tmp_path: Path) -> None:
    train(tmp_path, "r", collapsing)
    found = uses(tmp_path)
    assert [(use.state, use.since_step) for use in found] == [("collapsed", 20)] + 3 * [("in use", None)]
    assert answer(found).startswith(
        "1 of 4 layers wastes its width. Layer 0 has collapsed, since step 20: 1 dominant directions of 64. "
    )


def test_a_collapse_lasts_until_its_alert_would_be_resolved(tmp_path: Path) -> None:
    ranks = (1.5, 1.5, 1.5, 2.5, 2.5, 2.5)
    rows = [healthy(step, hard_rank=rank, spectral_concentration=0.98) for step, rank in enumerate(ranks)]
    write(tmp_path, "r", "records", *rows)
    assert uses(tmp_path)[0].state == "collapsed"
    write(tmp_path, "r", "records", *[healthy(step, hard_rank=3.5, hard_utilization=0.01) for step in (6, 7, 8)])
    assert uses(tmp_path)[0].state == "in use"


def test_a_front_loaded_layer_and_one_far_behind_the_others_are_told_apart(tmp_path: Path) -> None:
    for step in range(4):
        rows = [healthy(step, layer) for layer in range(4)]
        rows[1]["variance_10"] = 0.95
        rows[3]["effective_dimension"] = 20.0 if step else 60.0
        write(tmp_path, "r", "records", *rows)
    found = uses(tmp_path)
    assert [use.state for use in found] == ["in use", "front-loaded", "in use", "behind"]
    assert [use.since_step for use in found] == [None, 0, None, 1]
    assert "Layer 3 lies behind, since step 1: 20 effective directions of 256" in answer(found)


def test_activations_that_are_not_finite_are_the_first_thing_said(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", healthy(0), *[record(step, **NOT_FINITE) for step in (10, 20, 30)])
    assert answer(uses(tmp_path)).endswith("Layer 0 had activations that are not finite since step 10.")


def test_a_run_that_wastes_nothing_is_told_so(tmp_path: Path) -> None:
    write(tmp_path, "r", "records", *[healthy(step, layer) for step in range(4) for layer in range(2)])
    said = answer(uses(tmp_path))
    assert said == "No layer wastes its width by these measures. All 2 layers use 60 effective directions of 256."


@pytest.mark.parametrize(
    ("layers", "text"), [([3], "layer 3"), ([0, 1, 2, 5], "layers 0–2 and 5"), ([1, 3], "layers 1 and 3")]
)
def test_neighbouring_layers_are_named_in_short(layers: list[int], text: str) -> None:
    assert named(layers) == text
