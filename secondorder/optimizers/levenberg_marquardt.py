"""The Levenberg-Marquardt method for nonlinear least squares, by orthogonal factorizations.

Moré (1978), "The Levenberg-Marquardt algorithm: implementation and theory", with the damping of Nielsen (1999) or a
trust region, and the geodesic acceleration of Transtrum & Sethna (2012) as an option. What the Jacobian says is in
`curvature/linear_model.py`, dense or by products.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from secondorder import checks, transform
from secondorder.curvature import linear_model, residuals
from secondorder.curvature.linear_model import Direct, Iterative, LinearModel
from secondorder.globalization import stopping, trust_region
from secondorder.globalization.damping import Levenberg, TargetRatio, Truncation
from secondorder.globalization.stopping import Status
from secondorder.globalization.trust_region import Damping, Trial, TrustRegion
from secondorder.linalg import tree

DampingRule: TypeAlias = Levenberg | TrustRegion | TargetRatio | Truncation

ACCELERATION = 0.75  # largest 2 ||a|| / ||v|| (Transtrum & Sethna 2012, eq. 15)
BEND = 1.5  # the same for a truncated step (ours: with 0.6, one network in three ended 100 times less accurate)


class LastStep(NamedTuple):
    """The step that was accepted last, until the Jacobian at its end is known: its gain may be, or it is taken back."""

    start: jax.Array  # where it began, shape (n,)
    loss: jax.Array  # there
    slope: jax.Array  # g'p at its beginning
    predicted: jax.Array  # decrease that the model promised
    damping: Damping  # with which it was taken
    drowned: jax.Array  # bool: the promise was below the rounding of the loss
    taken: jax.Array  # bool: there is such a step, and no Jacobian yet


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`; memory n k + 9n, where k = min(m, n) or the dimension of the Krylov space."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no region is in flight
    lower: tree.ArrayTree  # bounds of the parameters, -Inf where there is none
    upper: tree.ArrayTree  # the same, Inf where there is none
    model: LinearModel  # of the residual at x, made once per accepted point
    damping: Damping  # shift of the squared singular values, or radius of ||D p|| [r]; of size 0 until one is started
    acceleration: jax.Array  # a of the trial in flight, shape (n,); shape (0,) without `geodesic`
    last: LastStep
    info: stopping.Info


@transform.cached
def levenberg_marquardt(
    damping: DampingRule = trust_region.trust_region(growth=3.0, shrinkage=0.5),  # noqa: B008
    solver: Direct | Iterative | None = None,
    geodesic: bool | None = None,
) -> transform.Optimizer:
    """Levenberg-Marquardt for losses ||r||²/2: curve fits, calibration, equations, physics-informed training.

    At the accepted point x, with J the Jacobian of r and D the largest norms that its columns had so far, raised where
    a parameter could otherwise change by more than its size, the trial is x + p, where p solves
    - `levenberg()`: min || [J; sqrt(shift) D] p + [r; 0] ||², the shift adapted by the gain ratio (Nielsen 1999);
    - `trust_region()`: min || J p + r || over ||D p|| <= radius (Moré 1978);
    - `target_ratio()`: the same as a trust region, with one as large as a low gain ratio allows, for networks;
    - `truncation()`: min || J p + r || over the larger singular directions of J D⁻¹, for networks.

    Args:
      damping: One of the four, with its options. A `radius` is one of ||D p||, in the unit of r. Default:
        `trust_region(growth=3, shrinkage=1/2)`, which starts with ||D x||, or ||r|| if x = 0.
      solver: `direct(...)`: one QR of [J r] and one singular value decomposition of its triangle answer every damping.
        `iterative(...)`: products J v and Jᵀu alone. Default: `direct()` up to 1000 parameters, else `iterative()`;
        `least_squares`, which knows the number of residuals, too, solves in their space if they are fewer. With
        `target_ratio()` and `truncation()` the default is `direct(scaled=False)`: scaled columns let saturated
        neurons go further astray.
      geodesic: Add half the geodesic acceleration a, which solves the damped problem with the second derivative
        of r along p in place of r, and the same shift, where 2 ||a|| <= 0.75 ||p||, or 1.5 ||p|| with `truncation()`.
        Costs one such derivative per trial. Default: with `target_ratio()` and `truncation()`, not with the others.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, the loss ||r||²/2, and `residual_fn(params,
      **extra)`, which returns r, any pytree. The Jacobian gives the gradient: the one handed in is only looked at for
      NaN. `bounds=(lower, upper)`, trees like params, keep all trials inside.
      Cost: one Jacobian (the fewer of n products J v and about 2m products Jᵀu) and one factorization,
      O(m n min(m, n)), per accepted point; O(n min(m, n)) per rejected trial.

    Raises:
      TypeError: here, for an unknown damping or solver; in `update`, for complex parameters or residuals.
      ValueError: in `update`, if `params`, `value` or `residual_fn` is missing.
      Never for NaN: the trial is rejected. Never for a singular Jacobian: what is singular to rounding counts as zero.

    Differs from Moré: (1) singular values instead of pivoted QR, so that a rank is seen, and any damping costs O(n²);
    (2) a trial whose predicted decrease drowns in the rounding of the loss is accepted if the loss does not rise, and
    the region is resized by the slopes at both ends, once the Jacobian there is known;
    (3) D has a floor, since a parameter that has little influence at the start would be thrown far away: at least
    ||N x|| / |x_j|, N the column norms and |x_j| the largest so far, where x_j did not start at zero;
    (4) the run has converged, too, when the part of r in the range of J is at the rounding level of r.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def residual(x):
      ...     return jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
      >>> result = so.least_squares(residual, jnp.array([-1.2, 1.0]), so.levenberg_marquardt())
      >>> result.params.round(4).tolist()
      [1.0, 1.0]

    References: Moré (1978); Nocedal & Wright (2006), section 10.3; Nielsen (1999); Transtrum & Sethna (2012).
    """
    who = "levenberg_marquardt"
    if not isinstance(damping, (TrustRegion, Levenberg, TargetRatio, Truncation)):
        raise TypeError(
            f"{who}: damping must be made by trust_region(...), levenberg(...), target_ratio(...) or truncation(...), "
            f"got {damping!r}."
        )
    linear_model.check(who, solver)
    truncated = isinstance(damping, Truncation)
    for_networks = isinstance(damping, (TargetRatio, Truncation))
    if geodesic is None:
        geodesic = for_networks
    checks.flag(who, "geodesic", geodesic)
    if for_networks and solver is None:
        solver = linear_model.direct(scaled=False)

    def init(params: tree.ArrayTree) -> LevenbergMarquardtState:
        n, dtype = tree.size(params), tree.scalar_dtype(params)
        infinite, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype)
        unset = Damping(zero, zero)
        return LevenbergMarquardtState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            lower=jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), tree.zeros_like(params)),
            upper=jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), tree.zeros_like(params)),
            model=linear_model.chosen(solver, n).initial(n, dtype),
            damping=unset,
            acceleration=jnp.zeros(n if geodesic else 0, dtype),
            last=LastStep(jnp.zeros(n, dtype), zero, zero, zero, unset, jnp.array(False), jnp.array(False)),
            info=stopping.initial(dtype),
        )

    def confine(state: LevenbergMarquardtState, bounds: tuple[Any, Any]) -> LevenbergMarquardtState:
        lower, upper = (tree.cast_like(bound, state.params) for bound in bounds)
        return state._replace(lower=lower, upper=upper)

    def judge(state: LevenbergMarquardtState, point: transform.Point) -> LevenbergMarquardtState:
        # 1. Gain ratio (N&W 4.4) of the step that was really taken, against the linear model of r.
        model, dtype = state.model, state.loss.dtype
        p = tree.ravel(tree.sub(point.params, state.params), dtype)
        x_norm, p_norm = _scaled_norm(model, state.params), tree.norm(model.scale * p)
        finite = jnp.isfinite(tree.max_norm(point.grad)) & jnp.isfinite(point.loss)
        predicted = linear_model.decrease(model, p - 0.5 * state.acceleration if geodesic else p)
        ratio = trust_region.gain_ratio(
            state.loss, point.loss, -predicted, -predicted, predicted, noise=stopping.NOISE * model.loss_rounding
        )
        ratio = jnp.where(finite, ratio, -jnp.inf)
        # 2. Accept or reject.
        first = state.fresh
        accepted = jnp.where(first, finite, ratio > damping.accept_ratio)
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        # 3. Resize the region; a trial that promised less than rounding and failed was the last one.
        change, slope, unknown = point.loss - state.loss, tree.dot(model.gradient, p), jnp.full_like(ratio, jnp.nan)
        trial = Trial(ratio, accepted, p_norm, change, slope, unknown, change + predicted, unknown)
        resized = tree.where(first, state.damping, damping.resize(state.damping, trial))
        eps = jnp.finfo(dtype).eps
        nothing_left = finite & (jnp.abs(predicted) <= model.loss_rounding) | (p_norm <= eps * x_norm)
        stuck = ~first & ~accepted & (nothing_left | damping.exhausted(resized, model.values, model.rotated, x_norm))
        resized = resized._replace(size=jnp.where(stuck, 0.0, resized.size))  # begin starts it afresh
        drowned = ~first & accepted & (predicted <= 10 * stopping.NOISE * model.loss_rounding)
        start = tree.ravel(state.params, dtype)
        last = LastStep(start, state.loss, slope, predicted, state.damping, drowned, accepted & ~first)
        grad_norm = tree.max_norm(point.grad).astype(dtype)
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=stuck,
            before=state.loss,
            loss=point.loss,
            # Progress that the loss cannot show is a shorter projection of r, in which active bounds have no part.
            grad_norm=jnp.where(first, jnp.finfo(dtype).max, model.offset),
            step_length=jnp.ones_like(loss),
            step_norm=tree.norm(p),
            ladder=for_networks,
        )
        grad_norm = jnp.where(accepted, grad_norm, state.info.grad_norm)
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | first | stuck,
            damping=resized,
            last=tree.where(accepted, last, state.last._replace(taken=jnp.array(False))),
            info=info._replace(grad_norm=grad_norm, gain_ratio=jnp.where(first, jnp.nan, ratio), damping=resized.size),
        )

    def taken_back(
        state: LevenbergMarquardtState, known: LinearModel, when: jax.Array
    ) -> tuple[LevenbergMarquardtState, jax.Array]:
        """Return the state, and whether it stands at a new point.

        Where J is not finite there is a wall, seen from behind: the step is taken back, as a trial that failed. At a
        point that no step led to, it is the end. `known` is the model where the step began.
        """
        last, dtype = state.last, state.loss.dtype
        wall = when & ~jnp.isfinite(tree.max_norm(state.model.gradient))
        back = wall & last.taken
        p_norm = tree.norm(known.scale * (tree.ravel(state.params, dtype) - last.start))
        unknown = jnp.full_like(p_norm, jnp.nan)
        failed = Trial(
            jnp.full_like(p_norm, -jnp.inf), jnp.array(False), p_norm, unknown, last.slope, unknown, unknown, unknown
        )
        resized = damping.resize(last.damping, failed)
        params = tree.where(back, tree.unravel(last.start, state.params), state.params)
        x_norm = _scaled_norm(known, params)
        stuck = damping.exhausted(resized, known.values, known.rotated, x_norm)
        stuck |= p_norm <= jnp.finfo(dtype).eps * x_norm
        status = jnp.where(back, jnp.where(stuck, Status.STALLED, Status.RUNNING), state.info.status)
        status = jnp.where(wall & ~back, Status.NONFINITE_START, status).astype(jnp.int32)
        info = state.info._replace(
            status=status,
            accepted=state.info.accepted & ~wall,
            grad_norm=jnp.where(back, tree.max_norm(known.gradient), state.info.grad_norm),
            optimality=jnp.where(back, known.cosine, state.info.optimality),
            iterations=state.info.iterations - back.astype(jnp.int32),
            hessians=state.info.hessians + (back & (state.model.products == 0)).astype(jnp.int32),
            hessian_products=state.info.hessian_products + back.astype(jnp.int32) * state.model.products,
        )
        state = state._replace(
            params=params,
            loss=jnp.where(back, last.loss, state.loss),
            model=tree.where(back, known, state.model),
            damping=tree.where(back, resized, state.damping),
            last=last._replace(taken=last.taken & ~back, drowned=last.drowned & ~back),
            fresh=state.fresh & ~back,
            info=info,
        )
        return state, when & ~back

    def begin(state: LevenbergMarquardtState, residual_fn: Any, when: jax.Array) -> LevenbergMarquardtState:
        # 4. The model of r at the accepted point: the only Jacobian. Only now it is seen whether there is one.
        known, n = state.model, tree.size(state.params)
        made = linear_model.chosen(solver, n)
        box = (tree.ravel(state.lower, state.loss.dtype), tree.ravel(state.upper, state.loss.dtype))
        model = jax.lax.cond(when, lambda: made.model(residual_fn, state.params, box, known), lambda: known)
        state, when = taken_back(state._replace(model=model), known, when)
        model = state.model
        # The gain of a drowned step by the trapezoidal rule, which is exact for a quadratic.
        last, step = state.last, tree.ravel(state.params, model.scale.dtype) - state.last.start
        gain = -0.5 * (last.slope + tree.dot(model.gradient, step)) / jnp.where(last.drowned, last.predicted, 1.0)
        unknown = jnp.full_like(gain, jnp.nan)
        p_norm = tree.norm(model.scale * step)
        trial = Trial(gain, jnp.array(True), p_norm, unknown, last.slope, unknown, unknown, unknown)
        resized = damping.resize(last.damping, trial)
        size = tree.where(when & last.drowned, resized, state.damping)
        size = jax.lax.cond(when & (size.size == 0), lambda: _first_damping(damping, model, state), lambda: size)
        # 5. Converged, if r is orthogonal to the range of J up to the rounding of r itself, or if r'r has vanished in a
        # step from a loss that could be told from rounding.
        info = linear_model.report(state.info, model, when)
        tiny = jnp.finfo(state.loss.dtype).tiny
        vanished = when & last.taken & (state.loss < tiny) & (last.loss * jnp.finfo(state.loss.dtype).eps >= tiny)
        info = info._replace(optimality=jnp.where(vanished, 0.0, info.optimality))
        return state._replace(
            grad=tree.where(when, tree.unravel(model.gradient, state.grad), state.grad),
            damping=size,
            last=last._replace(drowned=last.drowned & ~when, taken=last.taken & ~when),
            fresh=state.fresh & ~when,
            info=info._replace(damping=size.size),
        )

    def aim(state: LevenbergMarquardtState, residual_fn: Any) -> LevenbergMarquardtState:
        # 6. Geodesic acceleration: the damped problem once more, with r_vv in place of r (T&S eq. 12).
        p = _step(damping, state)
        v = linear_model.to_params(state.model, p)
        # Uᵀ r_vv from Jᵀ r_vv: the factor U is not kept. Where a truncated run ends depends on the rounding of its
        # bends: by rows eight of nine Poisson networks fell below 5e-8, otherwise seven of ten, which may be chance.
        _, pulled = residuals.second_derivative(residual_fn, state.params, v, by_rows=truncated)
        pulled = pulled.astype(v.dtype)
        bend = _under_the_same_shift(damping, state, p, linear_model.rotate(state.model, pulled))
        a = linear_model.to_params(state.model, bend)
        D = state.model.scale
        small = 2.0 * tree.norm(D * a) <= (BEND if truncated else ACCELERATION) * tree.norm(D * v)
        return state._replace(acceleration=jnp.where(small & jnp.all(jnp.isfinite(a)), a, 0.0))

    def rebase(state: LevenbergMarquardtState, point: transform.Point) -> LevenbergMarquardtState:
        grad_norm = tree.max_norm(point.grad).astype(state.loss.dtype)
        taken = state.last.taken & (tree.max_norm(tree.sub(point.params, state.params)) == 0)
        return state._replace(
            params=point.params,
            loss=point.loss,
            grad=point.grad,
            last=state.last._replace(taken=taken),
            info=state.info._replace(grad_norm=grad_norm),
        )

    def trial(state: LevenbergMarquardtState) -> tree.ArrayTree:
        p = linear_model.to_params(state.model, _step(damping, state))
        if geodesic:
            p = p + 0.5 * state.acceleration
        move = jnp.where(state.fresh, 0.0, p)
        x = tree.axpy(1.0, tree.unravel(move, state.params), state.params)
        return jax.tree.map(jnp.clip, x, state.lower, state.upper)

    return transform.optimizer(
        transform.Algorithm(
            who,
            init,
            judge,
            begin,
            rebase,
            trial,
            needs_residual=True,
            makes_gradient=True,
            confine=confine,
            aim=aim if geodesic else None,
        )
    )


def _step(damping: DampingRule, state: LevenbergMarquardtState) -> jax.Array:
    """Return the solution of the damped linear problem in the basis of singular vectors, shape (k,)."""
    return damping.step(state.model.values, state.model.rotated, state.damping)


def _under_the_same_shift(
    damping: DampingRule, state: LevenbergMarquardtState, p: jax.Array, q: jax.Array
) -> jax.Array:
    """Return -q / (values + shift) with the shift of the step p, in the basis of singular vectors, (k,)."""
    model, g = state.model, state.model.rotated
    if isinstance(damping, Truncation):
        # A truncated step is a share t of a path, v = t v1, and so its bend is t² a1: not a share of it.
        return damping.solve(model.values, q, state.damping)
    if isinstance(damping, Levenberg):
        return damping.step(model.values, q, state.damping)
    # The step -g / (values + shift) names its shift. A region of the same radius would have another one, none at
    # all where a is short: it would lie on the boundary in the directions that the residual hardly sees.
    k = jnp.argmax(jnp.abs(g))
    shift = jnp.maximum(-g[k] / jnp.where(p[k] == 0, 1.0, p[k]) - model.values[k], 0.0)
    damped = jnp.where(model.values + shift > 0, model.values + shift, jnp.inf)
    return jnp.where(g == 0, -q / damped, q * (p / jnp.where(g == 0, 1.0, g)))


def _scaled_norm(model: LinearModel, params: tree.ArrayTree) -> jax.Array:
    """Return ||D x||, in the unit of r."""
    return tree.norm(model.scale * tree.ravel(params, model.scale.dtype))


def _first_damping(damping: DampingRule, model: LinearModel, state: LevenbergMarquardtState) -> Damping:
    """Return the first shift or radius; where the caller gave no radius, ||D x||, or ||r|| if that is zero."""
    x_norm = _scaled_norm(model, state.params)
    if isinstance(damping, (TrustRegion, TargetRatio)) and damping.radius is None:
        r_norm = jnp.sqrt(2.0 * jnp.abs(state.loss))
        size = jnp.where(x_norm > 0, x_norm, r_norm)
        size = jnp.where(jnp.isfinite(size) & (size > 0), size, 1.0).astype(x_norm.dtype)
        return Damping(size, jnp.ones_like(size))
    return damping.start(model.values, model.rotated, x_norm, state.loss)
