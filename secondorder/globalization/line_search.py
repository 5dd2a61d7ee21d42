"""Line search as a state machine that takes one evaluation at a time.

Along x + alpha p, with phi(alpha) = f(x + alpha p), a trial is accepted by the strong Wolfe conditions
(Nocedal & Wright 2006, 3.7) or, where differences of the loss drown in rounding, by the approximate Wolfe
conditions of Hager & Zhang (2005, 4.1 to 4.3), which look at slopes alone. A rejected trial tightens a bracket
`low`..`high`, and the next one comes from cubic interpolation (N&W 3.59), from the secant of the slopes when the
values differ by noise only, or from bisection. A trial with a non-finite value or gradient is a wall: the search
retreats from it toward the last good point.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks
from secondorder.globalization import stopping

WALL_FIRST, WALL_NEXT = 0.5, 0.1  # share of the bracket kept after one, and after repeated, non-finite trials (ours)
MARGIN = 1e-3  # an interpolated trial keeps this share of the bracket away from both ends (ours)
SLOW = 0.66  # a bracket that shrinks by less than this is bisected (More & Thuente 1994, section 4)


class End(NamedTuple):
    """One end of the bracket: a point of phi. Each field has shape ()."""

    step: jax.Array  # alpha
    phi: jax.Array  # phi(alpha) [f]; Inf for a wall
    slope: jax.Array  # phi'(alpha) [f]


class Ray(NamedTuple):
    """A search in flight."""

    step: jax.Array  # alpha of the trial that is (to be) evaluated
    slope: jax.Array  # phi'(0) < 0 [f]
    low: End  # best point with a falling slope; alpha = 0 at first
    high: End  # a point known to lie beyond a minimizer; its step is Inf until there is one
    width: jax.Array  # width of the bracket before the last trial
    walls: jax.Array  # int32: non-finite trials in a row
    trials: jax.Array  # int32: evaluations on this ray
    last: jax.Array  # bool: the search is over, the trial goes back to `low` and is accepted if it can be


class LineSearch(NamedTuple):
    """Options of the search; build one with `line_search`."""

    c1: float  # sufficient decrease (N&W 3.7a)
    c2: float  # curvature (N&W 3.7b)
    max_trials: int  # evaluations on one ray
    growth: float  # a trial is at most this times the one before

    def begin(self, step: jax.Array, slope: jax.Array, value: jax.Array) -> Ray:
        """Return the search at its first trial `step`, on a ray with phi(0) = `value`, phi'(0) = `slope`."""
        zero, infinite = jnp.zeros_like(value), jnp.full_like(value, jnp.inf)
        start = End(zero, value, slope)
        end = End(infinite, infinite, zero)
        none = jnp.int32(0)
        return Ray(step.astype(value.dtype), slope, start, end, infinite, none, none, jnp.array(False))

    def judge(
        self, ray: Ray, value0: jax.Array, value: jax.Array, slope: jax.Array, finite: jax.Array
    ) -> tuple[Ray, jax.Array, jax.Array]:
        """Judge the trial at `ray.step`.

        Args:
          ray: The search.
          value0: phi(0).
          value: phi at the trial.
          slope: phi' at the trial.
          finite: Whether the value and the whole gradient are finite there.

        Returns:
          The search with its next trial, whether this one is accepted, and whether the search has failed.
        """
        eps_k = stopping.noise(value0)
        # 1. Accept?
        descent = value <= value0 + self.c1 * ray.step * ray.slope  # (3.7a)
        flat = jnp.abs(slope) <= self.c2 * jnp.abs(ray.slope)  # (3.7b)
        drowned = jnp.abs(value - value0) <= eps_k
        approximate = (
            drowned & (slope <= -jnp.minimum(0.8, self.c2) * ray.slope) & (slope >= self.c2 * ray.slope)
        )  # HZ (4.1)
        improved = value < ray.low.phi + eps_k
        exhausted = ray.trials + 1 >= self.max_trials
        good_enough = (ray.last | (exhausted & (slope <= 0) & improved)) & (value <= value0 + eps_k)
        accepted = finite & ((descent & flat) | approximate | good_enough)

        # 2. Tighten the bracket.
        trial = End(ray.step, value, slope)
        above = (value > value0 + self.c1 * ray.step * ray.slope + eps_k) | (value > ray.low.phi + eps_k)
        is_high = ~finite | above | (slope >= 0)
        wall = End(ray.step, jnp.full_like(value, jnp.inf), jnp.zeros_like(slope))
        low = _where(is_high, ray.low, trial)
        high = _where(is_high, _where(finite, trial, wall), ray.high)

        # 3. Next trial.
        walls = jnp.where(finite, 0, ray.walls + 1)
        width = high.step - low.step
        inside = _interpolate(low, high, eps_k, walls, slow=width > SLOW * ray.width)
        outside = _extrapolate(ray.low, trial, self.growth)
        step = jnp.where(jnp.isfinite(high.step), inside, outside)

        # 4. Give up: go back to the best point of the ray, or fail if that is its origin.
        narrow = width <= 2 * jnp.finfo(width.dtype).eps * low.step
        over = exhausted | narrow | (step == low.step) | (step == high.step)
        failed = ~accepted & (ray.last | (over & (low.step == 0)))
        step = jnp.where(over, low.step, step)
        return Ray(step, ray.slope, low, high, width, walls, ray.trials + 1, over), accepted, failed


