"""Starting the tests' training job, and reading what is in a store."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).parent.parent.parent


def start_job(out: Path, environment: dict[str, str], *options: str, ranks: int = 2) -> "subprocess.Popen[bytes]":
    """`tests.jobs.train` under torchrun, or alone where there is one rank only; in a session of its own."""
    out.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.jobs.train", "--out", str(out), *options],
        env=environment,
        cwd=REPOSITORY,
        stderr=(out / "stderr").open("wb"),
        start_new_session=True,
    )


def step_of(out: Path, rank: int = 0) -> int:
    """The last step that a rank of the job has ended; -1 before the first."""
    path = out / f"step-{rank}"
    text = path.read_text() if path.exists() else ""
    return int(text or -1)


def read_whole_store(store: Path) -> int:
    """Reads every Parquet file in full, which raises where one is damaged; returns how many there are."""
    files = list(store.rglob("*.parquet"))
    for file in files:
        if not file.name.startswith("."):
            pq.read_table(file)
    return len(files)
