"""What a question to the history costs, in one run: python benchmarks/history.py [--quick] [--keep FOLDER]

A store of 1000 runs × 32 layers × 300 sampled steps, 9.6 million records, as services wrote it, the same after
`eigenwatch compact`, and the same as JSON lines, one file a run. A service writes a file a table and second, so a file
for each sampled step, 300 a run: so it is in the eight runs that are asked about by name. The others have 30, or the
question about all runs would take an hour where nothing is compacted.

Every figure is a ratio of the same question to two of these, asked in turn: the median of alternating blocks with its
quartiles, so that a machine which is busy for a while shows in both. Eight runs are generated, one of each width; the
others are copies under names of their own (the run id stands in the path only). `--quick` takes few and small runs: it
shows that the benchmark runs, not how fast anything is.
"""

import argparse
import contextlib
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from eigenwatch.history import History, open_history
from eigenwatch.history.compaction import CompactionConfig, compact
from eigenwatch.history.report.reading import read_run
from eigenwatch.schemas import METRIC_NAMES, RECORDS, RUNS, table_folder
from eigenwatch.schemas.parts import encode, part_name
from eigenwatch.schemas.store import open_store
from rich.console import Console
from rich.table import Table

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAMED = 8
"""Runs that are asked about by name, each of another width, and generated; all others are copies of these."""
RUN = "run-0003"
LAW = ", ".join(f"'run-{number:04d}'" for number in range(NAMED))
ALONE = f"run_id = '{RUN}'"
QUESTIONS = {
    "one layer over time": f"SELECT step, hard_rank FROM records WHERE {ALONE} AND layer = 2 ORDER BY step",
    "layer × step heatmap": f"SELECT layer, step, hard_utilization FROM records WHERE {ALONE} ORDER BY layer, step",
    "a width law over 8 runs": f"""
        SELECT regr_slope(ln(rank), ln(width)) AS beta FROM (
            SELECT width, median(soft_rank) AS rank FROM records WHERE run_id IN ({LAW}) GROUP BY run_id, width)""",
    "the latest row of every layer of every run": """
        SELECT run_id, layer, max(step) AS step, arg_max(hard_rank, step) AS hard_rank,
            arg_max(soft_rank, step) AS soft_rank FROM records GROUP BY run_id, layer ORDER BY run_id, layer""",
}
MACRO = f"FROM width_law([{LAW}])"
ALL_RUNS = "the latest row of every layer of every run"


class Row(NamedTuple):
    """A line of the table."""

    name: str
    ratios: list[float]
    seconds: str
    target: str = ""


class Size(NamedTuple):
    """How much is measured."""

    runs: int
    layers: int
    steps: int
    files: int
    """Of one of the other runs."""
    rounds: int
    long_rounds: int
    """Of the question about all runs, which takes minutes where nothing is compacted."""


FULL = Size(runs=1000, layers=32, steps=300, files=30, rounds=7, long_rounds=2)
QUICK = Size(runs=12, layers=4, steps=20, files=5, rounds=2, long_rounds=2)


# --- the stores ---


def generate(folder: Path, size: Size) -> None:
    """`raw`, `compacted`, `alone` (the compacted one with one run) and `lines` below the folder."""
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(_generate_run, [folder] * NAMED, range(NAMED), [size] * NAMED):
            pass
        shutil.copytree(folder / "many", folder / "compacted")
        store = open_store(folder / "compacted")
        for _ in ("merge", "remove what was merged"):
            compact(store, CompactionConfig(grace_seconds=0))
        shutil.copytree(folder / "compacted" / f"run_id={RUN}", folder / "alone" / f"run_id={RUN}")
        copies = [(folder / "few", folder / "raw"), (folder / "compacted", folder / "compacted")]
        for source, target in copies:
            numbers = range(NAMED, size.runs)
            list(pool.map(_copy_run, [source] * len(numbers), [target] * len(numbers), numbers, chunksize=10))
    for number in range(NAMED):
        (folder / "many" / f"run_id={_name(number)}").rename(folder / "raw" / f"run_id={_name(number)}")
    for number in range(NAMED, size.runs):  # a link: as bytes they are many
        os.link(folder / "lines" / f"{_name(number % NAMED)}.jsonl", folder / "lines" / f"{_name(number)}.jsonl")


