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

FORGET = 0.5  # share of the last gamma below which gamma does not fall (ours)
SMALL_CHANGE = 0.1  # ||y|| / ||g|| below which B y is computed, not B g (ours; see tests/test_known_answers.py)


class Memory(NamedTuple):
    """The last m pairs (s, y) and what the compact form needs of them; m rows in ring order, not in order of time.

    The rows belong to the parameters joined into one vector where `tree.joinable` says that they may be, else to the
    tree of the parameters, leaf by leaf, with its sharding.
    """

    rows: tree.ArrayTree  # S, Y, and one row for what is not stored; (2m + 1, n); s = x+ - x [x], y = g+ - g [f/x]
    products: jax.Array  # [S; Y] g at the gradient g of the current direction, shape (2m + 1,)
    gg: jax.Array  # g'g there
    inv_r: jax.Array  # R^-1, R_ij = s_i'y_j for i not newer than j, shape (m, m); rows of unused slots are zero
    yy: jax.Array  # Y Y', shape (m, m)
    gamma: jax.Array  # initial inverse Hessian gamma I (N&W 7.20) [x^2/f], shape ()
    pairs: jax.Array  # int32: pairs stored since the last reset; the next one goes to slot pairs % m


class LBFGSState(NamedTuple):
    """State of `lbfgs`; memory 2m + 4 copies of the parameters."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x, as jax.grad gives it
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    direction: tree.ArrayTree  # p = -H g, joined like the rows
    slope: jax.Array  # g'p [f]
    unit: jax.Array  # max(1, ||x0||) [x]: the scale of a first step
    memory: Memory
    ray: line_search.Ray
    info: stopping.Info


class ScaleByLBFGSState(NamedTuple):
    """State of `scale_by_lbfgs`."""

    count: jax.Array  # int32: finite gradients seen
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
    s'y > sqrt(eps) ||s|| ||y|| (without a search, if |s'y| is: optax takes any pair). A direction that fails is
    replaced by steepest descent, with the memory emptied.

    Args:
      learning_rate: Fixed step length or schedule; it switches our search off. Default: none, search. As in optax, a
        fixed step takes pairs of negative curvature too, and may end at a stationary point that is no minimum.
      memory_size: Pairs kept, m >= 1. Default 10.
      scale_init_precond: Take gamma = s'y / y'y from the newest pair (7.20), else 1. Default True. A search does not
        let gamma fall below half its last value, nor the first one below max(1, ||x0||)²/|f|: too small a gamma costs
        many steps in the directions that no pair has seen, too large a one only a few trials.
      linesearch: `line_search(...)` (the default), an optax line search, or None for unit steps (or `learning_rate`).

    Returns:
      A `GradientTransformationExtraArgs`. `update(grads, state, params, value=...)` judges one evaluation and returns
      the move to the next; with `value_fn=` (and the loss's own keyword arguments) one call is one iteration, as
      with `optax.lbfgs`. With a fixed step `value` is not needed. Complex parameters are supported: hand in the
      conjugate of `jax.grad`, as for every optax optimizer.
      Cost: two passes over 2m + 1 copies of the parameters per evaluation. Memory: 2m + 4 copies.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if `params` or `value` is missing.
      Never for NaN: such a trial is rejected, and `state.info.status` says how the run stands.

    With `value_fn`, both gradients of a pair come from one call, so that pairs never mix two batches: a call on a new
    batch searches, and pairs, on that batch alone. With a fixed step this costs one evaluation more, spent only when
    the loss takes extra arguments (Schraudolph, Yu & Günter 2007). Without `value_fn` the caller answers for showing
    gradients of one function. Hand a batch in as an argument of the loss: what the loss closes over is not seen, and a
    value kept in the state counts as its value.

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
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            direction=tree.zeros_like(tree.join(params)),
            slope=zero,
            unit=line_search.unit_length(params),
            memory=_empty(params, memory_size),
            ray=search.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def judge(state: LBFGSState, point: transform.Point) -> LBFGSState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        g = tree.join_like(tree.conj(point.grad), state.direction)
        grad_norm = tree.max_norm(g)
        g_old = tree.join_like(tree.conj(state.grad), state.direction)
        s, y = tree.join_like(tree.sub(point.params, state.params), state.direction), tree.sub(g, g_old)
        step_norm = tree.norm(s)
        finite = jnp.isfinite(grad_norm) & transform.valid(point.loss, searching) & _in_place(step_norm, y)
        slope, new_gg = tree.dot(g, state.direction), tree.dot(g, g)
        first = state.fresh
        ray, accepted, failed = line_search.judge(
            search, state.ray, first, state.loss, state.slope, point.loss, slope, finite
        )

        # 2. Keep the better point, and learn from the pair.
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=~first & ((failed & (state.memory.pairs == 0)) | (state.slope == 0)),
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=state.ray.step,
            step_norm=step_norm,
            patient=not searching,
        )
        x, loss, grad, g = tree.where(
            accepted, (point.params, point.loss, point.grad, g), (state.params, state.loss, state.grad, g_old)
        )
        learn = accepted & ~(first & (state.info.evaluations == 0))
        gg = jnp.where(accepted, new_gg, state.memory.gg)
        memory = _forget(state.memory, failed)
        if scale_init_precond and not searching:
            memory = _first_scale(memory, gg, first)
        least = jnp.full_like(memory.gamma, -jnp.inf)  # optax takes pairs of negative curvature, and so gamma < 0
        if searching:
            first_gamma = line_search.curvature_scale(state.unit, state.loss, point.loss)
            least = jnp.where(memory.pairs == 0, first_gamma, FORGET * memory.gamma)
        memory = _learn(memory, s, y, step_norm, g, gg, learn, scale_init_precond, least, positive=searching)

        # 3. New direction. Where nothing was accepted, this is the old one again.
        direction, slope = _direction(memory, g, gg)
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | failed | first,
            direction=direction,
            slope=slope,
            memory=memory,
            ray=ray,
            info=info,
        )

    def begin(state: LBFGSState, hvp: transform.Hvp | None, when: jax.Array) -> LBFGSState:
        del hvp
        gamma, slope = state.memory.gamma, state.slope
        step = jnp.ones_like(slope)
        if isinstance(search, line_search.FixedStep):
            step = search.length(state.info.iterations).astype(step.dtype)
        else:  # with no pair there is no scale
            p_norm = jnp.sqrt(jnp.abs(slope * gamma))  # p = -gamma g
            step = jax.lax.cond(
                state.memory.pairs == 0,
                lambda: line_search.first_step(state.unit, state.loss, p_norm, slope, state.info.step_norm),
                lambda: step,
            )
        ray = search.begin(step, slope, state.loss)
        return state._replace(ray=tree.where(when, ray, state.ray), fresh=state.fresh & ~when)

    def rebase(state: LBFGSState, point: transform.Point) -> LBFGSState:
        # The direction was made for the gradient of the last trial; another batch, or edited params, need a new one.
        g = tree.join_like(tree.conj(point.grad), state.direction)
        first = state.info.evaluations == 0
        known = tree.equal(point.grad, state.grad) & ~first
        rows = state.memory.rows  # the histories stay outside of the branches, which would copy them

        def again() -> tuple[tree.ArrayTree, jax.Array, Memory]:
            gg = tree.dot(g, g)
            memory = state.memory._replace(products=tree.rows_dot(rows, g, state.memory.products.size), gg=gg)
            if scale_init_precond and not searching:
                memory = _first_scale(memory, gg, first)
            p, slope = _direction(memory, g, gg)
            return p, slope, memory._replace(rows=())

        def kept() -> tuple[tree.ArrayTree, jax.Array, Memory]:
            return state.direction, state.slope, state.memory._replace(rows=())

        p, slope, memory = jax.lax.cond(known, kept, again)
        return state._replace(
            params=point.params,
            loss=point.loss,
            grad=point.grad,
            direction=p,
            slope=slope,
            memory=memory._replace(rows=rows),
            info=state.info._replace(grad_norm=tree.max_norm(g)),
        )

    def trial(state: LBFGSState) -> tree.ArrayTree:
        move = tree.scale(jnp.where(state.fresh, 0.0, state.ray.step), state.direction)
        return tree.axpy(1.0, tree.split_like(move, state.params), state.params)

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
      A `GradientTransformationExtraArgs` that maps g to H g (not negated); `update` needs `params`. Pairs are
      differences of successive gradients. Follow it with a learning rate or an optax line search.

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
        memory = state.memory
        new, old = tree.cast_like(updates, state.updates), state.updates
        first = state.count == 0
        finite = jnp.isfinite(tree.max_norm(new))
        s, y = tree.join_like(tree.sub(params, state.params), memory.rows), tree.sub(new, old)
        step_norm = tree.norm(s)
        finite = finite & _in_place(step_norm, y)
        x, grad = tree.where(finite, (params, new), (state.params, old))
        g = tree.join_like(grad, memory.rows)
        gg = jnp.where(finite, tree.dot(new, new), memory.gg)
        if scale_init_precond:
            memory = _first_scale(memory, gg, first & finite)
        y = tree.join_like(y, memory.rows)
        memory = _learn(memory, s, y, step_norm, g, gg, finite & ~first, scale_init_precond, -jnp.inf, positive=False)
        p, _ = _direction(memory, g, gg)
        Hg = tree.scale(jnp.where(finite, -1.0, 0.0), tree.split_like(p, grad))
        return Hg, ScaleByLBFGSState(state.count + finite, x, grad, memory)

    return transform.pair(init, update)


def _empty(params: tree.ArrayTree, m: int) -> Memory:
    dtype = tree.scalar_dtype(params)
    square = jnp.zeros((m, m), dtype)
    rows = tree.zero_rows(tree.join(params), 2 * m + 1)
    return Memory(
        rows=rows,
        products=jnp.zeros(2 * m + 1, dtype),
        gg=jnp.zeros((), dtype),
        inv_r=square,
        yy=square,
        gamma=jnp.ones((), dtype),
        pairs=jnp.int32(0),
    )


def _in_place(step_norm: jax.Array, y: tree.ArrayTree) -> jax.Array:
    """Return whether ||s|| and y'y are numbers, as they are wherever the point is finite.

    Who asks before the new point takes the place of the old one tells XLA that s and y are made by then: it needs no
    copy of the old parameters and gradient to take them from.
    """
    return ~jnp.isnan(step_norm) & ~jnp.isnan(tree.dot(y, y))


def _forget(memory: Memory, when: jax.Array) -> Memory:
    """Return the memory without pairs, where the flag holds; zero rows of R^-1 switch the histories off."""
    return memory._replace(
        inv_r=jnp.where(when, 0.0, memory.inv_r),
        pairs=jnp.where(when, 0, memory.pairs),
    )


def _first_scale(memory: Memory, gg: jax.Array, when: jax.Array) -> Memory:
    """Return the memory with optax's gamma for a first fixed step, min(1, 1/||g||), where the flag holds."""
    capped = jnp.minimum(1.0, jax.lax.rsqrt(gg))
    return memory._replace(gamma=jnp.where(when & (gg > 0), capped, memory.gamma).astype(memory.gamma.dtype))


