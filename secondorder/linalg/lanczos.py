"""Lanczos tridiagonalization of a symmetric matrix known by its products.

Golub & Van Loan, *Matrix Computations*, 4th edition (2013), sections 10.1 and 10.3: from a unit vector q_1, orthonormal
q_1, ..., q_k with A Q = Q T + beta_k q_{k+1} e_k', T tridiagonal. `decompose` keeps Q (k vectors) and reorthogonalizes
fully; `tridiagonal` keeps three vectors, loses orthogonality, and finds converged eigenvalues more than once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import probes, tree

Matvec = Callable[[tree.ArrayTree], tree.ArrayTree]
DROP = 0.5**0.5  # a second pass if the first took away more than this (Daniel, Gragg, Kaufman & Stewart 1976)
BREAKDOWN = 10.0  # a residual below BREAKDOWN eps ||T|| is rounding: the Krylov space is invariant


class Lanczos(NamedTuple):
    """A Q = Q T + beta_k q_{k+1} e_k'."""

    alpha: jax.Array  # diagonal of T, shape (k,)
    beta: jax.Array  # beside the diagonal; the last is the residual of the decomposition. Shape (k,)
    vectors: tree.ArrayTree  # Q as a history of k rows; None if it was not kept
    skew: jax.Array  # largest |q_{j-1}'A q_j - beta_{j-1}| / ||A q_j||: no more than rounding if A = A'
    noise: jax.Array  # largest |q_{j-1}'A q_j - beta_{j-1}|: what a product's rounding does to T


class Ritz(NamedTuple):
    """Eigenpairs of T; with Q, they approximate eigenpairs of A."""

    values: jax.Array  # ascending, shape (k,)
    coordinates: jax.Array  # column i is the i-th Ritz vector in the basis Q, shape (k, k)
    residuals: jax.Array  # ||A u - theta u|| of each in exact arithmetic, shape (k,) (Golub & Van Loan, 10.1.4)


def decompose(matvec: Matvec, start: tree.ArrayTree, steps: int, key: jax.Array, *, any_size: bool = False) -> Lanczos:
    """Return `steps` steps with full reorthogonalization, in one loop; memory `steps` + 4 vectors.

    Args:
      matvec: v -> A v, A symmetric; trees like `start`.
      start: First vector, not zero; `key` replaces a zero one.
      steps: 1 <= steps <= n.
      key: Random key for the vectors that continue after an invariant subspace has been found.
      any_size: Choose the unit of A by the first product, so that squares of its entries neither overflow nor
        underflow; a reduction more per step.
    """
    dtype = tree.scalar_dtype(start)
    zero = jnp.zeros(steps, dtype)

    def step(j: jax.Array, carry: tuple) -> tuple:
        j = jnp.asarray(j)
        basis, alpha, beta, skew, noise, unit, q, last = carry
        basis = tree.set_row(basis, j, q)
        w = matvec(q)
        if any_size:
            unit = jnp.where(j > 0, unit, tree.power_of_two(tree.max_norm(w)))
            w = tree.scale(1.0 / unit, w)
        a, back, size = tree.dot(q, w), tree.dot(last, w), tree.norm(w)
        lack = jnp.abs(back - beta[j - 1] * (j > 0).astype(beta.dtype))
        noise, lack = jnp.maximum(noise, lack), lack / jnp.where(size > 0, size, 1.0)
        w = tree.axpy(
            -beta[j - 1] * (j > 0).astype(beta.dtype), last, tree.axpy(-a, q, w)
        )  # the three-term recurrence (10.1.3)
        w = _orthogonal(w, basis, steps)
        b = tree.norm(w)
        alpha = alpha.at[j].set(a)
        invariant = b <= _negligible(alpha, beta)
        fresh = lambda: _orthogonal(_unit(probes.normal(jax.random.fold_in(key, j), q)), basis, steps)
        w = jax.lax.cond(invariant, fresh, lambda: w)
        beta = beta.at[j].set(jnp.where(invariant, 0.0, b))
        return basis, alpha, beta, jnp.maximum(skew, lack), noise, unit, _unit(w), q

    first = tree.where(tree.norm(start) > 0, start, probes.normal(key, start))
    nothing, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    carry = (tree.zero_rows(start, steps), zero, zero, nothing, nothing, one, _unit(first), tree.zeros_like(start))
    basis, alpha, beta, skew, noise, unit, _, _ = jax.lax.fori_loop(0, steps, step, carry)
    return Lanczos(unit * alpha, unit * beta, basis, skew, unit * noise)


