"""Quasi-Newton steps from a dense inverse Hessian, with a line search: Nocedal & Wright (2006), Algorithm 6.1.

The state machine that `bfgs` and `broyden_class` share. They differ in one thing, the member of the Broyden class that
makes the next matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, transform
from secondorder.globalization import line_search, stopping
from secondorder.linalg import inverse_hessian, tree
from secondorder.linalg.branch import branch
from secondorder.linalg.inverse_hessian import Inverse, Member, Pair


class SecantState(NamedTuple):
    """State of `bfgs` and of the Broyden class; memory n^2 + 7n, or n^2 + 8n."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    direction: jax.Array  # p = -H g, shape (n,)
    slope: jax.Array  # g'p [f]
    unit: jax.Array  # max(1, ||x0||) [x]: the scale of a first step
    gain: jax.Array  # decrease of the loss by the last accepted step [f]; 0 if not known
    inverse: Inverse
    ray: line_search.Ray
    info: stopping.Info


def optimizer(
    who: str,
    learning_rate: optax.ScalarOrSchedule | None,
    scale_init_precond: bool,
    linesearch: line_search.LineSearch | None,
    member: Member | None = None,
    initial_scale: tree.Numeric | None = None,
    default_scale: float = 1.0,
    *,
    cautious: bool = True,
) -> transform.Optimizer:
    """Return the optimizer `who`, which updates the inverse Hessian by a member of the Broyden class.

    Args:
      who: Public name.
      learning_rate: Fixed step length or schedule; None to search.
      scale_init_precond: Whether the first pair scales the start.
      linesearch: Options of the search; None for fixed steps.
      member: Weights of the update; default: BFGS.
      initial_scale: Lower limit of the first scaling where there is a search, in multiples of
        `line_search.curvature_scale`.
      default_scale: The same, if None is given; 0 where self-scaling lets H grow.
      cautious: Whether a search begins at the step that the last decrease lets expect, at most 1, since H may be too
        large, by the lower limit of the first scaling or because it grew. Else it begins at 1.
    """
    checks.flag(who, "scale_init_precond", scale_init_precond)
    if linesearch is not None and not isinstance(linesearch, line_search.LineSearch):
        raise TypeError(f"{who}: linesearch must be secondorder.line_search(...) or None, got {linesearch!r}.")
    if learning_rate is not None and not callable(learning_rate):
        checks.number(who, "learning_rate", learning_rate, hint="leave it out to search for the step.")
    searching = learning_rate is None and linesearch is not None
    least_scale: Any = default_scale
    if initial_scale is not None:
        checks.number(who, "initial_scale", initial_scale, strict=False, hint="leave it out for the default.")
        if not (searching and scale_init_precond):
            raise ValueError(
                f"{who}: initial_scale limits the first scaling of a search, got {initial_scale!r} without one; "
                "leave it out, or leave scale_init_precond, linesearch and learning_rate at their defaults."
            )
        least_scale = initial_scale
    limited = searching and not (isinstance(least_scale, float | int) and least_scale == 0)
    search: line_search.LineSearch | line_search.FixedStep
    if learning_rate is None and linesearch is not None:
        search = linesearch
    else:
        search = line_search.FixedStep(1.0 if learning_rate is None else learning_rate)

    def init(params: tree.ArrayTree) -> SecantState:
        dtype = tree.scalar_dtype(params)
        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        inverse = inverse_hessian.identity(params, whole_class=member is not None)
        return SecantState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            direction=jnp.zeros(inverse.H.shape[0], dtype),
            slope=zero,
            unit=line_search.unit_length(params),
            gain=zero,
            inverse=inverse,
            ray=search.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def judge(state: SecantState, point: transform.Point) -> SecantState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        dtype = state.loss.dtype
        g, g_old = tree.ravel(point.grad, dtype), tree.ravel(state.grad, dtype)
        s, y = tree.ravel(tree.sub(point.params, state.params), dtype), g - g_old
        slope, ss, sy, yy, sg, sg_old, grad_norm = tree.products(
            (g, state.direction), (s, s), (s, y), (y, y), (s, g), (s, g_old), peak=g
        )
        grad_norm = stopping.squarable(grad_norm, g.size)
        finite = jnp.isfinite(grad_norm) & transform.valid(point.loss, searching)
        first = state.fresh
        ray, accepted, failed = line_search.judge(
            search, state.ray, first, state.loss, state.slope, point.loss, slope, finite
        )

        # 2. Keep the better point.
        step_norm = jnp.sqrt(ss)
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=~first & ((failed & (state.inverse.pairs == 0)) | (state.slope == 0)),
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=state.ray.step,
            step_norm=step_norm,
            patient=not searching,
        )
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))

        # 3. Update H by the pair, and take the direction from it. A point that no ray led to may belong to another loss
        # (resampled points, say): H is kept, and the gradients of two losses make no pair. Where the search fails, and
        # where half the patience is spent on steps that bring nothing, H may be far too small: it starts anew.
        waited = stopping.half_spent(state.info, info)
        failed = failed | waited
        learn = accepted & ~first & ~waited
        g = jnp.where(accepted, g, g_old)
        least = least_scale * line_search.curvature_scale(state.unit, state.loss, point.loss) if limited else 0.0
        pair = Pair(s, y, ss, sy, yy, sg, -state.ray.step * sg_old)
        gain = state.loss - point.loss
        resumed = first & (jnp.abs(gain) <= stopping.noise(state.loss))  # the point where the last call ended
        spent = (accepted & ~resumed) | failed
        inverse, p = inverse_hessian.update(
            state.inverse, state.direction, pair, g, learn, failed, scale_init_precond, least, member
        )
        slope, _ = tree.products((g, p), peak=p)
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | failed | first,
            direction=p,
            slope=slope,
            gain=jnp.where(learn & jnp.isfinite(gain), gain, jnp.where(spent, 0.0, state.gain)),
            inverse=inverse,
            ray=ray,
            info=info,
        )

    def begin(state: SecantState, hvp: transform.Hvp | None, when: jax.Array) -> SecantState:
        del hvp
        step = jnp.ones_like(state.slope)
        unscaled = state.inverse.pairs == 0  # H = I, p = -g
        p_norm = jnp.sqrt(jnp.abs(state.slope))
        if isinstance(search, line_search.FixedStep):
            step = search.length(state.info.iterations).astype(step.dtype)
            if scale_init_precond:
                step = jnp.where(unscaled & (p_norm > 1), step / p_norm, step)
        else:
            later = line_search.expected_step(state.gain, state.slope, state.loss) if cautious else step
            facts = (state.unit, state.loss, p_norm, state.slope, state.info.step_norm)
            step = branch(
                unscaled, lambda _, *facts: line_search.first_step(*facts), lambda later, *_: later, later, *facts
            )
        ray = search.begin(step, state.slope, state.loss)
        return state._replace(ray=tree.where(when, ray, state.ray), fresh=state.fresh & ~when)

    def rebase(state: SecantState, point: transform.Point) -> SecantState:
        # The direction was made for the gradient of the last trial; another batch, or edited params, need a new one.
        g = tree.ravel(point.grad, state.loss.dtype)
        known = tree.equal(point.grad, state.grad) & (state.info.evaluations > 0)
        p = jax.lax.cond(known, lambda: state.direction, lambda: -inverse_hessian.apply(state.inverse, g))
        return state._replace(
            params=point.params,
            loss=point.loss,
            grad=point.grad,
            direction=p,
            slope=tree.dot(g, p),
            info=state.info._replace(grad_norm=tree.max_norm(g)),
        )

    def trial(state: SecantState) -> tree.ArrayTree:
        move = jnp.where(state.fresh, 0.0, state.ray.step) * state.direction
        return tree.axpy(1.0, tree.unravel(move, state.params), state.params)

    return transform.optimizer(transform.Algorithm(who, init, judge, begin, rebase, trial, needs_value=searching))
