"""Trust region in the eigenbasis of the Hessian: every radius is answered in O(n) from one factorization.

The subproblem  min g'p + p'Hp / 2  subject to ||p|| <= radius  is solved exactly (Moré & Sorensen 1983; Conn, Gould &
Toint 2000, Algorithm 7.3.4), hard case included. Its solution is characterized by Nocedal & Wright (2006), Thm 4.1:
(H + sigma I) p = -g,  sigma (radius - ||p||) = 0,  H + sigma I positive semidefinite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.globalization import stopping
from secondorder.linalg import tree

SECULAR_STEPS = 60  # Newton steps on the secular equation; 3 to 6 are the rule
LEAST_SHRINK, MOST_SHRINK = 0.5, 0.1  # factors of the radius after a poor trial lie between these (MINPACK's lmpar)
WALL_SHRINK = 0.25  # factor after a trial that is not finite, which says nothing of how far to go back
FALLING = 0.1  # share of the first slope that the loss must realize where it still falls at the trial (ours)
TRUSTED = 2.0  # a first model that promises more than this times |f| is not trusted that far (ours)
MISFIT = 0.1  # error of the foretold change of the gradient that a region may reach as it grows (ours)
LEAST_GROWTH, MOST_GROWTH = 2.0, 10.0  # factors of the radius after a very good step to the boundary
AFTER_FAILURE = 2.0 / 3.0  # share of a length that failed to which the next good step may widen the region again (ours)
FIRST_RADII = 32  # candidates for the first radius: max(1, ||x0||) over powers of 2 (ours)


class Damping(NamedTuple):
    """How strongly the next step is held back; each field has shape ()."""

    size: jax.Array  # radius [x] of a trust region, or shift [f/x^2]
    factor: jax.Array  # of a shift or weight: what the next rejection multiplies it by (Nielsen 1999); of a radius: how
    # many times as large it may be after the next trial; no unit


class Trial(NamedTuple):
    """What is known of a trial step p from x; each field has shape ()."""

    ratio: jax.Array  # actual over predicted decrease; -Inf if the trial cannot be judged
    accepted: jax.Array  # bool
    length: jax.Array  # ||p|| [x]
    change: jax.Array  # f(x + p) - f(x) [f]; NaN if not finite
    slope: jax.Array  # g(x)'p [f]
    end_slope: jax.Array  # g(x + p)'p [f]; NaN if not finite or not known
    excess: jax.Array  # change minus that of the quadratic model [f]; NaN if not finite
    misfit: jax.Array  # ||g(x + p) - g(x) - Hp|| / ||Hp||, no unit; NaN if not known


class TrustRegion(NamedTuple):
    """Options of the trust region; build one with `trust_region`."""

    radius: float | None
    accept_ratio: float
    growth: float | None
    shrinkage: float | None

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first radius, given eigenvalues and gradient (in the eigenbasis), shapes (n,)."""
        unlimited = jnp.full((), jnp.inf, g.dtype)
        if self.radius is not None:
            return Damping(jnp.full((), self.radius, g.dtype), unlimited)
        return Damping(first_radius(values, g, x_norm, loss), unlimited)

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the step in the eigenbasis, shape (n,)."""
        return solve(values, g, damping.size)

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the model promises for the step p; all in the eigenbasis."""
        del damping
        return decrease(values, g, p)

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the radius after a trial (N&W Algorithm 4.1).

        Without fixed factors, (1) a poor trial shrinks the radius to the minimizer of the parabola through f(x),
        g'p and f(x + p), within limits, as MINPACK does, (2) where the loss still falls at an accepted trial, and
        has fallen by a fair share of the slope, the minimizer lies beyond: a poor ratio then says that the model
        promised too much (negative curvature), not that the step was too long, and (3) the radius grows as far as
        the gradient at the trial says that the model holds, but not at once to a length that has just failed. The gain
        ratio cannot say it: in a bent valley it is close to 1 by accident.
        """
        radius, (ratio, accepted, length, change, slope, end_slope, _, misfit) = damping.size, trial
        if self.growth is None:  # the misfit of a smooth loss grows like the length
            growth = jnp.clip(MISFIT / jnp.where(misfit > 0, misfit, 1.0), LEAST_GROWTH, MOST_GROWTH)
            growth = jnp.where(misfit == 0, MOST_GROWTH, growth)
            known = jnp.isfinite(misfit)
            growth = jnp.where(known, jnp.minimum(growth, jnp.maximum(damping.factor, 1.0)), LEAST_GROWTH)
        else:
            growth = self.growth
        wider = jnp.where(length >= 0.9 * radius, growth * radius, radius)
        if self.shrinkage is None:
            falling = accepted & (end_slope < 0) & (change <= FALLING * slope)
            bend = change - slope  # the parabola is f + slope t + bend t^2
            vertex = jnp.where(bend > 0, -slope / jnp.where(bend > 0, 2 * bend, 1.0), 1.0)
            shrink = jnp.where(jnp.isfinite(bend), jnp.clip(vertex, MOST_SHRINK, LEAST_SHRINK), WALL_SHRINK)
        else:
            falling, shrink = jnp.zeros_like(accepted), self.shrinkage
        new = jnp.where((ratio > 0.75) | falling, wider, radius)
        new = jnp.where(falling | (accepted & (ratio >= 0.25)), new, shrink * jnp.minimum(length, radius))
        new = jnp.where(length > 0, new, radius)  # a step of no length says nothing about the region
        limit = jnp.finfo(radius.dtype).max ** 0.5  # beyond it, or below its inverse, squares overflow
        new = jnp.clip(new, 1 / limit, limit).astype(radius.dtype)
        return Damping(new, jnp.where(accepted, jnp.inf, AFTER_FAILURE * length / new).astype(radius.dtype))

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether steps of this size no longer move x."""
        del values, g
        return damping.size <= jnp.finfo(x_norm.dtype).eps * x_norm


