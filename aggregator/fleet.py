"""The shards of a service: which of them answer, and so which of them own layers.

A shard that does not answer for long is away: its host is gone and Ray finds no room for another, or it hangs. The
others take its layers over, and it gets its part again when it answers. Couriers learn of either with their next
heartbeat and push again what is not durable, so nobody has to hand anything over. The service's poller calls.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
import ray.exceptions

from .snapshot import Launch, ShardSnapshot

log = logging.getLogger("eigenwatch.aggregator")

ASK_SECONDS = 5.0
"""How long a shard that answered lately is waited for."""
CALL_SECONDS = 30.0


class Fleet:
    """The shards by name, with what each said last."""

    def __init__(self, coordinator: Any, shards: dict[str, Any], away_seconds: float) -> None:
        self._coordinator, self._shards, self._away_seconds = coordinator, shards, away_seconds
        self._asked: dict[str, Any] = {}
        """The call that each shard still owes an answer to."""
        self._said: dict[str, ShardSnapshot] = {}
        self._heard_at: dict[str, float] = {}
        self._owners: list[str] = []

    @property
    def away(self) -> list[str]:
        """Shards that own nothing until they answer."""
        return [name for name in self._shards if name not in self._owners]

    def start(self, timeout_seconds: float) -> None:
        """Waits until all shards answer, or goes on with those that do.

        Raises:
            ray.exceptions.GetTimeoutError: none did.
        """
        deadline = time.monotonic() + timeout_seconds
        while len(self._heard_at) < len(self._shards) and time.monotonic() < deadline:
            self._ask([], min(ASK_SECONDS, timeout_seconds))
        if not self._heard_at:
            raise ray.exceptions.GetTimeoutError(f"no shard answered in {timeout_seconds:.0f} s")
        self._share_out()

    @property
    def heard_at(self) -> float:
        """Since when, as Unix time, every shard that owns layers has answered at least once."""
        now = time.monotonic()
        return time.time() - max(now - self._heard_at[name] for name in self._owners)

    def snapshots(self, ended: list[Launch]) -> list[ShardSnapshot]:
        """The state of every shard; of one that is away only what it has counted. Launches that ended are forgotten.

        Raises:
            TimeoutError: no shard that owns layers answers.
        """
        self._ask(ended, ASK_SECONDS)
        self._share_out()
        if not any(self._is_here(name) for name in self._owners):
            raise TimeoutError(f"none of {len(self._shards)} shards answers")
        return [
            said if name in self._owners else said._replace(latest=[], alerts=[], backlog_seconds=0.0, stretch={})
            for name, said in self._said.items()
        ]

    def _ask(self, ended: list[Launch], timeout_seconds: float) -> None:
        for name, shard in self._shards.items():
            if name not in self._asked:
                self._asked[name] = shard.snapshot.remote(ended)
        expected = [self._asked[name] for name in self._shards if name in self._owners or not self._owners]
        ray.wait(expected, num_returns=len(expected), timeout=timeout_seconds)
        for name, answer in list(self._asked.items()):
            if not ray.wait([answer], timeout=0)[0]:
                continue
            del self._asked[name]
            try:
                self._said[name] = ray.get(answer)
                self._heard_at[name] = time.monotonic()
            except ray.exceptions.RayError as error:  # it died, and Ray starts another
                log.warning("%s does not answer: %s", name, (str(error).splitlines() or [type(error).__name__])[0])

    def _is_here(self, name: str) -> bool:
        return time.monotonic() - self._heard_at.get(name, float("-inf")) <= self._away_seconds

    def _share_out(self) -> None:
        """Tells the coordinator who owns layers, where that has changed; where nobody answers nothing changes."""
        here = [name for name in self._shards if self._is_here(name)]
        if not here:
            return
        if here != self._owners:
            log.warning("layers are owned by %s%s", ", ".join(here), _and_without(set(self._shards) - set(here)))
        self._owners = here
        stretch: dict[str, int] = {}
        for said in (self._said[name] for name in here):
            stretch |= {run: max(wanted, stretch.get(run, 1)) for run, wanted in said.stretch.items()}
        shards = {name: self._said[name].incarnation for name in here}
        # Each time, since the coordinator may have restarted.
        ray.get(self._coordinator.set_shards.remote(shards, stretch), timeout=CALL_SECONDS)


def _and_without(away: set[str]) -> str:
    return f"; {', '.join(sorted(away))} do not answer" if away else ""