def _learn(
    memory: Memory,
    s: tree.ArrayTree,
    y: tree.ArrayTree,
    s_norm: jax.Array,
    g: tree.ArrayTree,
    gg: jax.Array,
    when: jax.Array,
    scale: bool,
    least: tree.Numeric,
    positive: bool,
) -> Memory:
    """Return the memory with the pair (s, y) in place of the oldest, and its products at the new gradient g.

    One pass over the history: with B = [S; Y], B y = B g - B g_old follows from B g, or B g from a small B y. On
    sharded parameters that is two reductions, one of scalars and one of 2m + 1 numbers.

    Args:
      memory: The memory.
      s: Step, like the rows.
      y: Change of the gradient, like the rows.
      s_norm: ||s||.
      g: New gradient, like the rows.
      gg: g'g.
      when: Whether the pair may enter, if its cosine is above sqrt(eps), whatever the scale of the loss.
      scale: Take gamma from the pair (7.20).
      least: Lower limit of gamma.
      positive: A search needs H positive definite. Without one a cosine below -sqrt(eps) enters too, as in optax.
    """
    # 1. Gate the pair.
    m = memory.yy.shape[0]
    i = memory.pairs % m
    sy, yy, sg, yg = tree.dot(s, y), tree.dot(y, y), tree.dot(s, g), tree.dot(y, g)
    limit = s_norm * jnp.sqrt(yy) * jnp.finfo(sy.dtype).eps ** 0.5
    size = sy if positive else jnp.abs(sy)
    good = when & (size > limit) & (size > jnp.finfo(sy.dtype).tiny) & jnp.isfinite(limit)

    # 2. Store it, or let the spare row take it: no row is read, and the buffer is updated in place.
    nothing = tree.scale(0.0, s)
    rows = tree.set_row(memory.rows, jnp.where(good, i, 2 * m), tree.where(good, s, nothing))
    rows = tree.set_row(rows, jnp.where(good, m + i, 2 * m), tree.where(good, y, nothing))

    # 3. B g, and B y as the change of it. The difference keeps few digits of a small y; then B y is computed, and B g
    # is the sum. A row takes part in at most m sums before it is replaced.
    small = when & (yy < SMALL_CHANGE**2 * gg)
    computed = tree.rows_dot(rows, tree.where(small, y, g), 2 * m + 1)
    at = jnp.arange(2 * m + 1)
    total = jnp.where(good & (at == i), sg, jnp.where(good & (at == m + i), yg, memory.products + computed))
    q = jnp.where(small, total, computed)
    by = jnp.where(small, computed, q - memory.products)

    # 4. R^-1 and Y Y'. Dropping the oldest pair zeroes its row and column; the new column is [-R^-1 S y; 1] / s'y.
    new = jnp.arange(m) == i
    row, column = new[:, None], new[None, :]
    s_y, y_y = jnp.where(new, sy, by[:m]), jnp.where(new, yy, by[m : 2 * m])
    kept = jnp.where(row | column, 0.0, memory.inv_r)
    inv_sy = 1.0 / jnp.where(good, sy, 1.0)
    last = jnp.where(new, inv_sy, -jnp.sum(kept * s_y[None, :], axis=1) * inv_sy)
    inv_r = jnp.where(good, jnp.where(column, last[:, None], kept), memory.inv_r)
    gram = jnp.where(good & row, y_y[None, :], jnp.where(good & column, y_y[:, None], memory.yy))
    gamma = memory.gamma
    if scale:
        gamma = jnp.where(good, jnp.maximum(sy / jnp.where(good, yy, 1.0), least), gamma)
    return Memory(rows, q, gg, inv_r, gram, gamma, memory.pairs + good)