def trust_region(
    radius: float | None = None, accept_ratio: float = 1e-4, growth: float | None = None, shrinkage: float | None = None
) -> TrustRegion:
    """Exact trust region, the default damping of `newton` and, with other factors, of `levenberg_marquardt`.

    Args:
      radius: First radius, > 0, in units of ||params||. Default: max(1, ||x0||), or the fraction of it over which the
        first model promises no more decrease than 2 |f(x0)|: a model that promises more is not to be trusted.
      accept_ratio: Accept a trial whose gain ratio exceeds this; in [0, 1/4), no unit. Default 1e-4.
      growth: Factor of the radius after a very good step to the boundary, > 1, no unit. Default: read from how well the
        model foretold the gradient, between 2 and 10, right after a failure to two thirds of the length that failed at
        most; 2 where that is not known (products, learned matrices, bounds).
      shrinkage: Factor of the step's length, the new radius after a poor step; in (0, 1), no unit. Default: read from
        the loss along the step, between 1/10 and 1/2.

    Returns:
      An immutable value to pass as `damping=`.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.newton(damping=so.trust_region(radius=0.1))

    References: Nocedal & Wright (2006), Algorithm 4.1; Conn, Gould & Toint (2000), chapter 7.
    """
    who = "trust_region"
    if radius is not None:
        checks.number(who, "radius", radius, hint="leave it out for a rule.")
    checks.number(who, "accept_ratio", accept_ratio, 0.0, 0.25, strict=False, hint="1e-4 is usual.")
    if growth is not None:
        checks.number(who, "growth", growth, 1.0, hint="2 is usual; leave it out for a rule.")
    if shrinkage is not None:
        checks.number(who, "shrinkage", shrinkage, 0.0, 1.0, hint="1/4 is usual; leave it out for a rule.")
    return TrustRegion(radius, accept_ratio, growth, shrinkage)


