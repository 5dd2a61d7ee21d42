"""L-BFGS-B: limited-memory quasi-Newton steps in a box.

Byrd, Lu, Nocedal & Zhu (1995), "A limited memory algorithm for bound constrained optimization", SIAM J. Sci. Comput.
16, with the projection of Morales & Nocedal (2011), "Remark on Algorithm 778", ACM Trans. Math. Software 38.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks, transform
from secondorder.globalization import line_search, stopping
from secondorder.linalg import box, tree

FORGET = 0.5  # gamma does not fall below this times its last value, as in `lbfgs`


class Memory(NamedTuple):
    """What the last m pairs (s, y) say, each divided by ||s||; slots in ring order."""

    S: jax.Array  # steps, rows of length 1, shape (m, n); unused rows are zero
    Y: jax.Array  # changes of the gradient, shape (m, n) [f/x^2]
    sy: jax.Array  # S Y', shape (m, m) [f/x^2]
    ss: jax.Array  # S S', shape (m, m)
    gamma: jax.Array  # B_0 = I / gamma [x^2/f], shape ()
    pairs: jax.Array  # int32: pairs stored since the last reset; the next one goes to slot pairs % m


class LBFGSBState(NamedTuple):
    """State of `lbfgsb`; memory 2m + 5 copies of the parameters."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no ray is in flight
    lower: jax.Array  # bounds, shape (n,); -Inf where there is none
    upper: jax.Array  # the same, Inf where there is none
    direction: jax.Array  # d = minimizer of the model in the box - x, shape (n,)
    slope: jax.Array  # g'd [f]
    longest: jax.Array  # the largest step length that stays in the box, >= 1
    unit: jax.Array  # max(1, ||x0||) [x]: the scale of a first step
    memory: Memory
    ray: line_search.Ray
    info: stopping.Info


