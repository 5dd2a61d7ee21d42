"""BFGS with a dense inverse Hessian, for smooth functions of up to a few thousand parameters.

Nocedal & Wright (2006), Algorithm 6.1, update (6.17).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, transform
from secondorder.globalization import line_search, stopping
from secondorder.linalg import tree


class Inverse(NamedTuple):
    """The inverse Hessian keep H + start I + s w' + w s'; the terms beside H wait for the next pass over H.

    They wait because XLA otherwise fuses the whole line search into that pass and repeats it for every entry of H.
    """

    H: jax.Array  # symmetric [x^2/f], shape (n, n)
    s: jax.Array  # shape (n,)
    w: jax.Array  # shape (n,)
    keep: jax.Array  # factor of H: 1, the first scaling (6.20), or 0 at a reset; shape ()
    start: jax.Array  # multiple of the identity that is added: 1 at a reset, else 0; shape ()
    pairs: jax.Array  # int32: updates since H was last the identity


class BFGSState(NamedTuple):
    """State of `bfgs`; memory n^2 + 7n."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    direction: jax.Array  # p = -H g, shape (n,)
    slope: jax.Array  # g'p [f]
    unit: jax.Array  # max(1, ||x0||) [x]: the scale of a first step
    inverse: Inverse
    ray: line_search.Ray
    info: stopping.Info


class ScaleByBFGSState(NamedTuple):
    """State of `scale_by_bfgs`."""

    count: jax.Array  # int32: finite gradients seen
    params: tree.ArrayTree  # parameters of the last gradient
    updates: tree.ArrayTree  # the last gradient
    direction: jax.Array  # -H g, shape (n,)
    inverse: Inverse


