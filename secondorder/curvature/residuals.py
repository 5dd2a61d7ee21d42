"""The Jacobian of a residual: products with it, and the dense matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from secondorder import checks
from secondorder.curvature.dense import BLOCK
from secondorder.linalg import tree

REVERSE_COST = 2.0  # one pull-back Jᵀu over one push-forward J v; decides which of the two makes the matrix


class Linear(NamedTuple):
    """A residual and its linearization at a point, on flat vectors."""

    residual: jax.Array  # r, shape (m,)
    push: Callable[[jax.Array], jax.Array]  # v -> J v, (n,) -> (m,)
    pull: Callable[[jax.Array], jax.Array]  # u -> Jᵀu, (m,) -> (n,)
    n: int


def jacobian(
    fun: Callable[..., tree.ArrayTree], params: tree.ArrayTree, *args: object, mode: str | None = None
) -> jax.Array:
    """Return the Jacobian of a residual as one matrix.

    Args:
      fun: Residual; fun(params, *args) is any pytree of real arrays with m entries in all.
      params: Where; any pytree of real arrays with n entries in all.
      *args: Further arguments of `fun`.
      mode: "forward" (n products J v), "reverse" (m products Jᵀu), or None for the cheaper one: forward if n <= 2 m.

    Returns:
      Shape (m, n), rows and columns in the order of `jax.flatten_util.ravel_pytree` of residual and parameters.
      Cost: the products share one linearization and are taken in blocks of 16, so that memory stays bounded.

    Raises:
      TypeError: if `params` or the residual has leaves that are not real floating-point arrays.
      ValueError: for an unknown `mode`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> curvature.jacobian(lambda x: {"a": x[0] * x[1], "b": x}, jnp.array([2.0, 3.0])).tolist()
      [[3.0, 2.0], [1.0, 0.0], [0.0, 1.0]]
    """
    who = "jacobian"
    checks.function(who, "fun", fun)
    checks.params(who, params)
    check_mode(who, mode)
    checks.residual(who, fun, jax.eval_shape(fun, params, *args))
    linear = linearize(lambda x: fun(x, *args), jax.tree.map(jnp.asarray, params))
    return matrix(linear, mode).astype(tree.scalar_dtype(params))


def check_mode(who: str, mode: str | None) -> None:
    """Raise unless `mode` is one of the two ways to make a Jacobian, or None."""
    if mode not in (None, "forward", "reverse"):
        raise ValueError(
            f'{who}: the Jacobian is made in mode "forward" or "reverse", got {mode!r}; None takes the cheaper one.'
        )


def linearize(residual_fn: Callable[[tree.ArrayTree], tree.ArrayTree], params: tree.ArrayTree) -> Linear:
    """Return the residual and its linearization at `params`, as functions of flat vectors."""
    x, unravel = ravel_pytree(params)

    def flat(v: jax.Array) -> jax.Array:
        r = ravel_pytree(residual_fn(unravel(v)))[0]
        return r.astype(jnp.promote_types(r.dtype, x.dtype))

    residual, push = jax.linearize(flat, x)

    def pull(u: jax.Array) -> jax.Array:
        return jax.linear_transpose(push, x)(u.astype(residual.dtype))[0]

    return Linear(residual, lambda v: push(v.astype(x.dtype)), pull, x.size)


def matrix(linear: Linear, mode: str | None = None) -> jax.Array:
    """Return J, shape (m, n), by pushing forward or pulling back blocks of unit vectors."""
    m, n = linear.residual.size, linear.n
    if mode is None:
        mode = "forward" if n <= REVERSE_COST * m else "reverse"
    if mode == "forward":
        return _images(linear.push, n, m, linear.residual.dtype).T
    return _images(linear.pull, m, n, linear.residual.dtype)


def second_derivative(
    residual_fn: Callable[[tree.ArrayTree], tree.ArrayTree], params: tree.ArrayTree, v: jax.Array
) -> jax.Array:
    """Return the second derivative of the residual along v, d²r(x + t v)/dt² at t = 0; v: (n,), result: (m,)."""
    x, unravel = ravel_pytree(params)
    flat = lambda y: ravel_pytree(residual_fn(unravel(y)))[0]
    v = v.astype(x.dtype)
    first = lambda y: jax.jvp(flat, (y,), (v,))[1]
    return jax.jvp(first, (x,), (v,))[1]


def _images(linear: Callable[[jax.Array], jax.Array], count: int, size: int, dtype: Any) -> jax.Array:
    """Return the images of the `count` unit vectors as rows, shape (count, size)."""
    if count == 0 or size == 0:
        return jnp.zeros((count, size), dtype)
    block = min(BLOCK, count)
    blocks = -(-count // block)  # padded to whole blocks: a remainder would compile the body twice

    def push(start: jax.Array) -> jax.Array:
        index = start + jnp.arange(block)
        return jax.vmap(linear)((index[:, None] == jnp.arange(count)[None, :]).astype(dtype))

    if blocks == 1:
        return push(jnp.int32(0))
    return jax.lax.map(push, block * jnp.arange(blocks)).reshape(blocks * block, size)[:count]
