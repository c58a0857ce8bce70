"""What the macros answer, through a real DuckDB over real files; numbers by hand or from the paper."""

import math
import re
from typing import Any

import pytest
import torch
from eigenwatch import spectrum as mathematics
from eigenwatch.history import History, open_history
from eigenwatch.schemas.views import table_macros

from tests.history.stored import alert, record, run, spectrum, write

ALPHAS = (1, 2, 2.67, 4, 5, 6, 7, 8)
PAPER = {"hard_rank": (14, 30, 32, 25, 50, 31, 76, 53), "soft_rank": (135, 442, 525, 582, 1184, 964, 1521, 1257)}
"""LLaMA-130M, d=768, Jha & Reagen 2025; see PAPER.md for the fits."""


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory):
    store = tmp_path_factory.mktemp("macros")
    for number, alpha in enumerate(ALPHAS):
        ranks = {name: float(values[number]) for name, values in PAPER.items()}
        width = round(768 * alpha)
        # Three layers around the median, and early samples that the fit must not see.
        rows = [
            record(step, layer, width=width, hard_utilization=0.5 / width, **{k: v * factor for k, v in ranks.items()})
            for step in range(0, 200, 10)
            for layer, factor in enumerate((0.5, 1.0, 2.0) if step >= 180 else (9.0, 9.0, 9.0))
        ]
        write(store, f"w{number}", "records", *rows)
    ramp = [record(step, layer, hard_rank=10.0 * layer + step / 100) for step in (0, 100, 200) for layer in (0, 1)]
    write(store, "ramp", "records", *ramp, record(0, 0, site="pre", hard_rank=99.0))
    write(store, "half", "records", *[record(step, layer, hard_rank=5.0) for step in (100, 150) for layer in (0, 1)])
    for step in (0, 100):
        write(store, "ramp", "eigenvalues", spectrum(step, 1, eigenvalues=[6.0 + step, 3.0, 1.0, 0.0]))
    experts = [(expert, step) for expert in (0, 1, 2) for step in (0, 10)]
    write(store, "moe", "records", *[record(s, expert=e, hard_rank=[1.0, 3.0, 50.0][e]) for e, s in experts])
    write(store, "moe", "eigenvalues", *[spectrum(s, expert=e, eigenvalues=[e + 1.0, 1.0]) for e, s in experts])
    write(store, "fallen", "records", *[record(step, hard_rank=1.0 + step) for step in (0, 10, 20)])
    write(store, "fallen", "records", record(10, attempt=1, written=100))
    write(store, "fallen", "eigenvalues", *[spectrum(step) for step in (0, 10)])
    write(store, "fallen", "alerts", alert("a1", 20, written=30, evidence_steps=[10, 20]))
    for name in ("ramp", "fallen"):
        write(store, name, "runs", run(written=0))
    with open_history(store) as history:
        yield history


def ask(history: History, sql: str) -> list[dict[str, Any]]:
    return history.query(sql).to_pylist()


def test_a_layer_is_summed_up_by_its_middle_spread_last_value_and_trend(history: History) -> None:
    rows = ask(history, "FROM layer_summary('ramp') WHERE metric = 'hard_rank'")
    assert [row["layer"] for row in rows] == [0, 1]
    assert rows[1] == pytest.approx(
        {
            "layer": 1, "expert": None, "width": 256, "metric": "hard_rank", "samples": 3, "median": 11.0,
            "lower_quartile": 10.5, "upper_quartile": 11.5, "last": 12.0, "last_step": 200,
            "trend_per_1000_steps": 10.0,
        }
    )  # fmt: skip


def test_a_site_other_than_post_is_asked_for_by_name(history: History) -> None:
    (row,) = ask(history, "FROM layer_summary('ramp', at_site := 'pre') WHERE metric = 'hard_rank'")
    assert row["median"] == 99.0


def test_two_runs_are_compared_at_the_steps_that_both_have(history: History) -> None:
    rows = ask(history, "SELECT step, layer, hard_rank_a, hard_rank_b FROM compare('ramp', 'half')")
    assert rows == [
        {"step": 100, "layer": layer, "hard_rank_a": 10.0 * layer + 1, "hard_rank_b": 5.0} for layer in (0, 1)
    ]


def test_experts_are_compared_each_with_its_own(history: History) -> None:
    rows = ask(history, "FROM compare('moe', 'moe')")
    assert len(rows) == 6
    assert all(row["hard_rank_a"] == row["hard_rank_b"] for row in rows)


def test_the_paper_s_law_comes_out_to_its_digits(history: History) -> None:
    runs = ", ".join(f"'w{number}'" for number in range(len(ALPHAS)))
    law = {row["metric"]: row for row in ask(history, f"FROM width_law([{runs}])")}
    for metric, expected in (("hard_rank", (0.612, 0.404, 0.696)), ("soft_rank", (1.070, 0.293, 0.930))):
        found = tuple(law[metric][name] for name in ("beta", "beta_ci95", "r2"))
        assert found == pytest.approx(expected, abs=0.0005)
        assert law[metric]["points"] == 8
    utilization = {row["metric"]: row for row in ask(history, f"FROM utilization_law([{runs}])")}
    assert utilization["hard_utilization"]["beta"] == pytest.approx(-1)
    assert utilization["hard_utilization"]["beta_ci95"] == pytest.approx(0, abs=1e-6)


def test_two_widths_make_no_law(history: History) -> None:
    (row,) = ask(history, "FROM width_law(['w0', 'w1', 'w0']) WHERE metric = 'hard_rank'")
    assert (row["beta"], row["beta_ci95"], row["r2"], row["widths"]) == (None, None, None, 2)


