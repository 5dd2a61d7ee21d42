"""Newton's method without matrices: truncated conjugate gradients in a trust region, for any number of parameters.

Nocedal & Wright (2006), Algorithms 7.2 (Steihaug 1983; Toint 1981) and 4.1, with the forcing terms of Eisenstat &
Walker (1996). The inner iteration stands in `linalg/steihaug.py`, the outer one in `matrix_free.py`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks, matrix_free, transform
from secondorder.globalization import trust_region
from secondorder.globalization.capped_cg import SHARE, CappedCG
from secondorder.globalization.stopping import Status
from secondorder.globalization.trust_region import TrustRegion
from secondorder.linalg import capped_cg as capped
from secondorder.linalg import steihaug as cg
from secondorder.linalg import tree
from secondorder.matrix_free import MatrixFreeState, Solved, Step
from secondorder.preconditioner import Preconditioner

FORCING, POWER = 0.9, 0.5 * (1 + 5**0.5)  # gamma and alpha of Eisenstat & Walker (1996), choice 2
LARGEST_FORCING = 0.5  # (N&W 7.3)
RELAXED = 0.1  # forcing terms above it do not fall faster than gamma eta^alpha (Eisenstat & Walker 1996, section 2.1)
PATIENT = 10  # products per solve, in n, where the user sets no limit (ours; SciPy's Newton-CG takes 20)
PARALLEL = 0.5  # power of eps: vectors of the reduced model whose angles are smaller count as parallel


class Path(NamedTuple):
    """The model on (-M^-1 g, s, d); memory 2 copies of the parameters, 3 with a preconditioner."""

    first: tree.ArrayTree  # -M^-1 g, where there is a preconditioner; else ()
    s: tree.ArrayTree  # last iterate of conjugate gradients inside the region
    d: tree.ArrayTree  # the direction that left it, or of negative curvature; else zero
    reduced: cg.Reduced
    last: jax.Array  # coefficients of the end of the path, shape (3,)
    exit: jax.Array  # int32: why the last solve ended, see linalg/steihaug.py
    forcing: jax.Array  # eta of the last solve, no unit
    norm: jax.Array  # ||g|| at the last solve; 0 before it
    unit: jax.Array  # what its model is divided by [f], see linalg/steihaug.py
    kept: Any  # the preconditioner's own memory, and ||z||_M / ||z|| of its last use; () without one


class Direction(NamedTuple):
    """A direction of capped conjugate gradients; memory 1 copy of the parameters."""

    d: tree.ArrayTree
    norm: jax.Array  # ||d|| [x]
    exit: jax.Array  # int32: what d is, see linalg/capped_cg.py
    forcing: jax.Array  # eta of the last solve, no unit
    grad_norm: jax.Array  # ||g|| at the last solve; 0 before it


@transform.cached
def newton_cg(
    region: TrustRegion | CappedCG = trust_region.trust_region(),  # noqa: B008
    max_cg: int | None = None,
    forcing: float | None = None,
    preconditioner: transform.Hvp | Preconditioner | None = None,
) -> transform.Optimizer:
    """Newton-CG: Newton's method by Hessian-vector products only, in a trust region or with a line search.

    The trial is x + p, p on the path of conjugate gradients for H p = -g: where the residual falls below
    eta ||g||, at the boundary of the region, or along the first direction d with d'Hd <= 0. At the boundary p is then
    improved to the minimizer of the model over the ball in span{g, s, d}, s the last iterate inside. A rejected trial
    is followed by the minimizer in the same span over the smaller ball, which costs no product.

    Args:
      region: `trust_region(...)`, the options of the radius, or `capped_cg(...)`, a line search with an exit along
        negative curvature, in place of it. Default: `trust_region()`; the first radius is then max(1, ||x0||), or what
        lets the model promise 2 |f(x0)|.
      max_cg: Products per solve at most, >= 1. Default: 10 n; rounding costs ill-conditioned systems more than n.
      forcing: eta, in (0, 1), no unit. Default: Eisenstat & Walker's second choice, at most 1/2.
      preconditioner: `lbfgs_preconditioner(...)` or `diagonal_preconditioner(...)`, which learn from products; or your
        own preconditioner(params, v) -> M⁻¹ v, trees like params; linear in v, symmetric positive definite. The region
        is then a ball of ||p||_M. What depends on `params` alone is computed once per solve. Not with `capped_cg`.
        Default: none.

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
    `minimize`, a random vector takes its place, for 100 products or for 10. That finds large negative
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
    (1996), "Choosing the forcing terms in an inexact Newton method", SIAM J. Sci. Comput. 17; Kelley (1995), *Iterative
    Methods for Linear and Nonlinear Equations*, section 6.3; Byrd, Schnabel &
    Shultz (1988), "Approximate solution of the trust region problem by minimization over two-dimensional subspaces".
    """
    return _optimizer("newton_cg", region, max_cg, forcing, preconditioner, None)


@transform.cached
def natural_gradient(
    fisher: transform.Hvp,
    region: TrustRegion | CappedCG = trust_region.trust_region(),  # noqa: B008
    max_cg: int | None = None,
    forcing: float | None = None,
    preconditioner: transform.Hvp | Preconditioner | None = None,
) -> transform.Optimizer:
    """Natural gradient: `newton_cg` with the Fisher matrix in place of the Hessian.

    The step minimizes g'p + p'Fp/2 in the region; without a boundary it is -F⁻¹g (Amari 1998), by conjugate gradients.
    Where F is singular, as with fewer samples than parameters, the iteration stays in the space of the samples'
    gradients, which holds g, and ends after as many products as F has different eigenvalues, or one more.

    Args:
      fisher: fisher(params, vector) -> F(params) vector: `curvature.fisher_vp(...)`, or `curvature.gnvp(...)` for the
        likelihoods of exponential families; any product with a positive semidefinite matrix will do.
      region: As in `newton_cg`, and so are `max_cg`, `forcing` and `preconditioner`.
      max_cg: Products per solve at most.
      forcing: Relative residual at which a solve ends.
      preconditioner: As in `newton_cg`.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`. An `hvp_fn` handed to it is not used.
      Cost and memory: as `newton_cg`.

    Raises:
      ValueError, TypeError: as `newton_cg`; TypeError if `fisher` is no function.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> from secondorder import curvature
      >>> A, y = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]]), jnp.array([5.0, 5.0, 2.0])
      >>> mean_square = lambda out: jnp.sum((out - y) ** 2) / 2
      >>> product = curvature.gnvp(lambda x: A @ x, mean_square)
      >>> result = so.minimize(lambda x: mean_square(A @ x), jnp.zeros(2), so.natural_gradient(product))
      >>> result.params.round(3).tolist()
      [1.0, 2.0]

    References: Amari (1998), "Natural gradient works efficiently in learning", Neural Computation 10; Martens (2020),
    "New insights and perspectives on the natural gradient method", JMLR 21.
    """
    checks.function("natural_gradient", "fisher", fisher)
    return _optimizer("natural_gradient", region, max_cg, forcing, preconditioner, fisher)


def _optimizer(
    who: str,
    region: TrustRegion | CappedCG,
    max_cg: int | None,
    forcing: float | None,
    preconditioner: transform.Hvp | Preconditioner | None,
    fixed: transform.Hvp | None,
) -> transform.Optimizer:
    """Return the optimizer, with the product `fixed` in place of what a caller hands in, if there is one."""
    if not isinstance(region, (TrustRegion, CappedCG)):
        raise TypeError(
            f"{who}: region must be made by secondorder.trust_region(...) or capped_cg(...), got {region!r}."
        )
    if max_cg is not None:
        checks.integer(who, "max_cg", max_cg, 1, hint="leave it out for 10 n, or take 20 to 100 for large networks.")
    if forcing is not None:
        checks.number(who, "forcing", forcing, 0.0, 1.0, hint="leave it out for Eisenstat and Walker's rule.")
    helper = preconditioner if isinstance(preconditioner, Preconditioner) else None
    given = None if isinstance(preconditioner, Preconditioner) else preconditioner
    if given is not None:
        checks.function(who, "preconditioner", given)
    if isinstance(region, CappedCG):
        if preconditioner is not None:
            raise ValueError(f"{who}: capped_cg takes no preconditioner, got {preconditioner!r}; use trust_region().")
        return _with_line_search(who, region, max_cg, forcing, fixed)

    def empty(params: tree.ArrayTree) -> Path:
        dtype = tree.scalar_dtype(params)
        nothing = matrix_free.wide(tree.zeros_like(params), dtype)
        square = jnp.zeros((3, 3), dtype)
        return Path(
            first=() if preconditioner is None else tree.copy(nothing),
            s=nothing,
            d=tree.copy(nothing),
            reduced=cg.Reduced(square, square, jnp.zeros(3, dtype)),
            last=jnp.zeros(3, dtype),
            exit=jnp.int32(cg.RUNNING),
            forcing=jnp.full((), LARGEST_FORCING, dtype),
            norm=jnp.zeros((), dtype),
            unit=jnp.ones((), dtype),
            kept=() if helper is None else (helper.empty(nothing), jnp.ones((), dtype)),
        )

    def solve(hvp: transform.Hvp | None, state: MatrixFreeState, when: jax.Array) -> Solved:
        dtype, x, model = state.loss.dtype, state.params, state.model
        g = matrix_free.wide(state.grad, dtype)
        matvec = _matvec(who, hvp, fixed, x, dtype)
        precondition, memory, spent, stretch = None, (), jnp.int32(0), jnp.ones((), dtype)
        if given is not None:
            precondition = matrix_free.linear(who, "preconditioner", given, x, dtype)
        elif helper is not None:
            key = jax.random.fold_in(jax.random.key(2), state.info.evaluations)
            memory, spent = helper.prepare(model.kept[0], matvec, key, when)
            precondition = partial(helper.apply, memory)
        # 1. A radius, where none is known, and how much the model may promise within it.
        chosen, promise = jnp.isinf(state.damping.size), jnp.full((), jnp.inf, dtype)
        if helper is not None or region.radius is None:
            stretch = _stretch(g, precondition)
        if region.radius is not None:
            first = jnp.full((), region.radius, dtype)
        else:
            first = matrix_free.first_length(state) * stretch
            known = chosen & jnp.isfinite(state.loss) & (state.loss != 0)
            promise = jnp.where(known, trust_region.TRUSTED * jnp.abs(state.loss), promise)
        last = state.damping.size if helper is None else state.damping.size * (stretch / model.kept[1])
        radius = jnp.where(chosen, first, last)
        # 2. Forcing term; a random vector asks for negative curvature where the gradient has nothing more to say.
        norm = tree.norm(g)
        eta = _forcing_term(forcing, model.forcing, model.norm, norm, state.gtol)
        b, probing = matrix_free.unless_flat(g, state)
        limit = _products(PATIENT * tree.size(x) if max_cg is None else max_cg, probing, norm, when)
        # 3. Conjugate gradients, in units that keep g'Hg from overflowing.
        unit = cg.loss_scale(tree.max_norm(g))
        path, d0, cut = cg.truncated(
            matvec,
            b,
            radius=jnp.where(probing, jnp.inf, radius),
            tolerance=jnp.where(probing, jnp.finfo(dtype).eps ** 0.5, eta),
            limit=limit,
            promise=jnp.where(probing, jnp.inf, promise),
            precondition=precondition,
            notes=() if helper is None else helper.notes(memory),
            note=None if helper is None else helper.note,
            unit=unit,
        )
        path = _along(path, g, radius, probing)
        fault = jnp.where(path.exit == cg.ASYMMETRIC, Status.NOT_SYMMETRIC, Status.RUNNING)
        indefinite = path.exit == cg.PRECONDITIONER
        if helper is None:
            fault = jnp.where(indefinite, Status.NOT_POSITIVE_DEFINITE, fault)
        made = Path(
            first=() if preconditioner is None else d0,
            s=path.s,
            d=path.d,
            reduced=path.reduced,
            last=path.last,
            exit=path.exit,
            forcing=eta,
            norm=norm,
            unit=unit,
            kept=() if helper is None else (helper.learn(memory, path.notes, indefinite), stretch),
        )
        radius = jnp.where(probing, radius, cut)
        return Solved(made, radius, path.products + spent, path.least, path.negative, fault.astype(jnp.int32))

    def move(model: Path, grad: tree.ArrayTree, c: jax.Array) -> tree.ArrayTree:
        d0, first = (grad, -c[0] / model.unit) if preconditioner is None else (model.first, c[0])
        return jax.tree.map(lambda u, v, w: first * u + c[1] * v + c[2] * w, d0, model.s, model.d)

    engine = matrix_free.Engine(empty, solve, _answer, move)
    own = given is not None or fixed is not None
    return matrix_free.optimizer(who, region, engine, joins=not own, needs_curvature=fixed is None)


def _with_line_search(
    who: str, search: CappedCG, max_cg: int | None, forcing: float | None, fixed: transform.Hvp | None
) -> transform.Optimizer:
    """Return damped Newton-CG, Algorithm 2 of Royer, O'Neill & Wright (2020)."""

    def empty(params: tree.ArrayTree) -> Direction:
        dtype = tree.scalar_dtype(params)
        zero = jnp.zeros((), dtype)
        nothing = matrix_free.wide(tree.zeros_like(params), dtype)
        return Direction(nothing, zero, jnp.int32(capped.RUNNING), jnp.full((), LARGEST_FORCING, dtype), zero)

    def solve(hvp: transform.Hvp | None, state: MatrixFreeState, when: jax.Array) -> Solved:
        dtype, x, model = state.loss.dtype, state.params, state.model
        g = matrix_free.wide(state.grad, dtype)
        matvec = _matvec(who, hvp, fixed, x, dtype)
        # 1. Forcing term; a random vector asks for negative curvature where the gradient has nothing more to say.
        norm = tree.norm(g)
        eta = _forcing_term(forcing, model.forcing, model.grad_norm, norm, state.gtol)
        b, probing = matrix_free.unless_flat(g, state)
        limit = _products(PATIENT * tree.size(x) if max_cg is None else max_cg, probing, norm, when)
        # 2. Capped conjugate gradients (Algorithm 1). Where H vanishes, its rounding is no curvature: the damping alone
        # then keeps the step within 1/sqrt(eps) lengths of x.
        floor = jnp.finfo(dtype).eps ** 0.5 * norm / jnp.maximum(1.0, tree.norm(x))
        end = capped.capped(
            matvec,
            b,
            0.0 if search.damping is None else search.damping,
            SHARE,
            jnp.where(probing, jnp.finfo(dtype).eps ** 0.5, eta),
            search.accuracy,
            limit,
            floor,
            cg.loss_scale(tree.max_norm(g)),
        )
        # 3. Along negative curvature the step is as long as the curvature is large, and goes downhill.
        bent = end.kind == capped.CURVATURE
        length = tree.norm(end.d)
        factor = jnp.abs(end.curvature) / jnp.where(length > 0, length, 1.0)
        factor = jnp.where(tree.dot(end.d, g) > 0, -factor, factor)
        factor = jnp.where(bent, factor, jnp.where(probing, 0.0, 1.0))
        d = tree.where(bent | ~probing, tree.scale(factor, end.d), tree.zeros_like(end.d))
        made = Direction(d, jnp.abs(factor) * length, end.kind, eta, norm)
        rounding = 10 * jnp.finfo(dtype).eps * end.bound
        running, one = jnp.int32(Status.RUNNING), jnp.ones((), dtype)
        return Solved(made, one, end.products, end.curvature, bent & (end.curvature < -rounding), running)

    def answer(model: Direction, step: jax.Array) -> Step:
        step = jnp.where(jnp.isfinite(step), step, 1.0)
        return Step(step, search.promised(step, model.norm), step)

    def move(model: Direction, grad: tree.ArrayTree, step: jax.Array) -> tree.ArrayTree:
        del grad
        return tree.scale(step, model.d)

    engine = matrix_free.Engine(empty, solve, answer, move)
    return matrix_free.optimizer(who, search, engine, joins=fixed is None, needs_curvature=fixed is None)


def _products(limit: int, probing: jax.Array, norm: jax.Array, when: jax.Array) -> jax.Array:
    """Return the most products of a solve: fewer where it only looks for negative curvature, none unless `when`."""
    few, more = min(limit, matrix_free.PROBE), min(limit, matrix_free.LONG_PROBE)
    return jnp.where(when, jnp.where(probing, jnp.where(norm > 0, few, more), limit), 0)


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


def _answer(model: Path, radius: jax.Array) -> Step:
    """Return the trial for the radius.

    The end of the path where the ball holds it and it is no boundary point; else the better of the minimizer of the
    reduced model over the ball, and the end of the path scaled back.
    """
    gram, hessian, gradient = model.reduced
    promised = lambda c: -(jnp.dot(gradient, c) + 0.5 * jnp.dot(c, tree.matmul(hessian, c)))
    norm = lambda c: jnp.sqrt(jnp.maximum(jnp.dot(c, tree.matmul(gram, c)), 0.0))
    # 1. The end of the path.
    length = norm(model.last)
    inside = (length <= radius) & (model.last[2] == 0)
    back = model.last * jnp.minimum(1.0, radius / jnp.where(length > 0, length, 1.0))
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


def _matvec(who: str, hvp: transform.Hvp | None, fixed: transform.Hvp | None, x: tree.ArrayTree, dtype: Any):
    """Return the product with the curvature at x: by `fixed` where an optimizer brings its own, else by `hvp`."""
    product = hvp if fixed is None else fixed
    assert product is not None
    return matrix_free.linear(who, "hvp_fn" if fixed is None else "fisher", product, x, dtype)


def _forcing_term(
    fixed: float | None, before: jax.Array, last: jax.Array, norm: jax.Array, gtol: jax.Array
) -> jax.Array:
    """Return eta: `fixed`, or Eisenstat & Walker's choice 2, (2.6) and section 2.1; then no less than gtol asks.

    `before` is the term of the last solve, `last` the norm of the gradient there.
    """
    if fixed is not None:
        return jnp.full((), fixed, norm.dtype)
    ratio = norm / jnp.where(last > 0, last, 1.0)
    relaxed = FORCING * before**POWER
    eta = FORCING * ratio**POWER
    eta = jnp.where(relaxed > RELAXED, jnp.maximum(eta, relaxed), eta)
    eta = jnp.where(last > 0, eta, LARGEST_FORCING)
    eta = jnp.maximum(eta, 0.5 * gtol / jnp.where(norm > 0, norm, 1.0))  # Kelley (1995), (6.20)
    return jnp.clip(eta, 10 * jnp.finfo(norm.dtype).eps, LARGEST_FORCING).astype(norm.dtype)


def _stretch(g: tree.ArrayTree, precondition: cg.Matvec | None) -> jax.Array:
    """Return ||z||_M / ||z||, z = M^-1 g: what makes a Euclidean length along z one in M."""
    if precondition is None:
        return jnp.ones((), tree.scalar_dtype(g))
    z = precondition(g)
    ratio = jnp.sqrt(jnp.maximum(tree.dot(g, z), 0.0)) / tree.norm(z)
    return jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1.0)
