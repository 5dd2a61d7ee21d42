"""Line search as a state machine that takes one evaluation at a time.

Along x + alpha p, with phi(alpha) = f(x + alpha p), a trial is accepted by the strong Wolfe conditions
(Nocedal & Wright 2006, 3.7), stricter where the loss still falls (`falling`), or, where differences of the loss drown
in rounding, by the approximate Wolfe conditions of Hager & Zhang (2005, 4.1 to 4.3), which look at slopes alone. A
rejected trial tightens a bracket `low`..`high`, and the next one comes from cubic interpolation (N&W 3.59), from the
secant of the slopes when the values differ by noise only, or from bisection. A trial with a non-finite value or
gradient is a wall: the search retreats from it toward the last good point.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks
from secondorder.globalization import stopping
from secondorder.linalg import tree
from secondorder.linalg.branch import branch

WALL_FIRST, WALL_NEXT = 0.5, 0.1  # share of the way kept when a first, and when a later, trial is not finite (ours)
MARGIN = 1e-3  # an interpolated trial keeps this share of the bracket away from both ends (ours)
RETREAT = 4  # after so many trials without one below the origin, each goes ten times nearer to it than the last (ours)
LEAST_EXPECTED = 1e-2  # of the unit step, for a first trial by the expected decrease (ours)
BISECT = 3  # every fourth trial (its last two bits set) halves the bracket, whatever the cubic says (ours)


class End(NamedTuple):
    """One end of the bracket: a point of phi. Each field has shape ()."""

    step: jax.Array  # alpha
    phi: jax.Array  # phi(alpha) [f]; Inf for a wall
    slope: jax.Array  # phi'(alpha) [f]


class Ray(NamedTuple):
    """A search in flight. The ends are `End`s as vectors: few, small outputs keep the compiled step small."""

    step: jax.Array  # alpha of the trial that is (to be) evaluated, shape ()
    low: jax.Array  # best point with a falling slope, shape (3,); alpha = 0 at first
    high: jax.Array  # a point known to lie beyond a minimizer, shape (3,); its step is Inf until there is one
    trials: jax.Array  # int32: evaluations on this ray


class LineSearch(NamedTuple):
    """Options of the search; build one with `line_search`."""

    c1: float  # sufficient decrease (N&W 3.7a)
    c2: float  # curvature (N&W 3.7b)
    max_trials: int  # evaluations on one ray
    growth: float  # a trial is at most this times the one before
    falling: float  # takes the place of a larger c2 where the loss still falls

    def begin(self, step: jax.Array, slope: jax.Array, value: jax.Array) -> Ray:
        """Return the search at its first trial `step`, on a ray with phi(0) = `value`, phi'(0) = `slope`."""
        low = jnp.stack([jnp.zeros_like(value), value, slope])
        high = jnp.array([jnp.inf, jnp.inf, 0.0], value.dtype)
        return Ray(step.astype(value.dtype), low, high, jnp.int32(0))

    def judge(
        self, ray: Ray, value0: jax.Array, slope0: jax.Array, value: jax.Array, slope: jax.Array, finite: jax.Array
    ) -> tuple[Ray, jax.Array, jax.Array]:
        """Judge the trial at `ray.step`.

        Args:
          ray: The search.
          value0: phi(0).
          slope0: phi'(0).
          value: phi at the trial.
          slope: phi' at the trial.
          finite: Whether the value and the whole gradient are finite there.

        Returns:
          The search with its next trial, whether this one is accepted, and whether the search has failed.
        """
        eps_k = stopping.noise(value0)
        low, high = End(*ray.low), End(*ray.high)
        last = ray.step == low.step  # the search is over: this trial went back to the best point, or to the origin
        # 1. Accept?
        descent = value <= value0 + self.c1 * ray.step * slope0  # (3.7a)
        # (3.7b), with two constants as in the generalized Wolfe conditions (Hager & Zhang 2006): BFGS lets an H that is
        # too small grow slowly, and cuts one that is too large at once (Byrd, Liu & Nocedal 1992).
        flat = (slope >= jnp.minimum(self.falling, self.c2) * slope0) & (slope <= -self.c2 * slope0)
        drowned = jnp.abs(value - value0) <= eps_k
        approximate = drowned & (slope <= -jnp.minimum(0.8, self.c2) * slope0) & (slope >= self.c2 * slope0)  # HZ (4.1)
        exhausted = ray.trials + 1 >= self.max_trials
        good_enough = ((last & (low.step > 0)) | (exhausted & (slope <= 0) & (value < low.phi + eps_k))) & (
            value <= value0 + eps_k
        )
        accepted = finite & ((descent & flat) | approximate | good_enough)

        # 2. Tighten the bracket.
        above = (value > value0 + self.c1 * ray.step * slope0 + eps_k) | (value > low.phi + eps_k)
        is_high = ~finite | above | (slope >= 0)
        trial = jnp.stack([ray.step, jnp.where(finite, value, jnp.inf), jnp.where(finite, slope, 0.0)])
        new_low = jnp.where(is_high, ray.low, trial)
        new_high = jnp.where(is_high, trial, ray.high)

        # 3. Next trial.
        bracketed = is_high | jnp.isfinite(high.step)
        other = jnp.where(bracketed & ~is_high, ray.high, ray.low)  # the cubic goes through the trial and this point
        cubic = _cubic(End(*other), End(*trial))
        outside = _extrapolate(cubic, ray.step, self.growth)
        low, high = End(*new_low), End(*new_high)
        inside = _interpolate(cubic, low, high, eps_k, ray.trials)
        step = jnp.where(bracketed, inside, outside)

        # 4. Give up: go back to the best point of the ray, or fail if that is its origin.
        narrow = high.step - low.step <= 2 * jnp.finfo(step.dtype).eps * low.step
        over = exhausted | narrow | (step == high.step)
        failed = ~accepted & (last | (over & (low.step == 0)))
        step = jnp.where(over, low.step, step)
        return Ray(step, new_low, new_high, ray.trials + 1), accepted, failed


