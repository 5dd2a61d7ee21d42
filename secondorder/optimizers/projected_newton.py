"""Trust-region Newton in a box: exact Hessian, projected steps.

After Lin & Moré (1999), "Newton's method for large bound-constrained optimization problems", SIAM J. Optim. 9.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import transform
from secondorder.curvature import dense
from secondorder.globalization import stopping, trust_region
from secondorder.globalization.trust_region import Damping, Trial, TrustRegion
from secondorder.linalg import box, tree

FACES = 10  # faces of the box that one step may go through (ours)
PATH = 32  # points that are looked at on a projected path, from 4^-24 times the radius upwards (ours)
CUTS = 16  # halvings of a step in a face (ours)


class Face(NamedTuple):
    """The model over the parameters of a face, in the eigenbasis of H there; the others are uncoupled and stiff."""

    values: jax.Array  # eigenvalues, ascending, shape (n,)
    rotated: jax.Array  # gradient in the eigenbasis, shape (n,)
    vectors: jax.Array  # shape (n, n)


class ProjectedNewtonState(NamedTuple):
    """State of `projected_newton`; memory 2n² + 8n."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no region is in flight
    lower: jax.Array  # bounds, shape (n,); -Inf where there is none
    upper: jax.Array  # the same, Inf where there is none
    hessian: jax.Array  # H at x, shape (n, n), once per accepted point
    face: Face  # of the parameters that no bound holds at x, once per accepted point
    damping: Damping  # the radius, of size 0 until a region is started
    info: stopping.Info


