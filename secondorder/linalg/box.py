"""Vectors in a box l <= x <= u: who is held by a bound, and what the gradient leaves to do.

Nocedal & Wright (2006), section 16.7; Lin & Moré (1999), section 2.
"""

from typing import Any

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

Box = tuple[jax.Array, jax.Array]  # lower and upper bounds, shapes (n,); -Inf and Inf where there is none


def blocked(x: jax.Array, grad: jax.Array, box: Box) -> jax.Array:
    """Return which parameters stand at a bound that -grad points out of, shape (n,).

    A move x + (bound - x) may end a rounding error short of the bound: that counts as being there.
    """
    at_lower, at_upper = _near(x, box)
    return (at_lower & (grad > 0)) | (at_upper & (grad < 0)) | (at_lower & at_upper)


def land(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Return x within the box, and on a bound where a move to it has ended a rounding error beside it; one shape."""
    at_lower, at_upper = _near(x, (lower, upper))
    return jnp.where(at_lower, lower, jnp.where(at_upper, upper, x))


def active(params: tree.ArrayTree, grad: tree.ArrayTree, bounds: tuple[Any, Any]) -> tree.ArrayTree:
    """Return int32 in a tree like params: -1 where a lower bound holds the parameter, 1 where an upper one, else 0."""

    def leaf(x: jax.Array, g: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        held = blocked(x, g, (low, high))
        lower = held & ((g > 0) | (x <= low))
        return jnp.where(held, jnp.where(lower, -1, 1), 0).astype(jnp.int32)

    return jax.tree.map(leaf, params, grad, *bounds)


def _near(x: jax.Array, box: Box) -> tuple[jax.Array, jax.Array]:
    """Return which entries are at, beyond, or a rounding error before the lower, and the upper, bound."""
    lower, upper = box
    near = lambda bound: 4 * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(bound), jnp.abs(x))
    at_lower = x <= jnp.where(jnp.isfinite(lower), lower + near(lower), lower)
    at_upper = x >= jnp.where(jnp.isfinite(upper), upper - near(upper), upper)
    return at_lower, at_upper


def projected_gradient(x: jax.Array, grad: jax.Array, box: Box) -> jax.Array:
    """Return the gradient without the entries that a bound holds, shape (n,): the KKT residual (Lin & Moré 2.2)."""
    return jnp.where(blocked(x, grad, box), 0.0, grad)


def longest_step(x: jax.Array, direction: jax.Array, box: Box) -> jax.Array:
    """Return the largest alpha, shape (), for which x + alpha direction is in the box; Inf if no bound is met."""
    room = jnp.where(direction < 0, box[0] - x, box[1] - x)
    return jnp.min(
        jnp.where(direction == 0, jnp.inf, room / jnp.where(direction == 0, 1.0, direction)), initial=jnp.inf
    )