def solve(values: jax.Array, g: jax.Array, radius: jax.Array) -> jax.Array:
    """Return the minimizer p of g'p + sum(values p^2) / 2 over ||p|| <= radius.

    Args:
      values: Eigenvalues in ascending order, shape (n,).
      g: Gradient in the eigenbasis, shape (n,).
      radius: > 0, shape ().

    With mu = sigma + values[0] and gaps = values - values[0] the step is -g / (gaps + mu), which loses no digits near
    the hard case. ||p|| falls in mu, and Newton's method on 1/radius - 1/||p|| climbs to the root without passing it
    when it starts left of it (CGT Lemma 7.3.2); |g_i| / radius - gaps_i and ||g|| / radius - max(gaps) are left of it.
    """
    if g.size == 0:
        return g
    # Entries next to underflow, beside larger ones, cannot be divided by a radius or squared; the step does without.
    tiny, eps, size = jnp.finfo(g.dtype).tiny, jnp.finfo(g.dtype).eps, jnp.abs(g)
    g = jnp.where((size < tiny / eps**2) & (size < eps * tree.max_norm(g)), 0.0, g)
    least = values[0]
    gaps = values - least
    floor = jnp.maximum(least, 0.0)  # sigma >= 0 and mu >= 0

    def step(mu: jax.Array) -> jax.Array:
        return jnp.where(g == 0, 0.0, -g / jnp.where(g == 0, 1.0, gaps + mu))

    def climb(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        mu, _, i = carry
        p = step(mu)
        length = norm(p)
        unit = p / length
        slope = tree.dot(unit, jnp.where(g == 0, 0.0, unit / jnp.where(g == 0, 1.0, gaps + mu)))
        new = mu + (length - radius) / (radius * slope)  # (CGT 7.3.6)
        new = jnp.where((length > radius) & (new > mu) & jnp.isfinite(new), new, mu)
        return new, mu, i + 1

    left = jnp.maximum(tree.largest(jnp.abs(g) / radius - gaps), norm(g) / radius - gaps[-1])
    left = jnp.maximum(jnp.maximum(floor, left), tiny)  # g / radius may underflow to zero
    # At the floor the step may already be inside: then sigma = 0, or the hard case.
    at_floor = step(floor)
    floor_norm = norm(at_floor)
    inside = jnp.isfinite(floor_norm) & (floor_norm <= radius)
    mu, _, _ = jax.lax.while_loop(
        lambda c: (c[0] != c[1]) & (c[2] < SECULAR_STEPS), climb, (left, jnp.full_like(left, -1.0), jnp.int32(0))
    )
    on_boundary = step(mu)
    p_norm = norm(on_boundary)
    on_boundary = on_boundary * jnp.where(p_norm > 0, radius / p_norm, 1.0)
    # Hard case: g has no part in the lowest eigenspace; walk along it to the boundary (CGT 7.3.1.3).
    rest = jnp.sqrt(jnp.maximum(radius * radius - floor_norm * floor_norm, 0.0))
    hard = at_floor.at[0].add(jnp.where(least < 0, rest, 0.0))
    return jnp.where(inside, hard, on_boundary)


def first_radius(values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> jax.Array:
    """Return the largest of some radii, max(1, ||x0||) at most, over which the model promises no more than 2 |f(x0)|.

    The decrease in the ball is bounded from above by that in the box around it, coordinate by coordinate. Curvature
    and gradient at a remote start say little about a far minimum, and a jump over it often ends on a plateau.
    """
    radii = jnp.maximum(1.0, x_norm) * 2.0 ** -jnp.arange(FIRST_RADII, dtype=g.dtype)
    values, g, reach = values[None, :], jnp.abs(g)[None, :], radii[:, None]
    t = jnp.where(values > 0, jnp.minimum(g / jnp.where(values > 0, values, 1.0), reach), reach)
    promised = jnp.sum(t * (g - 0.5 * values * t), axis=1)
    fair = (promised <= TRUSTED * jnp.abs(loss)) | (loss == 0) | ~jnp.isfinite(promised)
    return jnp.max(jnp.where(fair, radii, radii[-1]))


def decrease(values: jax.Array, g: jax.Array, p: jax.Array) -> jax.Array:
    """Return the decrease -(g'p + p'Hp / 2) that the quadratic model predicts; all in the eigenbasis."""
    slope, curvature, _ = tree.products((g, p), (values * p, p), peak=p)
    return -(slope + 0.5 * curvature)


def misfit(foretold: jax.Array, change: jax.Array) -> jax.Array:
    """Return the error of a model in the change of the gradient, relative to what it foretold, shape (); NaN for 0."""
    error = change - foretold
    squares, size, _ = tree.products((error, error), (foretold, foretold), peak=error)
    return jnp.sqrt(squares) / jnp.sqrt(size)


def gain_ratio(
    before: jax.Array,
    after: jax.Array,
    slope_before: jax.Array,
    slope_after: jax.Array,
    predicted: jax.Array,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Return actual over predicted decrease (N&W 4.4), -Inf if the trial cannot be judged; shapes ().

    When the predicted decrease drowns in the rounding of the loss, the actual one is taken from the slopes g'p at both
    ends by the trapezoidal rule, which is exact for a quadratic (compare Hager & Zhang's approximate Wolfe test).
    `noise` is the rounding level of the loss where the caller knows better than `stopping.noise`.
    """
    eps_k = stopping.noise(before) if noise is None else noise
    drowned = (predicted <= 10 * eps_k) & (after <= before + eps_k)
    actual = jnp.where(drowned, -0.5 * (slope_before + slope_after), before - after)
    ratio = jnp.where(predicted > 0, actual / jnp.where(predicted > 0, predicted, 1.0), -jnp.inf)
    return jnp.where(jnp.isfinite(ratio), ratio, -jnp.inf).astype(before.dtype)


def norm(x: jax.Array) -> jax.Array:
    """Return the Euclidean norm without underflow or overflow of the squares; x: shape (n,)."""
    peak = tree.max_norm(x)
    scaled = x / jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1.0)
    return jnp.where(jnp.isfinite(peak), peak * tree.norm(scaled), jnp.inf)