def _generate_run(folder: Path, number: int, size: Size) -> None:
    """One run as a part a sampled step in `many`, as fewer parts in `few`, and as JSON `lines`."""
    rows = _records(number, size)
    run = {
        "attempt": 0, "launch_id": _name(number), "status": "finished", "world_size": 8, "layers": [], "tags": {},
        "started_at": NOON, "ended_at": NOON + timedelta(days=1), "written_at": NOON,
    }  # fmt: skip
    for kind, files in (("many", size.steps), ("few", size.files)):
        _write(folder / kind, number, "runs", [pa.Table.from_pylist([run], schema=RUNS)])
        each = rows.num_rows // files
        _write(folder / kind, number, "records", [rows.slice(part * each, each) for part in range(files)])
    (folder / "lines").mkdir(exist_ok=True)
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        connection.execute(f"COPY rows TO '{folder / 'lines' / _name(number)}.jsonl' (FORMAT json)")


def _write(store: Path, number: int, table: str, parts: list[pa.Table]) -> None:
    folder = table_folder(store, _name(number), table)
    folder.mkdir(parents=True)
    for second, part in enumerate(parts):
        (folder / part_name(NOON + timedelta(seconds=second))).write_bytes(encode(part, table))


def _copy_run(source: Path, target: Path, number: int) -> None:
    shutil.copytree(source / f"run_id={_name(number % NAMED)}", target / f"run_id={_name(number)}")


def _name(number: int) -> str:
    return f"run-{number:04d}"


def _records(number: int, size: Size) -> pa.Table:
    """A plausible run: ranks that rise and level off, each layer at its own height, with noise."""
    random = np.random.default_rng(number)
    width, rows = 512 * (1 + number), size.steps * size.layers
    step, layer = np.repeat(np.arange(size.steps) * 100, size.layers), np.tile(np.arange(size.layers), size.steps)
    height = (1 - np.exp(-step / 3000)) * (1 + layer / size.layers) * random.normal(1, 0.05, rows)
    time_us = np.datetime64("2026-01-01T12:00:00", "us") + (step * 1000).astype("timedelta64[us]")
    columns = {
        "step": step, "layer": layer, "attempt": 0, "site": "post", "width": width, "tokens": 4 * width,
        "tokens_per_width": 4.0, "finite": True, "complete": True, "ranks_seen": 8, "ranks_expected": 8,
        "form": "scatter", "solver": "cpu-float64", "hard_rank_correction": "pairs", "sampling_steps": 100,
        "solve_seconds": random.random(rows), "captured_at": time_us, "written_at": time_us,
    }  # fmt: skip
    columns |= {name: height * random.uniform(0.1, 1) * width**0.5 for name in METRIC_NAMES if name != "js_divergence"}
    arrays = []
    for field in RECORDS:
        value = columns.get(field.name)
        constant = not isinstance(value, np.ndarray)
        arrays.append(pa.repeat(pa.scalar(value, field.type), rows) if constant else pa.array(value, field.type))
    return pa.Table.from_arrays(arrays, schema=RECORDS)


# --- the questions ---


def measure(folder: Path, size: Size) -> Iterator[Row]:
    with contextlib.ExitStack() as open_:
        raw, compacted, alone = (
            open_.enter_context(open_history(folder / name)) for name in ("raw", "compacted", "alone")
        )
        lines = open_.enter_context(duckdb.connect())
        lines.execute(f"SET threads = {os.cpu_count()}")
        for name, sql in QUESTIONS.items():
            rounds = size.long_rounds if name == ALL_RUNS else size.rounds
            as_lines = _over_lines(sql, folder)
            if name != ALL_RUNS or size is QUICK:
                assert _answer(compacted, sql) == _answer(raw, sql)
            asked = {
                "raw": _timer(lambda sql=sql: raw.query(sql)),
                "compacted": _timer(lambda sql=sql: compacted.query(sql)),
                "lines": _timer(lambda sql=as_lines: lines.sql(sql).to_arrow_table()),
            }
            yield from _over_compacted(name, asked, rounds)
        assert len(_answer(compacted, MACRO)) == 3
        pairs = [
            (_timer(lambda: raw.query(MACRO))(), _timer(lambda: compacted.query(MACRO))()) for _ in range(size.rounds)
        ]
        yield Row("width_law of 8 runs: uncompacted / compacted", _ratios(pairs), _seconds(pairs), "≥ 10")
        for name, sql in list(QUESTIONS.items())[:2]:
            among = _timer(lambda sql=sql: compacted.query(sql))
            by_itself = _timer(lambda sql=sql: alone.query(sql))
            pairs = [(among(), by_itself()) for _ in range(2 * size.rounds + 1)][1:]
            yield Row(f"{name}: among {size.runs} runs / alone in its store", _ratios(pairs), _seconds(pairs), "≤ 1.1")
        pairs = [(_opened(folder / "compacted"), _opened(folder / "alone")) for _ in range(size.rounds + 1)][1:]
        yield Row("open, and ask for its heatmap: among all / alone", _ratios(pairs), _seconds(pairs), "≤ 1.1")
        pairs = [(_reported(folder / "compacted"), _reported(folder / "alone")) for _ in range(size.rounds + 1)][1:]
        yield Row("all that its report asks: among all / alone", _ratios(pairs), _seconds(pairs), "≤ 1.1")