@transform.cached
def lbfgsb(
    memory_size: int = 10,
    linesearch: line_search.LineSearch = line_search.line_search(),  # noqa: B008
) -> transform.Optimizer:
    """L-BFGS-B: quasi-Newton steps within bounds, for many parameters.

    At the accepted point x, with B the matrix that the last m pairs define by the BFGS formula from I/gamma:
    1. the first local minimizer of the quadratic model along the projected path P(x - t g), the Cauchy point, tells
       which bounds are active (Byrd et al., Algorithm CP);
    2. the model is minimized over the other parameters, and the minimizer projected to the box;
    3. a line search goes from x toward that point, and on as far as the box allows.

    Args:
      memory_size: Pairs kept, m >= 1. Default 10.
      linesearch: `line_search(...)`.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and takes `bounds=(lower, upper)`, trees like params.
      All trials are within them, and `info.optimality` is the KKT residual: the max-norm of the gradient without the
      entries that a bound holds. `minimize(..., bounds=...)` passes them on.
      Cost per accepted point: a sort of n breakpoints and about 8 m² n flops. Memory: 2m + 5 copies of the parameters,
      4m more while the Cauchy point is sought. The parameters are joined into one vector: not for sharded ones.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if `params` or `value` is missing, for complex
        parameters, or for bounds of other shapes.
      Never for NaN: such a trial is rejected, and `state.info.status` says how the run stands.

    Differs from the source: (1) all segments of the projected path are looked at in one go, by cumulated sums over the
    sorted breakpoints, not one after another; (2) pairs are scaled to ||s|| = 1, which leaves B as it is and its
    small matrices well scaled; (3) the projection is kept if the model there is below the Cauchy point's, else the step
    is cut at the first bound; (4) gamma does not fall by more than half, as in `lbfgs`; (5) pairs enter if
    s'y >= sqrt(eps) ||s|| ||y||.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return jnp.sum((x - jnp.array([2.0, 0.5])) ** 2)
      >>> result = so.minimize(loss, jnp.zeros(2), so.lbfgsb(), bounds=(0.0, 1.0))
      >>> result.params.round(3).tolist(), result.active.tolist()
      ([1.0, 0.5], [1, 0])

    References: Byrd, Lu, Nocedal & Zhu (1995); Byrd, Nocedal & Schnabel (1994), Theorem 2.3; Morales & Nocedal (2011).
    """
    who = "lbfgsb"
    checks.integer(who, "memory_size", memory_size, 1, hint="10 is usual.")
    if not isinstance(linesearch, line_search.LineSearch):
        raise TypeError(f"{who}: linesearch must be made by line_search(...), got {linesearch!r}.")

    def init(params: tree.ArrayTree) -> LBFGSBState:
        n, m, dtype = tree.size(params), memory_size, tree.scalar_dtype(params)
        zero, infinite, nothing = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype), jnp.zeros(n, dtype)
        rows, square = jnp.zeros((m, n), dtype), jnp.zeros((m, m), dtype)
        return LBFGSBState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            lower=jnp.full(n, -jnp.inf, dtype),
            upper=jnp.full(n, jnp.inf, dtype),
            direction=nothing,
            slope=zero,
            longest=infinite,
            unit=line_search.unit_length(params),
            memory=Memory(rows, rows, square, square, jnp.ones((), dtype), jnp.int32(0)),
            ray=linesearch.begin(zero, zero, zero),
            info=stopping.initial(dtype),
        )

    def confine(state: LBFGSBState, bounds: tuple[Any, Any]) -> LBFGSBState:
        lower, upper = (tree.ravel(bound, state.loss.dtype) for bound in bounds)
        return state._replace(lower=lower, upper=upper)

    def judge(state: LBFGSBState, point: transform.Point) -> LBFGSBState:
        # 1. Judge the trial: Wolfe, or approximate Wolfe; where the box ends, sufficient decrease.
        dtype, limits = state.loss.dtype, (state.lower, state.upper)
        g, g_old = tree.ravel(point.grad, dtype), tree.ravel(state.grad, dtype)
        x, x_old = tree.ravel(point.params, dtype), tree.ravel(state.params, dtype)
        grad_norm = tree.max_norm(box.projected_gradient(x, g, limits))
        finite = jnp.isfinite(stopping.squarable(tree.max_norm(g), g.size)) & jnp.isfinite(point.loss)
        slope = tree.dot(g, state.direction)
        first = state.fresh
        ray, accepted, failed = line_search.judge(
            linesearch, state.ray, first, state.loss, state.slope, point.loss, slope, finite
        )
        at_end = ~first & (state.ray.step >= state.longest)
        enough = point.loss <= state.loss + linesearch.c1 * state.ray.step * state.slope
        accepted = accepted | (at_end & finite & enough)
        failed = failed & ~accepted
        ray = ray._replace(step=jnp.minimum(ray.step, state.longest))

        # 2. Keep the better point, and learn from the pair.
        s, y = x - x_old, g - g_old
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=~first & ((failed & (state.memory.pairs == 0)) | (state.slope == 0)),
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=state.ray.step,
            step_norm=tree.norm(s),
        )
        least = jnp.where(
            state.memory.pairs == 0,
            line_search.curvature_scale(state.unit, state.loss, point.loss),
            FORGET * state.memory.gamma,
        )
        learn = accepted & ~(first & (state.info.evaluations == 0))
        memory = state.memory._replace(pairs=jnp.where(failed, 0, state.memory.pairs))
        memory = _learn(memory, s, y, learn, least)
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | failed | first,
            memory=memory,
            ray=ray,
            info=info,
        )

    def begin(state: LBFGSBState, hvp: transform.Hvp | None, when: jax.Array) -> LBFGSBState:
        # 3. New direction, to the minimizer of the model in the box.
        del hvp
        dtype, limits = state.loss.dtype, (state.lower, state.upper)
        x, g = tree.ravel(state.params, dtype), tree.ravel(state.grad, dtype)

        def steepest() -> tuple[jax.Array, jax.Array]:
            # With no pair there is no scale; the first step is that of `lbfgs`.
            free = box.projected_gradient(x, g, limits)
            gg = tree.dot(free, free)
            gamma = line_search.first_step(state.unit, state.loss, jnp.sqrt(gg), -gg, state.info.step_norm)
            return jnp.clip(x - gamma * g, *limits) - x, jnp.zeros_like(state.memory.pairs)

        def newest() -> tuple[jax.Array, jax.Array]:
            d = _minimizer(state.memory, x, g, limits) - x
            slope = tree.dot(g, d)
            descends = jnp.isfinite(slope) & (slope < 0)
            return jax.lax.cond(descends, lambda: (d, state.memory.pairs), steepest)

        def new() -> tuple[jax.Array, jax.Array]:
            return jax.lax.cond(state.memory.pairs == 0, steepest, newest)

        d, pairs = jax.lax.cond(when, new, lambda: (state.direction, state.memory.pairs))
        slope = tree.dot(g, d)
        longest = jnp.maximum(box.longest_step(x, d, limits), 1.0)
        ray = linesearch.begin(jnp.ones_like(slope), slope, state.loss)
        return state._replace(
            direction=d,
            slope=jnp.where(when, slope, state.slope),
            longest=jnp.where(when, longest, state.longest),
            memory=state.memory._replace(pairs=pairs),
            ray=tree.where(when, ray, state.ray),
            fresh=state.fresh & ~when,
        )

    def rebase(state: LBFGSBState, point: transform.Point) -> LBFGSBState:
        dtype = state.loss.dtype
        x, g = tree.ravel(point.params, dtype), tree.ravel(point.grad, dtype)
        grad_norm = tree.max_norm(box.projected_gradient(x, g, (state.lower, state.upper)))
        info = state.info._replace(grad_norm=grad_norm, optimality=grad_norm)
        return state._replace(params=point.params, loss=point.loss, grad=point.grad, info=info)

    def trial(state: LBFGSBState) -> tree.ArrayTree:
        move = jnp.where(state.fresh, 0.0, state.ray.step) * state.direction
        x = tree.ravel(state.params, state.loss.dtype) + move
        return tree.unravel(jnp.clip(x, state.lower, state.upper), state.params)

    return transform.optimizer(transform.Algorithm(who, init, judge, begin, rebase, trial, confine=confine))


