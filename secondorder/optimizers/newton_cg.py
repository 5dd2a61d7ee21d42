"""Newton's method without matrices: truncated conjugate gradients in a trust region, for any number of parameters.

Nocedal & Wright (2006), Algorithms 7.2 (Steihaug 1983; Toint 1981) and 4.1, with the forcing terms of Eisenstat &
Walker (1996). The inner iteration stands in `linalg/steihaug.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks, transform
from secondorder.globalization import stopping, trust_region
from secondorder.globalization.stopping import Status
from secondorder.globalization.trust_region import Damping, Trial, TrustRegion
from secondorder.linalg import probes, tree
from secondorder.linalg import steihaug as cg

PROBE = 10  # products that look for negative curvature where the gradient passes the driver's test (ours)
FORCING, POWER = 0.9, 0.5 * (1 + 5**0.5)  # gamma and alpha of Eisenstat & Walker (1996), choice 2
LARGEST_FORCING = 0.5  # (N&W 7.3)
RELAXED = 0.1  # forcing terms above it do not fall faster than gamma eta^alpha (Eisenstat & Walker 1996, section 2.1)
PARALLEL = 0.5  # power of eps: vectors of the reduced model whose angles are smaller count as parallel

Preconditioner = Callable[[tree.ArrayTree, tree.ArrayTree], tree.ArrayTree]


class Step(NamedTuple):
    """A step p in the span that the last solve left."""

    coefficients: jax.Array  # on (-M^-1 g, s, d), shape (3,)
    promised: jax.Array  # decrease of the model [f]
    length: jax.Array  # ||p||_M


class NewtonCGState(NamedTuple):
    """State of `newton_cg`; memory 4 copies of the parameters, 5 with a preconditioner."""

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no region is in flight
    first: tree.ArrayTree  # -M^-1 g, where there is a preconditioner; else ()
    s: tree.ArrayTree  # last iterate inside the region
    d: tree.ArrayTree  # the direction that left it, or of negative curvature; else zero
    reduced: cg.Reduced  # the model on (-M^-1 g, s, d)
    last: jax.Array  # coefficients of the end of the path, shape (3,)
    step: Step  # the trial in flight
    exit: jax.Array  # int32: why the last solve ended, see linalg/steihaug.py
    forcing: jax.Array  # eta of the last solve, no unit
    norm: jax.Array  # ||g|| at the last solve; 0 before it
    gtol: jax.Array  # gradients of this max-norm pass the driver's test; 0 without a driver
    damping: Damping  # radius of ||p||_M; Inf where it is to be chosen
    info: stopping.Info


@transform.cached
def newton_cg(
    region: TrustRegion = trust_region.trust_region(),  # noqa: B008
    max_cg: int | None = None,
    forcing: float | None = None,
    preconditioner: Preconditioner | None = None,
) -> transform.Optimizer:
    """Newton-CG: a trust-region Newton method that needs Hessian-vector products only.

    The trial is x + p, p on the path of conjugate gradients for H p = -g: where the residual falls below
    eta ||g||, at the boundary of the region, or along the first direction d with d'Hd <= 0. At the boundary p is then
    improved to the minimizer of the model over the ball in span{g, s, d}, s the last iterate inside. A rejected trial
    is followed by the minimizer in the same span over the smaller ball, which costs no product.

    Args:
      region: `trust_region(...)`, the options of the radius. Default: `trust_region()`; the first radius is then
        max(1, ||x0||), or what lets the model promise 2 |f(x0)|.
      max_cg: Products per solve at most, >= 1. Default: n.
      forcing: eta, in (0, 1), no unit. Default: Eisenstat & Walker's second choice, at most 1/2.
      preconditioner: preconditioner(params, v) -> M⁻¹ v, trees like params; linear in v, symmetric positive definite.
        The region is then a ball of ||p||_M. What depends on `params` alone is computed once per solve. Default: none.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and `hvp_fn(params, vector)` or `value_fn`.
      The curvature is an argument: with a Gauss-Newton or Fisher product as `hvp_fn` this is the matrix-free
      Gauss-Newton or natural-gradient method. `hvp_fn` must be traceable, linear in `vector` and symmetric.
      Cost: up to `max_cg` products per accepted point, which share one linearization, none per rejected trial; two
      inner products per product. Memory: 4 copies of the parameters in the state, 9 at the peak of a step.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if an argument is missing.
      Never for NaN: such a trial is rejected, and a product that is not finite ends the solve (at the first one, the
      step is one of steepest descent). `Status.NOT_SYMMETRIC` if s'Hd and d'Hs differ, and
      `Status.NOT_POSITIVE_DEFINITE` if the preconditioner is seen not to be.

    Negative curvature is seen in the Krylov space of the gradient. Where the gradient is zero, or passes the test of
    `minimize`, a random vector takes its place: `max_cg` products from it, or 10. That finds large negative
    curvature and proves nothing: see `curvature.classify_critical_point`.

    Differs from the source: (1) the boundary step is improved in span{g, s, d}; (2) rejected trials stay in it;
    (3) the gain ratio is taken from slopes where the loss drowns in rounding.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
      >>> result = so.minimize(loss, jnp.array([-1.2, 1.0]), so.newton_cg())
      >>> result.params.round(3).tolist()
      [1.0, 1.0]

    References: Nocedal & Wright (2006), Algorithms 4.1 and 7.2; Steihaug (1983); Toint (1981); Eisenstat & Walker
    (1996), "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17; Byrd, Schnabel &
    Shultz (1988), "Approximate solution of the trust region problem by minimization over two-dimensional subspaces".
    """
    who = "newton_cg"
    if not isinstance(region, TrustRegion):
        raise TypeError(f"{who}: region must be made by secondorder.trust_region(...), got {region!r}.")
    if max_cg is not None:
        checks.integer(who, "max_cg", max_cg, 1, hint="leave it out for n, or take 20 to 100 for large networks.")
    if forcing is not None:
        checks.number(who, "forcing", forcing, 0.0, 1.0, hint="leave it out for Eisenstat and Walker's rule.")
    if preconditioner is not None:
        checks.function(who, "preconditioner", preconditioner)

    def init(params: tree.ArrayTree) -> NewtonCGState:
        dtype = tree.scalar_dtype(params)
        infinite, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype)
        nothing = _wide(tree.zeros_like(params), dtype)
        return NewtonCGState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            first=() if preconditioner is None else tree.copy(nothing),
            s=nothing,
            d=tree.copy(nothing),
            reduced=cg.Reduced(jnp.zeros((3, 3), dtype), jnp.zeros((3, 3), dtype), jnp.zeros(3, dtype)),
            last=jnp.zeros(3, dtype),
            step=Step(jnp.zeros(3, dtype), zero, zero),
            exit=jnp.int32(cg.RUNNING),
            forcing=jnp.full((), LARGEST_FORCING, dtype),
            norm=zero,
            gtol=zero,
            damping=Damping(infinite, jnp.ones((), dtype)),
            info=stopping.initial(dtype),
        )

    def judge(state: NewtonCGState, point: transform.Point) -> NewtonCGState:
        # 1. Gain ratio (N&W 4.4).
        first = state.fresh
        p = tree.sub(point.params, state.params)
        grad_norm, p_norm, x_norm = tree.max_norm(point.grad), tree.norm(p), tree.norm(state.params)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(point.loss)
        _, predicted, length = state.step
        slope, end_slope, change = tree.dot(p, state.grad), tree.dot(p, point.grad), point.loss - state.loss
        ratio = trust_region.gain_ratio(state.loss, point.loss, slope, end_slope, predicted)
        ratio = jnp.where(finite, ratio, -jnp.inf)
        # 2. Accept or reject.
        accepted = jnp.where(first, finite, ratio > region.accept_ratio)
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        # 3. Resize the region (N&W Algorithm 4.1).
        trial = Trial(ratio, accepted, length, change, slope, end_slope, change + predicted)
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
            info=_with_fault(info, state.exit)._replace(
                gain_ratio=jnp.where(first, jnp.nan, ratio), damping=resized.size
            ),
        )

    def begin(state: NewtonCGState, hvp: transform.Hvp | None, when: jax.Array) -> NewtonCGState:
        assert hvp is not None
        norm = tree.norm(state.grad)
        eta = _forcing_term(state, norm) if forcing is None else jnp.full_like(state.forcing, forcing)
        limit = tree.size(state.params) if max_cg is None else max_cg
        info = state.info

        def solve() -> tuple[cg.Path, tree.ArrayTree, jax.Array]:
            path, d0, size = _solve(region, hvp, preconditioner, state, eta, jnp.where(when, limit, 0))
            return path, () if preconditioner is None else d0, size

        def kept() -> tuple[cg.Path, tree.ArrayTree, jax.Array]:
            path = cg.Path(
                s=state.s,
                d=state.d,
                reduced=state.reduced,
                last=state.last,
                exit=state.exit,
                products=jnp.int32(0),
                least=info.curvature,
                negative=info.indefinite,
            )
            return path, state.first, state.damping.size

        # 4. The path of conjugate gradients at the accepted point: the only products.
        path, d0, size = jax.lax.cond(when, solve, kept)
        info = info._replace(
            hessian_products=info.hessian_products + path.products,
            damping=size,
            curvature=path.least,
            indefinite=path.negative,
        )
        return state._replace(
            first=d0,
            s=path.s,
            d=path.d,
            reduced=path.reduced,
            last=path.last,
            exit=path.exit,
            forcing=jnp.where(when, eta, state.forcing),
            norm=jnp.where(when, norm, state.norm),
            damping=state.damping._replace(size=size),
            fresh=state.fresh & ~when,
            info=_with_fault(info, path.exit),
        )

    def until(state: NewtonCGState, gtol: jax.Array) -> NewtonCGState:
        return state._replace(gtol=jnp.asarray(gtol).astype(state.gtol.dtype))

    def rebase(state: NewtonCGState, point: transform.Point) -> NewtonCGState:
        grad_norm = tree.max_norm(point.grad).astype(state.loss.dtype)
        return state._replace(
            params=point.params, loss=point.loss, grad=point.grad, info=state.info._replace(grad_norm=grad_norm)
        )

    def aim(state: NewtonCGState, hvp: transform.Hvp | None) -> NewtonCGState:
        del hvp
        return state._replace(step=_answer(state))

    def trial(state: NewtonCGState) -> tree.ArrayTree:
        c = jnp.where(state.fresh, 0.0, state.step.coefficients)
        d0, sign = (state.grad, -1.0) if preconditioner is None else (state.first, 1.0)
        move = lambda x, u, v, w: (x + (sign * c[0] * u + c[1] * v + c[2] * w).astype(x.dtype)).astype(x.dtype)
        return jax.tree.map(move, state.params, d0, state.s, state.d)

    return transform.optimizer(
        transform.Algorithm(who, init, judge, begin, rebase, trial, needs_curvature=True, until=until, aim=aim)
    )


def _solve(
    region: TrustRegion,
    hvp: transform.Hvp,
    preconditioner: Preconditioner | None,
    state: NewtonCGState,
    eta: jax.Array,
    limit: jax.Array,
) -> tuple[cg.Path, tree.ArrayTree, jax.Array]:
    """Return the path of conjugate gradients, -M^-1 g, and the radius; trees in the working precision."""
    dtype, x = state.loss.dtype, state.params
    g = _wide(state.grad, dtype)
    matvec = _linear("hvp_fn", hvp, x, dtype)
    precondition = None if preconditioner is None else _linear("preconditioner", preconditioner, x, dtype)
    # 1. A radius, where none is known, and how much the model may promise within it.
    chosen, promise = jnp.isinf(state.damping.size), jnp.full((), jnp.inf, dtype)
    if region.radius is not None:
        first = jnp.full((), region.radius, dtype)
    else:
        first = jnp.maximum(1.0, tree.norm(x)) * _stretch(g, precondition)
        known = chosen & jnp.isfinite(state.loss) & (state.loss != 0)
        promise = jnp.where(known, trust_region.TRUSTED * jnp.abs(state.loss), promise)
    radius = jnp.where(chosen, first, state.damping.size)
    # 2. Where the gradient has nothing more to say, a random vector asks for negative curvature.
    g_norm = tree.max_norm(g)
    probing = g_norm <= state.gtol
    key = jax.random.fold_in(jax.random.key(0), state.info.evaluations)
    b = jax.lax.cond(probing, lambda: probes.normal(key, g), lambda: g)
    eta = jnp.where(probing, jnp.finfo(dtype).eps ** 0.5, eta)
    limit = jnp.where(probing & (g_norm > 0), jnp.minimum(limit, PROBE), limit)
    # 3. Conjugate gradients.
    infinite = jnp.full((), jnp.inf, dtype)
    reach, trusted = jnp.where(probing, infinite, radius), jnp.where(probing, infinite, promise)
    path, d0, cut = cg.truncated(matvec, b, reach, eta, limit, trusted, precondition)
    return _along(path, g, radius, probing), d0, jnp.where(probing, radius, cut)


def _along(path: cg.Path, g: tree.ArrayTree, radius: jax.Array, when: jax.Array) -> cg.Path:
    """Return the path that has the direction of negative curvature alone, if there is one; where the flag holds."""
    found = when & (path.exit == cg.CURVATURE)
    slope, length = tree.dot(g, path.d), jnp.sqrt(path.reduced.gram[2, 2])
    only = jnp.zeros((3, 3), length.dtype).at[2, 2].set(jnp.where(found, 1.0, 0.0))
    tau = jnp.where(slope > 0, -radius, radius) / jnp.where(length > 0, length, 1.0)
    nothing = jnp.zeros(3, length.dtype)
    away = cg.Reduced(
        jnp.where(only > 0, path.reduced.gram, 0.0),
        jnp.where(only > 0, path.reduced.hessian, 0.0),
        nothing.at[2].set(jnp.where(found, slope, 0.0)),
    )
    last = nothing.at[2].set(jnp.where(found, tau, 0.0))
    return path._replace(reduced=tree.where(when, away, path.reduced), last=jnp.where(when, last, path.last))


def _answer(state: NewtonCGState) -> Step:
    """Return the trial for the radius.

    The end of the path where the ball holds it and it is no boundary point; else the better of the minimizer of the
    reduced model over the ball, and the end of the path scaled back.
    """
    (gram, hessian, gradient), radius = state.reduced, state.damping.size
    promised = lambda c: -(jnp.dot(gradient, c) + 0.5 * jnp.dot(c, tree.matmul(hessian, c)))
    norm = lambda c: jnp.sqrt(jnp.maximum(jnp.dot(c, tree.matmul(gram, c)), 0.0))
    # 1. The end of the path.
    length = norm(state.last)
    inside = (length <= radius) & (state.last[2] == 0)
    back = state.last * jnp.minimum(1.0, radius / jnp.where(length > 0, length, 1.0))
    # 2. Orthonormal coordinates: unit vectors, then a Cholesky factor of their cosines. The shift lengthens what
    # almost cancels, so that the step stays in the ball and parallel vectors do no harm.
    size = jnp.sqrt(jnp.diag(gram))
    there = size > 0
    scale = jnp.where(there, 1.0 / jnp.where(there, size, 1.0), 0.0)
    outer = scale[:, None] * scale[None, :]
    shift = jnp.finfo(radius.dtype).eps ** PARALLEL
    cosines = jnp.where(jnp.eye(3, dtype=bool), 1.0 + shift, gram * outer)
    factor = jnp.linalg.cholesky(cosines)
    into = jax.scipy.linalg.solve_triangular(factor, jnp.diag(scale), lower=True)
    bent = tree.matmul(tree.matmul(into, hessian), into.T)
    flat = jnp.max(jnp.abs(bent)) + 1.0
    bent = bent + jnp.diag(jnp.where(there, 0.0, flat))  # a vector that is not there attracts nothing
    # 3. The minimizer over the ball, in the eigenbasis.
    clean = jnp.where(jnp.all(jnp.isfinite(bent)), bent, 0.0)
    vectors, values = jax.lax.linalg.eigh(clean, symmetrize_input=False)
    p = trust_region.solve(values, tree.matmul(vectors.T, tree.matmul(into, gradient)), radius)
    best = tree.matmul(into.T, tree.matmul(vectors, p))
    better = (promised(best) > promised(back)) & (norm(best) <= 1.01 * radius) & jnp.all(jnp.isfinite(best))
    c = jnp.where(inside | ~better, back, best)
    return Step(c, promised(c), norm(c))


def _forcing_term(state: NewtonCGState, norm: jax.Array) -> jax.Array:
    """Return eta by Eisenstat & Walker's choice 2 with its safeguard, (2.6) and section 2.1."""
    last = state.norm
    ratio = norm / jnp.where(last > 0, last, 1.0)
    relaxed = FORCING * state.forcing**POWER
    eta = FORCING * ratio**POWER
    eta = jnp.where(relaxed > RELAXED, jnp.maximum(eta, relaxed), eta)
    eta = jnp.where(last > 0, eta, LARGEST_FORCING)
    return jnp.clip(eta, 10 * jnp.finfo(norm.dtype).eps, LARGEST_FORCING).astype(norm.dtype)


