"""The solver: it says which way it took, falls back where that way is closed, and fails for no job.

Here in its own process; in a child, and against SIGKILL and SIGSTOP, in `test_solver_process`.
"""

import math

import numpy as np
import pytest
import torch
from eigenwatch.aggregator.config import SolverConfig
from eigenwatch.aggregator.solver import Job, LocalSolver, Rung, RungFailed, climb, ladder, unsolved
from eigenwatch.aggregator.solver_process import DEAD_TRIES
from eigenwatch.schemas import METRIC_NAMES, Origin, PartialSamples, RecordKey
from eigenwatch.spectrum import Group, merge, samples_of

from tests.spectrum.cases import partial_of, two_pass_covariance

WIDTH = 20
KEY = RecordKey("run", 0, 100, 3, "post", None)


def tokens(count: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + seed


def as_rows(x_ND: torch.Tensor, rank: int = 0) -> PartialSamples:
    return samples_of(x_ND, Origin(key=KEY, rank=rank, share=rank, captured_at=1.0))


def as_scatter(*ranks: torch.Tensor) -> Group:
    return merge(partial_of(x_ND, rank=rank) for rank, x_ND in enumerate(ranks))


def job_of(*ranks: torch.Tensor) -> Job:
    return Job(KEY, as_scatter(*ranks))


def job_of_rows(*ranks: torch.Tensor) -> Job:
    return Job(KEY, Group(width=WIDTH), tuple(as_rows(x_ND, rank) for rank, x_ND in enumerate(ranks)))


def true_spectrum(*ranks: torch.Tensor) -> np.ndarray:
    return torch.linalg.eigvalsh(two_pass_covariance(torch.cat(ranks))).flip(-1).clamp(min=0).numpy()


@pytest.fixture
def solver():
    return LocalSolver(SolverConfig(device="cpu"))


def test_a_record_says_that_it_was_solved_on_the_cpu(solver):
    (solved,) = solver.solve([job_of(tokens(60), tokens(50, 1))])
    assert (solved.path, solved.finite, solved.error, solved.failure) == ("cpu-float64", True, None, None)
    np.testing.assert_allclose(solved.eigenvalues, true_spectrum(tokens(60), tokens(50, 1)), rtol=1e-5, atol=1e-5)
    assert solved.metrics["hard_rank_correction"] == "pairs"


def test_rows_fewer_than_the_width_are_solved_by_their_products(solver):
    rows = tokens(5), tokens(9, 1)
    by_rows, by_scatter = solver.solve([job_of_rows(*rows), job_of(*rows)])
    assert (by_rows.path, by_scatter.path) == ("cpu-float64-gram", "cpu-float64")
    np.testing.assert_allclose(by_rows.eigenvalues, true_spectrum(*rows), rtol=1e-5, atol=1e-5)
    for name in METRIC_NAMES:
        if not name.startswith("power_law"):
            expected = by_scatter.metrics[name]
            assert by_rows.metrics[name] == (None if expected is None else pytest.approx(expected, rel=1e-4)), name


@pytest.mark.parametrize(
    "job",
    [
        job_of_rows(tokens(15), tokens(9, 1)),
        Job(KEY, as_scatter(tokens(15)), (as_rows(tokens(9, 1), 1),)),
        Job(KEY, as_scatter(tokens(3)), (as_rows(tokens(4, 1), 1),)),
    ],
    ids=["more rows than directions", "both forms", "both forms, few tokens"],
)
def test_rows_that_must_be_folded_are_and_what_was_merged_stays_as_it_is(solver, job):
    before = job.group.within.clone()
    for _ in range(2):
        (solved,) = solver.solve([job])
        assert solved.path == "cpu-float64"
        first = tokens(job.tokens - job.rows[-1].tokens)
        np.testing.assert_allclose(
            solved.eigenvalues, true_spectrum(first, tokens(job.rows[-1].tokens, 1)), rtol=1e-4, atol=1e-4
        )
    assert torch.equal(job.group.within, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("count", [4, 40])
def test_rows_that_are_not_finite_are_no_failure_and_spoil_no_other(solver, bad, count):
    x_ND = tokens(count)
    x_ND[2, 3] = bad
    first, second = solver.solve([job_of_rows(x_ND), job_of(tokens(60))])
    assert (first.finite, first.eigenvalues, first.path, first.failure) == (False, None, None, None)
    assert set(first.metrics.values()) == {None}
    assert second.path == "cpu-float64"


def test_a_scatter_that_lies_about_being_finite_fails_alone_and_says_why(solver):
    lies = job_of(tokens(60))
    lies.group.within[1] = math.nan
    good, bad = solver.solve([job_of(tokens(50)), lies])
    assert good.path == "cpu-float64"
    assert (bad.path, bad.eigenvalues) == (None, None)
    assert "cpu-float64: " in bad.failure


def test_a_layer_without_variance_is_solved(solver):
    (solved,) = solver.solve([job_of(torch.ones(7, WIDTH))])
    assert (solved.metrics["hard_rank"], float(solved.eigenvalues.max())) == (1, 0)


def test_jobs_together_are_solved_as_each_alone(solver):
    jobs = [job_of(tokens(30 + n, n)) for n in range(3)] + [job_of_rows(tokens(4 + n, n)) for n in (0, 0, 5)]
    for together, job in zip(solver.solve(jobs), jobs, strict=True):
        (alone,) = solver.solve([job])
        assert together.path == alone.path
        np.testing.assert_allclose(together.eigenvalues, alone.eigenvalues, rtol=1e-6, atol=1e-6)
        assert set(together.metrics) == set(alone.metrics)
        for name, value in alone.metrics.items():
            near = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-6)
            assert together.metrics[name] == near, name


def test_auto_takes_a_gpu_where_there_is_one():
    (solved,) = LocalSolver(SolverConfig()).solve([job_of(tokens(60))])
    assert solved.path == ("cuda-float64" if torch.cuda.is_available() else "cpu-float64")


@pytest.mark.parametrize(
    ("device", "precision", "gpu", "rungs"),
    [
        ("auto", "float64", True, ["cuda-float64", "cuda-float32", "cpu-float64"]),
        ("auto", "float32", True, ["cuda-float32", "cuda-float64", "cpu-float64"]),
        ("auto", "float64", False, ["cpu-float64"]),
        ("auto", "float32", False, ["cpu-float64"]),
        ("cuda", "float64", False, ["cuda-float64", "cuda-float32", "cpu-float64"]),
        ("cpu", "float64", True, ["cpu-float64"]),
    ],
)
def test_the_ladder_ends_on_the_cpu(device, precision, gpu, rungs):
    assert [str(rung) for rung in ladder(SolverConfig(device=device, precision=precision), gpu)] == rungs


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would solve it")
def test_a_gpu_that_is_not_there_is_climbed_past():
    (solved,) = LocalSolver(SolverConfig(device="cuda")).solve([job_of(tokens(60))])
    assert solved.path == "cpu-float64"


RUNGS = [Rung("cuda", "float64"), Rung("cuda", "float32"), Rung("cpu", "float64")]


def climbing(failing: dict[str, bool], jobs: int = 1):
    """What is tried, and the answers, where these rungs fail; True where the solver dies of it."""
    tried = []

    def attempt(jobs, rung):
        tried.append((str(rung), len(jobs)))
        if str(rung) in failing:
            raise RungFailed(f"no {rung}", DEAD_TRIES if failing[str(rung)] else 1)
        return [unsolved()._replace(path=str(rung)) for _ in jobs]

    return tried, climb([job_of(tokens(9))] * jobs, RUNGS, attempt)


def test_rungs_are_tried_in_turn_until_one_holds():
    tried, (solved,) = climbing({"cuda-float64": False, "cuda-float32": True})
    assert [rung for rung, _ in tried] == ["cuda-float64", "cuda-float32", "cpu-float64"]
    assert solved.path == "cpu-float64"


def test_a_job_that_fails_on_every_rung_is_unsolved_and_says_why():
    tried, (solved,) = climbing({"cuda-float64": False, "cuda-float32": False, "cpu-float64": False})
    assert len(tried) == 3
    assert solved.failure == (
        "cuda-float64: no cuda-float64; cuda-float32: no cuda-float32; cpu-float64: no cpu-float64"
    )


def test_a_solver_that_died_on_the_last_rung_is_given_it_again():
    tried, (solved,) = climbing({"cuda-float64": False, "cuda-float32": False, "cpu-float64": True})
    assert [rung for rung, _ in tried[2:]] == ["cpu-float64"] * DEAD_TRIES
    assert solved.failure.count("no cpu-float64") == DEAD_TRIES


def test_jobs_that_fail_together_are_tried_one_by_one():
    tried, solved = climbing({"cuda-float64": False}, jobs=2)
    assert tried == [("cuda-float64", 2), *[("cuda-float64", 1), ("cuda-float32", 1)] * 2]
    assert [one.path for one in solved] == ["cuda-float32"] * 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("device", "gpu", "device must be one of auto, cpu, cuda, got 'gpu'"),
        ("device", "cuda:0", "device must be one of auto, cpu, cuda, got 'cuda:0'"),
        ("precision", "float16", "precision must be one of float64, float32, got 'float16'"),
        ("method", "SLQ", "method must be one of exact, slq, got 'SLQ'"),
        ("slq_width", 255, "slq_width must be at least 256, got 255"),
        ("timeout_seconds", -1.0, "timeout_seconds must be positive, got -1.0"),
    ],
)
def test_what_is_not_known_is_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        SolverConfig(**{field: value})