def _learn(memory: Memory, s: jax.Array, y: jax.Array, when: jax.Array, least: jax.Array) -> Memory:
    """Return the memory with the pair s, y, shapes (n,), for the oldest one; `least` bounds gamma from below."""
    m, eps = memory.S.shape[0], jnp.finfo(s.dtype).eps
    s_norm = tree.norm(s)
    inverse = 1.0 / jnp.where(s_norm > 0, s_norm, 1.0)
    s, y = s * inverse, y * inverse
    sy, yy = tree.dot(s, y), tree.dot(y, y)
    enters = when & (sy > jnp.sqrt(eps) * jnp.sqrt(yy)) & jnp.isfinite(yy)
    slot = memory.pairs % m
    # A memory that was emptied keeps its old rows: what is not used is hidden by the number of pairs.
    row = lambda rows, new: rows.at[slot].set(jnp.where(enters, new, rows[slot]))
    S, Y = row(memory.S, s), row(memory.Y, y)
    Sy, sY, Ss = tree.matmul(S, y), tree.matmul(Y, s), tree.matmul(S, s)
    products = memory.sy.at[:, slot].set(Sy).at[slot, :].set(sY)
    squares = memory.ss.at[:, slot].set(Ss).at[slot, :].set(Ss)
    gamma = jnp.maximum(sy / jnp.where(yy > 0, yy, 1.0), least)
    return Memory(
        S=S,
        Y=Y,
        sy=jnp.where(enters, products, memory.sy),
        ss=jnp.where(enters, squares, memory.ss),
        gamma=jnp.where(enters, gamma, memory.gamma),
        pairs=memory.pairs + enters.astype(jnp.int32),
    )


def _compact(memory: Memory) -> tuple[jax.Array, jax.Array]:
    """Return A, shape (2m, n), and K, shape (2m, 2m), with gamma B = I - A' K^-1 A (Byrd, Nocedal & Schnabel 2.17)."""
    m = memory.S.shape[0]
    age = (memory.pairs - 1 - jnp.arange(m)) % m
    used = (age < memory.pairs)[:, None]
    both = used & used.T
    A = jnp.concatenate([jnp.where(used, memory.S, 0.0), jnp.where(used, memory.gamma * memory.Y, 0.0)])
    scaled = jnp.where(both, memory.gamma * memory.sy, 0.0)
    L = jnp.where(age[:, None] < age[None, :], scaled, 0.0)  # s_i'y_j, i newer than j
    ss = jnp.where(both, memory.ss, jnp.eye(m, dtype=A.dtype))
    D = jnp.diag(jnp.where(used[:, 0], jnp.diagonal(scaled), 1.0))
    return A, jnp.block([[ss, L], [L.T, -D]])


