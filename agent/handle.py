"""The agent: the running observation of one model on one rank, and what a training loop calls of it.

After `attach` nothing of ours raises, blocks or grows without bound in the training process: errors are counted and
logged once, and what does not fit is dropped and counted.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from torch import Tensor, nn

from ..schemas import RunDescription
from .cadence import Cadence
from .embedded import EmbeddedAggregator
from .observation import UNUSABLE_MASK, Gate, Observer, Place, Shared, observe_mask
from .outbox import Outbox, Sample
from .overhead import Meter, wanted_stretch
from .ranks import Ranks
from .schedule import Schedule
from .topology import Observed, shown

log = logging.getLogger("eigenwatch.agent")

CLOSE_SECONDS = 60.0
MIN_END_SECONDS = 5.0
"""The embedded aggregator gets this long to end even where delivery has used up the time."""


class _Watched(NamedTuple):
    schedule: Schedule
    gate: Gate
    place: Place
    observer: Observer

    @classmethod
    def of(cls, one: Observed, model: nn.Module, shared: Shared) -> _Watched:
        gate = Gate()
        observer = Observer(one.place, one.module or model, gate, shared, hooked=one.module is not None)
        return cls(one.schedule, gate, one.place, observer)


class Agent:
    """What `attach` returns. All methods are called by the training thread."""

    def __init__(
        self,
        run: RunDescription,
        ranks: Ranks,
        models: Sequence[nn.Module],
        observed: Sequence[Observed],
        shared: Shared,
        outbox: Outbox,
        cadence: Cadence,
        embedded: EmbeddedAggregator | None,
        metrics_url: str | None,
        mask_argument: str | None,
        max_overhead: float | None,
    ) -> None:
        self.run = run
        self.metrics_url = metrics_url
        """The Prometheus endpoint of the embedded aggregator; None where another process serves it."""
        self._ranks, self._shared, self._outbox, self._embedded = ranks, shared, outbox, embedded
        self._cadence, self._max_overhead = cadence, max_overhead
        self._meter = Meter(asynchronous=any(p.device.type != "cpu" for model in models for p in model.parameters()))
        self._watched = [_Watched.of(one, models[0], shared) for one in observed]
        self._by_hand = {one.place.key: one.observer for one in self._watched if not one.observer.hooked}
        self._mask_handles = [
            observe_mask(model, mask_argument, shared.padding) for model in models if mask_argument is not None
        ]
        self._pid = os.getpid()
        self._last_step = -1
        self._covered = sys.maxsize
        """Up to which step points of the schedules have been looked for: what was expected to be the next."""
        self._step_ended_at: float | None = None
        self._undelivered: int | None = None
        self._warned: set[str] = set()
        atexit.register(self.close)

    def step(self, step: int) -> None:
        """Ends an optimizer step: what was captured since the last call is labelled with `step`.

        Call it on every rank. Never raises. Decides whether the coming step is sampled.
        """
        try:
            self._end_step(operator.index(step))
        except Exception as error:  # noqa: BLE001 - the training process never sees an error of ours
            self._warn_once("step", f"step({step!r}) was ignored: {error}")
            self._discard()  # or the next step's record would show this one's tokens too

    def observe(self, activations: Tensor, *, layer: int, site: str = "post", expert: int | None = None) -> None:
        """Shows activations (..., D) of a place that `attach` was told of by `declared=`; any forward may call it.

        For what has no module to hook, such as fused experts. Never raises; free but for one call between samples.
        """
        observer = self._by_hand.get((layer, site, expert))
        if observer is None:
            where = f"layer {layer}, site {site}" + ("" if expert is None else f", expert {expert}")
            self._warn_once(where, f"observe() of {where} is ignored: attach() was not told of it by declared=")
            return
        observer.call(activations)

    def mask(self, mask: Tensor | None) -> None:
        """Tokens where `mask` is 0 or False are padding and do not count, until it is set again or the step ends.

        Args:
            mask: (batch, time), or whatever leading dimensions the activations have; call it before the forward. The
                rows that reach an expert are not masked.
        """
        if mask is not None and type(mask) is not Tensor:
            self._warn_once("mask", f"mask() was given a {type(mask).__name__}, not a tensor: nothing is seen")
            mask = UNUSABLE_MASK
        self._shared.padding.set(mask)

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> int:
        """Ends the observation and waits, at most about `timeout_seconds`, until every record is durable.

        Call it on all ranks together: the embedded aggregator ends with rank 0's.

        Returns:
            How many partials of this rank are not known to be in a durable record, those that were dropped included; 0
            if all is well. May be called again.
        """
        if os.getpid() != self._pid:  # a forked DataLoader worker has neither our thread nor our children
            return 0
        if self._undelivered is not None:
            return self._undelivered
        atexit.unregister(self.close)
        for handle in self._mask_handles:
            handle.remove()
        for one in self._watched:
            one.observer.close()
        deadline = time.monotonic() + timeout_seconds
        try:
            self._undelivered = self._outbox.close(timeout_seconds)
        finally:
            if self._embedded is not None:
                self._embedded.close(max(deadline - time.monotonic(), MIN_END_SECONDS))
        return self._undelivered

    @property
    def dropped(self) -> dict[str, int]:
        """Partials that this rank has lost so far, by reason."""
        return self._outbox.dropped

    @property
    def overhead_ratio(self) -> float | None:
        """What sampling costs, measured: the stall of a sampled step over the time of the steps up to the next."""
        step = max(self._last_step, 0)
        return self._meter.ratio(self._cadence.stretch_at(step), step)

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        where = f", metrics at {self.metrics_url}" if self.metrics_url else ""
        cadences = " or ".join(str(steps) for steps in sorted({one.schedule.sampling_steps() for one in self._watched}))
        return (
            f"eigenwatch: run {self.run.run_id}, {shown(self.run.layers)}, every {cadences or '-'} steps, "
            f"{self._ranks.world_size} rank{'s' * (self._ranks.world_size > 1)}{where}"
        )

    def _end_step(self, step: int) -> None:
        if step < 0:
            raise ValueError("a step is not negative")
        if step <= self._last_step:
            self._warn_once(
                "order",
                f"step {step} came after step {self._last_step}: pass the optimizer's global step, which only rises, "
                "or later epochs are not sampled",
            )
        started = time.perf_counter()
        stride = 1 if self._last_step < 0 else max(step - self._last_step, 1)
        served = {one.schedule for one in self._watched if one.gate.open}
        if served:
            self._hand_over(step)
        self._shared.padding.set(None)
        self._last_step = step
        self._measure(served, started, stride)
        if served and self._cadence.decides:
            self._hold_contract(step, stride)
        self._cadence.settle(step + stride)
        self._open_gates(min(step, self._covered), step + stride)
        self._covered = step + stride

    def _discard(self) -> None:
        for one in self._watched:
            one.observer.discard()
        self._shared.padding.set(None)

    def _hand_over(self, step: int) -> None:
        captured_at = time.time()
        stretch = self._cadence.stretch_at(step)
        ratio = self.overhead_ratio
        seen = [(one, one.observer.take()) for one in self._watched if one.gate.open]
        trained = any(one.capture is not None or one.spoilt for _, one in seen)
        for one, its in seen:
            allowed = one.schedule.allows(step)
            if its.lost is not None and allowed:
                self._outbox.lost(its.lost, 1)
            if its.capture is not None and not allowed:
                its.capture.release()
            # An expert without tokens must not be waited for. A dense layer without them was skipped by the model, or
            # its hook is not in the code that ran: nobody shall take that for a record of no tokens.
            unseen = its.capture is None and not its.spoilt
            if unseen and trained and allowed and one.place.expert is None:
                self._warn_once(
                    f"unseen {one.place.name} {one.place.site}",
                    f"{one.place.name} (site {one.place.site}) was not observed in sampled step {step}, other layers "
                    "were: was it compiled before attach(), or is it given something that is no plain tensor?",
                )
            elif allowed and trained and not its.spoilt:
                self._outbox.put(
                    Sample(
                        step=step,
                        place=one.place,
                        capture=its.capture,
                        captured_at=captured_at,
                        sampling_steps=one.schedule.sampling_steps(stretch),
                        overhead_ratio=ratio,
                    )
                )
        if not trained and any(one.schedule.allows(step) for one, _ in seen):
            self._warn_once(
                "nothing",
                f"nothing was observed in sampled step {step}: was the model in training mode, and attach() "
                "called before the first compiled forward?",
            )

    def _measure(self, served: set[Schedule], started: float, stride: int) -> None:
        """Times the step that ended; `served` are the schedules for which it was sampled."""
        now = time.perf_counter()
        stalls = dict.fromkeys(served, (now - started) / max(len(served), 1))
        for one in self._watched:
            seconds, one.observer.seconds = one.observer.seconds, 0.0
            if one.schedule in stalls:
                stalls[one.schedule] += seconds
        if self._step_ended_at is not None:
            self._meter.ended(now - self._step_ended_at, stalls, stride)
        self._step_ended_at = now

    def _hold_contract(self, step: int, stride: int) -> None:
        """Stretches the cadence as far as the training, or the aggregator, needs it."""
        in_force, step_seconds = self._cadence.newest, self._meter.step_seconds
        if step_seconds is None or self._cadence.is_open or step < in_force.from_step:
            return
        wanted = self._outbox.stretch
        if self._max_overhead is not None:
            wanted = max(wanted, wanted_stretch(self._meter, self._max_overhead, in_force.stretch, step))
        if wanted != in_force.stretch:
            self._cadence.propose(step, wanted, step_seconds, stride)
            log.info("cadences are to be stretched by %d, where sampling takes %.2g %% of the time%s", wanted,
                     100 * (self._meter.ratio(wanted, step) or 0.0),
                     "; the aggregator asks for it" if wanted == self._outbox.stretch > 1 else "")  # fmt: skip

    def _open_gates(self, step: int, following: int) -> None:
        stretch = self._cadence.stretch_at(following)
        for one in self._watched:
            point = one.schedule.due(step, following, stretch)
            one.gate.open = point is not None and point.is_for(one.place.layer, one.schedule.rotate)

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned and len(self._warned) < 100:
            self._warned.add(about)
            log.warning("%s", message)
