"""How much each token contributes to what all of them span together: the score of FlashVLA and TokenCarve."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

# Tokens of so many numbers are multiplied in float32, less their mean, which takes a third of the time.
WIDE = 1024
# Of so many tokens NumPy's LAPACK finds the eigenvectors in 0.7 of the time of torch's.
MANY = 192


def information_contribution(
    tokens: Tensor, energy: float = 1.0, centre: bool = False, normalise: bool = False
) -> Tensor:
    """The information contribution score, C(x) = sum over i of |u_xi| s_i for tokens = U diag(s) V^T.

    FlashVLA (arXiv 2505.21200) and TokenCarve (arXiv 2503.10501) both define it so.

    tokens: (..., N, d).
    energy: in (0, 1]; the sum runs over the fewest, largest s_i whose squares hold this share of all squares. 1 is all
        of them, as in TokenCarve's published code; FlashVLA speaks of an "effective rank" without a rule.
    centre, normalise: see `gram`; our choice.
    Returns (..., N) float64, with |x| <= C(x) <= sqrt(r) |x| for r terms, of which the first holds for all N terms.
    """
    return contribution(gram(tokens, centre, normalise), energy)


def gram(tokens: Tensor, centre: bool = False, normalise: bool = False) -> Tensor:
    """tokens: (..., N, d). Returns the inner products of all pairs, (..., N, N) float64.

    centre: of the tokens less their mean, which in small models outweighs everything else.
    normalise: of tokens of length 1, after centring.

    In float64, because eigenvalues are squares of singular values and a float32 product drowns the small ones: on the
    mini it moves a token in one kept set of seven, and float64 none. Of tokens of `WIDE` numbers or more the mean is
    taken off first and put back in float64, and what is left multiplied, by itself and by the mean, in float32: that
    moves none either, of 256 x 4096 with a mean up to ten times as large as the rest.
    """
    count, size = tokens.shape[-2:]
    if size < WIDE or tokens.dtype == torch.float64:
        rows = tokens.double()
        products = rows @ rows.mT
    else:
        samples = tokens.reshape(-1, count, size).float()
        mean = samples.mean(1, keepdim=True)
        rest = samples - mean
        products = torch.stack([_inner(rows) for rows in rest]).double()
        along = (rest @ mean.mT).double()
        products = products + along + along.mT + mean.double().square().sum(-1, keepdim=True)
        products = products.view(*tokens.shape[:-1], count)
    if centre:
        mean = products.mean(-1, keepdim=True)
        products = products - mean - mean.mT + mean.mean(-2, keepdim=True)
    if normalise:
        inverse = lengths(products).reciprocal()
        products = products * inverse[..., None] * inverse[..., None, :]
    return products


def _inner(rows: Tensor) -> Tensor:
    """rows: (N, d) float32. Returns the inner products of all pairs, (N, N)."""
    if rows.device.type != "cpu":
        return rows @ rows.mT
    # NumPy sees that both are the same, and does half of the multiplications.
    array = rows.detach().numpy()
    with _one_thread():
        return torch.from_numpy(array @ array.T)


def lengths(products: Tensor) -> Tensor:
    """products: (..., N, N) of `gram`. Returns the tokens' lengths, (..., N), never quite 0."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).sqrt()


def contribution(products: Tensor, energy: float = 1.0) -> Tensor:
    """products: (..., N, N) of `gram`, whose eigenvectors are U and whose eigenvalues s^2. Returns (..., N)."""
    values, vectors = _eigh(products)
    squares = values.clamp_(min=0)
    sizes = squares.sqrt()
    if energy < 1:
        # Ascending: a term belongs to the sum while the larger ones hold less than the share.
        larger = squares.flip(-1).cumsum(-1).flip(-1) - squares
        sizes = sizes * (larger < energy * squares.sum(-1, keepdim=True))
    return vectors.abs_().mul_(sizes[..., None, :]).sum(-1)


def _eigh(products: Tensor) -> tuple[Tensor, Tensor]:
    if products.device.type != "cpu" or products.shape[-1] < MANY:
        return tuple(torch.linalg.eigh(products))
    with _one_thread():
        values, vectors = np.linalg.eigh(products.detach().numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


@cache
def _numpy_blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _one_thread() -> AbstractContextManager[object]:
    """NumPy's threads are its own, and where another job is running two of them take ten times as long as one."""
    return _numpy_blas().limit(limits=1)