@transform.cached
def projected_newton(damping: TrustRegion = trust_region.trust_region()) -> transform.Optimizer:  # noqa: B008
    """Newton's method within bounds, in a trust region, for up to a few hundred parameters.

    The trial is x + p, where p lowers the quadratic model g'p + p'Hp/2 in the box and the region at least as far as the
    best point of the projected gradient path. From the better of that point and of the projected trust-region step the
    model is minimized face by face: over the parameters that are strictly within their bounds, with a projected search
    back to the box, until no further bound is met (Lin & Moré 1999, section 4). Without active bounds this is the step
    of `newton`; the region doubles, where that of `newton` grows as its gradients allow.

    Args:
      damping: `trust_region(...)`; radius in units of ||params||.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, `hvp_fn` or `value_fn`, and takes
      `bounds=(lower, upper)`, trees like params. All trials are within them. `info.optimality` is the KKT residual: the
      max-norm of the gradient without the entries that a bound holds; `info.curvature` is the smallest eigenvalue of
      the Hessian of the other parameters. `minimize(..., bounds=...)` passes them on.
      Cost per accepted point: n Hessian-vector products and one eigendecomposition, O(n³); per trial that meets a bound
      one more for each further face, ten at most.

    Raises:
      TypeError: here, for an unknown damping; in `update`, for complex parameters.
      ValueError: in `update`, if `params`, `value` or the curvature is missing, or for bounds of other shapes.
      Never for NaN: such a trial is rejected, and `state.info.status` says how the run stands.

    Differs from Lin & Moré: (1) faces by eigendecomposition instead of conjugate gradients, so that a saddle or the
    hard case is left as in `newton`; (2) the points of the path and the cuts of a step are looked at all at once, and
    the best is taken; (3) the first face is the one where the gradient alone holds the bounds.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
      >>> result = so.minimize(loss, jnp.zeros(2), so.projected_newton(), bounds=(-jnp.inf, 0.5))
      >>> result.params.round(3).tolist(), result.active.tolist()
      ([0.5, 0.25], [1, 0])

    References: Lin & Moré (1999); Conn, Gould & Toint (2000), chapter 12.
    """
    who = "projected_newton"
    if not isinstance(damping, TrustRegion):
        raise TypeError(f"{who}: damping must be made by trust_region(...), got {damping!r}.")

    def init(params: tree.ArrayTree) -> ProjectedNewtonState:
        n, dtype = tree.size(params), tree.scalar_dtype(params)
        infinite, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype)
        return ProjectedNewtonState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            lower=jnp.full(n, -jnp.inf, dtype),
            upper=jnp.full(n, jnp.inf, dtype),
            hessian=jnp.zeros((n, n), dtype),
            face=Face(jnp.zeros(n, dtype), jnp.zeros(n, dtype), jnp.zeros((n, n), dtype)),
            damping=Damping(zero, zero),
            info=stopping.initial(dtype),
        )

    def confine(state: ProjectedNewtonState, bounds: tuple[Any, Any]) -> ProjectedNewtonState:
        lower, upper = (tree.ravel(bound, state.loss.dtype) for bound in bounds)
        return state._replace(lower=lower, upper=upper)

    def judge(state: ProjectedNewtonState, point: transform.Point) -> ProjectedNewtonState:
        # 1. Gain ratio (N&W 4.4) of the step that was really taken.
        dtype, limits = state.loss.dtype, (state.lower, state.upper)
        g, g_old = tree.ravel(point.grad, dtype), tree.ravel(state.grad, dtype)
        x, x_old = tree.ravel(point.params, dtype), tree.ravel(state.params, dtype)
        p = x - x_old
        grad_norm = tree.max_norm(box.projected_gradient(x, g, limits))
        p_norm, x_norm = tree.norm(p), tree.norm(x_old)
        finite = jnp.isfinite(tree.max_norm(g)) & jnp.isfinite(point.loss)
        slope, end_slope, change = tree.dot(g_old, p), tree.dot(g, p), point.loss - state.loss
        predicted = -(slope + 0.5 * tree.dot(p, tree.matmul(state.hessian, p)))
        ratio = trust_region.gain_ratio(state.loss, point.loss, slope, end_slope, predicted)
        ratio = jnp.where(finite, ratio, -jnp.inf)
        # 2. Accept or reject.
        first = state.fresh
        accepted = jnp.where(first, finite, ratio > damping.accept_ratio)
        # 3. Resize the region.
        unknown = jnp.full_like(ratio, jnp.nan)  # the bounds change the model under way
        trial = Trial(ratio, accepted, p_norm, change, slope, end_slope, change + predicted, unknown)
        resized = tree.where(first, state.damping, damping.resize(state.damping, trial))
        stuck = ~first & ~accepted & (damping.exhausted(resized, g, g, x_norm) | (p_norm == 0))
        resized = resized._replace(size=jnp.where(stuck, 0.0, resized.size))  # begin starts it afresh
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=stuck,
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=jnp.ones_like(state.loss),
            step_norm=p_norm,
        )
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | first | stuck,
            damping=resized,
            info=info._replace(gain_ratio=jnp.where(first, jnp.nan, ratio), damping=resized.size),
        )

    def begin(state: ProjectedNewtonState, hvp: transform.Hvp | None, when: jax.Array) -> ProjectedNewtonState:
        # 4. The Hessian at the accepted point, and what it says of the parameters that no bound holds.
        assert hvp is not None
        dtype, info = state.loss.dtype, state.info
        x, g = tree.ravel(state.params, dtype), tree.ravel(state.grad, dtype)

        def new() -> tuple[jax.Array, Face, Damping, jax.Array, jax.Array]:
            H = dense.from_products(hvp, state.params)
            H = jnp.where(jnp.all(jnp.isfinite(H)), H, 0.0)
            free = ~box.blocked(x, g, (state.lower, state.upper))
            face = _face(H, g, free)
            size = jax.lax.cond(
                state.damping.size == 0,
                lambda: damping.start(face.values, face.rotated, tree.norm(x), state.loss),
                lambda: state.damping,
            )
            least = face.values[0] if face.values.size else jnp.zeros((), dtype)
            return H, face, size, least, dense.indefinite(face.values)

        known = (state.hessian, state.face, state.damping, info.curvature, info.indefinite)
        H, face, size, least, indefinite = jax.lax.cond(when, new, lambda: known)
        return state._replace(
            hessian=H,
            face=face,
            damping=size,
            fresh=state.fresh & ~when,
            info=info._replace(
                hessians=info.hessians + when.astype(jnp.int32),
                damping=size.size,
                curvature=least,
                indefinite=indefinite,
            ),
        )

    def rebase(state: ProjectedNewtonState, point: transform.Point) -> ProjectedNewtonState:
        dtype = state.loss.dtype
        x, g = tree.ravel(point.params, dtype), tree.ravel(point.grad, dtype)
        grad_norm = tree.max_norm(box.projected_gradient(x, g, (state.lower, state.upper)))
        info = state.info._replace(grad_norm=grad_norm, optimality=grad_norm)
        return state._replace(params=point.params, loss=point.loss, grad=point.grad, info=info)

    def trial(state: ProjectedNewtonState) -> tree.ArrayTree:
        dtype, limits = state.loss.dtype, (state.lower, state.upper)
        x, g = tree.ravel(state.params, dtype), tree.ravel(state.grad, dtype)
        p = jax.lax.cond(
            state.fresh,
            lambda: jnp.zeros_like(x),
            lambda: _step(state.hessian, state.face, x, g, limits, state.damping.size),
        )
        return tree.unravel(jnp.clip(x + p, *limits), state.params)

    return transform.optimizer(
        transform.Algorithm(who, init, judge, begin, rebase, trial, needs_curvature=True, confine=confine)
    )


