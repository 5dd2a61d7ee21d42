"""Newton's method with a dense Hessian and a choice of damping, for up to a few thousand parameters.

Nocedal & Wright (2006): trust region, Algorithm 4.1 with the exact subproblem of section 4.3 (the loop of it stands in
`region.py`, which saddle-free Newton shares); line search with Hessian modification, Algorithm 3.2, here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, region, transform
from secondorder.curvature import dense
from secondorder.globalization import line_search, stopping, trust_region
from secondorder.globalization.damping import Levenberg, ModifiedCholesky
from secondorder.globalization.trust_region import TrustRegion
from secondorder.linalg import modified_cholesky, tree


class NewtonSearchState(NamedTuple):
    """State of `newton` with modified Cholesky and a line search; memory 3n."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    direction: jax.Array  # p = -(H + E)^-1 g, shape (n,)
    slope: jax.Array  # g'p [f]
    unit: jax.Array  # max(1, ||x0||) [x]: the scale of a first step
    ray: line_search.Ray
    info: stopping.Info


@transform.cached
def newton(
    damping: TrustRegion | Levenberg | ModifiedCholesky = trust_region.trust_region(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    """Newton's method with the dense Hessian, damped so that it converges from anywhere.

    With g and H at the accepted point x, the trial is x + p, where p solves
    - `trust_region()`: min g'p + p'Hp/2 over ||p|| <= radius, exactly, hard case included. At a saddle it leaves along
      the most negative curvature, also if the gradient is zero there.
    - `levenberg()`: (H + sigma I) p = -g, sigma adapted by the gain ratio.
    - `modified_cholesky()`: (H + E) p = -g, followed by a line search along p.

    Args:
      damping: One of the three, with its options. Default: `trust_region()`.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and `hvp_fn(params, vector)` or `value_fn`.
      The curvature is an argument: with a Gauss-Newton or Fisher product as `hvp_fn` this is the damped Gauss-Newton
      or natural-gradient method. `hvp_fn` must be traceable and linear in `vector`.
      Cost: one dense Hessian (n products) and one O(n³) factorization per accepted point, O(n²) per rejected trial.

    Raises:
      TypeError: here, for an unknown damping; in `update`, for complex parameters.
      ValueError: in `update`, if `params`, `value` or curvature is missing.
      Never for NaN: the trial is rejected, and a non-finite Hessian counts as zero (a step of steepest descent to the
      boundary of the region).

    Differs from the source: (1) the gain ratio is taken from slopes where the loss drowns in rounding; (2) a radius
    is answered in the eigenbasis, without further factorizations.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
      >>> result = so.minimize(loss, jnp.array([-1.2, 1.0]), so.newton())
      >>> result.params.round(3).tolist()
      [1.0, 1.0]

    References: Nocedal & Wright (2006), Algorithms 4.1 and 3.2; Moré & Sorensen (1983); Nielsen (1999).
    """
    if isinstance(damping, ModifiedCholesky):
        return _search_newton(damping.linesearch)
    if isinstance(damping, (TrustRegion, Levenberg)):
        return region.optimizer("newton", damping)
    raise TypeError(
        f"newton: damping must be made by trust_region(...), levenberg(...) or modified_cholesky(...), got {damping!r}."
    )


@transform.cached
def scale_by_newton(damping: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the inverse Hessian, (H + damping I)^-1 g, for use in `optax.chain`.

    This is the pure method of the textbook, without any safeguard: it goes to the nearest critical point, minimum,
    maximum or saddle alike. Eigenvalues below n eps of the largest |eigenvalue| count as zero, and their directions
    are left out (pseudo-inverse).

    Args:
      damping: Added to every eigenvalue, >= 0, in the unit of the Hessian [f/x²]. Default 0.

    Returns:
      A `GradientTransformationExtraArgs` that maps g to the Newton step (not negated); `update` needs `params`, and
      `hvp_fn` or `value_fn`. Cost: one dense Hessian and one eigendecomposition per call.

    Raises:
      ValueError, TypeError: for a bad option, or if an argument is missing. Never for NaN: the update is then zero.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_newton(), optax.scale_by_learning_rate(1.0))

    References: Nocedal & Wright (2006), section 3.3.
    """
    who = "scale_by_newton"
    checks.number(who, "damping", damping, strict=False)

    def init(params: tree.ArrayTree) -> optax.EmptyState:
        checks.params(who, params)
        return optax.EmptyState()

    def update(
        updates: tree.ArrayTree,
        state: optax.EmptyState,
        params: tree.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        hvp_fn: transform.Hvp | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, optax.EmptyState]:
        hvp = transform.curvature(who, updates, params, value_fn, hvp_fn, extra_args)
        values, Q = dense.spectrum(dense.from_products(hvp, params))
        values = values + damping
        cut = values.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), initial=0.0)
        keep = jnp.abs(values) > cut
        rotated = tree.matmul(Q.T, tree.ravel(updates, values.dtype))
        step = tree.matmul(Q, jnp.where(keep, rotated / jnp.where(keep, values, 1.0), 0.0))
        step = jnp.where(jnp.isfinite(tree.max_norm(step)), step, 0.0)
        return tree.unravel(step, updates), state

    return transform.pair(init, update)


def _search_newton(search: line_search.LineSearch) -> transform.Optimizer:
    """Return Newton's method with a modified Hessian and a line search (N&W Algorithm 3.2)."""

    def init(params: tree.ArrayTree) -> NewtonSearchState:
        n, dtype = tree.size(params), tree.scalar_dtype(params)
        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        return NewtonSearchState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            direction=jnp.zeros(n, dtype),
            slope=zero,
            unit=line_search.unit_length(params),
            ray=search.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def judge(state: NewtonSearchState, point: transform.Point) -> NewtonSearchState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        g = tree.ravel(point.grad, state.loss.dtype)
        grad_norm = tree.max_norm(g)
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
            stuck=~first & (failed | (state.slope == 0)),
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
            ray=ray,
            info=info,
        )

    def begin(state: NewtonSearchState, hvp: transform.Hvp | None, when: jax.Array) -> NewtonSearchState:
        assert hvp is not None
        # 3. Direction with the modified Hessian; steepest descent if even that does not descend.
        g = tree.ravel(state.grad, state.loss.dtype)

        def newton_direction() -> tuple[jax.Array, jax.Array]:
            H = dense.from_products(hvp, state.params)
            H = jnp.where(jnp.all(jnp.isfinite(H)), H, jnp.eye(g.size, dtype=H.dtype))
            factors = modified_cholesky.factorize(H)
            return -modified_cholesky.solve(factors, g), factors.indefinite

        p, indefinite = jax.lax.cond(when, newton_direction, lambda: (state.direction, state.info.indefinite))
        slope = tree.dot(g, p)
        descends = jnp.isfinite(slope) & (slope < 0)
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
            info=state.info._replace(hessians=state.info.hessians + when, indefinite=indefinite),
        )

    def rebase(state: NewtonSearchState, point: transform.Point) -> NewtonSearchState:
        grad_norm = tree.max_norm(point.grad).astype(state.loss.dtype)
        return state._replace(
            params=point.params, loss=point.loss, grad=point.grad, info=state.info._replace(grad_norm=grad_norm)
        )

    def trial(state: NewtonSearchState) -> tree.ArrayTree:
        move = jnp.where(state.fresh, 0.0, state.ray.step) * state.direction
        return tree.axpy(1.0, tree.unravel(move, state.params), state.params)

    return transform.optimizer(transform.Algorithm("newton", init, judge, begin, rebase, trial, needs_curvature=True))
