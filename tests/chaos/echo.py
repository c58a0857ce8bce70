"""A second client that pushes a job's partials once more: `python -m tests.chaos.echo SECONDS SEED`.

It reads the spools of living launches as their couriers do, and pushes each partial three times, mixed with those of
other steps: at once, perhaps before its courier, then later, then when its record is long durable. It ends by itself.
"""

import contextlib
import random
import sys
import time
from pathlib import Path

from eigenwatch.agent.ray_session import RaySession, SessionError
from eigenwatch.agent.spool import Spool, all_spool_roots, spools_in
from eigenwatch.schemas import PartialRefused, WirePartial

JOIN_SECONDS = 30.0
DELAYS_SECONDS = ((0.0, 0.2), (0.5, 2.0), (2.0, 5.0))


class Echo:
    """What of one spool waits to be pushed again."""

    def __init__(self, spool: Spool, draws: random.Random) -> None:
        self._spool, self._draws = spool, draws
        label = spool.label()
        self._session = RaySession(label.destination.address, label.run, label.rank)
        self._session.open()
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
        for wire in ready:
            self._session.push([wire])
        return len(ready)


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
            except (ValueError, SessionError) as error:
                print(error, flush=True)
        with contextlib.suppress(SessionError):
            pushed += sum(echo.work() for echo in echoes.values())
        time.sleep(0.05)
    print(f"pushed {pushed} partials of {len(echoes)} spools again", flush=True)


if __name__ == "__main__":
    main()
