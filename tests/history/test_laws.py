"""Laws of rank against width: from points, and from the runs of a store."""

import re
from pathlib import Path

import numpy as np
import pytest
from eigenwatch.history import Selection, fit, fit_by_step, open_history, width_law
from eigenwatch.history.csv_points import read_csv_points
from eigenwatch.history.fits import stable_from
from eigenwatch.history.laws import asymmetry, growth
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.stored import NOT_FINITE, record, write
from tests.history.sweep import HARD, SOFT, STEPS, WIDTHS, ranks, write_run, write_sweep

PAPER_WIDTHS = [768 * alpha for alpha in (1, 2, 2.67, 4, 5, 6, 7, 8)]
PAPER_HARD = [14, 30, 32, 25, 50, 31, 76, 53]
PAPER_SOFT = [135, 442, 525, 582, 1184, 964, 1521, 1257]

widths_st = st.lists(st.integers(1, 65536), min_size=3, max_size=12, unique=True)
betas = st.floats(-2, 2)
scales = st.floats(1e-3, 1e3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def fitted(store: Path, by: str | None = None, **selection):
    with open_history(store) as history:
        return fit(history, Selection(**selection), by=by)


@pytest.mark.parametrize(("values", "expected"), [(PAPER_HARD, "0.612 0.404 0.696"), (PAPER_SOFT, "1.070 0.293 0.930")])
def test_the_papers_example_comes_out_to_the_digits(values: list[float], expected: str) -> None:
    law = width_law(PAPER_WIDTHS, values)
    assert f"{law.beta:.3f} {law.beta_ci95:.3f} {law.r2:.3f}" == expected


@settings(deadline=None, max_examples=25)
@given(widths_st, betas, scales)
def test_an_exact_power_law_gives_back_its_exponent(widths: list[int], beta: float, scale: float) -> None:
    law = width_law(widths, [scale * width**beta for width in widths])
    assert law.beta == pytest.approx(beta, abs=1e-6)
    assert law.beta_ci95 == pytest.approx(0, abs=1e-4)
    assert law.at(1000) == pytest.approx(scale * 1000**beta, rel=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), scales, scales)
def test_other_units_of_width_or_rank_change_the_intercept_alone(seed: int, wider: float, higher: float) -> None:
    random = np.random.default_rng(seed)
    values = [width**0.7 * np.exp(0.2 * random.standard_normal()) for width in WIDTHS]
    law = width_law(WIDTHS, values)
    scaled = width_law([wider * width for width in WIDTHS], [higher * value for value in values])
    assert scaled[1:3] == pytest.approx(law[1:3])
    assert scaled.r2 == pytest.approx(law.r2)
    assert scaled.intercept == pytest.approx(law.intercept + np.log(higher) - law.beta * np.log(wider))