def _stretch(g: tree.ArrayTree, precondition: cg.Matvec | None) -> jax.Array:
    """Return ||z||_M / ||z||, z = M^-1 g: what makes a Euclidean length along z one in M."""
    if precondition is None:
        return jnp.ones((), tree.scalar_dtype(g))
    z = precondition(g)
    ratio = jnp.sqrt(jnp.maximum(tree.dot(g, z), 0.0)) / tree.norm(z)
    return jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0)


def _with_fault(info: stopping.Info, reason: jax.Array) -> stopping.Info:
    """Return the figures with a status for matrices that are not what they must be."""
    status = jnp.where(reason == cg.ASYMMETRIC, Status.NOT_SYMMETRIC, info.status)
    status = jnp.where(reason == cg.PRECONDITIONER, Status.NOT_POSITIVE_DEFINITE, status)
    return info._replace(status=status.astype(jnp.int32))


def _linear(name: str, product: Preconditioner, params: tree.ArrayTree, dtype: jax.typing.DTypeLike) -> cg.Matvec:
    """Return v -> product(params, v) in the working precision, linearized once."""

    def apply(v: tree.ArrayTree) -> tree.ArrayTree:
        out = product(params, tree.cast_like(v, params))
        remedy = f"{name}(params, vector) must return a tree like params"
        checks.same_shapes("newton_cg", out, params, f"the result of {name}", remedy=remedy)
        return _wide(out, dtype)

    return jax.linearize(apply, _wide(tree.zeros_like(params), dtype))[1]


def _wide(x: tree.ArrayTree, dtype: jax.typing.DTypeLike) -> tree.ArrayTree:
    """Return the tree in the working precision."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), x)
