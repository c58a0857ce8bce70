"""Losses as Prometheus sees them: counters read often, each rise added up, also over restarts that begin at 0 again."""

import contextlib
import re
import urllib.request
from collections import Counter

_SAMPLE = re.compile(r"^eigenwatch_partials_dropped_total\{(?P<labels>.*)\} (?P<value>\S+)$")


class CountedLosses:
    """What `eigenwatch_partials_dropped_total` has said of one run so far, by reason."""

    def __init__(self, run_id: str) -> None:
        self._run = f'run="{run_id}"'
        self._last: dict[str, float] = {}
        self.by_reason: Counter[str] = Counter()

    def read(self, metrics_url: str) -> None:
        """Takes in what the endpoint says now, where it answers."""
        with contextlib.suppress(OSError), urllib.request.urlopen(metrics_url, timeout=2) as answer:
            for line in answer.read().decode().splitlines():
                sample = _SAMPLE.match(line)
                if sample and self._run in sample["labels"].split(","):
                    self._take(sample["labels"], float(sample["value"]))

    def _take(self, labels: str, value: float) -> None:
        last = self._last.get(labels, 0.0)
        reason = re.search(r'reason="([^"]*)"', labels)
        assert reason is not None
        self.by_reason[reason[1]] += int(value - last if value >= last else value)
        self._last[labels] = value