def tridiagonal(matvec: Matvec, start: tree.ArrayTree, steps: int) -> Lanczos:
    """Return `steps` steps without reorthogonalization, for any size of A; memory 4 vectors, whatever `steps` is.

    The eigenvalues of T lie in the spectrum's range up to rounding; converged ones appear repeatedly ("ghosts") and
    share the weight of one, so that quadrature with T stays right (Greenbaum 1989; Golub & Meurant 2010, chapter 4).
    """
    dtype = tree.scalar_dtype(start)
    zero = jnp.zeros(steps, dtype)

    def step(j: jax.Array, carry: tuple) -> tuple:
        j = jnp.asarray(j)
        alpha, beta, unit, q, last = carry
        w = matvec(q)
        unit = jnp.where(j > 0, unit, tree.power_of_two(tree.max_norm(w)))
        w = tree.scale(1.0 / unit, w)
        a = tree.dot(q, w)
        w = tree.axpy(-beta[j - 1] * (j > 0), last, tree.axpy(-a, q, w))
        b = tree.norm(w)
        alpha = alpha.at[j].set(a)
        invariant = b <= _negligible(alpha, beta)  # then the quadrature is complete: zeros follow, of weight zero
        return alpha, beta.at[j].set(jnp.where(invariant, 0.0, b)), unit, tree.where(invariant, last0, _unit(w)), q

    last0 = tree.zeros_like(start)
    one = jnp.ones((), dtype)
    alpha, beta, unit, _, _ = jax.lax.fori_loop(0, steps, step, (zero, zero, one, _unit(start), last0))
    return Lanczos(unit * alpha, unit * beta, None, zero[0], zero[0])


def ritz(lanczos: Lanczos) -> Ritz:
    """Return the eigenpairs of T; NaN throughout if an entry of T is not finite."""
    T = jnp.diag(lanczos.alpha) + jnp.diag(lanczos.beta[:-1], 1) + jnp.diag(lanczos.beta[:-1], -1)
    coordinates, values = jax.lax.linalg.eigh(T, symmetrize_input=False)
    return Ritz(values, coordinates, jnp.abs(lanczos.beta[-1] * coordinates[-1]))


def ritz_vectors(lanczos: Lanczos, coordinates: jax.Array) -> tree.ArrayTree:
    """Return Q coordinates as a history: one row per column of `coordinates`, shape (k, number)."""

    def combine(rows: jax.Array) -> jax.Array:
        return jnp.tensordot(coordinates.T.astype(rows.dtype), rows, 1, precision=tree.HIGHEST)

    return jax.tree.map(combine, lanczos.vectors)


def _orthogonal(w: tree.ArrayTree, basis: tree.ArrayTree, rows: int) -> tree.ArrayTree:
    """Return w minus its projection on the rows written so far (the others are zero); Gram-Schmidt, twice if needed."""
    project = lambda x: tree.add_rows(-tree.rows_dot(basis, x, rows), basis, x)
    once = project(w)
    return jax.lax.cond(tree.norm(once) < DROP * tree.norm(w), project, lambda x: x, once)


def _negligible(alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """Return the size of a residual that is rounding; entries not computed yet are zero."""
    return BREAKDOWN * jnp.finfo(alpha.dtype).eps * (jnp.max(jnp.abs(alpha)) + jnp.max(beta))


def _unit(x: tree.ArrayTree) -> tree.ArrayTree:
    """Return x / ||x||; zero for zero."""
    size = tree.norm(x)
    return tree.scale(jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), jnp.zeros_like(size)), x)
