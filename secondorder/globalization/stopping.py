"""Why a run ends, and the figures that every optimizer keeps about itself.

`Status` is the answer, `Info` the evidence; `record` updates the evidence at each evaluation. Three ends are seen
by the optimizers themselves (no real progress any more, unbounded below, a non-finite start); the gradient test and
the budgets belong to the driver.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

UNBOUNDED_BELOW = -1e20  # [f]; a loss below it is called unbounded. Float32 still squares it without overflow.
PATIENCE = 30  # evaluations near the accepted loss without real progress before a run is called stalled
NOISE = 10.0  # a change of the loss below NOISE eps |f| is rounding (Hager & Zhang 2005 call it epsilon_k)
SHRINK = 0.9  # a gradient norm below SHRINK times the least so far is progress even if the loss cannot show it


class Status(enum.IntEnum):
    """Why a run ended; see `message`. `CONVERGED` is a success, and so is `RANK_DEFICIENT`.

    `RANK_DEFICIENT` comes from least squares, and from differentiated runs, which look at the Hessian.
    """

    RUNNING = 0
    CONVERGED = 1
    STALLED = 2
    MAX_STEPS = 3
    MAX_EVALUATIONS = 4
    UNBOUNDED = 5
    NONFINITE_START = 6
    DIVERGED = 7
    CALLBACK = 8
    RANK_DEFICIENT = 9
    NOT_SYMMETRIC = 10
    NOT_POSITIVE_DEFINITE = 11

    @property
    def message(self) -> str:
        """The status in words."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.RUNNING: "still running",
    Status.CONVERGED: "converged: the gradient passes the test",
    Status.STALLED: "stalled at rounding level: neither the loss nor the gradient can be improved measurably",
    Status.MAX_STEPS: "stopped: max_steps steps were taken",
    Status.MAX_EVALUATIONS: "stopped: max_evaluations evaluations were spent",
    Status.UNBOUNDED: f"the loss is unbounded below: it fell under {UNBOUNDED_BELOW:g}",
    Status.NONFINITE_START: "the loss or its gradient is not finite at the start, or the gradient too large to square",
    Status.DIVERGED: "a step led to a non-finite loss or gradient, and this optimizer has no way back",
    Status.CALLBACK: "stopped by the callback",
    Status.RANK_DEFICIENT: "converged, but the Jacobian or Hessian is singular there: parameters are left undetermined",
    Status.NOT_SYMMETRIC: "stopped: the products of hvp_fn are not those of a symmetric matrix",
    Status.NOT_POSITIVE_DEFINITE: "stopped: the preconditioner is not positive definite",
}


class Info(NamedTuple):
    """What an optimizer knows about its run; every field is a scalar array, the same in every optimizer."""

    status: jax.Array  # int32, a Status: RUNNING, STALLED, UNBOUNDED or NONFINITE_START
    accepted: jax.Array  # bool: the point shown last was accepted
    iterations: jax.Array  # int32: accepted points after the start
    evaluations: jax.Array  # int32: values and gradients seen
    hessian_products: jax.Array  # int32: single Hessian-vector products, or products J v and Jᵀu
    hessians: jax.Array  # int32: dense Hessians (n products each), or dense Jacobians in least squares
    grad_norm: jax.Array  # max-norm of the gradient at the accepted point [f/x]; Inf before the first
    optimality: jax.Array  # what gtol is compared with: grad_norm, or a cosine (no unit) in least squares
    least_grad_norm: jax.Array  # the least of it so far [f/x]
    since_progress: jax.Array  # int32: evaluations since the last real progress
    step_length: jax.Array  # alpha of the last accepted step, no unit; 1 for a trust region
    step_norm: jax.Array  # its Euclidean norm ||x+ - x|| [x]
    gain_ratio: jax.Array  # actual over predicted decrease of the last trial (N&W 4.4); NaN if there is no model
    damping: jax.Array  # radius [x] or shift [f/x^2], whichever the method has; NaN if none
    curvature: jax.Array  # smallest eigenvalue of the Hessian at the accepted point [f/x^2]; NaN if unknown
    indefinite: jax.Array  # bool: that eigenvalue is negative beyond rounding