WIDE = 300
SLQ = SolverConfig(device="cpu", method="slq", slq_width=256)


@pytest.mark.parametrize(
    ("job", "path"),
    [
        (job_of(tokens(900, width=WIDE)), "cpu-float64-slq"),
        (Job(KEY, Group(width=WIDE), (as_rows(tokens(280, width=WIDE)),)), "cpu-float64-gram-slq"),
        (Job(KEY, Group(width=WIDE), (as_rows(tokens(200, width=WIDE)),)), "cpu-float64-gram"),
        (job_of(tokens(60)), "cpu-float64"),
    ],
    ids=["wide", "many rows", "few rows", "narrow"],
)
def test_wide_layers_are_estimated_where_it_was_asked_for_and_say_with_which_error(solver, job, path):
    (exact,), (solved,), (again,) = solver.solve([job]), *(LocalSolver(SLQ).solve([job]) for _ in range(2))
    assert solved.path == path
    assert len(solved.eigenvalues) == job.group.width
    if path.endswith("slq"):
        off = abs(solved.metrics["soft_rank"] / exact.metrics["soft_rank"] - 1)
        assert 0 < off <= 3 * solved.error + 1e-3
        assert solved.metrics["hard_rank"] == pytest.approx(exact.metrics["hard_rank"], rel=1e-9)
    else:
        assert solved.error is None
        assert solved.metrics == exact.metrics
    assert again.metrics == solved.metrics, "the probes are those of the record's key"
