"""The linear model r + J p of a residual, in a form that answers every damping at once.

With D a scaling of the parameters, J D⁻¹ = U diag(s) Vᵀ: the damped least-squares problem is diagonal in V. The
decomposition is either exact (`Direct`) or that of a Krylov space (`Iterative`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.curvature import residuals as derivatives
from secondorder.globalization import stopping
from secondorder.linalg import box, golub_kahan, thin_svd, tree

DIRECT_LIMIT = 1000  # parameters, or residuals if they are fewer: up to here a factorization is cheap
OWN = 0.5  # power of eps: no residual of a fit that has converged would change by more, relatively (ours)
DIRECT_ENTRIES = 10_000_000  # of a Jacobian: up to here it is kept as a matrix
KRYLOV_DIMENSION = 50  # the default of `iterative`, which keeps as many vectors of residuals
Residual = Callable[[tree.ArrayTree], tree.ArrayTree]


class LinearModel(NamedTuple):
    """r + J p around an accepted point; p = D⁻¹ V c has the coefficients c."""

    values: jax.Array  # s², squared singular values of J D⁻¹, ascending, 0 below rounding; shape (k,)
    rotated: jax.Array  # s * Uᵀr, the gradient in V; shape (k,)
    vectors: jax.Array  # V, shape (n, k)
    scale: jax.Array  # D, shape (n,) [r/x]; ones if not known
    gradient: jax.Array  # Jᵀr, shape (n,); NaN where J is not finite: the model then predicts nothing
    offset: jax.Array  # norm of the part of r in the range of J, ||Uᵀr|| [r]
    cosine: jax.Array  # largest |cos| of the angle between r and a column of J (Moré 1978, section 8); Inf if not known
    orthogonal: jax.Array  # bool: r is orthogonal to the range of J up to the rounding of r itself
    loss_rounding: jax.Array  # rounding level of ||r||²/2
    rank: jax.Array  # int32: singular values that are not zero to rounding
    products: jax.Array  # int32: single products J v and Jᵀu spent on this model, beside a dense J
    duals: jax.Array  # with a preconditioner M, M⁻¹ V, which takes the place of V in Vᵀp; else shape (0, 0)
    column_norms: jax.Array  # largest norms that the columns of J had so far, shape (n,) [r/x]; else shape (0,)
    reach: jax.Array  # largest |x| so far, 0 for what started at zero, -1 before the start, shape (n,) [x]; else (0,)
    point: jax.Array  # where, shape (n,), if the next model asks for the step in between; else shape (0,)


class Direct(NamedTuple):
    """Options of the dense Jacobian; build one with `direct`."""

    jacobian: str | None
    residuals: int | None
    scaled: bool
    normal_equations: bool

    def initial(self, n: int, dtype: Any) -> LinearModel:
        """Return the model before the first accepted point."""
        k = n if self.residuals is None else min(n, self.residuals)
        return _empty(n, k, dtype)._replace(column_norms=jnp.zeros(n, dtype), reach=jnp.full(n, -1.0, dtype))

    def model(self, residual_fn: Residual, params: tree.ArrayTree, bounds: box.Box, last: LinearModel) -> LinearModel:
        """Return the model at `params`; `last` is that at the point accepted before."""
        dtype = last.scale.dtype
        linear = derivatives.linearize(residual_fn, params)
        r = linear.residual.astype(dtype)
        J = derivatives.matrix(linear, self.jacobian).astype(dtype)
        m, n = J.shape
        k = last.values.size
        if min(m, n) > k:
            raise ValueError(
                f"levenberg_marquardt: the residual has {m} entries, but the solver was built for {k}; "
                "pass direct(residuals=None), or the true number."
            )
        x = tree.ravel(params, dtype)
        # Columns, and r, in units that keep squares from overflowing and underflowing; powers of two round nothing.
        units, unit = tree.power_of_two(jnp.max(jnp.abs(J), axis=0, initial=0.0)), tree.power_of_two(tree.max_norm(r))
        J, r, xs = J / units[None, :], r / unit, units * x / unit
        # Everything is read off a compressed [J r] with as many rows as columns: one pass over J.
        if self.normal_equations and m >= n:
            rows = jnp.concatenate([J.T, r[None, :]])
            squares = tree.matmul(rows, rows.T)
            sound = jnp.all(jnp.isfinite(squares))
            squares = jnp.where(sound, squares, 0.0)
            norms, grad, r_norm = jnp.sqrt(jnp.diagonal(squares)[:n]), squares[:n, n], jnp.sqrt(squares[n, n])
            decompose = lambda d: thin_svd.from_products(squares[:n, :n] * d[:, None] * d[None, :], grad * d)
        else:
            R, b = thin_svd.triangle(J, r)
            sound = jnp.all(jnp.isfinite(R)) & jnp.all(jnp.isfinite(b))
            R, b = jnp.where(sound, R, 0.0), jnp.where(sound, b, 0.0)
            norms, grad, r_norm = jnp.sqrt(jnp.sum(R * R, axis=0)), tree.matmul(R.T, b), tree.norm(b)
            decompose = lambda d: thin_svd.factorize(R * d[None, :], b)
        cosines = jnp.abs(grad) / jnp.where(norms * r_norm > 0, norms * r_norm, 1.0)
        free = ~box.blocked(x, grad, bounds)
        column_norms = jnp.maximum(units * norms, last.column_norms)
        reach = jnp.where(last.reach == 0, 0.0, jnp.maximum(jnp.abs(x), last.reach))
        scale = _scale(column_norms, reach, x) if self.scaled else jnp.ones_like(norms)
        shrink = jnp.where(free, units / _divisor(scale), 0.0)
        svd = decompose(shrink)
        s = thin_svd.cut(svd.singular, m, n, squared=self.normal_equations)
        offset = tree.norm(jnp.where(s > 0, svd.projected, 0.0))
        # Is r orthogonal to the range of J, up to its rounding? In norm; and on the way to the minimum of the model no
        # residual changes in the first half of its own digits: one that rounds coarsely could hide what others ask for.
        rounding, loss_rounding = _rounding(r_norm, tree.dot(norms, jnp.abs(xs)))
        p = shrink * tree.matmul(svd.vectors, svd.projected / jnp.where(s > 0, s, jnp.inf))
        own = jnp.finfo(dtype).eps ** OWN * (jnp.abs(r) + tree.matmul(jnp.abs(J), jnp.abs(xs)))
        orthogonal = (offset <= rounding) & jnp.all(jnp.abs(tree.matmul(J, p)) <= own)
        # Where ||r||² has underflowed nothing can be compared; beside the largest x so far, such an r may be rounding.
        spent = r_norm <= jnp.finfo(dtype).eps * tree.dot(norms, units * jnp.maximum(reach, 0.0) / unit)
        cosine = jnp.where(_underflows(unit * r_norm) & spent, 0.0, tree.max_norm(jnp.where(free, cosines, 0.0)))
        known = sound & (spent | ~_underflows(unit * r_norm))
        spare = k - s.size
        return LinearModel(
            values=jnp.pad(s * s, (spare, 0)),
            rotated=jnp.pad(unit * (s * svd.projected), (spare, 0)),
            vectors=jnp.pad(jnp.where(free[:, None], svd.vectors, 0.0), ((0, 0), (spare, 0))),
            scale=scale,
            gradient=jnp.where(sound, units * (unit * grad), jnp.nan),
            offset=unit * offset,
            cosine=jnp.where(known, cosine, jnp.inf),
            orthogonal=known & orthogonal,
            loss_rounding=jnp.where(sound, unit * (unit * loss_rounding), 0.0),
            rank=jnp.sum(s > 0, dtype=jnp.int32),
            products=jnp.int32(0),
            duals=last.duals,
            column_norms=column_norms,
            reach=reach,
            point=last.point,
        )


class Iterative(NamedTuple):
    """Options of the Krylov space; build one with `iterative`."""

    dimension: int
    forcing: float
    warm_start: bool
    preconditioner: Callable[[Any], Any] | None

    def initial(self, n: int, dtype: Any) -> LinearModel:
        """Return the model before the first accepted point."""
        k = min(self.dimension, n + 1) if self.warm_start else min(self.dimension, n)
        empty = _empty(n, k, dtype)
        if self.preconditioner is not None:
            empty = empty._replace(duals=jnp.zeros((n, k), dtype))
        return empty._replace(point=jnp.zeros(n, dtype)) if self.warm_start else empty

    def model(self, residual_fn: Residual, params: tree.ArrayTree, bounds: box.Box, last: LinearModel) -> LinearModel:
        """Return the model at `params`; `last` is that at the point accepted before."""
        dtype = last.scale.dtype
        linear = derivatives.linearize(residual_fn, params)
        r = linear.residual.astype(dtype)
        x = tree.ravel(params, dtype)
        r_norm, unit = tree.safe_norm(r), tree.power_of_two(tree.max_norm(r))
        grad = linear.pull((r / unit).astype(linear.residual.dtype)).astype(dtype)  # in this unit no square underflows
        free = ~box.blocked(x, grad, bounds)
        push = lambda v: linear.push(jnp.where(free, v, 0.0)).astype(dtype)
        pull = lambda u: jnp.where(free, linear.pull(u).astype(dtype), 0.0)
        # Forcing terms of Eisenstat & Walker (1996), choice 2: the model is solved as well as the last one served.
        shrunk = unit * tree.norm(grad) / jnp.maximum(tree.norm(last.gradient), jnp.finfo(dtype).tiny)
        tolerance = jnp.minimum(self.forcing, shrunk**2).astype(dtype)
        space = golub_kahan.decompose(
            push,
            pull,
            jnp.where(jnp.all(jnp.isfinite(r)), r, 0.0),
            x.size,
            last.values.size,
            tolerance,
            precondition=self._precondition(params, free),
            seed=self._seed(x, free, last),
        )
        spare = last.values.size - space.singular.size
        s = thin_svd.cut(space.singular, r.size, x.size)
        rounding, loss_rounding = _rounding(r_norm, tree.norm(linear.push(x).astype(dtype)))
        offset = tree.safe_norm(jnp.where(s > 0, space.projected, 0.0))
        steep, size = tree.safe_norm(jnp.where(free, grad, 0.0)), tree.safe_norm(s)  # the part of ||J|| that was seen
        level = size * (r_norm / unit)
        cosine = jnp.where(level > 0, steep / jnp.where(level > 0, level, 1.0), jnp.inf)
        sound = jnp.isfinite(tree.max_norm(grad)) & jnp.all(jnp.isfinite(space.singular))
        known = sound & ~_underflows(r_norm)
        clean = lambda a: jnp.where(sound, a, 0.0)
        wide = lambda matrix: jnp.pad(matrix, ((0, 0), (spare, 0)))
        return LinearModel(
            values=jnp.pad(clean(s * s), (spare, 0)),
            rotated=jnp.pad(clean(s * space.projected), (spare, 0)),
            vectors=wide(clean(jnp.where(free[:, None], space.vectors, 0.0))),
            scale=jnp.ones_like(x),
            gradient=jnp.where(sound, unit * grad, jnp.nan),
            offset=offset,
            cosine=jnp.where(known, jnp.where(steep > 0, cosine, 0.0), jnp.inf),
            orthogonal=known & (offset <= rounding) & ((size > 0) | (steep == 0)),
            loss_rounding=clean(loss_rounding),
            rank=jnp.int32(-1),
            products=space.products + 2,
            duals=wide(clean(space.duals)) if self.preconditioner else last.duals,
            column_norms=last.column_norms,
            reach=last.reach,
            point=x if self.warm_start else last.point,
        )

    def _precondition(self, params: tree.ArrayTree, free: jax.Array) -> Callable[[jax.Array], jax.Array] | None:
        """Return the preconditioner on flat vectors, confined to the free parameters."""
        if self.preconditioner is None:
            return None
        M = self.preconditioner

        def precondition(v: jax.Array) -> jax.Array:
            image = tree.ravel(M(tree.unravel(jnp.where(free, v, 0.0), params)), v.dtype)
            return jnp.where(free, image, 0.0)

        return precondition

    def _seed(self, x: jax.Array, free: jax.Array, last: LinearModel) -> tuple[jax.Array, jax.Array] | None:
        """Return the step that led here and its dual, as far as the last model knew it."""
        if not self.warm_start:
            return None
        step = jnp.where(free, x - last.point, 0.0)
        if self.preconditioner is None:
            return step, step
        c = tree.matmul(last.duals.T, step)
        return jnp.where(free, tree.matmul(last.vectors, c), 0.0), jnp.where(free, tree.matmul(last.duals, c), 0.0)


def direct(
    jacobian: str | None = None, residuals: int | None = None, scaled: bool = True, normal_equations: bool = False
) -> Direct:
    """Dense Jacobian, QR of [J r] and a singular value decomposition of the triangle.

    Args:
      jacobian: "forward", "reverse", or None for the cheaper one for the shape.
      residuals: Number m of residuals, >= 1, where it is smaller than n: memory is then n m instead of n², and the
        problem is solved in the space of residuals. `least_squares` fills it in. Default: at least as many as n.
      scaled: Measure steps by ||D p||, D by the largest column norms so far (Moré 1978), not by ||p||. Default True.
      normal_equations: Take the singular values from the eigenvalues of D⁻¹JᵀJD⁻¹ instead of a QR. They are then seen
        down to sqrt(eps) of the largest only, and smaller ones count as zero; the gradient stays exact. For thousands
        of small, well-determined fits at once; up to three parameters it saves nothing. Default False.

    Returns:
      An immutable value to pass as `solver=`.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.levenberg_marquardt(solver=so.direct(jacobian="reverse"))

    References: Moré (1978); Golub & Van Loan (2013), section 5.3.3.
    """
    who = "direct"
    derivatives.check_mode(who, jacobian)
    if residuals is not None:
        checks.integer(who, "residuals", residuals, 1, hint="leave it out where residuals are at least as many as n.")
    checks.flag(who, "scaled", scaled)
    checks.flag(who, "normal_equations", normal_equations)
    return Direct(jacobian, residuals, scaled, normal_equations)


def iterative(
    dimension: int = KRYLOV_DIMENSION,
    forcing: float = 0.1,
    warm_start: bool = True,
    preconditioner: Callable[[Any], Any] | None = None,
) -> Iterative:
    """Products J v and Jᵀu alone: the linear problem is solved in a Krylov space, for many parameters or residuals.

    The space is built once per accepted point by Golub-Kahan bidiagonalization; every damping is then answered in it by
    the iterate of LSQR (of conjugate gradients on the normal equations), without further products.

    Args:
      dimension: Dimensions of the space at most, >= 2; the bidiagonalization is truncated there. Memory is
        `dimension` vectors of parameters, and while it is built as many of residuals. Default 50.
      forcing: The space is large enough when the normal equations are solved to this relative accuracy, in (0, 1), or
        to the square of the last reduction of the gradient (Eisenstat & Walker 1996). Default 0.1.
      warm_start: Add the last step to the space. Default True.
      preconditioner: v -> M v, a tree like params in and out, symmetric positive definite, near (JᵀJ)⁻¹. Steps are then
        measured in the norm of M⁻¹. Default: the identity.

    Returns:
      An immutable value to pass as `solver=`.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import secondorder as so
      >>> optimizer = so.levenberg_marquardt(solver=so.iterative(dimension=20))

    References: Paige & Saunders (1982); Fong & Saunders (2011); Eisenstat & Walker (1996).
    """
    who = "iterative"
    checks.integer(who, "dimension", dimension, 2, hint="50 is the default.")
    checks.number(who, "forcing", forcing, 0.0, 1.0, hint="0.1 is the default.")
    checks.flag(who, "warm_start", warm_start)
    if preconditioner is not None:
        checks.function(who, "preconditioner", preconditioner)
    return Iterative(dimension, forcing, warm_start, preconditioner)


def chosen(solver: Direct | Iterative | None, n: int) -> Direct | Iterative:
    """Return the solver, by the number of parameters where none is given."""
    if solver is not None:
        return solver
    return direct() if n <= DIRECT_LIMIT else iterative()


def check(who: str, solver: Any) -> None:
    """Raise unless `solver` is one of the two kinds, or None."""
    if not (solver is None or isinstance(solver, (Direct, Iterative))):
        raise TypeError(f"{who}: solver must be made by direct(...) or iterative(...), got {solver!r}.")


def by_size(m: int, n: int) -> Direct | Iterative:
    """Return the solver for m residuals and n parameters: dense, in the smaller space, while that is cheap.

    A Jacobian with fewer columns than a Krylov space has vectors is always dense.
    """
    if min(m, n) > DIRECT_LIMIT or (m * n > DIRECT_ENTRIES and n > KRYLOV_DIMENSION):
        return iterative()
    return direct(residuals=m if m < n else None)


def report(info: stopping.Info, model: LinearModel, when: jax.Array) -> stopping.Info:
    """Return the figures of a run with those of the model at a newly accepted point, where the flag holds.

    The run has converged if r is orthogonal to the range of J, up to the rounding of r itself.
    """
    orthogonal = when & (info.status == stopping.Status.RUNNING) & model.orthogonal
    grad_norm = tree.max_norm(model.gradient)
    return info._replace(
        status=jnp.where(orthogonal, stopping.Status.CONVERGED, info.status).astype(jnp.int32),
        hessians=info.hessians + (when & (model.products == 0)).astype(jnp.int32),
        hessian_products=info.hessian_products + when.astype(jnp.int32) * model.products,
        grad_norm=jnp.where(when, grad_norm, info.grad_norm),
        optimality=jnp.where(when, model.cosine, info.optimality),
    )


def inverse(model: LinearModel, free: jax.Array) -> jax.Array:
    """Return (JᵀJ)⁻¹, shape (n, n), for k = n: Inf for parameters with a part in the null space, 0 if not free."""
    V, s2 = model.vectors, model.values
    W = V / jnp.sqrt(jnp.where(s2 > 0, s2, jnp.inf))[None, :]
    C = tree.matmul(W, W.T) / _divisor(model.scale)[:, None] / _divisor(model.scale)[None, :]
    part = 1.0 - jnp.sum(jnp.where(s2 > 0, V * V, 0.0), axis=1)  # squared norm of e_j in the null space
    lost = free & (part > jnp.sqrt(jnp.finfo(V.dtype).eps))
    C = jnp.where(lost[:, None] | lost[None, :], jnp.inf, C)
    return jnp.where(free[:, None] & free[None, :], C, 0.0)


def _empty(n: int, k: int, dtype: Any) -> LinearModel:
    """Return a model that predicts nothing."""
    zero = jnp.zeros((), dtype)
    return LinearModel(
        values=jnp.zeros(k, dtype),
        rotated=jnp.zeros(k, dtype),
        vectors=jnp.zeros((n, k), dtype),
        scale=jnp.zeros(n, dtype),
        gradient=jnp.zeros(n, dtype),
        offset=zero,
        cosine=zero,
        orthogonal=jnp.array(False),
        loss_rounding=zero,
        rank=jnp.int32(0),
        products=jnp.int32(0),
        duals=jnp.zeros((0, 0), dtype),
        column_norms=jnp.zeros(0, dtype),
        reach=jnp.zeros(0, dtype),
        point=jnp.zeros(0, dtype),
    )


def to_params(model: LinearModel, c: jax.Array) -> jax.Array:
    """Return p = D⁻¹ V c, shape (n,), of coefficients c, shape (k,), in the basis of right singular vectors."""
    return tree.matmul(model.vectors, c) / _divisor(model.scale)


def rotate(model: LinearModel, g: jax.Array) -> jax.Array:
    """Return Vᵀ D⁻¹ g, shape (k,), of a gradient g, shape (n,)."""
    return tree.matmul(model.vectors.T, g / _divisor(model.scale))


def decrease(model: LinearModel, p: jax.Array) -> jax.Array:
    """Return the decrease -(g'p + ||J p||²/2) that the model predicts for a step p, shape (n,)."""
    duals = model.duals if model.duals.size else model.vectors
    c = tree.matmul(duals.T, model.scale * p)
    return -(tree.dot(model.rotated, c) + 0.5 * tree.dot(model.values * c, c))


def _scale(column_norms: jax.Array, reach: jax.Array, x: jax.Array) -> jax.Array:
    """Return D: the column norms of Moré (1978), raised where a parameter could change by far more than its size.

    A column that is small at the start lets its parameter jump to where the residual no longer depends on it. In a
    region of the size of ||N x||, N the column norms, no parameter changes by more than its size so far; one that
    started at zero has no size, as its first value may be rounding. Like N, D follows the units of the parameters.
    """
    least = tree.norm(column_norms * x) / jnp.where(reach > 0, reach, jnp.inf)
    return jnp.maximum(column_norms, least)


def _divisor(scale: jax.Array) -> jax.Array:
    """Return the scale without its zeros: a column that was always zero has none, and no part in a step."""
    return jnp.where(scale > 0, scale, 1.0)


def _underflows(r_norm: jax.Array) -> jax.Array:
    """Return whether ||r||² has underflowed, so that losses cannot be compared; not where r is zero."""
    return (r_norm > 0) & (r_norm * r_norm < jnp.finfo(r_norm.dtype).tiny)


def _rounding(r_norm: jax.Array, Jx_norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the rounding levels of ||r|| and of ||r||²/2, given (a bound of) the norm of |J| |x|.

    A residual inherits at least the rounding of the parameters, eps |J| |x|, and of itself.
    """
    eps = jnp.finfo(r_norm.dtype).eps
    rounding = eps * (r_norm + Jx_norm)
    return rounding, r_norm * rounding + 0.5 * rounding**2
