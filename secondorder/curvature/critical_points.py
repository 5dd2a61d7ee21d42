"""The second-derivative test, in floating-point arithmetic: minimum, maximum, saddle, or not to be told.

Nocedal & Wright (2006), Theorems 2.3 and 2.4, with a tolerance for the sign of an eigenvalue that comes from the
precision; the share of positive eigenvalues at a critical point is the "minimum ratio" of Pascanu, Dauphin, Ganguli &
Bengio (2014).
"""

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.curvature import dense, products
from secondorder.curvature.extreme import SEEN, krylov
from secondorder.curvature.linear_map import LinearMap, linear_map, number_of_steps
from secondorder.curvature.program import compiled
from secondorder.curvature.spectrum import disagreement, negligible, quadrature
from secondorder.linalg import lanczos, tree
from secondorder.linalg import probes as random

DENSE_LIMIT = 1000  # default: parameters up to which the dense Hessian is decomposed
STEPS = 100  # default: Lanczos steps above it
MISTAKE = 0.01  # probability that the bound on the smallest eigenvalue is wrong, in Lanczos's case
DOUBT = 4.0  # an eigenvalue must exceed DOUBT times its change under a perturbation to count (ours, see x³ and x⁴)
DRAWS = 3  # random signs: those of one draw may cancel
NORM_STEPS = 8  # Lanczos steps for the norm of the change of the Hessian
GRID = 241  # step lengths tried in the Taylor model, over 8 decades on each side


class Kind(enum.IntEnum):
    """What a point is; `message` says it in words."""

    NOT_CRITICAL = 0
    MINIMUM = 1
    MAXIMUM = 2
    SADDLE = 3
    DEGENERATE = 4

    @property
    def message(self) -> str:
        """The kind in words."""
        return _MESSAGES[self]


_MESSAGES = {
    Kind.NOT_CRITICAL: "not critical: the gradient is not zero within the tolerance",
    Kind.MINIMUM: "minimum: all eigenvalues of the Hessian are positive",
    Kind.MAXIMUM: "maximum: all eigenvalues of the Hessian are negative",
    Kind.SADDLE: "saddle: the Hessian has eigenvalues of both signs",
    Kind.DEGENERATE: "degenerate: the test is inconclusive, an eigenvalue is zero within the tolerance",
}


class CriticalPoint(NamedTuple):
    """The outcome of the second-derivative test."""

    kind: jax.Array  # int32, a Kind: Kind(int(kind)).message says it in words
    value: jax.Array  # the loss
    grad_norm: jax.Array  # Euclidean norm of the gradient [f/x]
    gtol: jax.Array  # critical means grad_norm <= gtol
    negative: jax.Array  # number of eigenvalues below -tolerance; not whole where `exact` is false
    zero: jax.Array  # number of eigenvalues within the tolerance
    positive: jax.Array  # number of eigenvalues above it
    minimum_ratio: jax.Array  # positive / n
    tolerance: jax.Array  # an eigenvalue of smaller magnitude may have either sign [f/x^2]
    smallest: jax.Array  # smallest eigenvalue, or the smallest that Lanczos found [f/x^2]
    smallest_bound: jax.Array  # none is smaller than this (in Lanczos's case with probability 0.99)
    largest: jax.Array  # largest eigenvalue found [f/x^2]
    direction: tree.ArrayTree  # unit eigenvector of the smallest eigenvalue, a tree like params
    escape_direction: tree.ArrayTree  # the same or its negative, downhill; zero at a minimum
    escape_length: jax.Array  # how far along it the Taylor model of fourth order is least, at most `radius` [x]
    predicted_decrease: jax.Array  # by how much the loss falls there, by the model [f]; 0 if it does not
    exact: jax.Array  # bool: all eigenvalues were computed


class _Spectrum(NamedTuple):
    values: jax.Array  # eigenvalues or nodes, ascending, shape (k,)
    counts: Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # tolerance -> numbers below -tolerance, above it
    smallest_bound: jax.Array
    largest_bound: jax.Array
    vector: tree.ArrayTree  # of the smallest, in A's vectors
    newton: Callable[[tree.ArrayTree, jax.Array], tree.ArrayTree]  # (g, zero) -> -|H|^-1 g where |H| > zero
    noise: jax.Array  # rounding of the eigenvalues that was seen


