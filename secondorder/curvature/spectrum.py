"""The whole spectrum without the matrix: stochastic Lanczos quadrature, and the figures that follow from it.

For a random unit vector v, k Lanczos steps give nodes theta_i and weights tau_i² with sum tau_i² f(theta_i) = v'f(A)v
for polynomials f of degree up to 2k - 1 (Golub & Meurant 2010); the mean over v, times n, estimates tr f(A)
(Ubaru, Chen & Saad 2017; for networks Ghorbani, Krishnan & Xiao 2019).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.curvature import dense
from secondorder.curvature.estimate import Estimate, from_samples
from secondorder.curvature.extreme import SEEN, krylov, rounding
from secondorder.curvature.linear_map import LinearMap, linear_map, number_of_steps
from secondorder.curvature.products import Product
from secondorder.curvature.program import compiled
from secondorder.linalg import lanczos, tree
from secondorder.linalg import probes as random

STEPS, PROBES = 60, 8  # defaults: Lanczos steps per probe, and probes
BROADENING = 0.01  # default width of the Gaussians, as a share of the spectral range


class SpectralDensity(NamedTuple):
    """A sum of point masses, nodes with weights, that stands for the eigenvalues divided by n."""

    nodes: jax.Array  # theta, ascending for each probe, shape (probes, k) [f/x^2]
    weights: jax.Array  # shares of the n eigenvalues, shape (probes, k); all together they sum to 1
    standard_error: jax.Array  # of the mean of the eigenvalues, relative to the spectral range
    products: jax.Array  # int32: matrix-vector products spent

    def density(self, grid: jax.Array, width: tree.Numeric | None = None) -> jax.Array:
        """Return the density on `grid`, shape (points,), each node widened to a Gaussian of standard deviation `width`.

        The default width is 1 % of the range of the nodes, or, where they differ by rounding only, of their size. The
        integral over the real line is 1.
        """
        if width is not None:
            checks.number("SpectralDensity.density", "width", width)
        low, high = _range(self.nodes, self.weights)
        spread, size = high - low, jnp.maximum(jnp.abs(low), jnp.abs(high))
        spread = jnp.where(spread > jnp.finfo(spread.dtype).eps ** 0.5 * size, spread, size)
        sigma = BROADENING * jnp.where(spread > 0, spread, 1.0) if width is None else width
        z = (jnp.atleast_1d(grid)[:, None] - self.nodes.ravel()[None, :]) / sigma
        return jnp.exp(-0.5 * z**2) @ self.weights.ravel() / (sigma * (2 * jnp.pi) ** 0.5)


def _range(nodes: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the least and the greatest node that stands for eigenvalues: after an invariant subspace others follow."""
    counts = ~(weights <= jnp.finfo(weights.dtype).eps ** 2)
    return jnp.min(jnp.where(counts, nodes, jnp.inf)), jnp.max(jnp.where(counts, nodes, -jnp.inf))


class ConditionNumber(NamedTuple):
    """Largest over smallest eigenvalue or singular value, by magnitude."""

    value: jax.Array  # Inf for a singular matrix
    largest: jax.Array  # the largest magnitude [f/x^2]
    smallest: jax.Array  # the smallest magnitude found [f/x^2]
    definite: jax.Array  # bool: all eigenvalues found have one sign beyond rounding
    exact: jax.Array  # bool: from all eigenvalues; else `value` is a lower bound up to rounding