def _face(H: jax.Array, g: jax.Array, free: jax.Array) -> Face:
    """Return the face of the free parameters, from H, g and flags, shapes (n, n), (n,), (n,)."""
    stiff = jnp.where(free, 0.0, jnp.maximum(jnp.max(jnp.abs(H), initial=0.0), jnp.finfo(H.dtype).tiny))
    values, vectors = dense.spectrum(jnp.where(free[:, None] & free[None, :], H, 0.0) + jnp.diag(stiff))
    return Face(values, tree.matmul(vectors.T, jnp.where(free, g, 0.0)), vectors)


def _step(H: jax.Array, first: Face, x: jax.Array, g: jax.Array, limits: box.Box, radius: jax.Array) -> jax.Array:
    """Return a step p, shape (n,), to a point of the box that lowers the model g'p + p'Hp/2; ||p|| <= 2 radius."""
    lower, upper = limits
    project = lambda moves: jnp.clip(x[None, :] + moves, lower[None, :], upper[None, :]) - x[None, :]

    def best(candidates: jax.Array, longest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the candidate, shape (n,), of least model value, and that value; they have the shape (k, n)."""
        models = tree.matmul(candidates, g) + 0.5 * jnp.sum(candidates * tree.matmul(candidates, H), axis=1)
        inside = jnp.linalg.norm(candidates, axis=1) <= longest
        models = jnp.where(inside & jnp.isfinite(models), models, jnp.inf)
        index = jnp.argmin(models)
        return candidates[index], models[index]

    def minimize_face(p: jax.Array, free: jax.Array, face: Face) -> tuple[jax.Array, jax.Array]:
        """Return p after a step in the face, projected to the box, and its model value."""
        slack = 2 * radius - jnp.linalg.norm(p)
        values, rotated, vectors = face
        w = tree.matmul(vectors, trust_region.solve(values, rotated, jnp.minimum(slack, radius)))
        w = jnp.where(free, w, 0.0)
        lengths = 2.0 ** -jnp.arange(CUTS, dtype=x.dtype)
        met = jnp.minimum(box.longest_step(x + p, w, limits), 1.0)
        back = jnp.where(d_norm > 0, 0.0, -lengths)  # at a saddle both ways are as good, and a bound may close one
        lengths = jnp.concatenate([lengths, met[None], jnp.zeros_like(met)[None], back])
        return best(project(p[None, :] + lengths[:, None] * w[None, :]), 2 * radius * (1 + 10 * jnp.finfo(x.dtype).eps))

    # 1. The projected gradient path, and the projected trust-region step: the better one.
    free = ~box.blocked(x, g, limits)
    d = jnp.where(free, g, 0.0)
    d_norm = tree.norm(d)
    unit = d / jnp.where(d_norm > 0, d_norm, 1.0)
    reach = radius * 4.0 ** (8 - jnp.arange(PATH, dtype=x.dtype))
    cauchy, cauchy_model = best(project(-reach[:, None] * unit[None, :]), radius)
    direct, direct_model = minimize_face(jnp.zeros_like(x), free, first)
    p = jnp.where(direct_model <= cauchy_model, direct, cauchy)

    # 2. Face by face, until a step meets no further bound.
    def strictly_inside(p: jax.Array) -> jax.Array:
        return (x + p > lower) & (x + p < upper)

    def more(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, moving, i = carry
        return moving & (i < FACES)

    def next_face(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        p, _, i = carry
        inside = strictly_inside(p)
        new, _ = minimize_face(p, inside, _face(H, g + tree.matmul(H, p), inside))
        return new, jnp.any(inside & ~strictly_inside(new)), i + 1

    met = (direct_model > cauchy_model) | jnp.any(free & ~strictly_inside(p))
    p, _, _ = jax.lax.while_loop(more, next_face, (p, met, jnp.int32(0)))
    return p
