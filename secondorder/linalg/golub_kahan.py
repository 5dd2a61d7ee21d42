"""The singular values of an operator on a Krylov space, by products alone: Golub-Kahan bidiagonalization.

Paige & Saunders (1982), section 3 ("Bidiag 1"), the engine of LSQR and LSMR. From u₁ = b/β₁ on,

    β_{k+1} u_{k+1} = A v_k - α_k u_k,     α_{k+1} v_{k+1} = Aᵀu_{k+1} - β_{k+1} v_k,     so that A V = U B

with B lower bidiagonal. Minimizing || A p + b ||² + shift ||p||² over the span of V is then a problem with B, for every
shift and every radius: the minimizer is the iterate of LSQR, which is the one of conjugate gradients on the normal
equations, without their squared condition number. All vectors are kept and orthogonalized anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

Product = Callable[[jax.Array], jax.Array]


class Krylov(NamedTuple):
    """A Z = U diag(singular) with Z = vectors, on a space of k dimensions; unused ones have singular value zero."""

    singular: jax.Array  # ascending, shape (k,)
    vectors: jax.Array  # columns of Z, shape (n, k); orthonormal in the inverse of the preconditioner
    duals: jax.Array  # M⁻¹ Z with a preconditioner M, else shape (0, 0): Z is its own dual
    projected: jax.Array  # Uᵀb, shape (k,)
    products: jax.Array  # int32: products with A and Aᵀ


class _Basis(NamedTuple):
    """The bidiagonalization after i steps."""

    i: jax.Array
    U: jax.Array  # rows u_1 .. u_{i+1}, shape (k + 2, m)
    Z: jax.Array  # rows z_1 .. z_{i+1} = M times the dual rows, shape (k + 1, n)
    duals: jax.Array  # rows, shape (k + 1, n), or (0, n) without preconditioner
    B: jax.Array  # shape (k + 2, k + 1)
    alpha: jax.Array  # α_{i+1}, the length that z_{i+1} had
    phibar: jax.Array  # norm of the least-squares residual so far
    rhobar: jax.Array
    optimality: jax.Array  # norm of Aᵀ times that residual, in the norm of M


def decompose(
    push: Product,
    pull: Product,
    b: jax.Array,
    n: int,
    dimension: int,
    tolerance: jax.Array,
    *,
    precondition: Product | None = None,
    seed: tuple[jax.Array, jax.Array] | None = None,
) -> Krylov:
    """Return the decomposition of A on the Krylov space of (AᵀA, Aᵀb), and of one more direction.

    Args:
      push: v -> A v, (n,) -> (m,).
      pull: u -> Aᵀu, (m,) -> (n,).
      b: Shape (m,), finite.
      n: Columns of A.
      dimension: k, dimensions at most; with a seed, one of them is for it.
      tolerance: The space is large enough when || Aᵀ(A p + b) || <= tolerance || Aᵀb || for the best undamped p.
      precondition: v -> M v, symmetric positive definite; the norm of p is then that of M⁻¹.
      seed: A direction to add to the space (the last step), and M⁻¹ times it; the same twice without preconditioner.
    """
    m, dtype, eps = b.size, b.dtype, jnp.finfo(b.dtype).eps
    steps = max(0, min(dimension - (seed is not None), m, n))
    beta = tree.norm(b)
    u = b / jnp.where(beta > 0, beta, 1.0)
    start = _Basis(
        jnp.int32(0),
        jnp.zeros((steps + 2, m), dtype).at[0].set(u),
        jnp.zeros((steps + 1, n), dtype),
        jnp.zeros((steps + 1 if precondition else 0, n), dtype),
        jnp.zeros((steps + 2, steps + 1), dtype),
        *(jnp.zeros((), dtype),) * 4,
    )
    basis = _new_row(start, pull(u), 0, precondition)
    basis = basis._replace(phibar=beta, rhobar=basis.alpha, optimality=beta * basis.alpha)
    first = basis.optimality

    def unfinished(basis: _Basis) -> jax.Array:
        return (basis.i < steps) & (basis.optimality > jnp.maximum(tolerance, eps) * first)

    def step(basis: _Basis) -> _Basis:
        i = basis.i
        # 1. The next left vector.
        w = push(basis.Z[i]).astype(dtype) - basis.alpha * basis.U[i]
        w = _orthogonal(w, basis.U, basis.U)
        beta = tree.norm(w)
        beta = jnp.where(beta > eps * basis.alpha, beta, 0.0)
        B = basis.B.at[i, i].set(basis.alpha).at[i + 1, i].set(beta)
        U = basis.U.at[i + 1].set(w / jnp.where(beta > 0, beta, 1.0))
        # 2. The next right vector.
        basis = _new_row(basis._replace(U=U, B=B), pull(U[i + 1]), i + 1, precondition)
        # 3. One rotation of LSQR tells the residuals (Paige & Saunders 1982, section 4).
        rho = jnp.hypot(basis.rhobar, beta)
        c, s = basis.rhobar / jnp.where(rho > 0, rho, 1.0), beta / jnp.where(rho > 0, rho, 1.0)
        phibar = s * basis.phibar
        return basis._replace(
            i=i + 1, phibar=phibar, rhobar=-c * basis.alpha, optimality=phibar * basis.alpha * jnp.abs(c)
        )

    basis = jax.lax.while_loop(unfinished, step, basis)
    return _diagonalize(basis, beta, push, steps, precondition is not None, seed)


def _new_row(basis: _Basis, w: jax.Array, i: Any, precondition: Product | None) -> _Basis:
    """Return the basis with row i of Z made from w = Aᵀu."""
    duals = basis.Z if precondition is None else basis.duals
    w = _orthogonal(w.astype(basis.Z.dtype), duals, basis.Z)
    z = w if precondition is None else precondition(w).astype(w.dtype)
    alpha = jnp.sqrt(jnp.maximum(tree.dot(w, z), 0.0))
    alpha = jnp.where(jnp.isfinite(alpha) & (alpha > jnp.finfo(w.dtype).eps * basis.alpha), alpha, 0.0)
    divisor = jnp.where(alpha > 0, alpha, 1.0)
    Z = basis.Z.at[i].set(jnp.where(alpha > 0, z / divisor, 0.0))
    if precondition is not None:
        basis = basis._replace(duals=basis.duals.at[i].set(jnp.where(alpha > 0, w / divisor, 0.0)))
    return basis._replace(Z=Z, alpha=alpha)


def _orthogonal(w: jax.Array, rows: jax.Array, duals: jax.Array) -> jax.Array:
    """Return w without its parts along the rows, whose dual rows are `duals`; twice is enough (Kahan, Parlett)."""
    for _ in range(2):
        w = w - tree.matmul(tree.matmul(duals, w), rows)
    return w


def _diagonalize(
    basis: _Basis,
    beta: jax.Array,
    push: Product,
    steps: int,
    preconditioned: bool,
    seed: tuple[jax.Array, jax.Array] | None,
) -> Krylov:
    """Return the decomposition from B, with the seed as a last direction."""
    used = (jnp.arange(steps + 1) < basis.i)[:, None]
    Z = jnp.where(used, basis.Z, 0.0)
    duals = jnp.where(used, basis.duals, 0.0) if preconditioned else Z
    B, products = basis.B, 1 + 2 * basis.i
    if seed is None:
        Z, B = Z[:steps], B[: steps + 1, :steps]
        duals = duals[:steps]
    else:
        s, dual = seed
        before = tree.dot(s, dual)
        for _ in range(2):
            part = tree.matmul(duals, s)
            s, dual = s - tree.matmul(part, Z), dual - tree.matmul(part, duals)
        size = tree.dot(s, dual)
        fresh = jnp.isfinite(size) & (size > jnp.finfo(s.dtype).eps * before)
        divisor = jnp.sqrt(jnp.where(fresh, size, 1.0))
        s, dual = jnp.where(fresh, s / divisor, 0.0), jnp.where(fresh, dual / divisor, 0.0)
        image = push(s).astype(s.dtype)
        image = jnp.where(jnp.all(jnp.isfinite(image)), image, 0.0)
        inside = tree.matmul(basis.U, image)
        rest = _orthogonal(image, basis.U, basis.U)
        B = B.at[:, steps].set(inside).at[steps + 1, steps].set(tree.norm(rest))
        Z, duals = Z.at[steps].set(s), duals.at[steps].set(dual)
        products = products + 1
    P, singular, Wt = jnp.linalg.svd(B, full_matrices=False)
    W = Wt.T[:, ::-1]
    return Krylov(
        singular=singular[::-1],
        vectors=tree.matmul(Z.T, W),
        duals=tree.matmul(duals.T, W) if preconditioned else jnp.zeros((0, 0), Z.dtype),
        projected=beta * P[0, ::-1],
        products=products.astype(jnp.int32),
    )
