"""The singular value decomposition of a matrix beside the right-hand side that it is to be fitted to.

One orthogonal factorization of [A b] and one decomposition of its small triangle, so that no product AᵀA or AAᵀ, which
would square the condition number, is ever formed (Golub & Van Loan, 4th edition, sections 5.3.3 and 8.6.3). Up to
`few_columns.LIMIT` columns both are written out, so that `vmap` does many of them at once; beyond it LAPACK does them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import few_columns, tree


class ThinSvd(NamedTuple):
    """A = U diag(singular) vectorsᵀ with k = min(m, n) columns; U is known by its product with b alone."""

    singular: jax.Array  # ascending, shape (k,)
    vectors: jax.Array  # right singular vectors as columns, shape (n, k)
    projected: jax.Array  # Uᵀb, shape (k,)


def triangle(A: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return A and b compressed to min(m, n + 1) rows, with the same singular values, Aᵀb and ||b||; A: (m, n).

    Where A is not finite, neither is what is returned.
    """
    m, n = A.shape
    if _few(m, n):
        return few_columns.triangle(A, b)
    if m <= n + 1:
        return A, b
    R = jnp.linalg.qr(jnp.concatenate([A, b[:, None]], axis=1), mode="r")
    return R[:, :n], R[:, n]


def factorize(A: jax.Array, b: jax.Array) -> ThinSvd:
    """Return the thin decomposition of A, shape (m, n), with Uᵀb; A and b are finite and made by `triangle`.

    With fewer rows than columns, Aᵀ = Q R first: the decomposition happens in the space of the rows (of the
    residuals). O(m n min(m, n)) either way.
    """
    m, n = A.shape
    if min(m, n) == 0:
        return ThinSvd(jnp.zeros((0,), A.dtype), jnp.zeros((n, 0), A.dtype), jnp.zeros((0,), A.dtype))
    if _few(m, n):
        return ThinSvd(*few_columns.factorize(A[:n], b[:n]))
    if m >= n:
        U, s, Vt = jnp.linalg.svd(A, full_matrices=False)
        vectors, projected = Vt.T, tree.matmul(U.T, b)
    else:
        Q, R = jnp.linalg.qr(A.T)
        U, s, Vt = jnp.linalg.svd(R, full_matrices=False)  # A = V diag(s) (Q U)ᵀ
        vectors, projected = tree.matmul(Q, U), tree.matmul(Vt, b)
    return ThinSvd(s[::-1], vectors[:, ::-1], projected[::-1])


def from_products(AA: jax.Array, Ab: jax.Array) -> ThinSvd:
    """Return the decomposition from AᵀA and Aᵀb, for m >= n: quick, and blind below sqrt(eps) of the largest value."""
    if _few(*AA.shape):
        return ThinSvd(*few_columns.factorize(*few_columns.cholesky(AA, Ab)))
    V, values = jax.lax.linalg.eigh(AA, symmetrize_input=False)
    singular = jnp.sqrt(jnp.maximum(values, 0.0))
    return ThinSvd(singular, V, tree.matmul(V.T, Ab) / jnp.where(singular > 0, singular, jnp.inf))


def cut(singular: jax.Array, m: int, n: int, *, squared: bool = False) -> jax.Array:
    """Return the ascending singular values with those that are zero to rounding set to zero (LAPACK's rule)."""
    if singular.size == 0:
        return singular
    level = max(m, n) * jnp.finfo(singular.dtype).eps
    return jnp.where(singular > (level**0.5 if squared else level) * singular[-1], singular, 0.0)


def _few(m: int, n: int) -> bool:
    """Return whether a matrix of this shape is factorized without LAPACK."""
    return 0 < n <= min(m, few_columns.LIMIT)
