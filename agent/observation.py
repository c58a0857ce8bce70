"""Observing a place of the model: a forward hook whose compiled body is one opaque operator call.

The hook must survive `torch.compile(fullgraph=True)`, so nothing that it compiles to may depend on Python state: the
operator is opaque to the compiler, runs at every forward, and reads the gate inside. Its only declared mutation is a
one-element tensor, which keeps it from being removed as dead code; declaring the accumulator itself as mutated
would make the compiler copy it. Recompute under activation checkpointing runs inside the backward pass, which is
how it is told from a forward; `is_grad_enabled` would also be false in a reentrant checkpoint's first forward.
"""

from __future__ import annotations

import inspect
import logging
import sys
import time
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .capture import Capture, Memory, NoRoom, Room, Scratch
from .padding import Padding
from .parallel import WidthGather

log = logging.getLogger("eigenwatch.agent")

MAX_ERRORS = 3
"""Steps with an error after which a place is no longer observed."""

_seeing: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""What the operator hands tensors to, by id: anything with `see`."""

# A captured CUDA graph would replay the operator's kernels without its gate.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("eigenwatch::observe", mutates_args=("pulse",), tags=_TAGS)
def _observe(activations: Tensor, pulse: Tensor, observer_id: int) -> None:
    observer = _seeing.get(observer_id)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What is observed: the place of a record, and this rank's part of it."""

    layer: int
    site: str
    expert: int | None = None
    name: str
    """Module path, for messages."""
    width: int
    """D of the whole layer."""
    share: int
    """The lowest of the ranks that hold the same tokens' features: this one, or its tensor-parallel group's first."""
    block: tuple[int, int]
    """Rows of the scatter that this rank forms: all of them, or its block within a tensor-parallel group."""
    columns: tuple[int, int] | None = None
    """Features of the module's output that are the activations; None: all."""
    gather: WidthGather | None = None
    """Brings the features of a tensor-parallel group together; all ranks of the group call it, or none."""

    @property
    def key(self) -> tuple[int, str, int | None]:
        return self.layer, self.site, self.expert


class Seen(NamedTuple):
    """What a place showed in one step."""

    capture: Capture | None
    """None where no token came."""
    spoilt: bool
    """Tokens came that could not be taken in, so that whatever else did is not the whole."""
    lost: str | None
    """Why what it showed is lost, as `agent.dropped` names it; None if it is not, or the place was given up before."""


@dataclass(kw_only=True, slots=True)
class Shared:
    """What all observers of an agent have in common."""

    room: Room
    padding: Padding
    scratch: dict[torch.device, Scratch]
    """By accelerator; built at the first forward there."""


