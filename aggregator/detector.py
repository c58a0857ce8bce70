"""What all detectors share: a window of one layer's samples, and an alert that starts and ends when they agree.

A detector is a pure function of one layer's records, in the order of their steps. All that it knows is its window,
whether its alert fires and since when, so whoever starts again gives it the newest records and the newest alert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple


class Observation(NamedTuple):
    """What detectors read of a record."""

    step: int
    hard_rank: float
    """NaN, as all metrics, where the record is not finite."""
    hard_utilization: float
    spectral_concentration: float
    width: int
    finite: bool = True


class Transition(NamedTuple):
    """The alert starts or ends."""

    firing: bool
    step: int
    since_step: int
    """First of the samples that made the alert."""
    reason: str
    evidence_steps: list[int]


class Detector(ABC):
    """Follows one layer. `update` with each record returns what changed."""

    kind: ClassVar[str]
    severity: ClassVar[str]

    def __init__(self, window_samples: int) -> None:
        """It remembers so many samples of those that it reads."""
        self._window: deque[Observation] = deque(maxlen=window_samples)
        self._firing = False
        self._since_step = 0

    def recall(self, seen: Iterable[Observation]) -> None:
        """Takes up what was seen before a restart, oldest first, and says nothing of it."""
        self._window.extend(one for one in seen if self._reads(one))

    def recall_firing(self, since_step: int) -> None:
        """Takes up that the alert fires."""
        self._firing, self._since_step = True, since_step

    def update(self, seen: Observation) -> Transition | None:
        if not self._reads(seen):
            return None
        self._window.append(seen)
        agreed = self._ended() if self._firing else self._started()
        if not agreed:
            return None
        self._firing = not self._firing
        if self._firing:
            self._since_step = agreed[0].step
        return Transition(self._firing, seen.step, self._since_step, self._reason(seen), [one.step for one in agreed])

    def _reads(self, seen: Observation) -> bool:
        """Whether it can tell anything from this record."""
        return seen.finite

    def _newest(self, samples: int, agree: Callable[[Observation], bool]) -> list[Observation]:
        """So many newest samples, where all agree; else none."""
        newest = list(self._window)[-samples:]
        return newest if len(newest) == samples and all(map(agree, newest)) else []

    @abstractmethod
    def _started(self) -> list[Observation]:
        """The samples that start the alert, the newest last; empty where they do not."""

    @abstractmethod
    def _ended(self) -> list[Observation]:
        """Those that end it."""

    @abstractmethod
    def _reason(self, seen: Observation) -> str:
        """In words, with the figures of the newest sample; of the state that the alert is in now."""
