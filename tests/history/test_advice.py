"""Advice on width, and what the data cannot tell: from stores of which the answer is known."""

import math
from pathlib import Path

import numpy as np
import pytest
from eigenwatch.history import Selection, advise, fit, open_history
from eigenwatch.history.limits import change

from tests.history.stored import record, run, write
from tests.history.sweep import WIDTHS, ranks, write_run, write_sweep


def fitted(store: Path, **selection):
    with open_history(store) as history:
        (found,) = fit(history, Selection(**selection))
    return found


def saturating(store: Path, beta: float, noise: float = 0.0, seed: int = 0, height: float = 2.0, **options) -> Path:
    """Runs whose effective dimension, hard and soft rank are all height · D^β, but for noise."""
    random = np.random.default_rng(seed)
    for width in WIDTHS:
        rank = height * width**beta * math.exp(noise * random.standard_normal())
        write(store, f"r{width}", "records", record(0, width=width, hard_rank=rank, soft_rank=rank, **options))
    return store


def limits(store: Path, **selection) -> str:
    return "\n".join(fitted(store, **selection).limits)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def test_the_knee_is_where_the_derivative_of_the_law_meets_the_threshold(tmp_path: Path) -> None:
    found = fitted(saturating(tmp_path, 0.5))
    knee = advise(found, gain=0.02).knee  # 2·0.5·D^−½ = 0.02 at D = 2500
    assert knee.width == pytest.approx(2500, rel=1e-6)
    assert (knee.low, knee.high) == pytest.approx((2500, 2500), rel=1e-6)
    assert [gain.value for gain in knee.gains] == pytest.approx([width**-0.5 for width in WIDTHS])
    half = advise(found).knee  # half of the gain at 256 is the gain at four times that
    assert half.width == pytest.approx(1024, rel=1e-6)
    assert "It falls under 0.031, half of it at width 256, at width 1.02e+03 (95 % interval" in half.text


def test_the_interval_of_the_knee_covers_it_in_95_of_100_sweeps() -> None:
    from eigenwatch.history.advice import _knee
    from eigenwatch.history.laws import width_law
    from eigenwatch.history.points import Point, Spread

    covered = 0
    for seed in range(300):
        noise = np.exp(0.02 * np.random.default_rng(seed).standard_normal(len(WIDTHS)))
        values = [float(2 * width**0.5 * factor) for width, factor in zip(WIDTHS, noise, strict=True)]
        points = [
            Point("r", width, 1, 9.0, 0, {"effective_dimension": Spread(value, value, value)})
            for width, value in zip(WIDTHS, values, strict=True)
        ]
        knee = _knee(points, width_law(WIDTHS, values, metric="effective_dimension"), 0.02)
        covered += knee.low <= 2500 <= knee.high
    assert abs(covered / 300 - 0.95) < 0.038  # three standard errors


@pytest.mark.parametrize(
    ("beta", "gain", "words"),
    [
        (0.5, 0.001, "at width 1e+06 (95 % interval 1e+06 to 1e+06); that is beyond the widest run, by extrapolation."),
        (0.5, 0.5, "It is under 0.5, as chosen, at every width here"),
        (1.0, 0.5, "It does not fall with the width"),
    ],
)
def test_a_knee_outside_the_sweep_is_said_to_be_there(tmp_path: Path, beta: float, gain: float, words: str) -> None:
    height = 2.0 if beta < 1 else 0.9
    assert words in advise(fitted(saturating(tmp_path, beta, height=height)), gain=gain).knee.text


def test_there_is_no_knee_where_effective_dimension_is_not_shown_to_grow(tmp_path: Path) -> None:
    advice = advise(fitted(saturating(tmp_path, 0.1, noise=0.5)))
    assert advice.knee is None
    assert advice.knee_missing.startswith("effective dimension is not shown to grow with the width (β ")


def test_a_gain_must_be_positive(store: Path) -> None:
    with pytest.raises(ValueError, match=r"gain must be positive, such as 0.02 .* got 0"):
        advise(fitted(store), gain=0.0)


def test_layers_to_prune_are_those_that_stay_far_below_their_runs_median(store: Path) -> None:
    advice = advise(fitted(store))
    assert {(found.use.layer, found.use.width) for found in advice.prune} == {(1, width) for width in WIDTHS}
    assert [found.of_median for found in advice.prune] == sorted(found.of_median for found in advice.prune)
    first = advice.prune[0]
    assert first.of_median < 0.5
    assert (first.use.low_samples, first.use.samples) == (3, 3)
    assert f"{first.use.run_id}, layer 1: effective dimension {first.use.effective_dimension:.1f} of " in first.text
    assert "in 3 of 3 samples; under half of it since step 0;" in first.text


def test_a_layer_that_is_low_once_in_a_while_is_not_to_prune(tmp_path: Path) -> None:
    write_sweep(tmp_path, factors=(1.0, 1.0, 1.0))
    write(tmp_path, "llama-256", "records", record(280, 1, width=256, written=1e6, **ranks(256, 0.2)))
    assert advise(fitted(tmp_path)).prune == ()