class FixedStep(NamedTuple):
    """No search: alpha is a number or a schedule of the iteration; only a non-finite trial is rejected."""

    learning_rate: optax.ScalarOrSchedule
    max_trials: int = 60  # halvings after a non-finite trial

    def length(self, iteration: jax.Array) -> jax.Array:
        """Return alpha for this iteration."""
        rate = self.learning_rate
        return jnp.asarray(rate(iteration) if callable(rate) else rate)

    def judge(
        self, ray: Ray, value0: jax.Array, slope0: jax.Array, value: jax.Array, slope: jax.Array, finite: jax.Array
    ) -> tuple[Ray, jax.Array, jax.Array]:
        """Accept any finite trial; halve the step otherwise. Same signature as `LineSearch.judge`."""
        del value0, slope0, value, slope
        trials = ray.trials + 1
        failed = ~finite & (trials >= self.max_trials)
        return ray._replace(step=jnp.where(finite, ray.step, ray.step / 2), trials=trials), finite, failed

    begin = LineSearch.begin


def judge(
    search: LineSearch | FixedStep,
    ray: Ray,
    fresh: jax.Array,
    value0: jax.Array,
    slope0: jax.Array,
    value: jax.Array,
    slope: jax.Array,
    finite: jax.Array,
) -> tuple[Ray, jax.Array, jax.Array]:
    """Return what `search.judge` does; a fresh point, to which no ray led, is accepted if it is finite.

    The branch also keeps the search in one place of the compiled program: XLA otherwise repeats it, inlined, in every
    large loop that needs to know whether the trial was accepted.
    """
    decide = jax.lax.cond if checks.traced(search) else branch
    operands = (ray, value0, slope0, value, slope, finite)
    return decide(fresh, _as_it_is, search.judge, *operands)


