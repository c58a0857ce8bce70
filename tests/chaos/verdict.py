"""What must be true after a storm, found out from outside: the store, the job's own notes, the counters.

Every sentence that `judge` returns is a promise that was broken.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from eigenwatch.history import open_history

from tests.chaos.job import EVERY, LAYERS, Line
from tests.chaos.training import RANKS, Training

TOLERANCE = 1e-4
LAST_WORDS_SECONDS = 5.0
"""What a rank saw so shortly before it was killed may have died with it."""

Key = tuple[int, int]
"""Step and layer."""


def judge(
    training: Training,
    store: Path,
    exit_codes: dict[str, int],
    counted: Counter[str] | None,
    spoilt: AbstractSet[Key] = frozenset(),
) -> list[str]:
    """The promises that are broken after all has ended.

    Args:
        training: the job.
        store: where its records are.
        exit_codes: of what was ended in order.
        counted: losses of the run by reason, as Prometheus saw them; None where nobody looked.
        spoilt: records that may lack a partial, so long as that is counted. One that was delivered before may count
            too: a file that cannot be read does not say whose it was.
    """
    lines = training.lines()
    steps = max(one.step for one in lines[0]) + 1
    problems = [f"{what} ended with exit code {code}" for what, code in exit_codes.items() if code]
    problems += _damaged_files(store)
    closed = [training.out / f"closed-{rank}.json" for rank in range(RANKS)]
    if missing := [path.name for path in closed if not path.exists()]:
        return [*problems, f"not closed: {', '.join(missing)}"]
    reports = [json.loads(path.read_text()) for path in closed]
    with open_history(store) as history:
        rows = history.query("SELECT * FROM records").to_pylist()
        raw = history.query(
            "SELECT attempt, step, layer, ranks_seen, written_at FROM records_raw ORDER BY written_at"
        ).to_pylist()
        spectra = history.query("SELECT attempt, step, layer, eigenvalues FROM eigenvalues").to_pylist()
        runs = history.query("SELECT attempt, launch_id, status FROM runs ORDER BY attempt").to_pylist()

    attempts = {row["launch_id"]: row["attempt"] for row in runs}
    problems += _attempts_out_of_order(attempts, lines)
    problems += _missing(rows, attempts, lines, spoilt)
    holes = _holes(rows, attempts, lines)
    lost_before = _holes_before(rows, attempts, lines)
    problems += _revised_for_the_worse(raw)
    problems += _wrong(rows, spectra, training.out)
    problems += _other_losses(training, lines, steps)
    if runs and runs[-1]["status"] != "finished":
        problems.append(f"the last attempt is {runs[-1]['status']}, not finished")
    if re.search(r"^(Import|Attribute|Type)Error", _echo_log(training.out), re.M):
        problems.append(f"the second client does not work: see {training.out / 'echo.log'}")
    undelivered = sum(report["undelivered"] for report in reports)
    there_though_spoilt = sum(row["complete"] for row in rows if (row["step"], row["layer"]) in spoilt)
    if not holes <= undelivered <= holes + there_though_spoilt:
        problems.append(f"close() says that {undelivered} partials are lost, {holes} are: {reports}")
    if counted is not None and sum(counted.values()) < holes + lost_before:
        problems.append(f"{holes + lost_before} partials are lost, but counted are {dict(counted)}")
    if counted is not None and len(_launches(lines)) == 1 and sum(counted.values()) > holes + there_though_spoilt:
        problems.append(f"only {holes} partials are lost, but counted are {dict(counted)}")
    print(
        f"{len(attempts)} attempts, {steps} steps, {len(rows)} records in {len(raw)} rows; {holes} partials lost, "
        f"{lost_before} of launches that were killed, counted {dict(counted or {})}; {_echoed(training.out)} pushed "
        f"again; longest time without a step {longest_stall(lines[0]):.1f} s",
        flush=True,
    )
    return problems


def _damaged_files(store: Path) -> list[str]:
    problems = []
    for file in store.rglob("*.parquet"):
        if not file.name.startswith("."):
            try:
                pq.read_table(file)
            except Exception as error:  # noqa: BLE001 - each is a finding
                problems.append(f"{file.name} cannot be read: {error}")
    return problems


def _launches(lines: list[list[Line]]) -> list[str]:
    """In the order in which they trained."""
    ordered = sorted((one for of_rank in lines for one in of_rank), key=lambda one: one.ended_at)
    return list(dict.fromkeys(one.launch_id for one in ordered))


def _attempts_out_of_order(attempts: dict[str, int], lines: list[list[Line]]) -> list[str]:
    known = [attempts[launch] for launch in _launches(lines) if launch in attempts]
    problems = [] if known == sorted(set(known)) else [f"attempts are not numbered in the order of launches: {known}"]
    if _launches(lines)[-1] not in attempts:
        problems.append("the last launch is not among the runs")
    return problems


def _kept(lines: list[list[Line]]) -> dict[int, str]:
    """For each sampled step the launch whose record of it is to be found, where one must be.

    A launch that was killed counts up to the first sampled step of any later one, less what may have died with it.
    """
    kept: dict[int, str] = {}
    last_launch = _launches(lines)[-1]
    for launch in _launches(lines):
        ended = [{one.step: one.ended_at for one in of_rank if one.launch_id == launch} for of_rank in lines]
        death = max((at for of_rank in ended for at in of_rank.values()), default=0.0)
        sampled = sorted(step for step in set(ended[0]) | set(ended[1]) if step % EVERY == 0)
        if not sampled:
            continue
        kept = {step: owner for step, owner in kept.items() if step < sampled[0]}
        for step in sampled:
            times = [of_rank.get(step) for of_rank in ended]
            sure = launch == last_launch or all(at is not None and at < death - LAST_WORDS_SECONDS for at in times)
            if sure:
                kept[step] = launch
    return kept


def _missing(
    rows: list[dict[str, Any]], attempts: dict[str, int], lines: list[list[Line]], spoilt: AbstractSet[Key]
) -> list[str]:
    """What the last launch sampled and is not there, or not complete; of any launch, what is there for another's."""
    problems = []
    found = Counter((row["step"], row["layer"]) for row in rows)
    problems += [f"record {key} is there {times} times" for key, times in found.items() if times > 1]
    by_key, last = {(row["step"], row["layer"]): row for row in rows}, _launches(lines)[-1]
    for step, launch in _kept(lines).items():
        for layer in range(LAYERS):
            row, attempt = by_key.get((step, layer)), attempts.get(launch)
            where = f"step {step} layer {layer} of attempt {attempt} ({launch})"
            if (step, layer) in spoilt or (launch != last and (row is None or row["attempt"] == attempt)):
                continue  # it must be counted: see _holes and _holes_before
            if row is None:
                problems.append(f"{where} is missing")
            elif row["attempt"] != attempt:
                problems.append(f"{where} is shown as of attempt {row['attempt']}")
            elif not row["complete"] or row["ranks_seen"] != RANKS:
                problems.append(f"{where} is incomplete: {row['ranks_seen']} of {row['ranks_expected']} ranks")
    return problems