class FixedStep(NamedTuple):
    """No search: alpha is a number or a schedule of the iteration; only a non-finite trial is rejected."""

    learning_rate: optax.ScalarOrSchedule
    max_trials: int = 60  # halvings after a non-finite trial

    def length(self, iteration: jax.Array) -> jax.Array:
        """Return alpha for this iteration."""
        rate = self.learning_rate
        return jnp.asarray(rate(iteration) if callable(rate) else rate)

    def judge(
        self, ray: Ray, value0: jax.Array, value: jax.Array, slope: jax.Array, finite: jax.Array
    ) -> tuple[Ray, jax.Array, jax.Array]:
        """Accept any finite trial; halve the step otherwise. Same signature as `LineSearch.judge`."""
        del value0, value, slope
        trials = ray.trials + 1
        failed = ~finite & (trials >= self.max_trials)
        return ray._replace(step=jnp.where(finite, ray.step, ray.step / 2), trials=trials), finite, failed

    begin = LineSearch.begin


def line_search(c1: float = 1e-4, c2: float = 0.9, max_trials: int = 20, growth: float = 10.0) -> LineSearch:
    """Options of the line search that `lbfgs`, `bfgs` and `newton(modified_cholesky())` use.

    Args:
      c1: Sufficient decrease, in (0, 1/2), no unit (N&W 3.7a). Default 1e-4.
      c2: Curvature condition, in (c1, 1), no unit (N&W 3.7b). Default 0.9; 0.1 makes the search nearly exact.
      max_trials: Evaluations on one ray before the search falls back to the best of them. Default 20.
      growth: Largest factor from one trial to the next while no minimizer is bracketed, > 1. Default 10.

    Returns:
      An immutable value to pass as `linesearch=`; equal options compare equal, so that programs are reused.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> exact = so.line_search(c2=0.1)
      >>> optimizer = so.bfgs(linesearch=exact)

    References: Nocedal & Wright (2006), section 3.5; Hager & Zhang (2005); Moré & Thuente (1994).
    """
    who = "line_search"
    checks.number(who, "c1", c1, 0.0, 0.5, hint="1e-4 is usual.")
    checks.number(who, "c2", c2, 0.0, 1.0, hint="0.9 is usual, 0.1 for a nearly exact search.")
    if not checks.traced(c1, c2) and c2 <= c1:
        raise ValueError(f"{who}: c2 must be greater than c1 = {c1}, got {c2}; 0.9 is usual.")
    checks.integer(who, "max_trials", max_trials, 1, hint="20 is usual.")
    checks.number(who, "growth", growth, 1.0, hint="10 is usual.")
    return LineSearch(c1, c2, max_trials, growth)


def first_step(x_norm: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Return alpha along -g when nothing is known of the curvature; shapes ().

    The move ||alpha g|| is twice |f| / ||g||, which would bring a quadratic with minimum 0 down to it (N&W 3.60
    with an expected decrease of |f|), kept within [1e-3, 1] max(1, ||x||). It does not depend on the scale of the loss.
    """
    unit = jnp.maximum(1.0, x_norm)
    length = 2 * jnp.abs(loss) / grad_norm
    length = jnp.where(jnp.isfinite(length) & (length > 0), length, unit)
    return jnp.where(grad_norm > 0, jnp.clip(length, 1e-3 * unit, unit) / grad_norm, 1.0).astype(loss.dtype)


def _where(flag: jax.Array, a: End, b: End) -> End:
    return End(*(jnp.where(flag, u, v) for u, v in zip(a, b, strict=True)))


def _cubic(a: End, b: End) -> jax.Array:
    """Return the minimizer of the cubic through two points and their slopes (N&W 3.59); NaN if it has none."""
    d1 = a.slope + b.slope - 3 * (a.phi - b.phi) / (a.step - b.step)
    d2 = jnp.sign(b.step - a.step) * jnp.sqrt(d1 * d1 - a.slope * b.slope)
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)


def _interpolate(low: End, high: End, eps_k: jax.Array, walls: jax.Array, slow: jax.Array) -> jax.Array:
    """Return a trial strictly inside the bracket."""
    width = high.step - low.step
    middle = low.step + 0.5 * width
    visible = jnp.abs(high.phi - low.phi) > eps_k
    secant = low.step - low.slope * width / (high.slope - low.slope)
    trial = jnp.where(visible, _cubic(low, high), jnp.where(high.slope > 0, secant, middle))
    trial = jnp.where(jnp.isfinite(trial) & ~slow, trial, middle)
    trial = jnp.clip(trial, low.step + MARGIN * width, high.step - MARGIN * width)
    wall = low.step + jnp.where(walls > 1, WALL_NEXT, WALL_FIRST) * width
    return jnp.where(jnp.isfinite(high.phi), trial, wall)


def _extrapolate(old: End, new: End, growth: float) -> jax.Array:
    """Return a trial beyond `new`, where the loss still falls: the cubic's minimizer, at most `growth` times as far."""
    trial = _cubic(old, new)
    far = growth * new.step
    return jnp.clip(jnp.where(trial > new.step, trial, far), jnp.minimum(2.0, growth) * new.step, far)
