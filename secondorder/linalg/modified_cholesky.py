"""Modified Cholesky factorization of Gill, Murray & Wright (1981)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Factors(NamedTuple):
    """P' L D L' P = A + E with E diagonal and nonnegative."""

    lower: jax.Array  # L, unit lower triangular, shape (n, n)
    diagonal: jax.Array  # D > 0, shape (n,)
    order: jax.Array  # rows of A in pivot order, int32, shape (n,)
    indefinite: jax.Array  # bool: E is larger than rounding, A has a negative eigenvalue


def factorize(a: jax.Array) -> Factors:
    """Return the factors of a symmetric matrix, made positive definite on the way; a: shape (n, n).

    At each step the largest remaining |diagonal| is the pivot, and
    d_j = max(|c_jj|, (theta_j / beta)^2, delta) keeps D positive and the entries of L sqrt(D) below beta
    (Nocedal & Wright 2006, section 3.4, equations 3.47 to 3.49). E = 0 when A is sufficiently positive definite.
    Cost: n^3 / 3 multiplications as n rank-one updates.
    """
    n = a.shape[0]
    if n == 0:
        return Factors(a, jnp.ones(0, a.dtype), jnp.arange(0), jnp.array(False))
    eps = jnp.finfo(a.dtype).eps
    index = jnp.arange(n)
    gamma = jnp.max(jnp.abs(jnp.diagonal(a)), initial=0.0)
    xi = jnp.max(jnp.where(index[:, None] == index[None, :], 0.0, jnp.abs(a)), initial=0.0)
    size = jnp.where(gamma + xi > 0, gamma + xi, 1.0)
    delta = eps * size  # ours: relative to A, without the book's max(1, .), so that the scale of the loss is immaterial
    beta2 = jnp.maximum(jnp.maximum(gamma, xi / max(1.0, n * n - 1.0) ** 0.5), eps * size)

    def column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        c, lower, d, order, lift = carry
        # 1. Pivot: swap rows and columns j and q.
        q = jnp.argmax(jnp.where(index >= j, jnp.abs(jnp.diagonal(c)), -1.0))
        swap = jnp.where(index == j, q, jnp.where(index == q, j, index))
        c, lower, order = c[swap][:, swap], lower[swap], order[swap]
        # 2. The new diagonal entry.
        below = jnp.where(index > j, c[:, j], 0.0)
        theta = jnp.max(jnp.abs(below))
        dj = jnp.maximum(jnp.maximum(jnp.abs(c[j, j]), theta * theta / beta2), delta)
        pivot = c[j, j]
        # 3. Column of L, and the Schur complement.
        l = below / dj
        c = c - jnp.outer(l, below)
        return c, lower.at[:, j].set(l), d.at[j].set(dj), order, jnp.maximum(lift, dj - pivot)

    start = (a, jnp.zeros_like(a), jnp.ones(n, a.dtype), index, jnp.zeros((), a.dtype))
    _, lower, d, order, lift = jax.lax.fori_loop(0, n, column, start)
    return Factors(lower + jnp.eye(n, dtype=a.dtype), d, order, lift > 10 * n * eps * size)


def solve(factors: Factors, b: jax.Array) -> jax.Array:
    """Return (A + E)^-1 b by two triangular solves, O(n^2); b and the result: shape (n,)."""
    if b.size == 0:
        return b
    z = jax.scipy.linalg.solve_triangular(factors.lower, b[factors.order], lower=True, unit_diagonal=True)
    z = jax.scipy.linalg.solve_triangular(factors.lower, z / factors.diagonal, lower=True, trans=1, unit_diagonal=True)
    return jnp.zeros_like(b).at[factors.order].set(z)
