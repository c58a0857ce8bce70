"""Padding: which tokens of the forwards under way are not tokens at all, and must not count.

The mask is a reference to the caller's tensor until the first place of a forward needs it; the indices it gives are
kept for the other places, so that an accelerator is waited for once a forward.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Padding:
    """The mask of the forwards under way; None: every token counts. Lives on the training thread."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._index: dict[bool, Tensor] = {}

    def set(self, mask: Tensor | None) -> None:
        """Tokens where `mask` is 0 or False do not count until it is set again.

        Args:
            mask: in the leading dimensions of the activations, (batch, time) as a rule, or (time, batch).
        """
        self._mask = None if mask is None else mask.detach()
        self._index = {}

    def without(self, rows_ND: Tensor, leading: torch.Size) -> Tensor:
        """The rows that count.

        Args:
            rows_ND: (N, D) activations.
            leading: their shape without D before they were flattened.

        Raises:
            ValueError: the mask is not about these activations.
        """
        mask = self._mask
        if mask is None:
            return rows_ND
        turned = mask.ndim == 2 and leading != mask.shape and leading == mask.T.shape  # Megatron: (time, batch, D)
        fits = leading == mask.shape or turned or (len(leading) == 1 and leading[0] == mask.numel())
        if not fits:
            raise ValueError(f"the mask has shape {tuple(mask.shape)} and the activations {tuple(leading)}")
        if turned not in self._index:
            flat = (mask.T if turned else mask).reshape(-1)
            self._index[turned] = flat.to(rows_ND.device).nonzero().squeeze(1)
        index = self._index[turned]
        return rows_ND if len(index) == len(rows_ND) else rows_ND[index]