@compiled
def spectral_density(
    hvp_fn: Product,
    params: tree.ArrayTree,
    *,
    steps: int | None = None,
    probes: int = PROBES,
    key: jax.Array | None = None,
    reorthogonalize: bool = True,
) -> SpectralDensity:
    """Estimate the distribution of the eigenvalues by stochastic Lanczos quadrature.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays with n entries in all, finite.
      steps: Lanczos steps k per probe, 1 <= k <= n. Default 60, or n if that is less.
      probes: Random vectors, >= 1. Default 8.
      key: Random key. Default: `jax.random.key(0)`.
      reorthogonalize: Keep k vectors and find every outlier once (default), or keep 4 vectors, whatever k is; converged
        outliers then appear several times and share one weight, so that the density is the same.

    Returns:
      `SpectralDensity`; its method `density(grid, width)` gives the curve. Outliers are single nodes with a weight near
      1/n. Cost: probes k products, one after the other; memory k + 4 vectors, or 4 without reorthogonalization.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> found = curvature.spectral_density(curvature.hvp(lambda x: jnp.sum(jnp.arange(4.0) * x**2)), jnp.zeros(4))
      >>> [round(float(node), 3) + 0.0 for node in found.nodes[0]]
      [0.0, 2.0, 4.0, 6.0]

    References: Lin, Saad & Yang (2016), "Approximating spectral densities of large matrices", SIAM Review 58; Ghorbani,
    Krishnan & Xiao (2019), "An investigation into neural net optimization via Hessian eigenvalue density", ICML,
    Algorithm 1.
    """
    checks.flag("spectral_density", "reorthogonalize", reorthogonalize)
    _, nodes, weights = quadrature("spectral_density", hvp_fn, params, steps, probes, key, reorthogonalize)
    means = jnp.sum(nodes * weights, axis=1)
    low, high = _range(nodes, weights)
    spread = high - low
    error = from_samples(means, 0).standard_error / jnp.where(spread > 0, spread, 1.0)
    return SpectralDensity(nodes, weights / probes, error, jnp.int32(nodes.size))


@compiled
def log_determinant(
    hvp_fn: Product,
    params: tree.ArrayTree,
    *,
    shift: tree.Numeric = 0.0,
    steps: int | None = None,
    probes: int = PROBES,
    key: jax.Array | None = None,
) -> Estimate:
    """Estimate log det(A + shift I), the log of the posterior volume in Laplace's approximation.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays with n entries in all, finite.
      shift: Added to every eigenvalue, >= 0 [f/x²], for instance the precision of a prior. Default 0.
      steps: Lanczos steps k per probe, 1 <= k <= n. Default 60, or n if that is less.
      probes: Random vectors, >= 2. Default 8.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `Estimate`; NaN if a node shows that A + shift I is not positive definite. The standard error is that of the
      probes; the quadrature error falls like ((√κ - 1) / (√κ + 1))^2k, κ the condition number, and is not in it: the
      result means little where the matrix is singular to rounding. With few probes, or a few eigenvalues that
      stand out, the margin holds less often than in 95 % of the cases.
      Cost: probes k products; memory k + 4 vectors.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 2.0]) * x**2) / 2
      >>> round(float(curvature.log_determinant(curvature.hvp(loss), jnp.zeros(2), probes=2).value), 4)  # log 2
      0.6931

    References: Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
    Matrix Anal. 38, Algorithm 1 and Theorem 4.1.
    """
    who = "log_determinant"
    checks.number(who, "shift", shift, strict=False)

    def log(theta: jax.Array) -> jax.Array:
        shifted = theta + shift
        return jnp.where(shifted > 0, jnp.log(jnp.where(shifted > 0, shifted, 1.0)), jnp.nan)

    return _trace_of(who, log, hvp_fn, params, steps, probes, key)


