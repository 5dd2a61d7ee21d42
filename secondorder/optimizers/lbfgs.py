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
from secondorder.linalg import compact_bfgs, tree
from secondorder.linalg.branch import branch
from secondorder.linalg.compact_bfgs import Memory

FIRST = 0.3  # share of `line_search.curvature_scale` below which the first gamma does not lie (ours)
FORGET = 0.5  # share of the last gamma below which gamma does not fall (ours)


class LBFGSState(NamedTuple):
    """State of `lbfgs`; memory 2m + 3 copies of the parameters."""

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
    history_dtype: jax.typing.DTypeLike | None = None,
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
        let gamma fall below half its last value, nor the first one below 0.3 max(1, ||x0||)²/|f|: too small a gamma
        costs many steps in the directions that no pair has seen, too large a one only a few trials.
      linesearch: `line_search(...)` (the default), an optax line search, or None for unit steps (or `learning_rate`).
      history_dtype: Floating dtype in which the pairs are kept, such as `jnp.bfloat16`, for half the memory; inner
        products are accumulated in float32 at least, and the pairs count as the rounded ones, so that H stays positive
        definite. More iterations, as a rule, and one more product per row and evaluation. Real parameters only.
        Default: that of the parameters.

    Returns:
      A `GradientTransformationExtraArgs`. `update(grads, state, params, value=...)` judges one evaluation and returns
      the move to the next; with `value_fn=` (and the loss's own keyword arguments) one call is one iteration, as
      with `optax.lbfgs`. With a fixed step `value` is not needed. Complex parameters are supported: hand in the
      conjugate of `jax.grad`, as for every optax optimizer.
      Cost: two passes over 2m copies of the parameters per evaluation. Memory: 2m + 3 copies, m + 3 with bfloat16
      histories of float32 parameters; 2m + 5 at the peak of a step, beside parameters and gradient.

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
    checks.flag(who, "scale_init_precond", scale_init_precond)
    history_dtype = _floating(who, history_dtype)
    if not isinstance(linesearch, line_search.LineSearch) and linesearch is not None:
        if not isinstance(linesearch, optax.GradientTransformation) and not (
            hasattr(linesearch, "init") and hasattr(linesearch, "update")
        ):
            raise TypeError(
                f"{who}: linesearch must be secondorder.line_search(...), an optax line search or None, "
                f"got {linesearch!r}."
            )
        rate = optax.scale(-1.0) if learning_rate is None else optax.scale_by_learning_rate(learning_rate)
        return optax.chain(scale_by_lbfgs(memory_size, scale_init_precond, history_dtype), rate, linesearch)
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
            memory=_empty(who, params, memory_size, history_dtype),
            ray=search.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def judge(state: LBFGSState, point: transform.Point) -> LBFGSState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe.
        g = tree.join_like(tree.conj(point.grad), state.direction)
        g_old = tree.join_like(tree.conj(state.grad), state.direction)
        s, y = tree.join_like(tree.sub(point.params, state.params), state.direction), tree.sub(g, g_old)
        ss, yy, slope, new_gg, grad_norm = tree.products((s, s), (y, y), (g, state.direction), (g, g), peak=g)
        grad_norm = stopping.squarable(grad_norm, tree.size(point.params))
        finite = jnp.isfinite(grad_norm) & transform.valid(point.loss, searching) & _in_place(ss, yy)
        step_norm = jnp.sqrt(ss)
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
        waited = stopping.half_spent(state.info, info)  # without progress: a fresh start may find some
        failed = failed | waited
        learn = accepted & ~waited & ~(first & (state.info.evaluations == 0))
        gg = jnp.where(accepted, new_gg, state.memory.gg)
        memory = compact_bfgs.forget(state.memory, failed)
        if scale_init_precond and not searching:
            memory = _first_scale(memory, gg, first & (memory.pairs == 0))
        least = jnp.full_like(memory.gamma, -jnp.inf)  # optax takes pairs of negative curvature, and so gamma < 0
        if searching:
            first_gamma = FIRST * line_search.curvature_scale(state.unit, state.loss, point.loss)
            least = jnp.where(memory.pairs == 0, first_gamma, FORGET * memory.gamma)
        memory = compact_bfgs.learn(
            memory, s, y, step_norm, g, gg, learn, scale_init_precond, least, positive=searching
        )

        # 3. New direction. Where nothing was accepted, this is the old one again.
        direction, slope = compact_bfgs.direction(memory, g, gg)
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
            known = (state.unit, state.loss, p_norm, slope, state.info.step_norm)
            step = branch(
                state.memory.pairs == 0, line_search.first_step, lambda _, loss, *__: jnp.ones_like(loss), *known
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
            p, slope = compact_bfgs.direction(memory, g, gg)
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
def scale_by_lbfgs(
    memory_size: int = 10, scale_init_precond: bool = True, history_dtype: jax.typing.DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the L-BFGS inverse Hessian, for use in `optax.chain`.

    Args:
      memory_size: Pairs kept, m >= 1. Default 10.
      scale_init_precond: As in `lbfgs`. Default True; the first step is then -g min(1, 1/||g||).
      history_dtype: As in `lbfgs`. Default: that of the parameters.

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
    checks.flag(who, "scale_init_precond", scale_init_precond)
    history_dtype = _floating(who, history_dtype)

    def init(params: tree.ArrayTree) -> ScaleByLBFGSState:
        checks.params(who, params, allow_complex=True)
        params = transform.as_arrays(params)
        memory = _empty(who, params, memory_size, history_dtype)
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
        s, y = (tree.join_like(tree.sub(a, b), memory.rows) for a, b in ((params, state.params), (new, old)))
        g = tree.join_like(new, memory.rows)
        ss, yy, gg, grad_norm = tree.products((s, s), (y, y), (g, g), peak=g)
        finite = jnp.isfinite(grad_norm) & _in_place(ss, yy)
        step_norm = jnp.sqrt(ss)
        x, grad = tree.where(finite, (params, new), (state.params, old))
        g = tree.join_like(grad, memory.rows)
        gg = jnp.where(finite, gg, memory.gg)
        if scale_init_precond:
            memory = _first_scale(memory, gg, first & finite)
        memory = compact_bfgs.learn(
            memory, s, y, step_norm, g, gg, finite & ~first, scale_init_precond, -jnp.inf, positive=False
        )
        p, _ = compact_bfgs.direction(memory, g, gg)
        Hg = tree.scale(jnp.where(finite, -1.0, 0.0), tree.split_like(p, grad))
        return Hg, ScaleByLBFGSState(state.count + finite.astype(jnp.int32), x, grad, memory)

    return transform.pair(init, update)


def _floating(who: str, dtype: Any) -> Any:
    """Return the dtype of the histories, checked; None stands for that of the parameters."""
    if dtype is None:
        return None
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise TypeError(f"{who}: history_dtype must be a floating dtype such as jnp.bfloat16, got {dtype!r}.")
    return known


def _in_place(ss: jax.Array, yy: jax.Array) -> jax.Array:
    """Return whether s's and y'y are numbers, as they are wherever the point is finite.

    Who asks before the new point takes the place of the old one tells XLA that s and y are made by then: it needs no
    copy of the old parameters and gradient to take them from.
    """
    return ~jnp.isnan(ss) & ~jnp.isnan(yy)


def _empty(who: str, params: tree.ArrayTree, memory_size: int, dtype: Any) -> Memory:
    if dtype is not None and any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{who}: history_dtype = {dtype} holds no complex parameters; leave it out.")
    return compact_bfgs.empty(params, memory_size, dtype)


def _first_scale(memory: Memory, gg: jax.Array, when: jax.Array) -> Memory:
    """Return the memory with optax's gamma for a first fixed step, min(1, 1/||g||), where the flag holds."""
    capped = jnp.minimum(1.0, jax.lax.rsqrt(gg))
    return memory._replace(gamma=jnp.where(when & (gg > 0), capped, memory.gamma).astype(memory.gamma.dtype))
