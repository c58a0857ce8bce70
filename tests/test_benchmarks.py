"""The benchmarks run; how fast anything is they tell on a machine with nothing else to do."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("section", "rows"),
    [
        ("solver", ["eigvalsh, D=128", "Gram route / full solve", "SLQ preview", "together / one by one"]),
        ("push", ["push until merged, 8 in flight / ray.put"]),
        ("ranks", ["8 ranks of a node / 1", "combiner, GB/s"]),
    ],
)
def test_each_section_of_the_aggregator_benchmark_prints_its_ratios(section, rows):
    command = [sys.executable, str(BENCHMARKS / "aggregator.py"), "--quick", section]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert row in done.stdout


def test_a_section_that_is_not_there_is_wrong_usage():
    command = [sys.executable, str(BENCHMARKS / "aggregator.py"), "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "no section nothing: choose of push, solver, ranks" in done.stderr


def test_the_capacity_benchmark_holds_its_model_against_real_actors():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "capacity.py"), "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    eight_ranks = next(line for line in done.stdout.splitlines() if "8 ranks of a node" in line)
    _, _, messages, measured, model, *_ = (cell.strip() for cell in eight_ranks.split("│"))
    assert messages == "1"
    assert measured == model, "what leaves a node does not depend on its ranks"


def test_the_history_benchmark_asks_each_question_of_each_store():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "history.py"), "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for question in ("one layer over time", "layer × step heatmap", "a width law over 8 runs", "the latest row"):
        assert len([line for line in done.stdout.splitlines() if question in line]) >= 2
    assert "Scanning Files: 1/12" in done.stdout
