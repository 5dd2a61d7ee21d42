"""The Jacobian of a residual: products with it, and its blocks as a matrix."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import one_kernel
from secondorder.curvature import pointwise
from secondorder.linalg import blocks, few_columns, tree

REVERSE_COST = 2.0  # one pull-back Jᵀu over one push-forward J v; decides which of the two makes the matrix


class Linear(NamedTuple):
    """A residual and its linearization at a point, on flat vectors."""

    residual: jax.Array  # r, shape (m,)
    push: Callable[[jax.Array], jax.Array]  # v -> J v, (n,) -> (m,)
    pull: Callable[[jax.Array], jax.Array]  # u -> Jᵀu, (m,) -> (n,)
    n: int


def check_mode(who: str, mode: str | None) -> None:
    """Raise unless `mode` is one of the two ways to make a Jacobian, or None."""
    if mode not in (None, "forward", "reverse"):
        raise ValueError(
            f'{who}: the Jacobian is made in mode "forward" or "reverse", got {mode!r}; None takes the cheaper one.'
        )


def linearize(residual_fn: Callable[[tree.ArrayTree], tree.ArrayTree], params: tree.ArrayTree) -> Linear:
    """Return the residual and its linearization at `params`, as functions of flat vectors."""
    x, unravel = tree.flatten(params)

    def flat(v: jax.Array) -> jax.Array:
        r = tree.flatten(residual_fn(unravel(v)))[0]
        return r.astype(jnp.promote_types(r.dtype, x.dtype))

    residual, push = jax.linearize(one_kernel.apart(flat), x)

    def pull(u: jax.Array) -> jax.Array:
        return jax.linear_transpose(push, x)(u.astype(residual.dtype))[0]

    return Linear(residual, lambda v: push(v.astype(x.dtype)), pull, x.size)


def matrix(linear: Linear, mode: str | None = None, memory: float | None = None) -> jax.Array:
    """Return J, shape (m, n), by pushing forward or pulling back blocks of unit vectors, in `memory` bytes."""
    m, n, dtype = linear.residual.size, linear.n, linear.residual.dtype
    if m == 0 or n == 0:
        return jnp.zeros((m, n), dtype)
    if mode is None:
        mode = "forward" if n <= REVERSE_COST * m else "reverse"
    if mode == "forward" and n <= few_columns.LIMIT:
        return jnp.stack([linear.push(unit) for unit in jnp.eye(n, dtype=dtype)], axis=1)
    if mode == "forward":
        return blocks.matrix(linear.push, jnp.zeros(n, dtype), memory).T
    return blocks.matrix(linear.pull, jnp.zeros(m, dtype), memory)


def second_derivative(
    residual_fn: Callable[[tree.ArrayTree], tree.ArrayTree], params: tree.ArrayTree, v: jax.Array, *, by_rows: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the second derivative of the residual along v, d²r(x + t v)/dt² at t = 0, and its product with Jᵀ.

    Args:
      residual_fn: params -> r, any pytree with m entries.
      params: x, a tree with n entries.
      v: Shape (n,).
      by_rows: Let residuals that make their own Jacobian (`pointwise`) do so. Else they are differentiated along v and
        pulled back once, a quarter of the time for a network.

    Returns:
      r_vv, shape (m,), and Jᵀ r_vv, shape (n,).
    """
    x, unravel = tree.flatten(params)
    flat = one_kernel.apart(lambda y: tree.flatten(residual_fn(unravel(y)))[0])
    v = v.astype(x.dtype)
    first = lambda y: jax.jvp(flat, (y,), (v,))[1]
    if by_rows:
        r_vv = jax.jvp(first, (x,), (v,))[1]
        return r_vv, linearize(residual_fn, params).pull(r_vv)
    with pointwise.along_directions():
        r_vv = jax.jvp(first, (x,), (v,))[1]
        return r_vv, jax.vjp(flat, x)[1](r_vv)[0]
