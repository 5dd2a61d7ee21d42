"""Cubic regularization in the eigenbasis of the Hessian: every weight is answered in O(n) from one factorization.

The step minimizes  g'p + p'Hp / 2 + sigma ||p||^3 / 3  over all p (Cartis, Gould & Toint 2011, part I). A minimizer is
characterized by their Theorem 3.1: (H + lambda I) p = -g with lambda = sigma ||p|| and H + lambda I positive
semidefinite. So it is the trust-region step of radius lambda / sigma, hard case included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder.globalization import trust_region
from secondorder.globalization.trust_region import Damping, Trial

SECULAR_STEPS = 60  # Newton steps on the secular equation; 3 to 6 are the rule
LARGEST = 2.0**20  # factor of the weight after a rejection (ours)


class Cubic(NamedTuple):
    """Options of the cubic model; see `cubic_newton`. `Damping.size` is the weight sigma [f/x^3]."""

    sigma: float | None
    accept_ratio: float

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first weight: with it, a step where H = 0 is as long as the first trust region's radius."""
        one = jnp.ones((), g.dtype)
        if self.sigma is not None:
            return Damping(self.sigma * one, 2 * one)
        radius = trust_region.first_radius(values, g, x_norm, loss)
        steepness = jnp.maximum(trust_region.norm(g), radius * jnp.maximum(-jnp.min(values, initial=0.0), 0.0))
        return Damping(_limited(jnp.where(steepness > 0, steepness / radius**2, 1.0)), 2 * one)

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the step in the eigenbasis, shape (n,)."""
        return solve(values, g, damping.size)

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the cubic model promises for the step p; all in the eigenbasis."""
        return trust_region.decrease(values, g, p) - damping.size * jnp.linalg.norm(p) ** 3 / 3

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the weight after a trial (Gould, Porcelli & Toint 2012, in spirit).

        The loss itself says which weight would have been right for this step: sigma ||p||^3 / 3 = f(x + p) - q(p), with
        q the quadratic model. A poor trial moves sigma toward it, between two and ten times as large, a very good one
        down to it, between a tenth and a half. Each further rejection doubles both factors (Nielsen 1999): a weight
        that a plateau made far too small is mended in the square root of as many trials.
        """
        sigma, factor = damping
        cubed = jnp.where(trial.length > 0, trial.length, 1.0) ** 3
        right = jnp.where(jnp.isfinite(trial.excess), 3 * trial.excess / cubed, jnp.inf)
        larger = jnp.clip(right, factor * sigma, 5 * factor * sigma)
        smaller = jnp.clip(right, 0.1 * sigma, 0.5 * sigma)
        poor = ~trial.accepted | (trial.ratio < 0.1)
        new = jnp.where(poor, larger, jnp.where(trial.ratio > 0.75, smaller, sigma))
        new = jnp.where(trial.length > 0, new, sigma)  # a step of no length says nothing
        return Damping(
            _limited(new), jnp.where(trial.accepted, 2.0, jnp.minimum(2 * factor, LARGEST)).astype(sigma.dtype)
        )

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether steps of this weight no longer move x.

        sigma ||p|| = lambda and (values_1 + lambda) ||p|| <= ||g|| bound the length: sigma l^2 + values_1 l = ||g||.
        """
        sigma, least = damping.size, jnp.minimum(jnp.min(values, initial=0.0), 0.0)
        longest = (jnp.hypot(least, 2 * jnp.sqrt(sigma) * jnp.sqrt(trust_region.norm(g))) - least) / (2 * sigma)
        return longest <= jnp.finfo(x_norm.dtype).eps * x_norm


def solve(values: jax.Array, g: jax.Array, sigma: jax.Array) -> jax.Array:
    """Return the minimizer p of g'p + sum(values p^2) / 2 + sigma ||p||^3 / 3.

    Args:
      values: Eigenvalues in ascending order, shape (n,).
      g: Gradient in the eigenbasis, shape (n,).
      sigma: > 0, shape ().

    1/||p(lambda)|| - sigma/lambda is concave and rises in lambda, so that Newton's method climbs to its root from the
    left without passing it (their section 6.1). A start left of it: |g_i| / (values_i + lambda) >= lambda / sigma.
    """
    if g.size == 0:
        return g
    lowest = jnp.maximum(-values[0], 0.0)

    def length(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return ||p|| and -d||p||/d shift."""
        gaps = values + shift
        p = jnp.where(g == 0, 0.0, g / jnp.where(g == 0, 1.0, gaps))
        size = jnp.linalg.norm(p)
        fall = jnp.sum(jnp.where(g == 0, 0.0, p * p / jnp.where(g == 0, 1.0, gaps)))
        return size, fall / jnp.where(size > 0, size, 1.0)

    def climb(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        shift, _, i = carry
        size, fall = length(shift)
        # phi = 1/||p|| - sigma/shift, phi' = fall/||p||^2 + sigma/shift^2
        gap = shift / sigma  # the length that this shift stands for
        step = (size - gap) / (size * gap) / (fall / size**2 + 1 / (shift * gap))
        new = jnp.where((size > gap) & jnp.isfinite(step) & (step > 0), shift + step, shift)
        return new, shift, i + 1

    # Left of the root: shift^2 + values_i shift = sigma |g_i|, written without cancellation.
    twice = 2 * jnp.sqrt(sigma) * jnp.sqrt(jnp.abs(g))
    root = jnp.hypot(values, twice)
    left = jnp.where(
        values > 0, 0.5 * twice * (twice / jnp.where(values > 0, values + root, 1.0)), 0.5 * (root - values)
    )
    start = jnp.maximum(lowest, jnp.max(left))
    shift, _, _ = jax.lax.while_loop(
        lambda c: (c[0] != c[1]) & (c[2] < SECULAR_STEPS), climb, (start, jnp.full_like(start, -1.0), jnp.int32(0))
    )
    radius = shift / sigma
    return jnp.where(radius > 0, trust_region.solve(values, g, jnp.where(radius > 0, radius, 1.0)), 0.0)


def _limited(sigma: jax.Array) -> jax.Array:
    """Return the weight within what can be squared."""
    limit = jnp.finfo(sigma.dtype).max ** 0.5
    return jnp.clip(sigma, 1 / limit, limit)
