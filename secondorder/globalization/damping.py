"""Damping by a shift, by truncation, and by a modified Cholesky factorization with a line search."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.globalization import line_search, trust_region
from secondorder.globalization.trust_region import Damping, Trial

COARSEST = 1e-2  # the largest relative cutoff of a truncated step (ours)
SHARES = 3  # trials with one truncation: the whole step, a quarter, a sixteenth (ours)
INSIDE = 0.5  # share of the radius below which a bent step ended inside: a bend takes at most 3/8 of its step (ours)
PASSES = 4  # over all truncations, each with shares that are 64 times shorter than the last pass's (ours)


class Levenberg(NamedTuple):
    """Options of the shift; build one with `levenberg`."""

    tau: float
    accept_ratio: float

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first shift, tau times the largest curvature (Nielsen 1999)."""
        del x_norm, loss
        largest = jnp.max(jnp.abs(values), initial=0.0)
        shift = jnp.where(largest > 0, self.tau * largest, 1.0)
        return Damping(shift.astype(g.dtype), jnp.full((), 2.0, g.dtype))

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return -(H + sigma I)^-1 g in the eigenbasis, with sigma = shift + max(0, -lowest eigenvalue)."""
        lowest = jnp.minimum(jnp.min(values, initial=0.0), 0.0)
        return -g / (values - lowest + damping.size)

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the quadratic model promises for the step p; all in the eigenbasis."""
        del damping
        return trust_region.decrease(values, g, p)

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the shift after a trial (Nielsen 1999, 2.4)."""
        ratio, accepted = trial.ratio, trial.accepted
        shift, nu = damping
        smaller = shift * jnp.maximum(1.0 / 3.0, 1.0 - (2.0 * jnp.maximum(ratio, 0.0) - 1.0) ** 3)
        tiny = jnp.finfo(shift.dtype).tiny
        new = jnp.where(accepted, jnp.maximum(smaller, tiny), jnp.minimum(shift * nu, jnp.finfo(shift.dtype).max))
        return Damping(new.astype(shift.dtype), jnp.where(accepted, 2.0, 2.0 * nu).astype(nu.dtype))

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether the shift is so large that steps no longer move x."""
        del g, x_norm
        largest = jnp.max(jnp.abs(values), initial=0.0)
        return damping.size > jnp.maximum(largest, 1.0) / jnp.finfo(values.dtype).eps ** 2


class TargetRatio(NamedTuple):
    """Options of the region at a target ratio; build one with `target_ratio`."""

    ratio: float
    growth: float
    shrinkage: float
    radius: float | None

    @property
    def accept_ratio(self) -> float:
        """Trials up to the target are rejected: one from the same factorization, a little shorter, is better."""
        return self.ratio

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first radius, ||x|| unless it is given."""
        del values, loss
        one = jnp.ones((), g.dtype)
        return Damping(one * (x_norm if self.radius is None else self.radius), one)

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the step in the basis of singular vectors, shape (k,)."""
        return trust_region.solve(values, g, damping.size)

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the radius after a trial: longer after every success on the boundary, a little shorter else."""
        radius, length = damping.size, trial.length
        inside = length < INSIDE * radius
        base = jnp.where(inside, length, radius)
        wider = jnp.where(inside, radius, self.growth * radius)
        new = jnp.where(trial.accepted, wider, self.shrinkage * base)
        new = jnp.where(length > 0, new, radius)
        limit = jnp.finfo(radius.dtype).max ** 0.5  # beyond it, or below its inverse, squares overflow
        return damping._replace(size=jnp.clip(new, 1 / limit, limit).astype(radius.dtype))

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether steps of this size no longer move x."""
        del values, g
        return damping.size <= jnp.finfo(x_norm.dtype).eps * x_norm