@compiled
def effective_dimension(
    hvp_fn: Product,
    params: tree.ArrayTree,
    regularization: tree.Numeric,
    *,
    steps: int | None = None,
    probes: int = PROBES,
    key: jax.Array | None = None,
) -> Estimate:
    """Estimate the number of well-determined parameters, the sum of λ / (λ + α) over the eigenvalues.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric; the Hessian or Gauss-Newton matrix of the data term.
      params: Where; any pytree of real arrays with n entries in all, finite.
      regularization: α > 0 [f/x²], the curvature of the prior.
      steps: Lanczos steps k per probe, 1 <= k <= n. Default 60, or n if that is less.
      probes: Random vectors, >= 2. Default 8.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `Estimate` of a number between 0 and n; negative eigenvalues count as zero. Cost and memory: as
      `log_determinant`.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 3.0]) * x**2) / 2
      >>> round(float(curvature.effective_dimension(curvature.hvp(loss), jnp.zeros(2), 1.0, probes=2).value), 3)
      1.25

    References: MacKay (1992), "Bayesian interpolation", Neural Computation 4; Maddox, Benton & Wilson (2020),
    "Rethinking parameter counting in deep models: effective dimensionality revisited".
    """
    who = "effective_dimension"
    checks.number(who, "regularization", regularization)

    def share(theta: jax.Array) -> jax.Array:
        positive = jnp.maximum(theta, 0.0)
        return positive / (positive + regularization)

    return _trace_of(who, share, hvp_fn, params, steps, probes, key)


@compiled
def condition_number(
    hvp_fn: Product,
    params: tree.ArrayTree,
    *,
    dense_limit: int = 1000,
    products: int | None = None,
    key: jax.Array | None = None,
) -> ConditionNumber:
    """Return the condition number of a symmetric curvature matrix, max |λ| / min |λ|.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays with n entries in all, finite.
      dense_limit: Up to this n the dense matrix is decomposed, >= 0. Default 1000.
      products: Lanczos steps above it. Default 100, or n if that is less.
      key: Random key of the first Lanczos vector. Default: `jax.random.key(0)`.

    Returns:
      `ConditionNumber`. From the dense matrix it is exact up to rounding; a magnitude below 10 √n eps max|λ|, or below
      the rounding that a further product shows, counts as zero. From Lanczos it is a lower bound, good where the
      smallest eigenvalue is well separated; for an indefinite matrix the smallest magnitude lies inside the spectrum,
      Lanczos does not see it, and the value is Inf.
      Cost: n + 1 products and an O(n³) decomposition, or `products` products.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
      >>> round(float(curvature.condition_number(curvature.hvp(loss), jnp.zeros(2)).value))
      100

    References: Golub & Van Loan (2013), *Matrix Computations*, section 2.6.
    """
    who = "condition_number"
    A = linear_map(who, hvp_fn, params)
    checks.integer(who, "dense_limit", dense_limit, 0)
    steps = number_of_steps(who, "products", products, 100, A.size)
    exact = A.size <= dense_limit
    key = jax.random.key(0) if key is None else key
    if exact:
        params = jax.tree.map(jnp.asarray, params)
        matrix = dense.from_products(hvp_fn, params)
        values, noise = dense.eigenvalues(matrix), disagreement(A, matrix, key)
    else:
        decomposition, ritz = krylov(A, steps, key)
        values, noise = ritz.values, SEEN * decomposition.noise
    sizes, zero = jnp.abs(values), jnp.maximum(negligible(values, A.size, A.eps), noise)
    definite = (values[0] > zero) | (values[-1] < -zero)
    largest, smallest = jnp.max(sizes), jnp.min(sizes)
    regular = (smallest > zero) if exact else definite
    value = jnp.where(regular, largest / jnp.where(regular, smallest, 1.0), jnp.inf)
    value = jnp.where(jnp.isfinite(largest), value, jnp.nan)
    return ConditionNumber(value, largest, smallest, definite, jnp.array(exact))