class Observer:
    """What one place showed in the step under way. Lives on the training thread."""

    def __init__(self, place: Place, module: nn.Module, gate: Gate, shared: Shared, hooked: bool = True) -> None:
        self.place, self.hooked = place, hooked
        self._module = weakref.ref(module)
        self._gate, self._shared = gate, shared
        self._capture: Capture | None = None
        self._memory = Memory()
        self._muted = self._spoilt = False
        self._lost: str | None = None
        self.errors: Counter[str] = Counter()
        self.seconds = 0.0
        """Time that the training thread has spent in `see` since this was last set to 0."""
        self.pulse = torch.zeros(1)
        _seeing[id(self)] = self
        self._handle: Any = None
        if hooked:
            hook = (_InputHook if place.site == "post" else _OutputHook)(id(self))
            register = module.register_forward_pre_hook if place.site == "post" else module.register_forward_hook
            self._handle = register(hook, with_kwargs=True)

    def see(self, activations: Tensor) -> None:
        """Adds one forward's activations (..., D); called by the operator at every forward of the place.

        Never raises: an error is counted, and after `MAX_ERRORS` the place is no longer observed.
        """
        module = self._module()
        if not self._gate.open or module is None or not module.training:
            return
        if torch._C._current_graph_task_id() >= 0 or torch.is_inference_mode_enabled():  # a recompute; no training
            return
        if _infers_pipeline_metadata() or torch._C._functorch.is_functorch_wrapped_tensor(activations):
            return
        started = time.perf_counter()
        try:
            # The operator runs under the caller's autocast, which would lower the product's precision.
            with torch.no_grad(), torch.autocast(activations.device.type, enabled=False):
                self._take_in(activations)
        except NoRoom:
            self._spoil()
            self._lost = "outbox_full"
        except Exception as error:  # noqa: BLE001 - the training process never sees an error of ours
            self._failed(error)
        self.seconds += time.perf_counter() - started

    def call(self, activations: Any) -> None:
        """What a hook does, for `agent.observe`; anything but a tensor is counted as an error."""
        if not _show(activations, self.pulse, id(self)):
            self._failed(TypeError(f"observe() was given a {type(activations).__name__}, not a tensor"))

    def take(self) -> Seen:
        """What was seen since the last call."""
        capture, lost, spoilt = self._capture, self._lost, self._spoilt or self._muted
        self._capture, self._lost, self._spoilt = None, None, False
        if capture is not None and (spoilt or capture.tokens == 0):
            capture.release()
            capture = None
        return Seen(capture, spoilt, lost)

    def discard(self) -> None:
        """Forgets what was seen since the last call, and gives back its room."""
        seen = self.take()
        if seen.capture is not None:
            seen.capture.release()

    def close(self) -> None:
        self._detach()
        self.discard()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        _seeing.pop(id(self), None)

    def _take_in(self, activations: Tensor) -> None:
        place = self.place
        if place.columns is not None:
            activations = activations[..., slice(*place.columns)]
        # First of all, and whatever went wrong before: the other ranks of the group are waiting in it.
        if place.gather is not None:
            if activations.shape[-1] == place.width:  # then the group's ranks may well have tokens of their own
                raise ValueError("its features are whole on this rank, though its weights seem tensor-parallel")
            activations = place.gather(activations)
        if self._muted or self._spoilt:
            return
        if activations.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("its forward is being captured into a CUDA graph, whose replays cannot be observed")
        if activations.shape[-1] != place.width:
            raise ValueError(f"input has width {activations.shape[-1]}, expected {place.width}")
        # The rows of an expert are gathered from all over the batch; which are padding is not known here.
        rows_ND = activations.reshape(-1, place.width)
        if place.expert is None:
            rows_ND = self._shared.padding.without(rows_ND, activations.shape[:-1])
        if self._capture is None:
            scratch = self._scratch_of(activations.device)
            self._capture = Capture(place.width, place.block, self._shared.room, scratch, self._memory)
        if rows_ND.shape[0] > 0:
            self._capture.add(rows_ND)

    def _scratch_of(self, device: torch.device) -> Scratch | None:
        if device.type == "cpu":
            return None
        if device not in self._shared.scratch:
            self._shared.scratch[device] = Scratch(device)
        return self._shared.scratch[device]

    def _spoil(self) -> None:
        """The step is not whole any more: what it showed so far goes, and what still comes is not taken in."""
        self._spoilt = True
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _failed(self, error: Exception) -> None:
        self._spoil()
        self._lost = "observation_error"
        self.errors[type(error).__name__] += 1
        what = f"layer {self.place.layer} ({self.place.name})"
        if self.errors.total() == 1:
            log.warning("%s was not observed: %s", what, error)
        if self.errors.total() >= MAX_ERRORS and not self._muted:
            log.warning("%s is no longer observed after %d errors", what, MAX_ERRORS)
            self._muted = True
            if self.place.gather is None:
                self._detach()