class Truncation(NamedTuple):
    """Options of the truncated step; build one with `truncation`. `Damping.size` counts the trials that failed."""

    cutoff: float
    accept_ratio: float

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first size: no trial has failed."""
        del values, x_norm, loss
        return Damping(jnp.zeros((), g.dtype), jnp.ones((), g.dtype))

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return a share of -g / values over the values that are kept, in the basis of singular vectors."""
        trials = SHARES * self._rungs
        done = jnp.floor(damping.size / trials)
        share = 0.25 ** (SHARES * done + damping.size % SHARES)
        return share.astype(g.dtype) * self.solve(values, g, damping)

    def solve(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the whole step, -g / values over the values that are kept."""
        rung = jnp.floor(damping.size % (SHARES * self._rungs) / SHARES)
        level = jnp.minimum(self.cutoff * 10.0**rung, COARSEST)
        kept = values > level * level * jnp.max(values, initial=0.0)
        return jnp.where(kept, -g / jnp.where(kept, values, 1.0), 0.0)

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the quadratic model promises for the step p; all in the eigenbasis."""
        del damping
        return trust_region.decrease(values, g, p)

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the finest truncation and the whole step after a success, the next trial of the ladder else."""
        return damping._replace(size=jnp.where(trial.accepted, 0.0, damping.size + 1.0).astype(damping.size.dtype))

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether the ladder has ended, its last pass with shares of 4^-9 to 4^-11."""
        del values, g, x_norm
        return damping.size >= PASSES * SHARES * self._rungs

    @property
    def _rungs(self) -> int:
        return 1 + max(0, round(math.log10(COARSEST / self.cutoff)))


class ModifiedCholesky(NamedTuple):
    """Options of modified Cholesky; build one with `modified_cholesky`."""

    linesearch: line_search.LineSearch


def levenberg(tau: float = 1e-3, accept_ratio: float = 1e-4) -> Levenberg:
    """Damping by a shift: p = -(H + sigma I)^-1 g, sigma adapted by the gain ratio.

    Args:
      tau: First shift over the largest |eigenvalue| of the first Hessian, > 0, no unit. Default 1e-3.
      accept_ratio: Accept a trial whose gain ratio exceeds this; in [0, 1/4), no unit. Default 1e-4.

    Returns:
      An immutable value to pass as `newton(damping=...)` or `levenberg_marquardt(damping=...)`. The shift [f/x²] scales
      with the loss; in least squares it is one of the squared singular values of the scaled Jacobian, without unit.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.newton(damping=so.levenberg())

    References: Levenberg (1944); Nielsen (1999), "Damping parameter in Marquardt's method", IMM-REP-1999-05.
    """
    who = "levenberg"
    checks.number(who, "tau", tau, hint="1e-3 is usual; 1 for a poor start.")
    checks.number(who, "accept_ratio", accept_ratio, 0.0, 0.25, strict=False, hint="1e-4 is usual.")
    return Levenberg(tau, accept_ratio)


def truncation(cutoff: float = 1e-10, accept_ratio: float = 1e-4) -> Truncation:
    """Damping by truncation, for residuals whose Jacobian is singular beyond rounding: physics-informed networks.

    The step solves min || J p + r || over the singular directions whose singular value exceeds `cutoff` times the
    largest. Where the whole step fails, a quarter and a sixteenth of it are tried; then the same for a ten times
    coarser truncation, and so on, up to 1e-2; then the same truncations with shorter shares, down to 4^-11. After a
    success the finest truncation comes first again. `levenberg_marquardt` bends these steps by the geodesic
    acceleration, along the valley, and leaves the parameters unscaled (`docs/pinn.md` has the reasons).

    A shift damps all directions a little, and a network then creeps along valleys; a truncated step leaves the
    directions alone that the residual hardly sees, and goes the whole way in the others.

    Args:
      cutoff: Relative size of the singular values that are left out first, in (0, 1e-2), no unit. Default 1e-10.
      accept_ratio: Accept a trial whose gain ratio exceeds this; in [0, 1/4), no unit. Default 1e-4.

    Returns:
      An immutable value to pass as `levenberg_marquardt(damping=...)`. `info.damping` counts the trials that failed
      since the last accepted point.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.levenberg_marquardt(damping=so.truncation())

    References: Müller & Zeinhofer (2023), "Achieving high accuracy with PINNs via energy natural gradient descent",
    truncate with a fixed cutoff and search the step on a grid; the ladder is ours.
    """
    who = "truncation"
    checks.number(who, "cutoff", cutoff, 0.0, COARSEST, hint="1e-10 is the default.")
    checks.number(who, "accept_ratio", accept_ratio, 0.0, 0.25, strict=False, hint="1e-4 is usual.")
    return Truncation(cutoff, accept_ratio)


def target_ratio(
    ratio: float = 0.1, growth: float = 2.0, shrinkage: float = 0.75, radius: float | None = None
) -> TargetRatio:
    """Damping by a trust region that is as large as a low gain ratio allows, for physics-informed networks.

    The step minimizes ||J p + r|| over ||p|| <= radius. A trial whose decrease is less than `ratio` of the predicted
    one is rejected, and the next is a little shorter; after a success the region grows, however good it was. So each
    factorization, which costs as much as some hundred residuals, is used for nearly the longest step that it can
    give. `levenberg_marquardt` bends these steps by the geodesic acceleration and leaves the parameters unscaled.

    Args:
      ratio: Gain ratio below which a trial is rejected, in (0, 1), no unit. Default 0.1.
      growth: Factor of the radius after a success, > 1, no unit. Default 2.
      shrinkage: Factor of the radius after a rejected trial; in (0, 1), no unit. Default 0.75: finer than the factors
        of `trust_region`, since a trial is cheap beside a Jacobian.
      radius: First radius, > 0, in the unit of ||p||. Default: ||x||, or ||r|| if x = 0.

    Returns:
      An immutable value to pass as `levenberg_marquardt(damping=...)`.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.levenberg_marquardt(damping=so.target_ratio())

    References: Webb, Jerad & Cartis (2026), arXiv 2607.02194, take the largest of a window of radii whose gain ratio
    reaches a target; to come from above, one trial after the other, is ours, and so is the bend.
    """
    who = "target_ratio"
    checks.number(who, "ratio", ratio, 0.0, 1.0, hint="0.1 is the default.")
    checks.number(who, "growth", growth, 1.0, hint="2 is the default.")
    checks.number(who, "shrinkage", shrinkage, 0.0, 1.0, hint="3/4 is the default.")
    if radius is not None:
        checks.number(who, "radius", radius, hint="leave it out for ||x||.")
    return TargetRatio(ratio, growth, shrinkage, radius)


def modified_cholesky(linesearch: line_search.LineSearch | None = None) -> ModifiedCholesky:
    """Damping by a modified Cholesky factorization, with a line search along the step.

    The Hessian is factorized as H + E = L D Lᵀ with E diagonal, zero when H is safely positive definite
    (Gill, Murray & Wright 1981), and the step -(H + E)⁻¹ g is searched.

    Args:
      linesearch: Options of the search. Default: `line_search(growth=10.0, falling=0.9)`: Newton's steps have the scale
        of the loss, and where it goes on falling there is nothing to fear from a long one.

    Returns:
      An immutable value to pass as `newton(damping=...)`.

    Raises:
      TypeError: if `linesearch` is not made by `line_search`.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.newton(damping=so.modified_cholesky())

    References: Nocedal & Wright (2006), Algorithm 3.2 and section 3.4; Gill, Murray & Wright (1981), section 4.4.2.2.
    """
    search = line_search.WIDE if linesearch is None else linesearch
    if not isinstance(search, line_search.LineSearch):
        raise TypeError(f"modified_cholesky: linesearch must be made by line_search(...), got {linesearch!r}.")
    return ModifiedCholesky(search)