def _as_it_is(
    ray: Ray, value0: jax.Array, slope0: jax.Array, value: jax.Array, slope: jax.Array, finite: jax.Array
) -> tuple[Ray, jax.Array, jax.Array]:
    """Accept a point to which no ray led. Same signature as `LineSearch.judge`."""
    del value0, slope0, value, slope
    return ray, finite, jnp.zeros_like(finite)


def line_search(
    c1: float = 1e-4, c2: float = 0.9, max_trials: int = 20, growth: float = 4.0, falling: float = 0.7
) -> LineSearch:
    """Options of the line search that `lbfgs`, `bfgs`, `lbfgsb` and `newton(modified_cholesky())` use.

    The Broyden class (`ssbroyden` and its kin) takes it too, by default with growth=10.0 and falling=0.9.

    Args:
      c1: Sufficient decrease, in (0, 1/2), no unit (N&W 3.7a). Default 1e-4.
      c2: Curvature condition, in (c1, 1), no unit (N&W 3.7b). Default 0.9; 0.1 makes the search nearly exact.
      max_trials: Evaluations on one ray before the search falls back to the best of them. Default 20.
      growth: Largest factor from one trial to the next while no minimizer is bracketed, > 1. Default 4, as in MINPACK-2
        (Moré & Thuente 1994): where there is no scale yet, a longer jump often ends on a plateau.
      falling: The smaller of this and c2 counts where the loss still falls at the trial, in (c1, 1), no unit: a trial
        with a larger share of the first slope left is too short. Default 0.7 (ours, see `docs/robustness.md`).

    Returns:
      An immutable value to pass as `linesearch=`; equal options compare equal, so that programs are reused.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> exact = so.line_search(c2=0.1)
      >>> optimizer = so.bfgs(linesearch=exact)

    References: Nocedal & Wright (2006), section 3.5; Hager & Zhang (2005); Hager & Zhang (2006), "A survey of nonlinear
    conjugate gradient methods" (generalized Wolfe conditions); Moré & Thuente (1994).
    """
    who = "line_search"
    checks.number(who, "c1", c1, 0.0, 0.5, hint="1e-4 is usual.")
    checks.number(who, "c2", c2, 0.0, 1.0, hint="0.9 is usual, 0.1 for a nearly exact search.")
    if not checks.traced(c1, c2) and c2 <= c1:
        raise ValueError(f"{who}: c2 must be greater than c1 = {c1}, got {c2}; 0.9 is usual.")
    checks.integer(who, "max_trials", max_trials, 1, hint="20 is usual.")
    checks.number(who, "growth", growth, 1.0, hint="4 is usual.")
    checks.number(who, "falling", falling, 0.0, 1.0, hint="0.7 is usual.")
    if not checks.traced(c1, falling) and falling <= c1:
        raise ValueError(f"{who}: falling must be greater than c1 = {c1}, got {falling}; 0.7 is usual.")
    return LineSearch(c1, c2, max_trials, growth, falling)


# For directions that are not held back by an H that is too small, since H grows by itself (self-scaling) or is computed
# (Newton): there the two defaults that help `bfgs` and `lbfgs` only cost evaluations (ours, see docs/robustness.md).
WIDE = line_search(growth=10.0, falling=0.9)


def unit_length(params: tree.ArrayTree) -> jax.Array:
    """Return max(1, ||x0||), shape (): the length [x] against which a first step is measured."""
    params = tree.zeros_like(params) if tree.abstract(params) else params
    return jnp.maximum(1.0, tree.norm(params))


def first_step(unit: jax.Array, loss: jax.Array, p_norm: jax.Array, slope: jax.Array, last: jax.Array) -> jax.Array:
    """Return alpha along a direction p of steepest descent when nothing is known of the curvature; shapes ().

    The move is as long as the `last` one. Before there was one, it is the step 2 |f| / |g'p| that would bring a
    quadratic with minimum 0 down to it (N&W 3.60 with an expected decrease of |f|), kept within [1e-3, 1] unit. It does
    not depend on the scale of the loss.
    """
    step = 2 * jnp.abs(loss) / jnp.abs(slope)
    longest = unit / p_norm
    step = jnp.where(jnp.isfinite(step) & (step > 0), step, longest)
    step = jnp.where(last > 0, last / p_norm, jnp.clip(step, 1e-3 * longest, longest))
    return jnp.where((p_norm > 0) & jnp.isfinite(step), step, 1.0).astype(loss.dtype)