def test_an_expert_is_no_layer_of_its_own(history: History) -> None:
    (row,) = ask(history, "FROM width_points(['moe']) WHERE metric = 'hard_rank'")
    assert (row["value"], row["layers"]) == (3.0, 1)


@pytest.mark.parametrize("degrees", [1, 2, 6, 29, 30, 31, 50, 1000])
def test_student_t(history: History, degrees: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    (row,) = ask(history, f"SELECT student_t_95({degrees}) AS t")
    assert row["t"] == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-5)


def test_a_spectrum_is_a_row_an_eigenvalue_at_the_nearest_sampled_step(history: History) -> None:
    assert ask(history, "SELECT step, k, eigenvalue, share, cumulative_share FROM spectrum('ramp', 1, 40)") == [
        {"step": 0, "k": 1, "eigenvalue": 6.0, "share": 0.6, "cumulative_share": 0.6},
        {"step": 0, "k": 2, "eigenvalue": 3.0, "share": 0.3, "cumulative_share": 0.9},
        {"step": 0, "k": 3, "eigenvalue": 1.0, "share": 0.1, "cumulative_share": 1.0},
        {"step": 0, "k": 4, "eigenvalue": 0.0, "share": 0.0, "cumulative_share": 1.0},
    ]
    assert {row["step"] for row in ask(history, "FROM spectrum('ramp', 1, 50)")} == {0}, "of two, the earlier"
    assert {row["step"] for row in ask(history, "FROM spectrum('ramp', 1, 51)")} == {100}


def test_a_spectrum_of_experts_is_of_all_or_of_one(history: History) -> None:
    assert [row["expert"] for row in ask(history, "FROM spectrum('moe', 0, 10)")] == [0, 0, 1, 1, 2, 2]
    assert [row["share"] for row in ask(history, "FROM spectrum('moe', 0, 10, of_expert := 2)")] == [0.75, 0.25]


@pytest.mark.parametrize("arguments", ["'a1'", "'a1', 'fallen'", "'a1', run := 'fallen'"])
def test_an_alert_leads_to_its_records_even_where_a_restart_has_hidden_them(history: History, arguments: str) -> None:
    rows = ask(history, f"SELECT step, hard_rank, eigenvalues, kind FROM alert_evidence({arguments})")
    assert rows == [
        {"step": 10, "hard_rank": 11.0, "eigenvalues": [3.0, 2.0, 1.0], "kind": "collapse"},
        {"step": 20, "hard_rank": 21.0, "eigenvalues": None, "kind": "collapse"},
    ]


def test_an_alert_that_is_not_there_has_no_evidence(history: History) -> None:
    assert ask(history, "FROM alert_evidence('a2')") == []


def test_a_new_metric_is_computed_from_what_was_stored(history: History) -> None:
    sql = """SELECT step, list_sum(list_transform(p, lambda x: x * x)) AS purity, renyi_rank(eigenvalues, 2) AS rank
        FROM recompute(['ramp']) ORDER BY step"""
    rows = ask(history, sql)
    assert [row["step"] for row in rows] == [0, 100]
    assert rows[0]["purity"] == pytest.approx(0.46)
    assert rows[0]["rank"] == pytest.approx(1 / 0.46)


SPECTRA = ([6.0, 3.0, 1.0, 0.0], [1.0] * 7, [5.0], [0.0, 0.0, 0.0], [1e-30, 1e-31])


@pytest.mark.parametrize("eigenvalues", SPECTRA, ids=str)
def test_the_ranks_of_macros_are_those_of_the_aggregator(history: History, eigenvalues: list[float]) -> None:
    (row,) = history.query(
        """SELECT renyi_rank($e, 1) AS soft, renyi_rank($e, 2) AS hard, renyi_rank($e, 'infinity'::DOUBLE) AS least,
            variance_share($e, 0.5) AS half""",
        {"e": eigenvalues},
    ).to_pylist()
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    assert row["soft"] == pytest.approx(float(mathematics.soft_rank(values)))
    assert row["hard"] == pytest.approx(float(mathematics.hard_rank(values)))
    assert row["half"] == pytest.approx(float(mathematics.variance_share(values, 0.5)))
    assert row["least"] == pytest.approx(1 / max(eigenvalues) * sum(eigenvalues) if any(eigenvalues) else 1.0)
    assert all(math.isfinite(value) for value in row.values())


CALLS = {
    "layer_summary": "'ramp'",
    "compare": "'ramp', 'ramp'",
    "width_points": "['ramp']",
    "width_fit": "['ramp']",
    "width_law": "['ramp']",
    "utilization_law": "['ramp']",
    "spectrum": "'ramp', 1, 0",
    "alert_evidence": "'a1', run := 'ramp'",
    "recompute": "['ramp']",
}


def test_every_macro_is_asked_here() -> None:
    assert table_macros() == set(CALLS)


@pytest.mark.parametrize(("macro", "arguments"), CALLS.items())
def test_a_macro_opens_the_files_of_its_runs_alone(history: History, macro: str, arguments: str) -> None:
    """In any DuckDB with the views over all runs; `query` would not even name it the others."""
    plan = history.connection.sql(f"EXPLAIN ANALYZE FROM {macro}({arguments})").fetchall()[0][1]
    opened = [int(number) for number, _ in re.findall(r"Scanning Files: (\d+)/(\d+)", plan)]
    assert opened
    assert len(opened) == plan.count("READ_PARQUET"), plan
    assert all(number <= 2 for number in opened), plan