class _InputHook:
    """Observes what goes into a module. Copies of the model, and saved ones, carry a hook that does nothing."""

    def __init__(self, observer_id: int) -> None:
        self.observer_id = observer_id
        # A plain tensor, not a module buffer: DDP would broadcast a buffer at every forward.
        self.pulse = torch.zeros(1)

    def __call__(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        _show(arguments[0] if arguments else keywords.get("input"), self.pulse, self.observer_id)

    def __reduce__(self) -> Any:
        return _NoHook, ()


class _OutputHook(_InputHook):
    """Observes what comes out of a module; of a tuple (Megatron's linears also give their bias), the first."""

    def __call__(self, module: nn.Module, arguments: Any, keywords: Any, output: Any = None) -> None:
        _show(output[0] if isinstance(output, tuple) else output, self.pulse, self.observer_id)


def _show(value: Any, pulse: Tensor, seer_id: int) -> bool:
    """Hands a tensor to whoever has this id in `_seeing`; False for what is no plain tensor."""
    if isinstance(value, DTensor):  # this rank's shard; asked by class, which the compiler understands
        value = value.to_local()
    elif type(value) not in (Tensor, nn.Parameter):  # another subclass may know no rule for our operator
        return False
    if torch.compiler.is_compiling():
        torch.ops.eigenwatch.observe(value.detach(), pulse, seer_id)
    elif (seer := _seeing.get(seer_id)) is not None:  # the operator's dispatch would cost 30 µs
        seer.see(value)
    return True


class _NoHook:
    def __call__(self, *whatever: Any) -> None:
        return None


UNUSABLE_MASK = torch.zeros(0, 0, 0)
"""Stands for a mask that is no tensor of (batch, time): it fits no activations, so that nothing is seen wrongly."""


class _MaskSeer:
    """Receives the mask that the model's forward was called with."""

    def __init__(self, padding: Padding) -> None:
        self._padding = padding

    def see(self, mask: Tensor) -> None:
        # Compiled code may use the memory of a mask that it made for something else once this call is over.
        self._padding.set(mask.clone() if mask.ndim > 0 else (None if mask.item() == 0 else UNUSABLE_MASK))


class _MaskHook:
    """A pre-hook of the whole model; like the others it must pass through the compiler."""

    def __init__(self, seer: _MaskSeer, argument: str, position: int | None) -> None:
        self._seer, self._argument, self._position = seer, argument, position  # the registry alone would let it go
        self._seer_id = id(seer)
        self.pulse = torch.zeros(1)
        self.none, self.unusable = torch.tensor(0), torch.tensor(1)

    def __call__(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        mask = keywords.get(self._argument)
        if mask is None and self._position is not None and self._position < len(arguments):
            mask = arguments[self._position]
        if not _show(self.none if mask is None else mask, self.pulse, self._seer_id):
            _show(self.unusable, self.pulse, self._seer_id)

    def __reduce__(self) -> Any:
        return _NoHook, ()


def observe_mask(model: nn.Module, argument: str, padding: Padding) -> Any:
    """Hands the argument of this name of every forward of `model` to `padding`; the handle removes the hook."""
    seer = _MaskSeer(padding)
    _seeing[id(seer)] = seer
    return model.register_forward_pre_hook(_MaskHook(seer, argument, mask_position(model, argument)), with_kwargs=True)


def mask_position(model: nn.Module, argument: str) -> int | None:
    """Where `argument` stands in the model's forward, should a caller not name it; None: it is always named.

    Raises:
        ValueError: the forward has no such argument.
    """
    names: list[str] = []
    inner: Any = model
    while isinstance(inner, nn.Module):
        parameters = inspect.signature(inner.forward).parameters
        names = list(parameters)
        if argument in parameters:
            named_only = parameters[argument].kind is inspect.Parameter.KEYWORD_ONLY
            return None if named_only else names.index(argument)
        # What DDP and torch.compile wrap.
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    raise ValueError(
        f"mask_argument={argument!r} is no argument of the model's forward, which has {', '.join(names) or 'none'}: "
        "name the one that is the padding mask, or pass None and call agent.mask(mask)"
    )


def _infers_pipeline_metadata() -> bool:
    """Whether this forward is torch's pipeline stage finding out shapes, on memory that was never written.

    Nothing but the caller's name tells that run from a real one (torch 2.13, `_PipelineStageBase`).
    """
    if "torch.distributed.pipelining.stage" not in sys.modules:
        return False
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _METADATA_RUNS and frame.f_code.co_filename.endswith("pipelining/stage.py"):
            return True
        frame = frame.f_back
    return False


_METADATA_RUNS = frozenset({"_forward_metadata_inference", "_backward_metadata_inference", "_shape_inference"})