def _over_compacted(name: str, asked: dict[str, Callable[[], float]], rounds: int) -> Iterator[Row]:
    blocks = [{kind: ask() for kind, ask in asked.items()} for _ in range(rounds)]
    for kind, what, target in (("raw", "uncompacted", "≥ 10"), ("lines", "JSON lines", "")):
        pairs = [(block[kind], block["compacted"]) for block in blocks]
        yield Row(f"{name}: {what} / compacted", _ratios(pairs), _seconds(pairs), target)


def _answer(history: History, sql: str) -> list[list[object]]:
    """Rounded, since sums depend on the order."""
    rows = (row.values() for row in history.query(sql).to_pylist())
    return [[round(value, 9) if isinstance(value, float) else value for value in row] for row in rows]


def _over_lines(sql: str, folder: Path) -> str:
    """The same question to JSON lines, of the files that it needs."""
    if ALONE in sql:
        names = [RUN]
    else:
        names = [_name(number) for number in range(NAMED)] if LAW in sql else ["*"]
    files = ", ".join(f"'{folder}/lines/{name}.jsonl'" for name in names)
    rows = f"SELECT *, parse_filename(filename, true) AS run_id FROM read_json([{files}], filename = true)"
    return sql.replace("FROM records", f"FROM ({rows})")


def _opened(store: Path) -> float:
    def ask() -> None:
        with open_history(store) as history:
            history.query(QUESTIONS["layer × step heatmap"])

    return _timer(ask)()


def _reported(store: Path) -> float:
    def ask() -> None:
        with open_history(store) as history:
            read_run(history, RUN)

    return _timer(ask)()


def _timer(ask: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        started = time.perf_counter()
        ask()
        return time.perf_counter() - started

    return seconds


def _ratios(pairs: list[tuple[float, float]]) -> list[float]:
    return [one / other for one, other in pairs]


def _seconds(pairs: list[tuple[float, float]]) -> str:
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    return f"{first:.3g} / {second:.3g}"


def pruning(store: Path) -> str:
    """How many files DuckDB opens for one run, of all that the views name."""
    with open_history(store) as history:
        plan = history.connection.sql(f"EXPLAIN ANALYZE {QUESTIONS['layer × step heatmap']}").fetchall()[0][1]
    return next((line.strip("│ \n") for line in plan.splitlines() if "Scanning Files" in line), "no file is skipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few and small runs, few rounds")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="generate the stores here, or ask those that are here"
    )
    asked = parser.parse_args()
    size = QUICK if asked.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        started = time.perf_counter()
        if not (folder / "raw").exists():
            generate(folder, size)
        generated = time.perf_counter() - started
        table = Table(
            title=f"{platform.machine()}, {os.cpu_count()} cores, duckdb {duckdb.__version__}, {size.runs} runs × "
            f"{size.layers} layers × {size.steps} steps = {size.runs * size.layers * size.steps:,} records, medians of "
            f"{size.rounds} alternating blocks (all runs: {size.long_rounds})"
        )
        for heading in ("", "median", "quartiles", "seconds", "target"):
            table.add_column(heading)
        for row in measure(folder, size):
            low, median, high = statistics.quantiles(row.ratios, n=4)
            table.add_row(row.name, f"{median:.3g}", f"{low:.3g} – {high:.3g}", row.seconds, row.target)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        table.add_row("memory of all this, GiB", f"{memory:.2g}", "", "", "< 2")
        Console(width=140).print(table)
        print(f"one run of {size.runs}, by EXPLAIN ANALYZE: {pruning(folder / 'compacted')}")
        for name in ("raw", "compacted", "lines"):
            files = [
                file.stat().st_size for file in (folder / name).rglob("*") if file.suffix in (".parquet", ".jsonl")
            ]
            print(f"{name}: {len(files):,} files, {sum(files) / 2**30:.2g} GiB")
        print(f"generated in {generated:.0f} s")


if __name__ == "__main__":
    main()
