"""Krylov subspaces of a large symmetric matrix: its leading eigenpairs, and the measures that probes see of the rest.

Everything goes by blocks, so that a step is one product of the matrix with a tall, thin one. Bases are orthogonalised
in full, twice: without that, Lanczos finds its leading eigenvalues again and again and counts them each time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CONVERGED = 1e-5
"""Residual of an eigenpair, relative to its eigenvalue, up to which it counts as found; it bounds the value's error."""
EXHAUSTED = 1e-9
"""Length of a new direction, relative to the spectral norm, below which a probe has seen all there is to see."""


class Leading(NamedTuple):
    """Eigenpairs that have converged, the largest first."""

    values: Tensor
    """(r,)"""
    vectors: Tensor
    """(D, r), orthonormal."""


class Quadrature(NamedTuple):
    """Gauss quadratures of the measures that m probes see of a matrix: Σ_j w_j f(x_j) is vᵀf(A)v for a unit probe v."""

    nodes: Tensor
    """(m, k)"""
    weights: Tensor
    """(m, k), at least 0; each probe's add up to 1."""


def leading(matrix: Tensor, start: Tensor, steps: int) -> Leading:
    """The leading eigenpairs, as many as converge, by Rayleigh–Ritz in a block Krylov subspace.

    Several copies of one eigenvalue are found, up to the width of the block.

    Args:
        matrix: (D, D), symmetric and positive semidefinite.
        start: (D, b), random.
        steps: blocks in the subspace; b·steps is well below D.
    """
    block = torch.linalg.qr(start).Q
    basis, images = block, matrix @ block
    for _ in range(steps - 1):
        block = images[:, -block.shape[1] :]
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        basis, images = torch.cat((basis, block), 1), torch.cat((images, matrix @ block), 1)
    small = basis.T @ images
    values, rotation = (one.flip(-1) for one in torch.linalg.eigh((small + small.T) / 2))
    vectors, residuals = (
        basis @ rotation,
        torch.linalg.vector_norm(images @ rotation - (basis @ rotation) * values, dim=0),
    )
    converged = ((residuals <= CONVERGED * values) & (values > 0)).int().cumprod(0).sum()
    return Leading(values[:converged], vectors[:, :converged])


def quadrature(matrix: Tensor, probes: Tensor, steps: int, without: Tensor) -> Quadrature:
    """What each probe sees of the matrix on the complement of some of its eigenvectors.

    Args:
        matrix: (D, D), symmetric.
        probes: (D, m), any length; their part along `without` is taken away.
        steps: nodes of each quadrature, k; it is exact for polynomials of degree 2k − 1.
        without: (D, r), orthonormal.

    Source: Golub & Meurant 1994; Ubaru, Chen & Saad 2017.
    """
    count = probes.shape[1]
    seen = matrix.new_zeros(count, steps, matrix.shape[0])
    diagonal_mk, beside_mk = matrix.new_zeros(count, steps), matrix.new_zeros(count, steps)
    direction = _orthogonal(probes.T, seen[:, :0], without)
    direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    largest = matrix.new_zeros(())
    for step in range(steps):
        seen[:, step] = direction
        image = (matrix @ direction.T).T
        diagonal_mk[:, step] = (image * direction).sum(1)
        image = _orthogonal(image, seen[:, : step + 1], without)
        length = torch.linalg.vector_norm(image, dim=1)
        largest = torch.maximum(largest, torch.maximum(length.max(), diagonal_mk[:, step].max()))
        # What a probe goes on with when it has seen everything are zeros, which get nodes without weight.
        alive = length > EXHAUSTED * largest
        beside_mk[:, step] = torch.where(alive, length, 0.0)
        direction = torch.where(alive[:, None], image / torch.where(alive, length, 1.0)[:, None], 0.0)
    tridiagonal = torch.diag_embed(diagonal_mk)
    if steps > 1:
        beside = torch.diag_embed(beside_mk[:, :-1], 1)
        tridiagonal = tridiagonal + beside + beside.mT
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return Quadrature(nodes, vectors[:, 0, :].square())


def _orthogonal(rows_mD: Tensor, seen_mjD: Tensor, without_Dr: Tensor) -> Tensor:
    """Each probe's row without its part along what that probe has seen, and along `without`."""
    for _ in range(2):
        rows_mD = rows_mD - (rows_mD @ without_Dr) @ without_Dr.T
        along_mj = seen_mjD @ rows_mD[:, :, None]
        rows_mD = rows_mD - (along_mj.mT @ seen_mjD)[:, 0]
    return rows_mD
