"""Observing a layer: a forward pre-hook whose body is one opaque operator call.

The hook must survive `torch.compile(fullgraph=True)`, so nothing in it may depend on Python state: the operator is
opaque to the compiler, runs at every forward, and reads the gate inside. Its only declared mutation is a
one-element tensor, which keeps it from being removed as dead code; declaring the accumulator itself as mutated
would make the compiler copy it. Recompute under activation checkpointing runs inside the backward pass, which is
how it is told from a forward; `is_grad_enabled` would also be false in a reentrant checkpoint's first forward.
"""

import logging
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..spectrum import Moments

log = logging.getLogger("eigenwatch.agent")

MAX_ERRORS = 3
"""Errors after which a layer's observation is switched off."""

_observers: "weakref.WeakValueDictionary[int, Observer]" = weakref.WeakValueDictionary()


@torch.library.custom_op("eigenwatch::observe", mutates_args=("pulse",))
def _observe(activations: Tensor, pulse: Tensor, observer_id: int) -> None:
    observer = _observers.get(observer_id)
    if observer is not None:
        observer.see(activations)


@_observe.register_fake
def _(activations: Tensor, pulse: Tensor, observer_id: int) -> None:
    return None


class Gate:
    """Whether the step under way is sampled; opened and closed between steps by the training thread."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open = True


class Observer:
    """What one layer showed in the step under way. Lives on the training thread."""

    def __init__(self, layer: int, site: str, name: str, width: int, module: nn.Module, gate: Gate) -> None:
        self.layer, self.site, self.name, self.width = layer, site, name, width
        self._module = weakref.ref(module)
        self._gate = gate
        self._moments: Moments | None = None
        self.errors: Counter[str] = Counter()
        _observers[id(self)] = self
        self._handle = module.register_forward_pre_hook(_Hook(id(self)), with_kwargs=True)

    def see(self, activations: Tensor) -> None:
        """Adds one forward's activations (..., D); called by the operator at every forward of the layer.

        Never raises: an error is counted, and after `MAX_ERRORS` the layer is no longer observed.
        """
        module = self._module()
        if not self._gate.open or module is None or not module.training:
            return
        if torch._C._current_graph_task_id() >= 0 or torch.is_inference_mode_enabled():  # a recompute; no training
            return
        try:
            if activations.shape[-1] != self.width:
                raise ValueError(f"input has width {activations.shape[-1]}, expected {self.width}")
            if self._moments is None:
                self._moments = Moments(self.width, device=activations.device)
            # The operator runs under the caller's autocast, which would lower the product's precision.
            with torch.no_grad(), torch.autocast(activations.device.type, enabled=False):
                self._moments.add(activations.reshape(-1, self.width))
        except Exception as error:  # noqa: BLE001 - the training process never sees an error of ours
            self._failed(error)

    def take(self) -> Moments | None:
        """What was seen since the last call, or None where nothing was."""
        moments, self._moments = self._moments, None
        return moments if moments is not None and moments.tokens > 0 else None

    def close(self) -> None:
        self._handle.remove()
        _observers.pop(id(self), None)

    def _failed(self, error: Exception) -> None:
        self._moments = None
        self.errors[type(error).__name__] += 1
        if self.errors.total() == 1:
            log.warning("layer %d (%s) was not observed: %s", self.layer, self.name, error)
        if self.errors.total() >= MAX_ERRORS:
            log.warning("layer %d (%s) is no longer observed after %d errors", self.layer, self.name, MAX_ERRORS)
            self.close()


class _Hook:
    """The pre-hook of one layer. A copy of the model, or one that was saved, carries a hook that observes nothing."""

    def __init__(self, observer_id: int) -> None:
        self.observer_id = observer_id
        # A plain tensor, not a module buffer: DDP would broadcast a buffer at every forward.
        self.pulse = torch.zeros(1)

    def __call__(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        activations = arguments[0] if arguments else keywords.get("input")
        if type(activations) is Tensor:  # a subclass, such as a DTensor, may know no rule for our operator
            torch.ops.eigenwatch.observe(activations.detach(), self.pulse, self.observer_id)

    def __reduce__(self) -> Any:
        return _NoHook, ()


class _NoHook:
    def __call__(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        return None
