"""Robust losses: how much a residual counts, less and less as it grows.

The loss is f = C²/2 * sum rho(z), z = (r/C)², with rho(z) near z for small z and C the scale at which a residual
begins to look like an outlier. Losses and names are those of `scipy.optimize.least_squares`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

Rho = Callable[[jax.Array], jax.Array]
FLOOR = 1e-2  # least curvature of a residual, over that of reweighted least squares; ours, see `Reweighted`


def huber(z: jax.Array) -> jax.Array:
    """Quadratic inside, linear outside of the scale (Huber 1964)."""
    return jnp.where(z <= 1.0, z, 2.0 * jnp.sqrt(jnp.maximum(z, 1.0)) - 1.0)


def soft_l1(z: jax.Array) -> jax.Array:
    """Smooth absolute value, 2 (sqrt(1 + z) - 1), in a form that does not cancel."""
    return 2.0 * z / (1.0 + jnp.sqrt(1.0 + z))


def cauchy(z: jax.Array) -> jax.Array:
    """Logarithm, ln(1 + z): the pull of an outlier on the fit falls like one over its residual."""
    return jnp.log1p(z)


def arctan(z: jax.Array) -> jax.Array:
    """Bounded, arctan z: an outlier counts at most pi/2, and its pull falls like the cube of one over its residual."""
    return jnp.arctan(z)


LOSSES: dict[str, Rho | None] = {
    "linear": None,
    "soft_l1": soft_l1,
    "huber": huber,
    "cauchy": cauchy,
    "arctan": arctan,
}


def value(rho: Rho | None, residual: tree.ArrayTree, scale: Any) -> jax.Array:
    """Return the loss of a residual tree, ||r||²/2 without rho; shape ()."""
    dtype = tree.scalar_dtype(residual)
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(residual)]
    if rho is None:
        return sum((0.5 * jnp.sum(r * r) for r in leaves), jnp.zeros((), dtype))
    C = jnp.asarray(scale, dtype)
    return sum((0.5 * C * C * jnp.sum(rho((r / C) ** 2)) for r in leaves), jnp.zeros((), dtype))


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """A residual function whose linear least-squares model is the quadratic model of a robust loss; hashable.

    Its value and linearization are rho' r / sqrt(h) and sqrt(h) J, with h = rho' + 2 rho'' z (Triggs et al. 2000,
    section 4.3): JᵀJ and Jᵀr are then those of the robust loss. Where h falls below a hundredth of rho' (beyond Huber's
    scale it is zero), the hundredth stands in for it: the gradient is still exact, and the region bounds the step.
    """

    residual: Callable[..., tree.ArrayTree]
    rho: Rho

    def __call__(self, params: tree.ArrayTree, scale: Any, *args: Any) -> tree.ArrayTree:
        """Return the reweighted residual tree."""
        return jax.tree.map(
            lambda r: _reweighted(self.rho, r, jnp.asarray(scale, r.dtype)), self.residual(params, *args)
        )


def _reweighted(rho: Rho, r: jax.Array, C: jax.Array) -> jax.Array:
    """Return rho' r / sqrt(h), to be linearized as sqrt(h) dr."""
    z = (r / C) ** 2
    first = lambda z: jax.jvp(rho, (z,), (jnp.ones_like(z),))[1]
    slope, bend = jax.jvp(first, (z,), (jnp.ones_like(z),))
    # At z = 0 the second derivative of a user's rho may be infinite, times z: zero.
    h = jnp.maximum(slope + jnp.where(z > 0, 2.0 * bend * z, 0.0), FLOOR * slope)
    root = jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(h, jnp.finfo(r.dtype).tiny)))
    still = jax.lax.stop_gradient(slope * r / root)
    return still + root * (r - jax.lax.stop_gradient(r))