@transform.cached
def bfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | None = line_search.line_search(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    """BFGS: quasi-Newton steps from a dense inverse Hessian.

    The step is p = -H g. After it, with s = x₊ - x, y = g₊ - g,
    H₊ = (I - s y'/s'y) H (I - y s'/s'y) + s s'/s'y, written as H + s w' + w s'. A pair enters if
    s'y >= sqrt(eps) ||s|| ||y||; the first one scales the start, H = gamma I with gamma = max(s'y / y'y, u²/|f|), where
    u = max(1, ||x0||): (6.20) with a lower limit. A direction that fails is replaced by steepest descent, with H
    reset.

    Args:
      learning_rate: Fixed step length or schedule; it switches the search off. Default: none, search.
      scale_init_precond: Scale H before the first update. Default True. Without a search, by (6.20) alone.
      linesearch: `line_search(...)` (the default), or None for unit steps (or `learning_rate`).

    Returns:
      A `GradientTransformationExtraArgs`, called as `lbfgs` is; real parameters only.
      Cost: one matrix-vector product and one in-place pass over H per evaluation. Memory: n² + 7n numbers.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if `params` or `value` is missing, or for
        complex parameters. Never for NaN: the trial is rejected, `state.info.status` says how the run stands.

    Differs from the source: (1) H y = H g₊ + p needs no product of its own, and -H₊g₊ follows from H g₊ by vector
    algebra; (2) the update is written as one symmetric rank-two term, fused with the scaling and the reset.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> result = so.minimize(lambda x: jnp.sum((x - 3.0) ** 4 + x**2), jnp.zeros(2), so.bfgs())
      >>> bool(result.success)
      True

    References: Nocedal & Wright (2006), section 6.1; Byrd, Liu & Nocedal (1992), "On the behavior of Broyden's class of
    quasi-Newton methods".
    """
    who = "bfgs"
    if linesearch is not None and not isinstance(linesearch, line_search.LineSearch):
        raise TypeError(f"{who}: linesearch must be secondorder.line_search(...) or None, got {linesearch!r}.")
    if learning_rate is not None and not callable(learning_rate):
        checks.number(who, "learning_rate", learning_rate, hint="leave it out to search for the step.")
    searching = learning_rate is None and linesearch is not None
    search: line_search.LineSearch | line_search.FixedStep
    if learning_rate is None and linesearch is not None:
        search = linesearch
    else:
        search = line_search.FixedStep(1.0 if learning_rate is None else learning_rate)

    def init(params: tree.ArrayTree) -> BFGSState:
        dtype = tree.scalar_dtype(params)
        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        inverse = _identity(params)
        return BFGSState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            direction=jnp.zeros(inverse.H.shape[0], dtype),
            slope=zero,
            unit=line_search.unit_length(params),
            inverse=inverse,
            ray=search.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def judge(state: BFGSState, point: transform.Point) -> BFGSState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        dtype = state.loss.dtype
        g, g_old = tree.ravel(point.grad, dtype), tree.ravel(state.grad, dtype)
        grad_norm = tree.max_norm(g)
        finite = jnp.isfinite(grad_norm) & transform.valid(point.loss, searching)
        first = state.fresh
        ray, accepted, failed = line_search.judge(
            search, state.ray, first, state.loss, state.slope, point.loss, tree.dot(g, state.direction), finite
        )

        # 2. Keep the better point.
        s, y = tree.ravel(tree.sub(point.params, state.params), dtype), g - g_old
        step_norm = tree.norm(s)
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

        # 3. Update H by the pair (6.17), and take the direction from it.
        learn = accepted & ~(first & (state.info.evaluations == 0))
        g = jnp.where(accepted, g, g_old)
        least = line_search.curvature_scale(state.unit, state.loss, point.loss) if searching else 0.0
        inverse, p = _update(
            state.inverse, state.direction, s, y, step_norm, g, learn, failed, scale_init_precond, least
        )
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | failed | first,
            direction=p,
            slope=tree.dot(g, p),
            inverse=inverse,
            ray=ray,
            info=info,
        )

    def begin(state: BFGSState, hvp: transform.Hvp | None, when: jax.Array) -> BFGSState:
        del hvp
        step = jnp.ones_like(state.slope)
        unscaled = state.inverse.pairs == 0  # H = I, p = -g
        p_norm = jnp.sqrt(jnp.abs(state.slope))
        if isinstance(search, line_search.FixedStep):
            step = search.length(state.info.iterations).astype(step.dtype)
            if scale_init_precond:
                step = jnp.where(unscaled & (p_norm > 1), step / p_norm, step)
        else:
            step = jax.lax.cond(
                unscaled,
                lambda: line_search.first_step(state.unit, state.loss, p_norm, state.slope, state.info.step_norm),
                lambda: step,
            )
        ray = search.begin(step, state.slope, state.loss)
        return state._replace(ray=tree.where(when, ray, state.ray), fresh=state.fresh & ~when)

    def rebase(state: BFGSState, point: transform.Point) -> BFGSState:
        # The direction was made for the gradient of the last trial; another batch, or edited params, need a new one.
        g = tree.ravel(point.grad, state.loss.dtype)
        known = tree.equal(point.grad, state.grad) & (state.info.evaluations > 0)
        p = jax.lax.cond(known, lambda: state.direction, lambda: -_apply(state.inverse, g))
        return state._replace(
            params=point.params,
            loss=point.loss,
            grad=point.grad,
            direction=p,
            slope=tree.dot(g, p),
            info=state.info._replace(grad_norm=tree.max_norm(g)),
        )

    def trial(state: BFGSState) -> tree.ArrayTree:
        move = jnp.where(state.fresh, 0.0, state.ray.step) * state.direction
        return tree.axpy(1.0, tree.unravel(move, state.params), state.params)

    return transform.optimizer(transform.Algorithm(who, init, judge, begin, rebase, trial, needs_value=searching))