@pytest.mark.parametrize("widths", [WIDTHS[:3], WIDTHS])
def test_the_interval_covers_the_true_exponent_in_95_of_100_samples(widths: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    noise = np.exp(0.3 * random.standard_normal((600, len(widths))))
    laws = [width_law(widths, list(np.array(widths) ** 0.8 * row)) for row in noise]
    covered = sum(abs(law.beta - 0.8) <= law.beta_ci95 for law in laws)
    assert abs(covered / 600 - 0.95) < 0.027  # three standard errors


def test_ranks_that_never_vary_have_exponent_0_and_no_r2() -> None:
    law = width_law(WIDTHS, [1.0] * len(WIDTHS))
    assert (law.beta, law.beta_ci95, law.r2) == (0, 0, None)


@pytest.mark.parametrize(
    ("widths", "values", "message"),
    [
        ([256, 256, 512], [1, 2, 3], r"at least 3 different widths, got 2 \(256, 512\): add runs of 1 more width$"),
        ([], [], r"got 0 \(none\): add runs of 3 more widths"),
        ([1, 2, 3], [1, 2], "one rank for each width, got 3 widths and 2 values"),
        ([1, 2, 3], [1, 0, 2], "a rank of 0 has no logarithm: leave that point out"),
        ([1, 2, 3], [1, float("nan"), 2], "a rank of nan has no logarithm"),
        ([1, -2, 3], [1, 1, 2], "a width of -2 has no logarithm"),
    ],
)
def test_points_that_have_no_law_are_refused_with_the_reason(widths, values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        width_law(widths, values)


@pytest.mark.parametrize(
    ("beta", "noise", "words"),
    [
        (0.5, 0.01, "grows, but less than in proportion"),
        (1.0, 0.05, "growth in proportion to the width .* is within its interval"),
        (1.5, 0.01, "grows faster than the width"),
        (-0.5, 0.01, "falls as the width grows"),
        (0.0, 0.05, "does not measurably grow"),
        (0.5, 2.0, "these points cannot tell"),
    ],
)
def test_an_exponent_is_put_in_words_no_surer_than_its_interval(beta: float, noise: float, words: str) -> None:
    wiggle = np.exp(noise * np.array([1, -1, 0, -1, 1]))
    law = width_law(WIDTHS, list(np.array(WIDTHS) ** beta * wiggle))
    assert re.search(words, growth(law))


def test_tail_growth_is_told_by_the_ratio_of_the_ranks() -> None:
    tail = asymmetry(PAPER_WIDTHS, PAPER_HARD, PAPER_SOFT)
    assert tail.startswith("Tail growth: soft rank / hard rank goes as D^(0.46 ± 0.23)")
    assert asymmetry(PAPER_WIDTHS, PAPER_SOFT, PAPER_HARD).startswith("Head growth")
    wiggled = [rank * (1 + number % 2) for number, rank in enumerate(PAPER_HARD)]
    assert asymmetry(PAPER_WIDTHS, PAPER_HARD, wiggled).startswith("No asymmetry is shown")


def test_a_sweep_has_the_laws_of_its_median_layers(store: Path) -> None:
    (found,) = fitted(store)
    assert found.law("hard_rank").beta == pytest.approx(HARD)
    assert found.law("soft_rank").beta == pytest.approx(SOFT)
    assert found.law("hard_utilization").beta == pytest.approx(HARD - 1, abs=0.02)
    assert found.law("soft_utilization").beta == pytest.approx(SOFT - 1, abs=0.02)
    assert found.reading[-1].startswith("Tail growth")
    assert [point.width for point in found.points] == list(WIDTHS)
    hard = found.points[0].values["hard_rank"]
    middle = ranks(WIDTHS[0])["hard_rank"]
    assert hard == pytest.approx((middle, middle, middle))


def test_sql_fits_the_same_laws(tmp_path: Path) -> None:
    noise = dict(zip(WIDTHS, (1.0, 1.2, 0.8, 1.1, 0.9), strict=True))
    for width in WIDTHS:
        write_run(tmp_path, f"noisy-{width}", width, noise=noise[width])
        skipped = {"solver": "skipped", "hard_rank": None, "soft_rank": None}
        last = STEPS[-1]
        write(
            tmp_path, f"noisy-{width}", "records", *[record(last + n, 0, width=width, **skipped) for n in range(1, 40)]
        )
    (found,) = fitted(tmp_path)
    with open_history(tmp_path) as history:
        runs = ", ".join(f"'noisy-{width}'" for width in WIDTHS)
        rows = history.query(f"FROM width_law([{runs}])").to_pylist()
    laws = {row["metric"]: row for row in rows}
    for metric in ("hard_rank", "soft_rank"):
        mine = found.law(metric)
        assert laws[metric]["beta"] == pytest.approx(mine.beta, rel=1e-9)
        assert laws[metric]["beta_ci95"] == pytest.approx(mine.beta_ci95, rel=1e-3), "a table of Student's t"
        assert laws[metric]["r2"] == pytest.approx(mine.r2, rel=1e-9)
        assert laws[metric]["points"] == mine.points


def test_error_bars_are_the_quartiles_over_layers(tmp_path: Path) -> None:
    write_sweep(tmp_path, factors=(1.0, 2.0, 3.0, 4.0, 5.0))
    hard = fitted(tmp_path)[0].points[0].values["hard_rank"]
    middle = ranks(WIDTHS[0])["hard_rank"]
    assert hard == pytest.approx((3 * middle, 2 * middle, 4 * middle))


def test_two_runs_of_one_width_are_two_points(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_sweep(tmp_path, f"seed{seed}", WIDTHS[:3], noise=1 + seed / 10)
    (found,) = fitted(tmp_path)
    assert found.law("hard_rank").points == 6
    assert found.law("hard_rank").widths == WIDTHS[:3]


def test_the_window_is_the_last_tenth_of_the_samples_or_the_steps_that_are_named(store: Path) -> None:
    (last,) = fitted(store)
    assert {(layer.first_step, layer.last_step, layer.samples) for layer in last.layers} == {(270, 290, 3)}
    (named,) = fitted(store, steps=(0, 5))
    assert {(layer.first_step, layer.last_step, layer.samples) for layer in named.layers} == {(0, 0, 1)}
    assert named.points[0].values["hard_rank"].median == pytest.approx(last.points[0].values["hard_rank"].median / 2)


def test_a_run_of_one_sample_has_that_one_as_its_window(tmp_path: Path) -> None:
    write_sweep(tmp_path, steps=(0,))
    assert fitted(tmp_path)[0].law("hard_rank").points == len(WIDTHS)


def test_runs_are_named_by_id_or_pattern(store: Path) -> None:
    (found,) = fitted(store, runs=("llama-256", "llama-*24", "llama-4*"))
    assert [point.width for point in found.points] == [256, 1024, 4096]
    with pytest.raises(ValueError, match=r"no run 'lama' has records; the store has llama-1024, .*"):
        fitted(store, runs=("lama",))


def test_corrected_ranks_are_fitted_when_asked(tmp_path: Path) -> None:
    for width in WIDTHS:
        soft = None if width == 4096 else float(width)
        write_run(tmp_path, f"r{width}", width, hard_rank_corrected=width**0.25, soft_rank_corrected=soft)
    (found,) = fitted(tmp_path, corrected=True)
    assert found.law("hard_rank").beta == pytest.approx(0.25)
    assert found.law("soft_rank").beta == pytest.approx(1)
    assert (found.law("soft_rank").points, found.law("hard_rank").points) == (4, 5)
    assert fitted(tmp_path)[0].law("hard_rank").beta == pytest.approx(HARD)


def test_experts_of_a_layer_count_as_their_median(tmp_path: Path) -> None:
    for width in WIDTHS:
        rows = [record(0, width=width, expert=e, **ranks(width, factor)) for e, factor in enumerate((1.0, 9.0, 2.0))]
        write(tmp_path, f"r{width}", "records", *rows)
    (found,) = fitted(tmp_path)
    assert found.points[0].values["hard_rank"].median == pytest.approx(2 * ranks(WIDTHS[0])["hard_rank"])


def test_records_without_ranks_are_left_out_and_told(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_run(tmp_path, "diverged", 8192, **NOT_FINITE)
    write(tmp_path, "late", "records", record(0, width=64, **ranks(64)), record(10, width=64, hard_rank=0.0))
    (found,) = fitted(tmp_path, last=1.0)
    assert found.points[0].run_id == "late"
    assert "diverged" not in [point.run_id for point in found.points]
    assert any("have no ranks (not finite) and were left out: diverged, late." in limit for limit in found.limits)


def test_a_skipped_record_takes_no_place_in_the_window(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    empty = {"hard_rank": None, "soft_rank": None, "solver": "skipped"}
    write(
        tmp_path, "llama-256", "records", *[record(step, layer, **empty) for step in (300, 310) for layer in range(5)]
    )
    (found,) = fitted(tmp_path)
    assert found.points[0].last_step == 290


def test_a_collapsed_run_has_ranks_but_no_law_of_utilization(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write(tmp_path, "flat", "records", record(0, width=64, hard_rank=1.0, soft_rank=1.0))
    (found,) = fitted(tmp_path)
    assert found.law("hard_rank").points == 6
    with pytest.raises(ValueError, match=r"hard_utilization is 0 in run flat \(width 64\).*leave that run out"):
        found.law("hard_utilization")


def test_too_few_widths_say_what_is_missing(store: Path) -> None:
    (found,) = fitted(store, runs=("llama-256", "llama-512"))
    assert found.laws == {}
    with pytest.raises(ValueError, match=r"got 2 \(256, 512\): add runs of 1 more width"):
        found.law("hard_rank")
    with pytest.raises(ValueError, match=r"metric must be one of hard_rank, .* got 'rank'"):
        fitted(store)[0].law("rank")


def test_a_fit_for_each_value_of_a_tag_or_a_column(tmp_path: Path) -> None:
    for norm, noise in (("pre", 1.0), ("post", 0.5)):
        write_sweep(tmp_path, norm, WIDTHS[:3], noise=noise, tags={"norm": norm})
    write_run(tmp_path, "plain", 512)
    found = fitted(tmp_path, by="norm")
    assert [(one.value, len(one.points)) for one in found] == [("post", 3), ("pre", 3), (None, 1)]
    assert found[0].law("hard_rank").beta == pytest.approx(HARD)
    assert [one.value for one in fitted(tmp_path, by="world_size")] == ["2"]
    with pytest.raises(ValueError, match=r"no tag 'nrm'.* tags norm; columns attempt, "):
        fitted(tmp_path, by="nrm")


def test_a_window_without_records_is_an_error_that_names_it(store: Path) -> None:
    with pytest.raises(ValueError, match=r"no records of site 'post' in steps 5000 to 6000 in llama-1024, .*: choose"):
        fitted(store, steps=(5000, 6000))
    with pytest.raises(ValueError, match="no records of site 'pre' in"):
        fitted(store, site="pre")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": (5, 1)}, "from ≤ to, got"), ({"last": 0.0}, "last must lie in"), ({"last": 2}, "got 2")],
)
def test_a_wrong_selection_is_refused(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**wrong)


def test_over_training_each_common_step_has_its_laws(tmp_path: Path) -> None:
    for number, width in enumerate(WIDTHS[:4]):
        wiggle = 6.0 if number % 2 else 1.0
        for step, noise in ((0, wiggle), (10, wiggle), (20, 1.0), (30, 1.0)):
            write(tmp_path, f"r{width}", "records", record(step, width=width, **ranks(width, noise)))
    write(tmp_path, "r256", "records", record(25, width=256), record(35, width=256, **NOT_FINITE))
    with open_history(tmp_path) as history:
        steps = fit_by_step(history)
        assert [at.step for at in steps] == [0, 10, 20, 30]
        assert steps[-1].laws["hard_rank"].beta == pytest.approx(HARD)
        assert steps[0].laws["hard_rank"].r2 < 0.6
        assert stable_from(steps, "hard_rank") == 20
        assert stable_from(steps[:2], "hard_rank") is None
        assert [at.step for at in fit_by_step(history, Selection(steps=(5, 25)))] == [10, 20]


def test_over_training_runs_need_common_steps_and_three_widths(tmp_path: Path) -> None:
    for start, width in enumerate(WIDTHS):
        write_run(tmp_path, f"r{width}", width, steps=(start, start + 5))
    with open_history(tmp_path) as history:
        with pytest.raises(ValueError, match="no step was sampled by all of these runs: r1024 has 2, 7, …; r2048"):
            fit_by_step(history)
        with pytest.raises(ValueError, match="at least 3 different widths, got 1"):
            fit_by_step(history, Selection(runs=("r256",)))


@pytest.mark.parametrize(
    ("text", "column", "points"),
    [
        ("width,rank\n256,20\n512,28\n", None, ("rank", [256, 512], [20, 28])),
        ("\ufeffalpha, D ,hard,soft\n1,768,14,135\n\n2,1536,30,442\n", "soft", ("soft", [768, 1536], [135, 442])),
        ("edim,intermediate_size\n5,256\n", None, ("edim", [256], [5])),
    ],
)
def test_points_are_read_from_csv(text: str, column: str | None, points) -> None:
    assert read_csv_points(text.splitlines(), column=column) == points


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", None, "f.csv needs a header with a column named width .*, got: none"),
        ("256,20\n", None, "got: 256, 20"),
        ("D,hard,soft\n1,2,3\n", None, "has columns D, hard, soft: say which one is the rank with --column"),
        ("D,hard,soft\n1,2,3\n", "sfot", "no column 'sfot' beside the width, only hard, soft"),
        ("D\n1\n", "hard", "only the width"),
        ("D,rank\n1,2\n2,3x\n", None, "f.csv line 3: rank is no number: '3x'"),
        ("D,rank\n1\n", None, "f.csv line 2: rank is no number: ''"),
    ],
)
def test_a_csv_that_cannot_be_read_says_where(text: str, column: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv_points(text.splitlines(), column=column, name="f.csv")


def test_a_fit_opens_the_files_of_its_runs_only(store: Path) -> None:
    from eigenwatch.history.points import samples_sql

    with open_history(store) as history:
        sql, parameters = samples_sql(["llama-256", "llama-512"], Selection())
        plan = history.connection.execute(f"EXPLAIN ANALYZE {sql}", parameters).fetchall()[0][1]
    assert f"Scanning Files: 2/{len(WIDTHS)}" in plan