def _minimizer(memory: Memory, x: jax.Array, g: jax.Array, limits: box.Box) -> jax.Array:
    """Return a point of the box, shape (n,), that lowers the model below its Cauchy point."""
    if x.size == 0:
        return x
    A, K = _compact(memory)
    M = jnp.linalg.inv(K)
    h = memory.gamma * g

    def model(z: jax.Array) -> jax.Array:
        c = tree.matmul(A, z)
        return tree.dot(h, z) + 0.5 * (tree.dot(z, z) - jnp.dot(c, tree.matmul(M, c)))

    # 1. Generalized Cauchy point (Algorithm CP).
    lower, upper = limits
    cauchy = jnp.clip(x - _path_length(A, M, x, h, limits) * h, lower, upper)
    # 2. Minimize over the parameters that are free there (section 5.1): (I - A_F'M A_F)^-1 by Sherman & Morrison.
    z = cauchy - x
    free = (cauchy > lower) & (cauchy < upper)
    r = jnp.where(free, h + z - tree.matmul(tree.matmul(M, tree.matmul(A, z)), A), 0.0)
    A_F = jnp.where(free[None, :], A, 0.0)
    v = jnp.linalg.solve(K - tree.matmul(A_F, A_F.T), tree.matmul(A_F, r))
    d = -(r + tree.matmul(v, A_F))
    # 3. Back to the box: by projection, or along d to the first bound.
    projected = jnp.clip(cauchy + d, lower, upper)
    cut = jnp.clip(cauchy + jnp.minimum(1.0, box.longest_step(cauchy, d, limits)) * d, lower, upper)
    return jnp.where(model(projected - x) <= model(z), projected, cut)


def _path_length(A: jax.Array, M: jax.Array, x: jax.Array, h: jax.Array, limits: box.Box) -> jax.Array:
    """Return t >= 0, shape (), of the first local minimizer of h'z + z'(I - A'MA)z/2 along P(x - t h) - x.

    On the segment between two breakpoints the model is a parabola. With the parameters sorted by their breakpoints,
    d = -h of those that still move, p = A d and c = A z are sums over the later, and over the earlier ones:
    slope h'd + d'z - p'Mc, curvature d'd - p'Mp (Byrd et al. 4.5 and 4.6).
    """
    room = jnp.where(h > 0, x - limits[0], limits[1] - x)
    breakpoints = jnp.where(h == 0, jnp.inf, jnp.maximum(room, 0.0) / jnp.where(h == 0, 1.0, jnp.abs(h)))
    order = jnp.argsort(breakpoints)
    h, ends = h[order], breakpoints[order]
    from_here = lambda a: jnp.concatenate([jnp.cumsum(a[::-1], axis=0)[::-1], jnp.zeros_like(a[:1])])
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])  # of the n + 1 segments
    ends = jnp.concatenate([ends, jnp.full_like(ends[:1], jnp.inf)])
    rest = from_here(h * h)
    p = -from_here((A[:, order] * h[None, :]).T)
    lengths = jnp.where(jnp.isfinite(ends), ends - starts, 0.0)
    before = jnp.concatenate([jnp.zeros_like(p[:1]), jnp.cumsum(lengths[:, None] * p, axis=0)[:-1]])
    Mp = tree.matmul(p, M)
    # Where nothing moves any more a segment may start at Inf.
    walked = jnp.where(rest > 0, starts, 0.0) * rest
    slope = -rest + walked - jnp.sum(Mp * before, axis=1)
    bend = jnp.maximum(rest - jnp.sum(Mp * p, axis=1), jnp.finfo(x.dtype).eps * rest)
    length = jnp.where(slope < 0, -slope / jnp.where(bend > 0, bend, 1.0), 0.0)
    t = starts + length
    here = (ends > starts) & (t < ends)
    return t[jnp.argmax(here)]
