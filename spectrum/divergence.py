"""Divergence of two spectra: what the nonlinearity does to the distribution of variance."""

import math

from torch import Tensor

from .shares import entropy, variance_shares


def js_divergence(eigenvalues_pre: Tensor, eigenvalues_post: Tensor) -> Tensor:
    """Jensen–Shannon divergence of two spectra's variance shares, H((p+q)/2) − (H(p) + H(q))/2, in nats.

    Args:
        eigenvalues_pre: (..., D), non-negative, descending, any scale.
        eigenvalues_post: (..., D), likewise; leading dimensions broadcast.

    Returns:
        (...), between 0 for equal shares and ln 2 for disjoint ones; symmetric in its arguments.

    Raises:
        ValueError: the widths differ.

    Source: Lin 1991; NerVE (Jha & Reagen, ICLR 2026).
    """
    if eigenvalues_pre.shape[-1] != eigenvalues_post.shape[-1]:
        raise ValueError(
            "js_divergence compares spectra of one width, got "
            f"{eigenvalues_pre.shape[-1]} and {eigenvalues_post.shape[-1]}"
        )
    pre, post = variance_shares(eigenvalues_pre), variance_shares(eigenvalues_post)
    divergence = entropy((pre + post) / 2) - (entropy(pre) + entropy(post)) / 2
    return divergence.clamp(0.0, math.log(2))