def initial(dtype: jax.typing.DTypeLike) -> Info:
    """Return the figures before the first evaluation."""
    zero, nothing, infinite = jnp.int32(0), jnp.array(jnp.nan, dtype), jnp.array(jnp.inf, dtype)
    no, nil = jnp.array(False), jnp.zeros((), dtype)
    return Info(
        status=jnp.int32(Status.RUNNING),
        accepted=no,
        iterations=zero,
        evaluations=zero,
        hessian_products=zero,
        hessians=zero,
        grad_norm=infinite,
        optimality=infinite,
        least_grad_norm=infinite,
        since_progress=zero,
        step_length=nil,
        step_norm=nil,
        gain_ratio=nothing,
        damping=nothing,
        curvature=nothing,
        indefinite=no,
    )


def noise(loss: jax.Array) -> jax.Array:
    """Return the size of a change of `loss` that rounding alone can make; 0 where the loss is not known (Inf)."""
    level = NOISE * jnp.finfo(loss.dtype).eps * jnp.abs(loss)
    return jnp.where(jnp.isfinite(level), level, 0.0).astype(loss.dtype)


def squarable(grad_norm: jax.Array, n: int) -> jax.Array:
    """Return the max-norm of a gradient of n entries; Inf where the sum of their squares might overflow.

    For methods that need g'g or g'p: a start with such a gradient is no start, and a trial is a wall.
    """
    limit = (jnp.finfo(grad_norm.dtype).max / max(n, 1)) ** 0.5
    return jnp.where(grad_norm > limit, jnp.inf, grad_norm)


def record(
    info: Info,
    *,
    accepted: jax.Array,
    first: jax.Array,
    stuck: jax.Array,
    before: jax.Array,
    loss: jax.Array,
    grad_norm: jax.Array,
    step_length: jax.Array,
    step_norm: jax.Array,
    patient: bool = False,
    ladder: bool = False,
) -> Info:
    """Return the figures after one evaluation.

    Args:
      info: The figures before it.
      accepted: Whether the point was accepted.
      first: Whether it is a point that no search led to (the start, or a point that the caller chose).
      stuck: Whether the method has no further trial to offer that differs from the accepted point.
      before: Loss at the last accepted point.
      loss: Loss at this point.
      grad_norm: Max-norm of the gradient at this point.
      step_length: alpha that led here.
      step_norm: Distance from the last accepted point.
      patient: Do not call slow progress a stall (a fixed step length has no claim to progress).
      ladder: Rejected trials are no sign of a stall: the method has a list of them, and says by `stuck` when it ends.
    """
    visible = (before - loss > noise(loss)) & jnp.isfinite(grad_norm)  # without a gradient a point is a wall
    flatter = grad_norm < SHRINK * info.least_grad_norm
    progress = visible | (accepted & (first | flatter))  # a long search whose trials descend is no stall
    # A trial that is far above, or not finite, says that it went too far, not that nothing is left to gain.
    near = (loss - before <= jnp.abs(before)) & jnp.isfinite(grad_norm)
    if ladder:
        near = near & accepted
    since = jnp.where(progress, 0, info.since_progress + near.astype(jnp.int32))
    if patient:
        since = jnp.zeros_like(since)
    status = jnp.int32(Status.RUNNING)
    status = jnp.where(stuck | (since >= PATIENCE), Status.STALLED, status)
    status = jnp.where(accepted & (loss < UNBOUNDED_BELOW), Status.UNBOUNDED, status)
    status = jnp.where(first & ~accepted, Status.NONFINITE_START, status)
    moved = accepted & ~first
    return info._replace(
        status=status.astype(jnp.int32),
        accepted=accepted,
        iterations=info.iterations + moved.astype(jnp.int32),
        evaluations=info.evaluations + 1,
        grad_norm=jnp.where(accepted, grad_norm, info.grad_norm),
        optimality=jnp.where(accepted, grad_norm, info.optimality),
        least_grad_norm=jnp.where(accepted, jnp.minimum(grad_norm, info.least_grad_norm), info.least_grad_norm),
        since_progress=since.astype(jnp.int32),
        step_length=jnp.where(moved, step_length, info.step_length),
        step_norm=jnp.where(moved, step_norm, info.step_norm),
    )


def half_spent(before: Info, after: Info) -> jax.Array:
    """Return whether this evaluation spends the first half of the patience, shape (): the moment for a fresh start."""
    half = PATIENCE // 2
    return (after.since_progress >= half) & (before.since_progress < half)