def _holes(rows: list[dict[str, Any]], attempts: dict[str, int], lines: list[list[Line]]) -> int:
    """How many partials of the last launch are in no record."""
    last = _launches(lines)[-1]
    expected = LAYERS * sum(
        1 for of_rank in lines for one in of_rank if one.launch_id == last and one.step % EVERY == 0
    )
    return expected - sum(row["ranks_seen"] for row in rows if row["attempt"] == attempts.get(last))


def _holes_before(rows: list[dict[str, Any]], attempts: dict[str, int], lines: list[list[Line]]) -> int:
    """The same of the launches that were killed, up to the checkpoints from which the next ones went on."""
    kept, last = _kept(lines), _launches(lines)[-1]
    there = {(row["attempt"], row["step"], row["layer"]): row["ranks_seen"] for row in rows}
    return sum(
        RANKS - there.get((attempts.get(launch, -1), step, layer), 0)
        for step, launch in kept.items()
        for layer in range(LAYERS)
        if launch != last
    )


def _revised_for_the_worse(raw: list[dict[str, Any]]) -> list[str]:
    problems: list[str] = []
    newest: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in raw:
        key = (row["attempt"], row["step"], row["layer"])
        before = newest.get(key)
        if before is not None and before["written_at"] == row["written_at"]:
            problems.append(f"{key} was written twice at {row['written_at']}: neither is the newest")
        if before is not None and before["ranks_seen"] > row["ranks_seen"]:
            problems.append(f"{key} had {before['ranks_seen']} ranks and was revised to {row['ranks_seen']}")
        newest[key] = row
    return problems


def _wrong(rows: list[dict[str, Any]], spectra: list[dict[str, Any]], out: Path) -> list[str]:
    """Complete records that are not what the ranks saw."""
    problems = []
    found = {(one["attempt"], one["step"], one["layer"]): one["eigenvalues"] for one in spectra}
    seen: dict[int, list[dict[int, torch.Tensor]]] = {}
    for row in rows:
        if not row["complete"]:
            continue
        step, layer = row["step"], row["layer"]
        if step not in seen:
            seen[step] = [torch.load(out / f"activations-{step}-{rank}.pt") for rank in range(RANKS)]
        x_ND = torch.cat([of_rank[layer] for of_rank in seen[step]]).double()
        want_D = torch.linalg.eigvalsh(torch.cov(x_ND.T)).flip(0).clamp(min=0)
        where = f"step {step} layer {layer} of attempt {row['attempt']}"
        if row["tokens"] != len(x_ND):
            problems.append(f"{where} has {row['tokens']} tokens, not {len(x_ND)}")
        if row["hard_rank"] is None:
            problems.append(f"{where} was not solved: {row['solver_error']}")
            continue
        hard_rank = float(want_D.sum() ** 2 / (want_D**2).sum())
        if abs(row["hard_rank"] / hard_rank - 1) > TOLERANCE:
            problems.append(f"{where} has hard rank {row['hard_rank']}, not {hard_rank}")
        spectrum = found.get((row["attempt"], step, layer))
        if spectrum is None:
            problems.append(f"{where} has no eigenvalues")
            continue
        got_D = torch.zeros_like(want_D)
        got_D[: len(spectrum)] = torch.tensor(spectrum, dtype=torch.float64)
        error = float((got_D - want_D).abs().max() / want_D.max())
        if error > TOLERANCE:
            problems.append(f"{where} has eigenvalues that are wrong by {error:.2g}")
    return problems


def _other_losses(training: Training, lines: list[list[Line]], steps: int) -> list[str]:
    """Steps whose loss is another than without eigenwatch and without faults, to the last bit."""
    alone = training.losses_alone(steps)
    return [
        f"the loss of step {one.step} on rank {rank} is {one.loss}, without faults {alone[rank].get(one.step)}"
        for rank, of_rank in enumerate(lines)
        for one in of_rank
        if one.loss != alone[rank].get(one.step)
    ][:3]


def _echoed(out: Path) -> int:
    return sum(int(number) for number in re.findall(r"^pushed (\d+)", _echo_log(out), re.M))


def _echo_log(out: Path) -> str:
    log = out / "echo.log"
    return log.read_text() if log.exists() else ""


def longest_stall(lines: list[Line]) -> float:
    """The longest time, in seconds, that a rank was without ending a step."""
    return max((after.ended_at - before.ended_at for before, after in itertools.pairwise(lines)), default=0.0)