@transform.cached
def scale_by_bfgs(scale_init_precond: bool = True) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the dense BFGS inverse Hessian, for use in `optax.chain`.

    Args:
      scale_init_precond: As in `bfgs`. Default True; the first step is then -g min(1, 1/||g||).

    Returns:
      A `GradientTransformationExtraArgs` that maps g to H g (not negated); `update` needs `params`. Pairs are
      differences of successive gradients. Follow it with a learning rate or an optax line search.

    Raises:
      ValueError, TypeError: if `params` is missing or complex. A non-finite gradient gives a zero update.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_bfgs(), optax.scale_by_learning_rate(0.5))

    References: as for `bfgs`.
    """
    who = "scale_by_bfgs"

    def init(params: tree.ArrayTree) -> ScaleByBFGSState:
        checks.params(who, params)
        params = transform.as_arrays(params)
        inverse = _identity(params)
        direction = jnp.zeros(inverse.H.shape[0], inverse.H.dtype)
        return ScaleByBFGSState(jnp.int32(0), tree.copy(params), tree.zeros_like(params), direction, inverse)

    def update(
        updates: tree.ArrayTree,
        state: ScaleByBFGSState,
        params: tree.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, ScaleByBFGSState]:
        del extra_args
        if params is None:
            raise checks.missing(who, "the parameters", "update(grads, state, params)")
        checks.same_shapes(who, updates, params, "the gradient (first argument)")
        dtype = state.direction.dtype
        new = tree.cast_like(updates, state.updates)
        finite, first = jnp.isfinite(tree.max_norm(new)), state.count == 0
        s, y = tree.ravel(tree.sub(params, state.params), dtype), tree.ravel(tree.sub(new, state.updates), dtype)
        x, grad = tree.where(finite, (params, new), (state.params, state.updates))
        no = jnp.array(False)
        g = tree.ravel(grad, dtype)
        inverse, p = _update(
            state.inverse, state.direction, s, y, tree.norm(s), g, finite & ~first, no, scale_init_precond
        )
        length = tree.norm(p)
        capped = jnp.where((inverse.pairs == 0) & scale_init_precond & (length > 1), 1 / length, 1.0)
        Hg = tree.unravel(jnp.where(finite, -capped, 0.0) * p, state.params)
        return Hg, ScaleByBFGSState(state.count + finite, x, grad, p, inverse)

    return transform.pair(init, update)


def _identity(params: tree.ArrayTree) -> Inverse:
    n, dtype = tree.size(params), tree.scalar_dtype(params)
    nothing, zero = jnp.zeros(n, dtype), jnp.zeros((), dtype)
    return Inverse(jnp.eye(n, dtype=dtype), nothing, nothing, jnp.ones((), dtype), zero, jnp.int32(0))


def current(inverse: Inverse) -> jax.Array:
    """Return the inverse Hessian approximation, shape (n, n): one pass over H, in place in a loop."""
    H, s, w, keep, start, _ = inverse
    n = s.size
    # The identity depends on `start`, so that it stays inside the pass instead of becoming a second matrix.
    diagonal = jnp.arange(n)[:, None] + jnp.where(start > 0, 0, n) == jnp.arange(n)[None, :]
    return jnp.where(diagonal, start, keep * H + (s[:, None] * w[None, :] + w[:, None] * s[None, :]))


def _apply(inverse: Inverse, g: jax.Array) -> jax.Array:
    """Return the inverse Hessian approximation times g, shape (n,), without forming it."""
    H, s, w, keep, start, _ = inverse
    return keep * tree.matmul(H, g) + start * g + s * tree.dot(w, g) + w * tree.dot(s, g)


def _update(
    inverse: Inverse,
    p: jax.Array,
    s: jax.Array,
    y: jax.Array,
    s_norm: jax.Array,
    g: jax.Array,
    learn: jax.Array,
    reset: jax.Array,
    scale: bool,
    least: tree.Numeric = 0.0,
) -> tuple[Inverse, jax.Array]:
    """Return the inverse after the pair (s, y), and -H g at the new gradient g.

    Args:
      inverse: H.
      p: -H g at the old gradient, shape (n,).
      s: Step, shape (n,).
      y: Change of the gradient, shape (n,).
      s_norm: ||s||.
      g: Gradient at the point that is kept, shape (n,).
      learn: Take the pair in, if its curvature is positive.
      reset: Start again from the identity.
      scale: Scale the first H by (6.20).
      least: Lower limit of the first scaling.
    """
    H = current(inverse)  # the only pass
    q = tree.matmul(H, g)  # the only product
    sy, yy = tree.dot(s, y), tree.dot(y, y)
    limit = jnp.finfo(sy.dtype).eps ** 0.5 * s_norm * jnp.sqrt(yy)
    good = learn & (sy > limit) & (sy > jnp.finfo(sy.dtype).tiny) & jnp.isfinite(limit)
    rho = jnp.where(good, 1.0 / jnp.where(good, sy, 1.0), 0.0)
    first = good & (inverse.pairs == 0) & scale
    c = jnp.where(first, jnp.maximum(sy / jnp.where(good, yy, 1.0), least), 1.0)  # (6.20)
    Hy = c * (q + p)
    # (6.17) as H + s w' + w s'; w = 0 leaves H as it is.
    w = jnp.where(good, rho * (0.5 * (1.0 + rho * tree.dot(y, Hy)) * s - Hy), 0.0)
    s = jnp.where(good, s, 0.0)
    Hg = c * q + s * tree.dot(w, g) + w * tree.dot(s, g)
    pairs = jnp.where(reset, 0, inverse.pairs + good)
    keep, start = jnp.where(reset, 0.0, c), jnp.where(reset, 1.0, 0.0).astype(c.dtype)
    return Inverse(H, s, w, keep, start, pairs), -jnp.where(reset, g, Hg)