def _direction(memory: Memory, g: tree.ArrayTree, gg: jax.Array) -> tuple[tree.ArrayTree, jax.Array]:
    """Return p = -H g and g'p; needs memory.products = B g. One pass over the history.

    H = gamma I + [S' gamma Y'] [[R^-T (D + gamma Y Y') R^-1, -R^-T], [-R^-1, 0]] [S; gamma Y]  (Byrd et al., 3.1)
    """
    m, gamma, inv_r = memory.yy.shape[0], memory.gamma, memory.inv_r
    q_s, q_y = memory.products[:m], memory.products[m : 2 * m]
    diagonal = jnp.sum(jnp.where(jnp.eye(m, dtype=bool), inv_r, 0.0), axis=1)
    d = jnp.where(diagonal != 0, 1.0 / jnp.where(diagonal != 0, diagonal, 1.0), 0.0)  # D = diag(s_i'y_i)
    w = jnp.sum(inv_r * q_s[None, :], axis=1)
    r = jnp.sum(memory.yy * w[None, :], axis=1) - q_y
    u = jnp.sum((w * d + gamma * r)[:, None] * inv_r, axis=0)
    coefficients = jnp.concatenate([-u, gamma * w, jnp.zeros(1, u.dtype)])
    p = tree.add_rows(coefficients, memory.rows, tree.scale(-gamma, g))
    # g'Hg = w'Dw + gamma ||g - Y'w||^2, a sum of nonnegative parts if D is positive.
    return p, -jnp.sum(w * w * d) - gamma * jnp.maximum(gg + jnp.sum(w * (r - q_y)), 0.0)
