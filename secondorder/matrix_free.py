"""Newton's method by products, in a region that the gain ratio resizes: Nocedal & Wright (2006), Algorithm 4.1.

The state machine that `newton_cg` and `saddle_free_newton(rank=k)` share; what a dense Hessian is to `region.py`, a
model on a few vectors is here. They differ in the vectors and in the step that they take in their span: see `Engine`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from secondorder import checks, one_kernel, transform
from secondorder.curvature import products
from secondorder.globalization import stopping, trust_region
from secondorder.globalization.stopping import Status
from secondorder.globalization.trust_region import Damping, Trial
from secondorder.linalg import probes, tree

PROBE, LONG_PROBE = (
    10,
    100,
)  # products that look for negative curvature where the gradient passes the driver's test, and
# where it is zero (ours)


class Step(NamedTuple):
    """A step p in the span that the last solve left."""

    coefficients: jax.Array  # on the vectors of the model
    promised: jax.Array  # decrease of the quadratic model [f]
    length: jax.Array  # ||p|| in the norm of the region


class Solved(NamedTuple):
    """What a solve found at the accepted point."""

    model: Any
    radius: jax.Array
    products: jax.Array  # int32
    curvature: jax.Array  # smallest curvature seen [f/x^2]; NaN if none
    indefinite: jax.Array  # bool: it is negative beyond rounding
    fault: jax.Array  # int32: Status.RUNNING, or what is wrong with the matrices


class Region(Protocol):
    """How the size of a step is judged and changed: a trust region, or a step length."""

    @property
    def accept_ratio(self) -> float:
        """Accept a trial whose decrease exceeds this share of what was promised."""
        ...

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the size after a trial."""
        ...


class Engine(NamedTuple):
    """The parts in which the methods differ."""

    empty: Callable[[tree.ArrayTree], Any]  # params -> model before the first solve
    solve: Callable[[Any, Any, jax.Array], Solved]  # (hvp, state, when): the only products; none unless `when`
    answer: Callable[[Any, jax.Array], Step]  # (model, radius) -> step, without products
    move: Callable[[Any, tree.ArrayTree, jax.Array], tree.ArrayTree]  # (model, grad, coefficients) -> p