@compiled
def classify_critical_point(
    fun: Callable[..., jax.Array],
    params: tree.ArrayTree,
    *args: Any,
    gtol: tree.Numeric | None = None,
    radius: tree.Numeric = 1.0,
    dense_limit: int = DENSE_LIMIT,
    steps: int | None = None,
    probes: int = 4,
    key: jax.Array | None = None,
) -> CriticalPoint:
    """Tell minimum, maximum and saddle apart by the signs of the Hessian's eigenvalues, and say which way leads out.

    An eigenvalue counts as zero if its sign could be another one at a point that the precision cannot tell from this
    one, or at the critical point itself:

        tolerance = max(10 √n eps ||H||, δ) + 4 eps ||d/dt H(x + t |x| s)|| + 4 ||d/dt H(x + t p)||,

    with random signs s (the largest of three draws) and, if the point is critical, the Newton step p = -|H|⁻¹ g. The
    first term is the rounding of the eigenvalues, δ what the products show of it (sums over many samples round more),
    the second that of the parameters, the third vanishes with the gradient. Eigenvalues of zero
    make the test inconclusive: x³, x⁴ and -x⁴ share their Hessian at 0. The point is then `DEGENERATE`, unless signs
    of both kinds make it a saddle all the same.

    Args:
      fun: Loss; fun(params, *args) is a scalar. For data that do not fit, see `over_batches`.
      params: The point; any pytree of real arrays with n entries in all, finite.
      *args: Further arguments of `fun`.
      gtol: The point is critical if the Euclidean norm of the gradient is at most this [f/x].
        Default: √eps ||H|| max(1, ||x||), so that scaling the loss changes nothing.
      radius: How far the Taylor model of fourth order is trusted [x], > 0. Default 1.
      dense_limit: Up to this n all eigenvalues are computed, >= 0. Default 1000.
      steps: Lanczos steps above it. Default 100, or n if that is less.
      probes: Random vectors for the numbers of eigenvalues above `dense_limit`, >= 1. Default 4.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `CriticalPoint`. Above `dense_limit` the numbers are estimates by Lanczos quadrature. A saddle is then still
      proven, by a vector of negative and one of positive curvature. A minimum is claimed only if no eigenvalue below
      the tolerance exists with probability 0.99, by the bound of Kuczyński & Woźniakowski on Lanczos from a random
      vector; otherwise the point is `DEGENERATE`, undecided. A point that is not finite is `NOT_CRITICAL`.
      Cost: n products and an O(n³) decomposition, or (probes + 1) steps products; and about 70 products' time for
      the tolerance. Compile it (`jax.jit`) to call it at several points.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> found = curvature.classify_critical_point(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, jnp.zeros(2))
      >>> curvature.Kind(int(found.kind)).name, float(found.minimum_ratio), round(float(found.predicted_decrease), 3)
      ('SADDLE', 0.5, 0.25)

    References: Nocedal & Wright (2006), *Numerical Optimization*, Theorems 2.3 and 2.4; Dauphin et al. (2014), NeurIPS,
    section 3; Kuczyński & Woźniakowski (1992), "Estimating the largest eigenvalue by the power and Lanczos algorithms
    with a random start", SIAM J. Matrix Anal. 13, Theorem 4.2.
    """
    who = "classify_critical_point"
    checks.function(who, "fun", fun)
    checks.integer(who, "dense_limit", dense_limit, 0)
    checks.integer(who, "probes", probes, 1)
    checks.number(who, "radius", radius)
    if gtol is not None:
        checks.number(who, "gtol", gtol, strict=False)
    if steps is not None:
        checks.integer(who, "steps", steps, 1, hint=f"{STEPS} is the default.")
    key = jax.random.key(0) if key is None else key
    spectrum_key, norm_key = jax.random.split(key)
    checks.params(who, params)
    checks.scalar_loss(who, fun, jax.eval_shape(lambda x: fun(x, *args), params), has_aux=False)
    loss = lambda x: fun(x, *args)
    hvp_fn = products.hvp(fun, *args)
    A = linear_map(who, hvp_fn, params)
    params = jax.tree.map(jnp.asarray, params)
    value, grad = jax.value_and_grad(loss)(params)
    g = A.join(grad)

    # 1. The spectrum: all of it, or its ends and an estimate of the rest.
    if exact := A.size <= dense_limit:
        spectrum = _dense_spectrum(hvp_fn, params, A, spectrum_key)
    else:
        k = number_of_steps(who, "steps", steps, STEPS, A.size)
        spectrum = _lanczos_spectrum(who, hvp_fn, params, A, k, probes, spectrum_key)
    smallest, largest = spectrum.values[0], spectrum.values[-1]
    norm = jnp.maximum(jnp.abs(smallest), jnp.abs(largest))

    # 2. How far the sign of an eigenvalue can be trusted.
    rounding = jnp.maximum(negligible(spectrum.values, A.size, A.eps), spectrum.noise)
    eps = A.eps

    def wobbled(key: jax.Array) -> jax.Array:
        relative = lambda s, x: float(jnp.finfo(x.dtype).eps) * jnp.abs(x) * s
        move = jax.tree.map(relative, A.split(random.signs(key, A.zero)), params)
        return _change_of_hessian(hvp_fn, params, move, A, norm_key)

    moved = jnp.max(jax.lax.map(wobbled, jax.random.split(jax.random.fold_in(norm_key, 1), DRAWS)))
    newton = A.split(spectrum.newton(g, rounding))
    ahead = _change_of_hessian(hvp_fn, params, newton, A, norm_key)
    if gtol is None:
        gtol = eps**0.5 * norm * jnp.maximum(1.0, tree.safe_norm(A.join(params)))
    gtol, grad_norm = jnp.asarray(gtol, A.dtype), tree.safe_norm(g)
    critical = grad_norm <= gtol
    tolerance = rounding + DOUBT * (moved + jnp.where(critical, ahead, 0.0))  # elsewhere the Newton step means nothing

    # 3. The test.
    negative, positive = spectrum.counts(tolerance)
    down, up = smallest < -tolerance, largest > tolerance
    kind = jnp.where(down & up, Kind.SADDLE, Kind.DEGENERATE)
    kind = jnp.where(spectrum.smallest_bound > tolerance, Kind.MINIMUM, kind)
    kind = jnp.where(spectrum.largest_bound < -tolerance, Kind.MAXIMUM, kind)
    kind = jnp.where(critical, kind, Kind.NOT_CRITICAL).astype(jnp.int32)

    # 4. The way out.
    direction = A.split(spectrum.vector)
    length, decrease = _least_of_taylor(loss, params, direction, jnp.asarray(radius, A.dtype))
    out = ~(spectrum.smallest_bound > tolerance)
    sign = jnp.where(out, jnp.where(length < 0, -1.0, 1.0), 0.0)
    return CriticalPoint(
        kind=kind,
        value=value,
        grad_norm=grad_norm,
        gtol=gtol,
        negative=negative,
        zero=A.size - negative - positive,
        positive=positive,
        minimum_ratio=positive / A.size,
        tolerance=tolerance,
        smallest=smallest,
        smallest_bound=spectrum.smallest_bound,
        largest=largest,
        direction=direction,
        escape_direction=tree.scale(sign, direction),
        escape_length=jnp.where(out, jnp.abs(length), 0.0),
        predicted_decrease=jnp.where(out, decrease, 0.0),
        exact=jnp.array(exact),
    )


