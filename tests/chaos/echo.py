"""A second client that pushes a job's partials once more: `python -m tests.chaos.echo SECONDS SEED`.

It reads the spools of living launches as their couriers do, and pushes each partial three times, mixed with those of
other steps: at once, perhaps before its courier, then later, then when its record is long durable. It ends by itself.
"""

import contextlib
import random
import sys
import time
from pathlib import Path

import ray
import ray.exceptions
from eigenwatch.agent.spool import Spool, all_spool_roots, spools_in
from eigenwatch.schemas import PartialRefused, RunDescription, WirePartial
from eigenwatch.schemas.delivery import COORDINATOR, NAMESPACE, Opened

JOIN_SECONDS, CALL_SECONDS = 30.0, 10.0
DELAYS_SECONDS = ((0.0, 0.2), (0.5, 2.0), (2.0, 5.0))


class Echo:
    """What of one spool waits to be pushed again."""

    def __init__(self, spool: Spool, draws: random.Random) -> None:
        self._spool, self._draws = spool, draws
        label = spool.label()
        self._attempt, self._owners, *_ = _joined(label.destination.address, label.run)
        self._seen: set[int] = set()
        self._due: list[tuple[float, WirePartial]] = []

    def work(self) -> int:
        """How many partials were pushed."""
        now = time.monotonic()
        for number in self._spool.numbers():
            if number not in self._seen:
                self._seen.add(number)
                with contextlib.suppress(FileNotFoundError, PartialRefused):
                    header, mean, payload = self._spool.read(number)
                    copy = WirePartial(header, mean.copy(), payload.copy())  # the file goes
                    self._due += [(now + self._draws.uniform(*delay), copy) for delay in DELAYS_SECONDS]
        ready = [wire for due, wire in self._due if due <= now]
        self._due = [one for one in self._due if one[0] > now]
        self._draws.shuffle(ready)
        answers = []
        for header, mean, payload in ready:
            shard = ray.get_actor(self._owners[header["layer"]], namespace=NAMESPACE)
            answers.append(shard.push.remote(header | {"attempt": self._attempt}, mean, payload))
        ray.get(answers, timeout=CALL_SECONDS)
        return len(ready)


def _joined(address: str, run: RunDescription) -> Opened:
    """What the coordinator and the shards say to whoever comes with this launch, be it its courier or not."""
    where = Path(address).read_text() if address.startswith("/") else address
    if not ray.is_initialized():
        ray.init(address=where, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    coordinator = ray.get_actor(COORDINATOR, namespace=NAMESPACE)
    opened = Opened(*ray.get(coordinator.open_run.remote(run.to_wire()), timeout=CALL_SECONDS))
    for name in opened.shards:
        shard = ray.get_actor(name, namespace=NAMESPACE)
        owned = [layer for layer, owner in opened.owners.items() if owner == name]
        ray.get(shard.open_run.remote(run.to_wire(), opened.attempt, owned, opened.epoch), timeout=CALL_SECONDS)
    return opened


def main() -> None:
    seconds, draws = float(sys.argv[1]), random.Random(sys.argv[2])
    echoes: dict[Path, Echo] = {}
    pushed, deadline = 0, time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        for spool in spools_in(all_spool_roots()):
            try:
                if spool.folder not in echoes and not spool.closed and not spool.lock(alone=True):  # somebody uses it
                    echo = Echo(spool, draws)
                    deadline = deadline if echoes else time.monotonic() + seconds
                    echoes[spool.folder] = echo
                spool.unlock()
            except (ValueError, OSError, RuntimeError, ray.exceptions.RayError) as error:
                print(error, flush=True)
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # a shard is starting again
            pushed += sum(echo.work() for echo in echoes.values())
        time.sleep(0.05)
    print(f"pushed {pushed} partials of {len(echoes)} spools again", flush=True)


if __name__ == "__main__":
    main()
