"""`make chaos`: storms by hand, one after the other. `python -m tests.chaos --seeds 20`, or one again: `--seed 7`."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.faults import draw, tokens_of
from tests.chaos.storm import FORMS, Storm


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--form", choices=FORMS, help="of the aggregator; default: each seed its own")
    parser.add_argument("--faults", type=int, default=8, help="in each storm")
    options = parser.parse_args()
    failed = []
    for seed in range(options.seeds) if options.seed is None else [options.seed]:
        form = options.form or form_of(seed)
        folder = Path(tempfile.mkdtemp(prefix=f"ew-chaos-{seed}-"))
        print(f"== seed {seed}, {form}, in {folder}", flush=True)
        began = time.monotonic()
        problems = []
        try:
            schedule = draw(seed, form, options.faults)
            with Storm(folder, form=form, schedule=schedule, tokens=tokens_of(seed)) as storm:
                storm.run()
                problems = storm.judged()
        except Exception as error:  # noqa: BLE001 - the next seed has its turn
            problems = [f"{type(error).__name__}: {error}"]
        print(f"== seed {seed}: {len(problems)} problems, {time.monotonic() - began:.0f} s", flush=True)
        for problem in problems[:20]:
            print(f"   {problem}", flush=True)
        if problems:
            failed.append(seed)
        else:
            shutil.rmtree(folder)
    print(f"{len(failed)} seeds failed: {failed}; again with --seed N" if failed else "all seeds passed")
    sys.exit(bool(failed))


def form_of(seed: int) -> str:
    """Most faults are possible on a cluster."""
    return ("cluster", "own", "cluster", "embedded")[seed % 4]


if __name__ == "__main__":
    main()