def _dense_spectrum(hvp_fn: products.Product, params: tree.ArrayTree, A: LinearMap, key: jax.Array) -> _Spectrum:
    """Return all eigenvalues; the counts are exact."""
    H = dense.from_products(hvp_fn, params)
    finite = jnp.all(jnp.isfinite(H))
    values, vectors = dense.spectrum(H)
    values = jnp.where(finite, values, jnp.nan)

    def counts(tolerance: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(values < -tolerance).astype(A.dtype), jnp.sum(values > tolerance).astype(A.dtype)

    def newton(g: tree.ArrayTree, zero: jax.Array) -> tree.ArrayTree:
        rotated = tree.matmul(vectors.T, tree.ravel(g, A.dtype))
        return tree.unravel(tree.matmul(vectors, _divided(rotated, values, zero)), A.zero)

    noise = disagreement(A, H, key)
    return _Spectrum(values, counts, values[0], values[-1], tree.unravel(vectors[:, 0], A.zero), newton, noise)


def _lanczos_spectrum(
    who: str, hvp_fn: products.Product, params: tree.ArrayTree, A: LinearMap, k: int, probes: int, key: jax.Array
) -> _Spectrum:
    """Return the ends of the spectrum with bounds, and estimates of the counts."""
    ends_key, counts_key = jax.random.split(key)
    decomposition, ritz = krylov(A, k, ends_key)
    values = ritz.values
    # P(theta_min - lambda_min > share (lambda_max - lambda_min)) <= 1.648 √n exp(-√share (2k - 1)); so at the top.
    share = (math.log(1.648 * A.size**0.5 / MISTAKE) / (2 * k - 1)) ** 2 if k < A.size else 0.0
    beyond = share / (1 - 2 * share) * (values[-1] - values[0]) if share < 0.5 else jnp.inf
    _, nodes, weights = quadrature(who, hvp_fn, params, k, probes, counts_key)

    def counts(tolerance: jax.Array) -> tuple[jax.Array, jax.Array]:
        negative = jnp.sum(jnp.where(nodes < -tolerance, weights, 0.0)) * A.size / probes
        positive = jnp.sum(jnp.where(nodes > tolerance, weights, 0.0)) * A.size / probes
        return negative, positive

    def newton(g: tree.ArrayTree, zero: jax.Array) -> tree.ArrayTree:
        within = _divided(tree.matmul(ritz.coordinates.T, tree.rows_dot(decomposition.vectors, g, k)), values, zero)
        return tree.add_rows(tree.matmul(ritz.coordinates, within), decomposition.vectors, A.zero)

    first = jax.tree.map(lambda rows: rows[0], lanczos.ritz_vectors(decomposition, ritz.coordinates[:, :1]))
    noise = SEEN * decomposition.noise
    return _Spectrum(values, counts, values[0] - beyond, values[-1] + beyond, first, newton, noise)


def _divided(rotated: jax.Array, values: jax.Array, zero: jax.Array) -> jax.Array:
    """Return -g_i / |lambda_i| where |lambda_i| exceeds `zero`, else 0; shape (k,)."""
    sizes = jnp.abs(values)
    return jnp.where(sizes > zero, -rotated / jnp.where(sizes > zero, sizes, 1.0), 0.0)


def _change_of_hessian(
    hvp_fn: products.Product, params: tree.ArrayTree, move: tree.ArrayTree, A: LinearMap, key: jax.Array
) -> jax.Array:
    """Return the norm of d/dt H(params + t move), by a few Lanczos steps; shape ()."""
    move = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0).astype(x.dtype), move)

    def change(x: tree.ArrayTree, vector: tree.ArrayTree) -> tree.ArrayTree:
        return products.along(lambda y: hvp_fn(y, vector), x, move)

    third = linear_map("classify_critical_point", change, params)
    _, ritz = krylov(third, min(NORM_STEPS, A.size), key)
    return jnp.max(jnp.abs(ritz.values))


