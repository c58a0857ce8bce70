"""The solver in a child of its own: the same answers, whoever kills or stops it, and no orphan whoever dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from eigenwatch.aggregator import solver_process
from eigenwatch.aggregator.config import SolverConfig
from eigenwatch.aggregator.solver import Job, LocalSolver, Solved
from eigenwatch.aggregator.solver_process import DEAD_TRIES, SolverProcess
from eigenwatch.spectrum import Group

from tests.processes import end_all, marked_environment, wait_until

from .test_solver import KEY, as_rows, as_scatter, job_of, job_of_rows, tokens

LONG_WIDTH = 1600
"""Its solve takes long enough to be caught in the act."""


@pytest.fixture(scope="module")
def solver() -> Iterator[SolverProcess]:
    solver = SolverProcess(SolverConfig(device="cpu", own_process=True))
    yield solver
    solver.close()


def open_solver(**changes) -> SolverProcess:
    return SolverProcess(SolverConfig(device="cpu", own_process=True, **changes))


@pytest.fixture
def hasty() -> Iterator[SolverProcess]:
    """One that waits for no more than three seconds."""
    solver = open_solver(timeout_seconds=3.0)
    yield solver
    solver.close()


@pytest.fixture(scope="module")
def long_job() -> Job:
    x_ND = torch.randn(64, LONG_WIDTH, generator=torch.Generator().manual_seed(0))
    return job_of(x_ND, x_ND + 1)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_the_middle(solver: SolverProcess, job: Job, act: Callable[[int], None]) -> Solved:
    """Solves a job and does something to the child while it works."""
    solver.solve([job_of(tokens(30))])  # it is awake now
    pid = solver.pid
    assert pid is not None
    before = cpu_seconds(pid)

    def when_busy() -> None:
        wait_until(lambda: cpu_seconds(pid) > before + 0.1, "the solve to begin")
        act(pid)

    thread = threading.Thread(target=when_busy)
    thread.start()
    (solved,) = solver.solve([job])
    thread.join()
    return solved


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_child_gives_the_answers_that_this_process_gives(solver):
    nothing = Job(KEY, Group(width=20), (as_rows(torch.full((3, 20), torch.nan)),))
    jobs = [
        job_of(tokens(60), tokens(50, 1)),
        job_of_rows(tokens(5), tokens(4, 1)),
        Job(KEY, Group(width=20), (as_rows(tokens(9).bfloat16()), as_rows(tokens(3).half(), 1))),
        Job(KEY, as_scatter(tokens(15)), (as_rows(tokens(9, 1), 1),)),
        nothing,
    ]
    here = LocalSolver(SolverConfig(device="cpu")).solve(jobs)
    for there, expected in zip(solver.solve(jobs), here, strict=True):
        assert (there.path, there.finite, there.failure) == (expected.path, expected.finite, expected.failure)
        if expected.eigenvalues is None:
            assert there.eigenvalues is None
        else:
            np.testing.assert_allclose(there.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=1e-5)
        for name, value in expected.metrics.items():
            near = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-6)
            assert there.metrics[name] == near, name


def test_one_child_serves_all_jobs_and_is_as_nice_as_its_parent(solver):
    pid = solver.pid
    for seed in range(3):
        solver.solve([job_of(tokens(30, seed))])
    assert solver.pid == pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_child_that_is_killed_in_the_middle_of_a_solve_costs_one_try(solver, long_job):
    killed = []

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    solved = in_the_middle(solver, long_job, kill)
    assert solved.path == "cpu-float64"
    assert solved.eigenvalues is not None
    (expected,) = LocalSolver(SolverConfig(device="cpu")).solve([long_job])
    np.testing.assert_allclose(solved.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=1e-5)
    assert killed != [solver.pid]
    assert all(map(gone, killed)), "nothing is left of it, not even a zombie"


def test_a_child_that_is_stopped_is_killed_when_its_time_is_up(hasty, long_job):
    stopped = []

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)

    started = time.monotonic()
    solved = in_the_middle(hasty, long_job, stop)
    assert solved.path == "cpu-float64"
    assert time.monotonic() - started >= 3
    assert all(map(gone, stopped))


def test_a_child_that_is_stopped_before_it_is_asked_does_not_hold_up_its_parent_either(hasty):
    hasty.solve([job_of(tokens(30))])
    os.kill(hasty.pid, signal.SIGSTOP)
    many = [job_of(tokens(30, seed % 5)) for seed in range(2000)]  # more than the socket holds unread
    assert {one.path for one in hasty.solve(many)} == {"cpu-float64"}


def test_a_job_that_kills_every_solver_is_unsolved_and_the_next_is_solved(solver, long_job):
    stop = threading.Event()

    def kill_whoever_comes() -> None:
        while not stop.wait(0.005):
            pid = solver.pid
            if pid is not None and not gone(pid):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_whoever_comes)
    killer.start()
    (solved,) = solver.solve([long_job])
    stop.set()
    killer.join()
    assert (solved.path, solved.eigenvalues, solved.finite) == (None, None, True)
    assert solved.failure.count("the solver process died (signal 9)") == DEAD_TRIES
    assert solver.solve([job_of(tokens(30))])[0].path == "cpu-float64"


def test_memory_of_a_large_job_is_given_back(solver, long_job, monkeypatch):
    monkeypatch.setattr(solver_process, "KEPT_BYTES", 1 << 20)
    solver.solve([long_job])
    assert held_bytes(solver) == 0
    assert solver.solve([job_of(tokens(30))])[0].path == "cpu-float64"
    assert 0 < held_bytes(solver) < 1 << 20


def held_bytes(solver: SolverProcess) -> int:
    return os.fstat(solver._memory.descriptor).st_size


def test_a_closed_solver_leaves_nothing_behind():
    solver = open_solver()
    solver.start()
    pid = solver.pid
    solver.close()
    assert pid is not None
    assert gone(pid)


OWNER = """
import sys, torch
from eigenwatch.aggregator.config import SolverConfig
from eigenwatch.aggregator.solver_process import SolverProcess
from tests.aggregator.test_solver import job_of, tokens

solver = SolverProcess(SolverConfig(device="cpu", own_process=True))
solver.solve([job_of(tokens(30))])
print(solver.pid, flush=True)
while True:
    solver.solve([job_of(torch.randn(64, 2000))])
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["at work", "stopped"])
def test_a_child_ends_with_its_parent_even_by_sigkill(stopped):
    marker, environment = marked_environment()
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=environment)
    try:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        before = cpu_seconds(pid)
        wait_until(lambda: cpu_seconds(pid) > before + 0.2, "a solve to begin")
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        owner.kill()
        owner.wait()
        wait_until(lambda: gone(pid), "the child to end")
    finally:
        end_all(marker)