class MatrixFreeState(NamedTuple):
    """State of `newton_cg` and `saddle_free_newton(rank=k)`; memory 2 copies of the parameters, and the model's."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no region is in flight
    model: Any  # made once per accepted point
    step: Step  # the trial in flight
    fault: jax.Array  # int32: Status.RUNNING, or what is wrong with the matrices
    gtol: jax.Array  # gradients of this max-norm pass the driver's test; 0 without a driver
    damping: Damping  # radius; Inf where it is to be chosen
    info: stopping.Info


def optimizer(
    who: str, region: Region, engine: Engine, joins: bool = True, needs_curvature: bool = True
) -> transform.Optimizer:
    """Return the optimizer `who` that takes the steps of `engine` and resizes `region` by the gain ratio."""

    def init(params: tree.ArrayTree) -> MatrixFreeState:
        dtype = tree.scalar_dtype(params)
        infinite, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype)
        model = engine.empty(params)
        return MatrixFreeState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            model=model,
            step=jax.tree.map(jnp.zeros_like, engine.answer(model, infinite)),
            fault=jnp.int32(Status.RUNNING),
            gtol=zero,
            damping=Damping(infinite, jnp.ones((), dtype)),
            info=stopping.initial(dtype),
        )

    def judge(state: MatrixFreeState, point: transform.Point) -> MatrixFreeState:
        # 1. Gain ratio (N&W 4.4).
        first = state.fresh
        p = tree.sub(point.params, state.params)
        grad_norm = stopping.squarable(tree.max_norm(point.grad), tree.size(point.params))
        p_norm, x_norm = tree.norm(p), tree.norm(state.params)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(point.loss)
        _, predicted, length = state.step
        slope, end_slope, change = tree.dot(p, state.grad), tree.dot(p, point.grad), point.loss - state.loss
        ratio = trust_region.gain_ratio(state.loss, point.loss, slope, end_slope, predicted)
        ratio = jnp.where(finite, ratio, -jnp.inf)
        # 2. Accept or reject.
        accepted = jnp.where(first, finite, ratio > region.accept_ratio)
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        # 3. Resize the region (N&W Algorithm 4.1).
        unknown = jnp.full_like(ratio, jnp.nan)
        trial = Trial(ratio, accepted, length, change, slope, end_slope, change + predicted, unknown)
        resized = tree.where(first, state.damping, region.resize(state.damping, trial))
        next_norm = p_norm * jnp.minimum(1.0, resized.size / jnp.where(length > 0, length, 1.0))
        stuck = ~first & ~accepted & (next_norm <= jnp.finfo(x_norm.dtype).eps * x_norm)
        # A region that has collapsed says nothing about the next one (another batch, say): start it afresh.
        resized = resized._replace(size=jnp.where(stuck, jnp.inf, resized.size))
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=stuck,
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=jnp.ones_like(loss),
            step_norm=p_norm,
        )
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | first | stuck,
            damping=resized,
            info=_with_fault(info, state.fault)._replace(
                gain_ratio=jnp.where(first, jnp.nan, ratio), damping=resized.size
            ),
        )

    def begin(state: MatrixFreeState, hvp: transform.Hvp | None, when: jax.Array) -> MatrixFreeState:
        info = state.info
        known = Solved(state.model, state.damping.size, jnp.int32(0), info.curvature, info.indefinite, state.fault)
        # 4. The model at the accepted point: the only products.
        model, size, products, curvature, indefinite, fault = jax.lax.cond(
            when, lambda: engine.solve(hvp, state, when), lambda: known
        )
        info = info._replace(
            hessian_products=info.hessian_products + products,
            damping=size,
            curvature=curvature,
            indefinite=indefinite,
        )
        return state._replace(
            model=model,
            fault=fault,
            damping=state.damping._replace(size=size),
            fresh=state.fresh & ~when,
            info=_with_fault(info, fault),
        )

    def aim(state: MatrixFreeState, hvp: transform.Hvp | None) -> MatrixFreeState:
        del hvp
        return state._replace(step=engine.answer(state.model, state.damping.size))

    def until(state: MatrixFreeState, gtol: jax.Array) -> MatrixFreeState:
        return state._replace(gtol=jnp.asarray(gtol).astype(state.gtol.dtype))

    def rebase(state: MatrixFreeState, point: transform.Point) -> MatrixFreeState:
        grad_norm = tree.max_norm(point.grad).astype(state.loss.dtype)
        return state._replace(
            params=point.params, loss=point.loss, grad=point.grad, info=state.info._replace(grad_norm=grad_norm)
        )

    def trial(state: MatrixFreeState) -> tree.ArrayTree:
        p = engine.move(state.model, state.grad, jnp.where(state.fresh, 0.0, state.step.coefficients))
        return tree.axpy(1.0, p, state.params)

    return transform.optimizer(
        transform.Algorithm(
            who,
            init,
            judge,
            begin,
            rebase,
            trial,
            needs_curvature=needs_curvature,
            until=until,
            aim=aim,
            joins=joins,
        )
    )


def linear(who: str, name: str, product: transform.Hvp, params: tree.ArrayTree, dtype: Any) -> Callable[[Any], Any]:
    """Return v -> product(params, v) on trees in the working precision, linearized once."""

    def apply(v: tree.ArrayTree) -> tree.ArrayTree:
        out = product(params, tree.cast_like(v, params))
        remedy = f"{name}(params, vector) must return a tree like params"
        checks.same_shapes(who, out, params, f"the result of {name}", remedy=remedy)
        return wide(out, dtype)

    return products.linear(one_kernel.apart(apply), wide(tree.zeros_like(params), dtype))


def wide(x: tree.ArrayTree, dtype: Any) -> tree.ArrayTree:
    """Return the tree in the working precision."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), x)


def unless_flat(g: tree.ArrayTree, state: MatrixFreeState) -> tuple[tree.ArrayTree, jax.Array]:
    """Return the gradient, or a random vector where the gradient has nothing more to say, and whether that is so."""
    flat = tree.max_norm(g) <= state.gtol
    key = jax.random.fold_in(jax.random.key(0), state.info.evaluations)
    return jax.lax.cond(flat, lambda: probes.normal(key, g), lambda: g), flat


def first_length(state: MatrixFreeState) -> jax.Array:
    """Return the Euclidean radius of the first region, where the caller gives none: max(1, ||x||)."""
    return jnp.maximum(1.0, tree.norm(state.params))


def _with_fault(info: stopping.Info, fault: jax.Array) -> stopping.Info:
    return info._replace(status=jnp.where(fault != Status.RUNNING, fault, info.status).astype(jnp.int32))
