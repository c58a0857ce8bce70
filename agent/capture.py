"""What one layer showed in the step under way, as pieces in host memory; the outbox's thread makes a partial of them.

The training thread does what is cheap where the activations are:

- On the CPU it copies rows, at about a fortieth of the time that forming their scatter takes, and the outbox's thread
  forms the scatter beside the next steps. Where `Room` has none left for rows, they are folded at once.
- On an accelerator the product is cheap and the way to the host is narrow. A forward's rows are copied where they are
  fewer bytes than their packed scatter, else the scatter is formed in one of two scratch buffers and that is copied;
  both on a side stream into pinned memory, and the training stream waits only if both scratch buffers are still busy.
  (This path was run on the CPU's null streams only, never on a GPU.)
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spectrum import Moments, Product, block_length, product_for


class Room:
    """Bytes of host memory that captures of all layers may hold, together; taken and given back by two threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._used_bytes = limit_bytes, 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Takes `nbytes` if there is room for them."""
        with self._lock:
            fits = self._used_bytes + nbytes <= self._limit_bytes
            self._used_bytes += nbytes * fits
            return fits

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self._used_bytes -= nbytes


class NoRoom(Exception):
    """The layer's sample does not fit; it is lost and counted."""


class _Copied(NamedTuple):
    """Moments of one forward that came from a device."""

    tokens: int
    mean: Tensor
    scatter: Tensor


class Memory:
    """What is remembered of a place's samples: written by the outbox's thread, read by the training thread."""

    mean_to_variance: float | None = None
    """Of the last sample, see `Moments.mean_to_variance`; None before the first."""


class Capture:
    """One layer's sample in the making. `add` on the training thread; afterwards the outbox's thread owns it."""

    def __init__(
        self,
        width: int,
        block: tuple[int, int],
        room: Room,
        scratch: Scratch | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.width, self.block = width, block
        self._memory = memory
        self.tokens = 0
        self._room = room
        self._scratch = scratch
        self._held_bytes = 0
        self._rows: list[Tensor] = []
        self._copied: list[_Copied] = []
        self._folded: Moments | None = None
        self._arrivals: list[Any] = []
        """Events of copies that are still under way."""

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return self._held_bytes + (self._folded.scatter.nbytes if self._folded is not None else 0)

    def add(self, x_ND: Tensor) -> None:
        """Takes in the rows of one forward, which may change afterwards.

        Raises:
            NoRoom: host memory is used up, and this place cannot fold.
        """
        self.tokens += x_ND.shape[0]
        if self._scratch is not None:
            self._add_from_device(x_ND, self._scratch)
        elif self._folded is None and self._hold(x_ND.nbytes):
            self._rows.append(x_ND.clone(memory_format=torch.contiguous_format))
        else:
            self._fold().add(x_ND)

    def rows_ND(self, most_bytes: int) -> Tensor | None:
        """All rows in their own dtype, if nothing was folded and they take at most `most_bytes`."""
        self._wait()
        if self._folded is not None or self._copied or sum(rows.nbytes for rows in self._rows) > most_bytes:
            return None
        return torch.cat(self._rows)

    def moments(self) -> Moments:
        """Everything seen, folded. Called once, by the outbox's thread."""
        self._wait()
        moments = self._fold()
        for one in self._copied:
            moments.include(one.tokens, one.mean, one.scatter)
        self._copied.clear()
        if self._scratch is not None and self._memory is not None:
            self._memory.mean_to_variance = moments.mean_to_variance()
        return moments

    def release(self) -> None:
        """Gives back the room; the pieces are not used any more."""
        self._rows.clear()
        self._copied.clear()
        self._room.give_back(self._held_bytes)
        self._held_bytes = 0

    def _fold(self) -> Moments:
        """The moments of this capture, with the rows that were held in them."""
        if self._folded is None:
            self._folded = Moments(self.width, rows=self.block)
            for rows_ND in self._rows:
                self._folded.add(rows_ND)
            freed = sum(rows_ND.nbytes for rows_ND in self._rows)
            self._rows.clear()
            self._room.give_back(freed)
            self._held_bytes -= freed
        return self._folded

    def _hold(self, nbytes: int) -> bool:
        fits = self._room.take(nbytes)
        self._held_bytes += nbytes * fits
        return fits

    def _add_from_device(self, x_ND: Tensor, scratch: Scratch) -> None:
        scatter_bytes = 4 * block_length(self.width, self.block)
        if x_ND.nbytes <= scatter_bytes:
            if not self._hold(x_ND.nbytes):
                raise NoRoom(f"{x_ND.nbytes} bytes of rows")
            (rows_ND,) = self._receive(scratch.rows(x_ND))
            self._rows.append(rows_ND)
            return
        if not self._hold(scatter_bytes):
            raise NoRoom(f"{scatter_bytes} bytes of scatter")
        known = None if self._memory is None else self._memory.mean_to_variance
        product = product_for(x_ND.dtype, x_ND.device, known)
        mean, scatter = self._receive(scratch.fold(x_ND, self.width, self.block, product))
        self._copied.append(_Copied(x_ND.shape[0], mean, scatter))

    def _receive(self, copies: tuple[tuple[Tensor, ...], Any]) -> tuple[Tensor, ...]:
        tensors, arrival = copies
        self._arrivals.append(arrival)
        return tensors

    def _wait(self) -> None:
        for arrival in self._arrivals:
            if arrival is not None:  # the CPU's null streams have no events
                arrival.synchronize()
        self._arrivals.clear()


class Scratch:
    """Two buffers on one device in which scatters are formed, and the side stream that copies to the host.

    Device memory is bounded by them, however many layers are observed. Training thread only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._side = self._streams.Stream()
        self._buffers: list[Tensor | None] = [None, None]
        self._copied: list[Any] = [None, None]
        self._turn = 1

    def rows(self, x_ND: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Starts the copy of rows to the host, by way of a buffer: the training may overwrite them at once."""
        kept = self._next(x_ND.nbytes).view(x_ND.dtype).view(x_ND.shape)
        return self._copy(kept.copy_(x_ND))

    def _copy(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Starts copies to the host; the tensors there, and the event after which they may be read."""
        self._side.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._side):
            pinned = self._device.type != "cpu"
            arrived = tuple(torch.empty_like(one, device="cpu", pin_memory=pinned) for one in tensors)
            for here, there in zip(arrived, tensors, strict=True):
                here.copy_(there, non_blocking=True)
                if pinned:
                    there.record_stream(self._side)
        self._copied[self._turn] = self._side.record_event()
        return arrived, self._copied[self._turn]

    def fold(
        self, x_ND: Tensor, width: int, block: tuple[int, int], product: Product = Product.EXACT
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Forms mean and scatter of rows on the device, and starts their copies to the host."""
        scatter = self._next(4 * block_length(width, block)).view(torch.float32).zero_()
        moments = Moments(width, device=self._device, rows=block, scatter=scatter, product=product)
        moments.add(x_ND)
        return self._copy(moments.mean, moments.scatter)

    def _next(self, nbytes: int) -> Tensor:
        """The other buffer, once its last copy is over; the training stream waits for that, not its thread."""
        self._turn = 1 - self._turn
        if self._copied[self._turn] is not None:
            self._streams.current_stream().wait_event(self._copied[self._turn])
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._buffers[self._turn] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return buffer[:nbytes]