def expected_step(gain: jax.Array, slope: jax.Array, loss: jax.Array) -> jax.Array:
    """Return alpha <= 1 for which a quadratic would fall as much as the loss did last; shapes () (N&W 3.60).

    It is at least `LEAST_EXPECTED`, and 1 where the last gain is not known, or drowns in the rounding of the loss.
    """
    step = 1.01 * 2.0 * gain / jnp.abs(slope)
    known = jnp.isfinite(step) & (gain > 10.0 * stopping.noise(loss))
    return jnp.where(known, jnp.clip(step, LEAST_EXPECTED, 1.0), 1.0).astype(loss.dtype)


def curvature_scale(unit: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """Return unit^2 / |f|, shape () [x^2/f]: an inverse curvature by which a unit length changes the loss by its size.

    A first inverse Hessian gamma I with gamma = s'y / y'y (N&W 6.20) is the inverse of the largest curvature seen. If
    the problem is ill-conditioned, that is far too small for all other directions, and quasi-Newton updates make a
    small H grow slowly, while they cut a large one at once (Byrd, Liu & Nocedal 1992). So this is a lower limit of
    gamma. It scales with the loss as gamma must; `after` guards against a loss that happens to be zero.
    """
    scale = unit * unit / jnp.maximum(jnp.abs(before), jnp.abs(before - after))
    return jnp.where(jnp.isfinite(scale), scale, 0.0).astype(unit.dtype)


def _cubic(a: End, b: End) -> jax.Array:
    """Return the minimizer of the cubic through two points and their slopes (N&W 3.59); NaN if it has none."""
    d1 = a.slope + b.slope - 3 * (a.phi - b.phi) / (a.step - b.step)
    d2 = jnp.sign(b.step - a.step) * jnp.sqrt(d1 * d1 - a.slope * b.slope)
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)


def _interpolate(cubic: jax.Array, low: End, high: End, eps_k: jax.Array, trials: jax.Array) -> jax.Array:
    """Return a trial strictly inside the bracket, where it may be at the minimizer of the cubic through its ends."""
    width = high.step - low.step
    middle = low.step + 0.5 * width
    visible = jnp.abs(high.phi - low.phi) > eps_k
    secant = low.step - low.slope * width / (high.slope - low.slope)
    trial = jnp.where(visible, cubic, jnp.where(high.slope > 0, secant, middle))
    trial = jnp.where(jnp.isfinite(trial) & (trials & BISECT != BISECT), trial, middle)
    trial = jnp.clip(trial, low.step + MARGIN * width, high.step - MARGIN * width)
    wall = low.step + jnp.where(trials > 0, WALL_NEXT, WALL_FIRST) * width
    # A loss that rises by many powers of ten at the trials says nothing about the scale at the origin: a cubic keeps a
    # third of the way, and twenty trials end far from it.
    lost = (low.step == 0) & (high.phi > low.phi + eps_k)
    retreat = jnp.where(lost, 0.1 ** jnp.maximum(trials - RETREAT, 0).astype(trial.dtype), 1.0) * high.step
    return jnp.minimum(jnp.where(jnp.isfinite(high.phi), trial, wall), retreat)


def _extrapolate(cubic: jax.Array, last: jax.Array, growth: float) -> jax.Array:
    """Return a trial beyond the last, where the loss still falls: the cubic's minimizer, at most `growth` as far."""
    far = growth * last
    return jnp.clip(jnp.where(cubic > last, cubic, far), jnp.minimum(2.0, growth) * last, far)