def _least_of_taylor(
    loss: Callable[[tree.ArrayTree], jax.Array], params: tree.ArrayTree, direction: tree.ArrayTree, radius: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return t, |t| <= radius, where the Taylor model of fourth order along a direction is least, and the decrease."""
    derivatives = []
    phi: Callable[[jax.Array], jax.Array] = lambda t: loss(tree.axpy(t, direction, params))
    for order in range(4):
        phi = jax.grad(phi) if order == 0 else _derivative(phi)  # a loss may have reverse rules alone
        derivatives.append(phi(jnp.zeros_like(radius)))

    def least(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = jnp.zeros_like(t)
        for order in (4, 3, 2, 1):  # Horner's scheme
            model = (model + derivatives[order - 1] / math.factorial(order)) * t
        model = jnp.where(jnp.isfinite(model), model, 0.0)
        best = jnp.argmin(model)
        return t[best], model[best]

    size = radius * jnp.logspace(-8, 0, GRID, dtype=radius.dtype)
    coarse, _ = least(jnp.concatenate([-size[::-1], size]))
    t, model = least(coarse * jnp.linspace(0.9, jnp.where(jnp.abs(coarse) < radius, 1.1, 1.0), GRID))
    return t, jnp.maximum(-model, 0.0)


def _derivative(phi: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda t: products.along(phi, t, jnp.ones_like(t))