def test_a_layer_is_low_since_the_sample_after_its_last_good_one(tmp_path: Path) -> None:
    for step in range(0, 100, 10):
        rows = [record(step, layer, width=256, **ranks(256)) for layer in range(3)]
        write(tmp_path, "r", "records", *rows, record(step, 3, width=256, **ranks(256, 1.0 if step < 60 else 0.2)))
    (found,) = advise(fitted(tmp_path, last=0.3)).prune
    assert (found.use.layer, found.use.low_since) == (3, 60)
    assert "-8" in found.text  # per cent since the window before, which has some good samples


def test_layers_that_can_use_more_width_are_full_and_rise_with_it(store: Path) -> None:
    advice = advise(fitted(store))
    assert {found.use.layer for found in advice.widen} == {3}
    assert len(advice.widen) == len(WIDTHS)
    assert advice.widen[0].law.beta > advice.widen[0].law.beta_ci95
    assert "goes as D^(0.56 ± 0.01) over the runs" in advice.widen[0].text


def test_a_full_layer_that_rises_neither_with_width_nor_training_gets_no_more(tmp_path: Path) -> None:
    write_run(tmp_path, "still", 256)
    assert advise(fitted(tmp_path)).widen == ()
    (found,) = advise(fitted(tmp_path, steps=(200, 290))).widen
    assert found.use.layer == 3
    assert found.change > 0.05
    assert found.law is None


def test_one_run_gets_advice_on_its_layers_and_no_knee(tmp_path: Path) -> None:
    write_run(tmp_path, "only", 256)
    advice = advise(fitted(tmp_path))
    assert advice.knee is None
    assert "at least 3 different widths" in advice.knee_missing
    assert [found.use.layer for found in advice.prune] == [1]
    assert "One width: nothing here says what another width would bring." in advice.limits


def test_layers_of_a_collapsed_run_are_not_judged_by_their_width(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    for layer, rank in enumerate((1.5, 1.5, 1.0)):
        write(tmp_path, "fallen", "records", record(0, layer, width=64, hard_rank=rank, soft_rank=rank))
    found = fitted(tmp_path)
    assert "fallen" not in {candidate.use.run_id for candidate in advise(found).prune}
    assert any(
        limit.startswith("fallen: collapsed, half of the layers have 2 directions or fewer.") for limit in found.limits
    )


def test_a_complete_sweep_still_says_that_ranks_are_not_loss(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_sweep(tmp_path, f"s{seed}", tags={"seed": str(seed)})
    (last,) = fitted(tmp_path).limits
    assert last.startswith("A rank says which directions carry variance, not which of them the loss needs")


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"widths": WIDTHS[:3]}, "3 widths leave a wide interval"),
        ({"widths": (256, 384, 512)}, "The widths span a factor of 2 only"),
        ({}, "One run a width"),
        (
            {"tokens_per_width": 0.5},
            "0.5 tokens a width in llama-256 (width 256): raw ranks are too low there; --corrected mends",
        ),
        ({"complete": False}, "75 of 75 records in the window are incomplete"),
        ({"steps": (0, 10)}, "1 sample a layer in the window cannot show what persists"),
        ({"steps": (0,)}, "Nothing was sampled before the window"),
        ({"steps": range(0, 20, 10)}, "Training still moves the ranks: effective dimension changed by +"),
    ],
)
def test_what_the_data_cannot_tell_is_said(tmp_path: Path, sweep, said: str) -> None:
    assert said in limits(write_sweep(tmp_path, **sweep))


def test_unequal_tokens_and_unequal_ends_are_told(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_run(tmp_path, "short", 128, steps=range(0, 100, 10), tokens_per_width=8.0)
    said = limits(tmp_path)
    assert "Tokens a width go from 4 to 8: the fewer, the lower a raw rank, so β is biased" in said
    assert "The windows end at different steps, 90 in short and 290 in llama-" in said
    assert "different steps" not in limits(tmp_path, steps=(50, 90))


def test_points_that_bend_away_from_a_line_are_told(tmp_path: Path) -> None:
    for width in WIDTHS:
        rank = 100 * width / (width + 1000)
        write(tmp_path, f"r{width}", "records", record(0, width=width, hard_rank=rank, soft_rank=rank))
    assert "do not lie on a line: they flatten, so β is too high beyond the widest run" in limits(tmp_path)


def test_runs_of_different_making_in_one_fit_are_told_and_one_making_a_width_is_not(tmp_path: Path) -> None:
    write_sweep(tmp_path, "pre", tags={"norm": "pre", "seed": "1"})
    write_run(tmp_path, "post", 256, tags={"norm": "post", "seed": "2"})
    assert "The runs differ in norm (post, pre): --by norm fits each by itself." in limits(tmp_path)
    for width in WIDTHS:
        write(tmp_path, f"pre-{width}", "runs", run(written=1e6, tags={"norm": "pre", "width": str(width)}))
    write(tmp_path, "post", "runs", run(written=1e6, tags={"norm": "pre", "width": "256"}))
    assert "differ in" not in limits(tmp_path)


def test_the_change_since_the_window_before_is_that_of_the_median_layer(tmp_path: Path) -> None:
    assert change(fitted(write_sweep(tmp_path), steps=(0, 290)).layers) is None
    assert change(fitted(tmp_path).layers) == pytest.approx(0, abs=1e-9)
