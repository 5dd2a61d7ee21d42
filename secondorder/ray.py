"""A direction from second derivatives, and a line search along it: Nocedal & Wright (2006), Algorithm 3.2.

The state machine that `newton(modified_cholesky())` and `gauss_newton` share. They differ in one thing, the direction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import transform
from secondorder.globalization import line_search, stopping
from secondorder.linalg import tree


class SearchState(NamedTuple):
    """State of `newton` with modified Cholesky, and of `gauss_newton`; memory 3n and the model's."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    steepest: jax.Array  # bool: p = -g; where no ray is in flight, that it is to be, since the search along p failed
    direction: jax.Array  # p, shape (n,)
    slope: jax.Array  # g'p [f]
    unit: jax.Array  # max(1, ||x0||) [x]: the scale of a first step
    ray: line_search.Ray
    model: Any  # what the second derivatives at x say, as the direction left it
    info: stopping.Info


def optimizer(
    who: str,
    search: line_search.LineSearch,
    no_model: Callable[[int, Any], Any],
    direction: Callable[[SearchState, Any], tuple[jax.Array, Any]],
    report: Callable[[stopping.Info, Any, jax.Array], stopping.Info],
    *,
    needs_residual: bool = False,
) -> transform.Optimizer:
    """Return the optimizer `who` that searches along the directions it is given.

    Args:
      who: Public name.
      search: Options of the line search.
      no_model: (n, dtype) -> the model before the first accepted point.
      direction: (state, curvature) -> p, shape (n,), and the model at the accepted point. Where p does not descend,
        steepest descent takes its place.
      report: (info, model, when) -> info, with what the model says where the flag holds.
      needs_residual: Whether the curvature is that of a residual_fn, else of an hvp_fn.
    """

    def init(params: tree.ArrayTree) -> SearchState:
        n, dtype = tree.size(params), tree.scalar_dtype(params)
        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        return SearchState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            steepest=jnp.array(False),
            direction=jnp.zeros(n, dtype),
            slope=zero,
            unit=line_search.unit_length(params),
            ray=search.begin(zero, zero, zero),
            model=no_model(n, dtype),
            info=stopping.initial(dtype),
        )

    def judge(state: SearchState, point: transform.Point) -> SearchState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        g = tree.ravel(point.grad, state.loss.dtype)
        grad_norm = stopping.squarable(tree.max_norm(g), g.size)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(point.loss)
        slope = tree.dot(g, state.direction)
        first = state.fresh
        ray, accepted, failed = line_search.judge(
            search, state.ray, first, state.loss, state.slope, point.loss, slope, finite
        )
        # 2. Keep the better point.
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=~first & ((failed & state.steepest) | (state.slope == 0)),
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=state.ray.step,
            step_norm=tree.norm(tree.sub(point.params, state.params)),
        )
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | failed | first,
            steepest=jnp.where(accepted | failed | first, failed & ~state.steepest, state.steepest),
            ray=ray,
            info=info,
        )

    def begin(state: SearchState, curvature: Any, when: jax.Array) -> SearchState:
        # 3. Direction; steepest descent if it does not descend, or if the search along it has failed.
        g = tree.ravel(state.grad, state.loss.dtype)
        known, anew = (state.direction, state.model), when & ~state.steepest
        p, model = jax.lax.cond(anew, lambda: direction(state, curvature), lambda: known)
        slope = tree.dot(g, p)
        descends = jnp.isfinite(slope) & (slope < 0) & ~state.steepest
        p = jnp.where(descends, p, -g)
        slope = jnp.where(descends, slope, -tree.dot(g, g))
        suggested = line_search.first_step(state.unit, state.loss, tree.norm(g), slope, state.info.step_norm)
        step = jnp.where(descends, 1.0, suggested).astype(slope.dtype)
        ray = search.begin(step, slope, state.loss)
        return state._replace(
            direction=p,
            slope=slope,
            ray=tree.where(when, ray, state.ray),
            fresh=state.fresh & ~when,
            steepest=jnp.where(when, ~descends, state.steepest),
            model=model,
            info=report(state.info, model, anew),
        )

    def rebase(state: SearchState, point: transform.Point) -> SearchState:
        grad_norm = tree.max_norm(point.grad).astype(state.loss.dtype)
        return state._replace(
            params=point.params, loss=point.loss, grad=point.grad, info=state.info._replace(grad_norm=grad_norm)
        )

    def trial(state: SearchState) -> tree.ArrayTree:
        move = jnp.where(state.fresh, 0.0, state.ray.step) * state.direction
        return tree.axpy(1.0, tree.unravel(move, state.params), state.params)

    algorithm = transform.Algorithm(who, init, judge, begin, rebase, trial)
    return transform.optimizer(algorithm._replace(needs_curvature=not needs_residual, needs_residual=needs_residual))