@compiled
def jacobian_condition_number(
    fun: Callable[..., tree.ArrayTree], params: tree.ArrayTree, *args: object, memory: float | None = None
) -> ConditionNumber:
    """Return the condition number of a Jacobian, from its singular values: that of J'J is the square of it.

    Args:
      fun: fun(params, *args) -> outputs or residuals, any pytree of real arrays with m entries in all.
      params: Where; any pytree of real arrays with n entries in all, finite.
      *args: Further arguments of `fun`.
      memory: As in `jacobian`.

    Returns:
      `ConditionNumber`, σ_max / σ_min over the min(m, n) singular values; Inf if one is below max(m, n) eps σ_max.
      `definite` says that the columns (or, for m < n, the rows) are independent. Cost: one dense Jacobian, and a
      decomposition of O(m n min(m, n)).

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> round(float(curvature.jacobian_condition_number(lambda x: jnp.array([3.0, 4.0]) * x, jnp.zeros(2)).value), 3)
      1.333

    References: Golub & Van Loan (2013), *Matrix Computations*, sections 2.4 and 5.5.
    """
    who = "jacobian_condition_number"
    checks.params(who, params)
    checks.finite(who, params)
    J = dense.jacobian(fun, params, *args, memory=memory)
    if J.size == 0:
        raise ValueError(f"{who}: the Jacobian must have at least one entry, got shape {J.shape}.")
    values = jnp.linalg.svd(J, compute_uv=False)
    largest, smallest = values[0], values[-1]
    regular = smallest > max(J.shape) * jnp.finfo(J.dtype).eps * largest
    value = jnp.where(regular, largest / jnp.where(regular, smallest, 1.0), jnp.inf)
    value = jnp.where(jnp.isfinite(largest), value, jnp.nan)
    return ConditionNumber(value, largest, smallest, regular, jnp.array(True))


def quadrature(
    who: str,
    hvp_fn: Product,
    params: tree.ArrayTree,
    steps: int | None,
    probes: int,
    key: jax.Array | None,
    reorthogonalize: bool = True,
) -> tuple[LinearMap, jax.Array, jax.Array]:
    """Return the matrix, and the nodes and weights of every probe, shapes (probes, k); weights of a probe sum to 1."""
    A = linear_map(who, hvp_fn, params)
    k = number_of_steps(who, "steps", steps, STEPS, A.size)
    checks.integer(who, "probes", probes, 1, hint=f"{PROBES} is the default.")
    keys = jax.random.split(jax.random.key(0) if key is None else key, probes)

    def rule(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, later = jax.random.split(key)
        start = random.signs(first, A.zero)
        if reorthogonalize:
            found = lanczos.ritz(lanczos.decompose(A.apply, start, k, later, any_size=True))
        else:
            found = lanczos.ritz(lanczos.tridiagonal(A.apply, start, k))
        return found.values, found.coordinates[0] ** 2

    nodes, weights = jax.lax.map(rule, keys)  # one probe after the other: one basis in memory
    return A, nodes, weights


def negligible(values: jax.Array, n: int, eps: float) -> jax.Array:
    """Return the size of an eigenvalue that rounding alone can make, from the others; shape ()."""
    return n**0.5 * rounding(values, eps)


def disagreement(A: LinearMap, matrix: jax.Array, key: jax.Array) -> jax.Array:
    """Return ||M v - A v||, v a random unit vector: what the rounding of products does, sums over samples included."""
    v = random.normal(key, A.zero)
    v = tree.scale(1.0 / tree.norm(v), v)
    return tree.safe_norm(tree.matmul(matrix, tree.ravel(v, A.dtype)) - tree.ravel(A.apply(v), A.dtype))


def _trace_of(
    who: str,
    f: Callable[[jax.Array], jax.Array],
    hvp_fn: Product,
    params: tree.ArrayTree,
    steps: int | None,
    probes: int,
    key: jax.Array | None,
) -> Estimate:
    """Return tr f(A) = n E[v'f(A)v]."""
    checks.integer(who, "probes", probes, 2, hint=f"{PROBES} is the default.")
    A, nodes, weights = quadrature(who, hvp_fn, params, steps, probes, key)
    # A node of no weight does not count: after an invariant subspace, Lanczos goes on in another.
    terms = jnp.where(weights <= jnp.finfo(weights.dtype).eps ** 2, 0.0, weights * f(nodes))
    return from_samples(A.size * jnp.sum(terms, axis=1), nodes.size)
