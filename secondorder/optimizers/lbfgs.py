"""L-BFGS in compact form, for smooth functions of any number of parameters.

Nocedal & Wright (2006), section 7.2 (equations 7.19 and 7.24), applied as Byrd, Nocedal & Schnabel (1994),
Theorem 2.2, write the inverse.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, transform
from secondorder.globalization import line_search, stopping
from secondorder.linalg import tree


SMALL_CHANGE = 1e-2  # ||y|| / ||g|| below which B y is computed afresh (ours; see test_known_answers)


class Memory(NamedTuple):
    """The last m pairs (s, y) and what the compact form needs of them; m rows in ring order, not in order of time."""

    rows: tree.ArrayTree  # S over Y, leaves (2m, *leaf.shape): s = x+ - x [x], y = g+ - g [f/x]
    products: jax.Array  # [S; Y] g at the gradient g of the current direction, shape (2m,)
    inv_r: jax.Array  # R^-1, R_ij = s_i'y_j for i not newer than j, shape (m, m); rows of unused slots are zero
    yy: jax.Array  # Y Y', shape (m, m)
    gamma: jax.Array  # initial inverse Hessian gamma I (N&W 7.20) [x^2/f], shape ()
    slot: jax.Array  # int32: where the next pair goes
    pairs: jax.Array  # int32: pairs stored since the last reset


class LBFGSState(NamedTuple):
    """State of `lbfgs`; memory 2m + 3 copies of the parameters."""

    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x, as jax.grad gives it
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    direction: tree.ArrayTree  # p = -H g
    slope: jax.Array  # g'p [f]
    memory: Memory
    ray: line_search.Ray
    info: stopping.Info


class ScaleByLBFGSState(NamedTuple):
    """State of `scale_by_lbfgs`."""

    iteration: jax.Array  # int32: gradients seen
    params: tree.ArrayTree  # parameters of the last gradient
    updates: tree.ArrayTree  # the last gradient
    memory: Memory


@transform.cached
def lbfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | optax.GradientTransformation | None = line_search.line_search(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    """L-BFGS: quasi-Newton steps from the last few changes of the gradient.

    The step is p = -H g with the inverse Hessian H that the last m pairs s = x₊ - x, y = g₊ - g define by the BFGS
    formula from gamma I. It is applied in compact form: two passes over the (2m, n) history and small m×m products,
    instead of 2m dependent dot products; on sharded parameters that is one small reduction. A pair enters if
    s'y >= sqrt(eps) ||s|| ||y||
    (without a search, where optax takes any, if |s'y| is). A direction that fails is replaced by steepest descent, with the memory emptied.

    Args:
      learning_rate: Fixed step length or schedule; it switches our search off. Default: none, search.
      memory_size: Pairs kept, m >= 1. Default 10.
      scale_init_precond: Take gamma = s'y / y'y from the newest pair (7.20), else 1. Default True.
      linesearch: `line_search(...)` (the default), an optax line search, or None for unit steps (or `learning_rate`).

    Returns:
      A `GradientTransformationExtraArgs`. `update(grads, state, params, value=...)` judges one evaluation and returns
      the move to the next; with `value_fn=` (and the loss's own keyword arguments) one call is one iteration, as
      with `optax.lbfgs`. With a fixed step `value` is not needed. Complex parameters are supported: hand in the
      conjugate of `jax.grad`, as for every optax optimizer.
      Cost: two passes over 2m copies of the parameters per evaluation. Memory: 2m + 3 copies.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if `params` or `value` is missing.
      Never for NaN: such a trial is rejected, and `state.info.status` says how the run stands.

    With `value_fn`, both gradients of a pair come from one call, so that pairs never mix two batches: a call on a new
    batch searches, and pairs, on that batch alone. With a fixed step this costs one evaluation more, spent only when
    the loss takes extra arguments (Schraudolph, Yu & Günter 2007). Without `value_fn` the caller answers for showing
    gradients of one function.

    Differs from the source: (1) rows stay in ring order, since R⁻¹ may be permuted at will; (2) [S; Y] y comes from the
    change of [S; Y] g, without a pass of its own unless y is small; (3) g'Hg is summed from its nonnegative parts.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> result = so.minimize(loss, jnp.zeros(3), so.lbfgs(memory_size=5))
      >>> result.params.round(3).tolist()
      [0.0, 1.0, 2.0]

    References: Nocedal & Wright (2006), section 7.2; Byrd, Nocedal & Schnabel (1994), "Representations of quasi-Newton
    matrices and their use in limited memory methods", Math. Programming 63, Theorem 2.2.
    """
    who = "lbfgs"
    checks.integer(who, "memory_size", memory_size, 1, hint="10 is usual.")
    if not isinstance(linesearch, line_search.LineSearch) and linesearch is not None:
        if not isinstance(linesearch, optax.GradientTransformation) and not (
            hasattr(linesearch, "init") and hasattr(linesearch, "update")
        ):
            raise TypeError(
                f"{who}: linesearch must be secondorder.line_search(...), an optax line search or None, "
                f"got {linesearch!r}."
            )
        rate = optax.scale(-1.0) if learning_rate is None else optax.scale_by_learning_rate(learning_rate)
        return optax.chain(scale_by_lbfgs(memory_size, scale_init_precond), rate, linesearch)
    if learning_rate is not None and not callable(learning_rate):
        checks.number(who, "learning_rate", learning_rate, hint="leave it out to search for the step.")
    searching = learning_rate is None and linesearch is not None
    search: line_search.LineSearch | line_search.FixedStep
    if learning_rate is None and linesearch is not None:
        search = linesearch
    else:
        search = line_search.FixedStep(1.0 if learning_rate is None else learning_rate)

    def init(params: tree.ArrayTree) -> LBFGSState:
        dtype = tree.scalar_dtype(params)
        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        return LBFGSState(
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            direction=tree.zeros_like(params),
            slope=zero,
            memory=_empty(params, memory_size),
            ray=search.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def judge(state: LBFGSState, point: transform.Point) -> LBFGSState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        g, g_old = tree.conj(point.grad), tree.conj(state.grad)
        grad_norm = tree.max_norm(g)
        finite = jnp.isfinite(grad_norm) & (jnp.isfinite(point.loss) | (not searching))
        slope = tree.dot(g, state.direction)
        ray, accepted, failed = search.judge(state.ray, state.loss, point.loss, slope, finite)
        first = state.fresh
        accepted, failed = jnp.where(first, finite, accepted), failed & ~first

        # 2. Keep the better point, and learn from the pair.
        s, y = tree.sub(point.params, state.params), tree.sub(g, g_old)
        step_norm = tree.norm(s)
        sy, yy = tree.dot(s, y), tree.dot(y, y)
        stuck = failed & (state.memory.pairs == 0)
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=stuck,
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=state.ray.step,
            step_norm=step_norm,
            patient=not searching,
        )
        good = accepted & ~(first & (info.evaluations == 1)) & _curved(sy, step_norm, yy, positive=searching)
        base = transform.Point(state.params, state.loss, g_old)
        x, loss, g = tree.where(accepted, transform.Point(point.params, point.loss, g), base)
        memory = _forget(state.memory, failed)
        gg = tree.dot(g, g)
        memory = _first_scale(memory, gg, first & scale_init_precond & (not searching))
        memory = _learn(memory, s, y, sy, yy, g, good, scale_init_precond)

        # 3. New direction. Where nothing was accepted, this is the old one again.
        direction, slope = _direction(memory, g, gg)
        return state._replace(
            params=x,
            loss=loss,
            grad=tree.conj(g),
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | failed | (first & ~accepted),
            direction=direction,
            slope=slope,
            memory=memory,
            ray=ray,
            info=info,
        )

    def begin(state: LBFGSState, hvp: transform.Hvp | None, when: jax.Array) -> LBFGSState:
        del hvp
        step = jnp.ones_like(state.slope)
        if isinstance(search, line_search.FixedStep):
            step = search.length(state.info.iterations).astype(step.dtype)
        else:  # with no pair there is no scale: move as far as last time, or as the loss suggests
            norm = jnp.sqrt(jnp.maximum(-state.slope * state.memory.gamma, 0.0)) / state.memory.gamma  # = ||g||
            suggested = line_search.first_step(tree.norm(state.params), state.loss, norm)
            known = state.info.step_norm / norm
            unscaled = jnp.where((known > 0) & jnp.isfinite(known), known, suggested) / state.memory.gamma
            step = jnp.where(state.memory.pairs == 0, unscaled, step)
        ray = search.begin(step, state.slope, state.loss)
        return state._replace(ray=tree.where(when, ray, state.ray), fresh=state.fresh & ~when)

    def rebase(state: LBFGSState, point: transform.Point) -> LBFGSState:
        # The direction was made for the gradient of the last trial; another batch, or edited params, need a new one.
        g = tree.conj(point.grad)
        known = tree.equal(point.grad, state.grad) & (state.info.evaluations > 0)

        def again() -> tuple[tree.ArrayTree, jax.Array, Memory]:
            gg = tree.dot(g, g)
            rows = state.memory.rows
            memory = _first_scale(
                state.memory, gg, (state.info.evaluations == 0) & scale_init_precond & (not searching)
            )._replace(products=tree.rows_dot(rows, g, 2 * memory_rows(state.memory)), rows=())
            p, slope = _direction(memory._replace(rows=rows), g, gg)
            return p, slope, memory

        kept = state.memory._replace(rows=())  # the histories stay outside of the branches, which would copy them
        p, slope, memory = jax.lax.cond(known, lambda: (state.direction, state.slope, kept), again)
        grad_norm = tree.max_norm(g)
        return state._replace(
            params=point.params,
            loss=point.loss,
            grad=point.grad,
            direction=p,
            slope=slope,
            memory=memory._replace(rows=state.memory.rows),
            info=state.info._replace(grad_norm=grad_norm),
        )

    def trial(state: LBFGSState) -> tree.ArrayTree:
        return tree.axpy(jnp.where(state.fresh, 0.0, state.ray.step), state.direction, state.params)

    return transform.optimizer(
        transform.Algorithm(who, init, judge, begin, rebase, trial, needs_value=searching, allow_complex=True)
    )


@transform.cached
def scale_by_lbfgs(memory_size: int = 10, scale_init_precond: bool = True) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the L-BFGS inverse Hessian, for use in `optax.chain`.

    Args:
      memory_size: Pairs kept, m >= 1. Default 10.
      scale_init_precond: As in `lbfgs`. Default True; the first step is then -g min(1, 1/||g||).

    Returns:
      A `GradientTransformationExtraArgs` that maps g to H g (not negated); `update` needs `params`. Pairs are differences of
      successive gradients. Follow it with a learning rate or an optax line search.

    Raises:
      ValueError, TypeError: for a bad option, or if `params` is missing. A non-finite gradient gives a zero update.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_lbfgs(), optax.scale_by_learning_rate(0.5))

    References: as for `lbfgs`.
    """
    who = "scale_by_lbfgs"
    checks.integer(who, "memory_size", memory_size, 1, hint="10 is usual.")

    def init(params: tree.ArrayTree) -> ScaleByLBFGSState:
        checks.params(who, params, allow_complex=True)
        params = transform.as_arrays(params)
        memory = _empty(params, memory_size)
        return ScaleByLBFGSState(jnp.int32(0), tree.copy(params), tree.zeros_like(params), memory)

    def update(
        updates: tree.ArrayTree,
        state: ScaleByLBFGSState,
        params: tree.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, ScaleByLBFGSState]:
        del extra_args
        if params is None:
            raise checks.missing(who, "the parameters", "update(grads, state, params)")
        checks.same_shapes(who, updates, params, "the gradient (first argument)")
        g = tree.cast_like(updates, state.updates)
        finite, first = jnp.isfinite(tree.max_norm(g)), state.iteration == 0
        s, y = tree.sub(params, state.params), tree.sub(g, state.updates)
        sy, yy = tree.dot(s, y), tree.dot(y, y)
        good = finite & ~first & _curved(sy, tree.norm(s), yy, positive=False)
        x, g = tree.where(finite, (params, g), (state.params, state.updates))
        gg = tree.dot(g, g)
        memory = _first_scale(state.memory, gg, first & finite & scale_init_precond)
        memory = _learn(memory, s, y, sy, yy, g, good, scale_init_precond)
        p, _ = _direction(memory, g, gg)
        Hg = tree.scale(jnp.where(finite, -1.0, 0.0), p)
        return Hg, ScaleByLBFGSState(state.iteration + finite, x, g, memory)

    return transform.pair(init, update)


def memory_rows(memory: Memory) -> int:
    """Return m."""
    return memory.yy.shape[0]


def _empty(params: tree.ArrayTree, memory_size: int) -> Memory:
    m = memory_size
    dtype = tree.scalar_dtype(params)
    square = jnp.zeros((m, m), dtype)
    rows = tree.zero_rows(params, 2 * m)
    zero = jnp.int32(0)
    return Memory(rows, jnp.zeros(2 * m, dtype), square, square, jnp.ones((), dtype), zero, zero)


def _curved(sy: jax.Array, s_norm: jax.Array, yy: jax.Array, positive: bool) -> jax.Array:
    """Return whether a pair may enter: its cosine is above sqrt(eps), whatever the scale of the loss.

    A search needs H positive definite. Without one (`positive` False) a cosine below -sqrt(eps) enters too, as in optax.
    """
    product = s_norm * jnp.sqrt(yy)
    enough = (sy if positive else jnp.abs(sy)) > jnp.finfo(sy.dtype).eps ** 0.5 * product
    return enough & jnp.isfinite(product) & jnp.isfinite(1.0 / sy) & (yy > 0)


def _forget(memory: Memory, when: jax.Array) -> Memory:
    """Return the memory without pairs, where the flag holds; zero rows of R^-1 switch the histories off."""
    keep = jnp.where(when, 0.0, 1.0)
    pairs = jnp.where(when, 0, memory.pairs)
    return memory._replace(inv_r=memory.inv_r * keep, yy=memory.yy * keep, pairs=pairs)


def _first_scale(memory: Memory, gg: jax.Array, when: jax.Array) -> Memory:
    """Return the memory with optax's gamma for a first fixed step, min(1, 1/||g||), where the flag holds."""
    capped = jnp.minimum(1.0, jax.lax.rsqrt(gg))
    return memory._replace(gamma=jnp.where(when & (gg > 0), capped, memory.gamma).astype(memory.gamma.dtype))


def _learn(
    memory: Memory,
    s: tree.ArrayTree,
    y: tree.ArrayTree,
    sy: jax.Array,
    yy: jax.Array,
    g: tree.ArrayTree,
    when: jax.Array,
    scale: bool,
) -> Memory:
    """Return the memory with the pair (s, y) in place of the oldest where `when` holds, and products at g.

    One pass over the history. With B = [S; Y], B y = B g - B g_old needs no pass of its own.
    """
    m, i = memory_rows(memory), memory.slot
    rows = tree.set_row(memory.rows, i, s, when)
    rows = tree.set_row(rows, m + i, y, when)
    q = tree.rows_dot(rows, g, 2 * m)
    new = jnp.arange(m) == i
    # The difference keeps few digits of a small y: there it is worth a pass of its own.
    small = yy < SMALL_CHANGE**2 * tree.dot(g, g)
    by = jax.lax.cond(small, lambda: tree.rows_dot(rows, y, 2 * m), lambda: q - memory.products)
    s_y = jnp.where(new, sy, by[:m])
    y_y = jnp.where(new, yy, by[m:])
    # Dropping the oldest pair zeroes its row and column of R^-1; the new column is [-R^-1 S y; 1] / s'y.
    kept = jnp.where(new[:, None] | new, 0.0, memory.inv_r)
    inv_sy = 1.0 / jnp.where(when, sy, 1.0)
    column = jnp.where(new, inv_sy, -jnp.sum(kept * s_y, axis=1) * inv_sy)
    inv_r = jnp.where(new, column[:, None], kept)
    gram = jnp.where(new, y_y[:, None], jnp.where(new[:, None], y_y, memory.yy))
    inv_r, gram = jnp.where(when, inv_r, memory.inv_r), jnp.where(when, gram, memory.yy)
    gamma = jnp.where(when, sy / jnp.where(when, yy, 1.0), memory.gamma) if scale else memory.gamma
    slot = jnp.where(when, (i + 1) % m, i)
    return Memory(rows, q, inv_r, gram, gamma, slot, memory.pairs + when)


def _direction(memory: Memory, g: tree.ArrayTree, gg: jax.Array) -> tuple[tree.ArrayTree, jax.Array]:
    """Return p = -H g and g'p; needs memory.products = B g. One pass over the history.

    H = gamma I + [S' gamma Y'] [[R^-T (D + gamma Y Y') R^-1, -R^-T], [-R^-1, 0]] [S; gamma Y]  (Byrd et al., 3.1)
    """
    m, gamma, inv_r = memory_rows(memory), memory.gamma, memory.inv_r
    q_s, q_y = memory.products[:m], memory.products[m:]
    diagonal = jnp.diagonal(inv_r)
    d = jnp.where(diagonal != 0, 1.0 / jnp.where(diagonal != 0, diagonal, 1.0), 0.0)  # D = diag(s_i'y_i)
    w = jnp.sum(inv_r * q_s, axis=1)
    r = jnp.sum(memory.yy * w, axis=1) - q_y
    u = jnp.sum((w * d + gamma * r)[:, None] * inv_r, axis=0)
    p = tree.add_rows(jnp.concatenate([-u, gamma * w]), memory.rows, tree.scale(-gamma, g))
    # g'Hg = w'Dw + gamma ||g - Y'w||^2, a sum of nonnegative parts.
    rest = jnp.maximum(gg + jnp.dot(w, r - q_y), 0.0)
    return p, -(jnp.dot(w * d, w) + gamma * rest)
