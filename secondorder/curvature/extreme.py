"""The ends of the spectrum: the smallest and the largest eigenvalues of a curvature matrix, with eigenvectors.

`extreme_eigenpairs` is the Lanczos method with full reorthogonalization (Golub & Van Loan 2013, section 10.3),
`lobpcg_eigenpairs` the locally optimal block gradient method (Knyazev 2001), which keeps 3 blocks of vectors only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.curvature.linear_map import LinearMap, linear_map, number_of_pairs, number_of_steps
from secondorder.curvature.products import Product
from secondorder.curvature.program import compiled
from secondorder.linalg import lanczos, probes, tree

PRODUCTS = 60  # default Lanczos steps: both ends to 6 digits at the start and in the middle of training a network
FLOOR = 10.0  # rounding of a product, in eps ||A||, that the residual bounds allow for
SEEN = 4.0  # the same, over the largest asymmetry that was seen: sums over many samples round more (ours)


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs at one end of the spectrum, the outermost first."""

    values: jax.Array  # theta, shape (num,) [f/x^2]
    vectors: tree.ArrayTree  # unit vectors u as trees like params, with a leading axis of length num
    residuals: jax.Array  # bounds of ||A u - theta u||, shape (num,): an eigenvalue lies that close to theta


class ExtremeEigenpairs(NamedTuple):
    """Both ends of the spectrum."""

    smallest: Eigenpairs  # ascending
    largest: Eigenpairs  # descending
    products: jax.Array  # int32: matrix-vector products spent


@compiled
def extreme_eigenpairs(
    hvp_fn: Product,
    params: tree.ArrayTree,
    num: int = 1,
    *,
    products: int | None = None,
    key: jax.Array | None = None,
) -> ExtremeEigenpairs:
    """Return the `num` smallest and the `num` largest eigenpairs, by Lanczos with full reorthogonalization.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric: `curvature.hvp(loss)`, `gnvp(...)`, `fisher_vp(...)`.
      params: Where; any pytree of real arrays with n entries in all, finite.
      num: Pairs at each end, 1 <= num <= n. Default 1.
      products: Lanczos steps k, num <= k <= n. Default 60, or n if that is less.
      key: Random key of the first vector. Default: `jax.random.key(0)`.

    Returns:
      `ExtremeEigenpairs`. Every theta lies inside the spectrum (up to rounding), so that the smallest is an upper bound
      of the smallest eigenvalue, and one that is negative beyond its residual proves negative curvature. Within its
      residual of theta there is an eigenvalue (rounding is seen by the asymmetry that it makes, and allowed for); that
      it is the outermost one is likely, not proven. The ends converge at a rate set by the gap to the next eigenvalue
      over the spectral range: outliers within some 20 products; a smallest eigenvalue that is tiny against the largest
      and close to its neighbours, as at the end of a training, not within 60.
      Cost: k products that share one linearization, and O(n k²) flops; memory k + 2 num vectors.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced
        (the results are then NaN).

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> pairs = curvature.extreme_eigenpairs(curvature.hvp(lambda x: x[0] ** 2 - 3 * x[1] ** 2), jnp.zeros(2))
      >>> round(float(pairs.smallest.values[0]), 4), round(float(pairs.largest.values[0]), 4)
      (-6.0, 2.0)

    References: Golub & Van Loan (2013), *Matrix Computations*, sections 10.1 and 10.3; Daniel, Gragg, Kaufman &
    Stewart (1976), "Reorthogonalization and stable algorithms", Math. Comp. 30.
    """
    who = "extreme_eigenpairs"
    A = linear_map(who, hvp_fn, params)
    number_of_pairs(who, num, A.size)
    k = number_of_steps(who, "products", products, max(PRODUCTS, 2 * num), A.size)
    if k < num:
        raise ValueError(f"{who}: products must be at least num = {num}, got {k}; leave it out.")
    key = jax.random.key(0) if key is None else key
    decomposition, ritz = krylov(A, k, key)
    both = jnp.concatenate([jnp.arange(num), k - 1 - jnp.arange(num)])
    vectors = lanczos.ritz_vectors(decomposition, ritz.coordinates[:, both])
    residuals = ritz.residuals[both] + jnp.maximum(rounding(ritz.values, A.eps, A.size), SEEN * decomposition.noise)

    def end(part: slice) -> Eigenpairs:
        rows = jax.vmap(A.split)(jax.tree.map(lambda x: x[part], vectors))
        return Eigenpairs(ritz.values[both[part]], rows, residuals[part])

    return ExtremeEigenpairs(end(slice(0, num)), end(slice(num, None)), jnp.int32(k))


@compiled
def lobpcg_eigenpairs(
    hvp_fn: Product,
    params: tree.ArrayTree,
    num: int = 1,
    *,
    iterations: int = 100,
    tol: float | None = None,
    key: jax.Array | None = None,
) -> ExtremeEigenpairs:
    """Return the `num` smallest and the `num` largest eigenpairs, by LOBPCG.

    An alternative to `extreme_eigenpairs` where k vectors do not fit, or where several close eigenvalues are wanted. It
    needs more products: a block of `num` in every iteration, for each end.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays with n entries in all, finite. Sharded leaves are gathered.
      num: Pairs at each end, 1 <= num and 5 num < n.
      iterations: Most iterations for each end, >= 1. Default 100.
      tol: An end stops when ||A u - theta u|| <= tol ||A|| sqrt(n) or so; default n eps, as in JAX.
      key: Random key of the first block. Default: `jax.random.key(0)`.

    Returns:
      `ExtremeEigenpairs`, with residuals that are computed (by 4 num further products), and `products` the most that
      the iterations may have spent. Cost: up to 2 (num + 1) products per iteration; memory about 10 num vectors.

    Raises:
      ValueError, TypeError: as `extreme_eigenpairs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> loss = lambda x: jnp.sum(jnp.arange(-2.0, 8.0) * x**2) / 2
      >>> pairs = curvature.lobpcg_eigenpairs(curvature.hvp(loss), jnp.zeros(10))
      >>> round(float(pairs.smallest.values[0]), 3), round(float(pairs.largest.values[0]), 3)
      (-2.0, 7.0)

    References: Knyazev (2001), "Toward the optimal preconditioned eigensolver", SIAM J. Sci. Comput. 23; the
    iteration is `jax.experimental.sparse.linalg.lobpcg_standard`.
    """
    from jax.experimental.sparse.linalg import lobpcg_standard

    who = "lobpcg_eigenpairs"
    A = linear_map(who, hvp_fn, params)
    number_of_pairs(who, num, A.size)
    checks.integer(who, "iterations", iterations, 1, hint="100 is the default.")
    if tol is not None:
        checks.number(who, "tol", tol)
    if 5 * num >= A.size:
        raise ValueError(
            f"{who}: 5 num must be less than n = {A.size}, got num = {num}; take extreme_eigenpairs, or the matrix."
        )
    key = jax.random.key(0) if key is None else key
    template = A.zero

    def block(sign: tree.Numeric, X: jax.Array) -> jax.Array:
        product = lambda column: sign * tree.ravel(A.apply(tree.unravel(column, template)), A.dtype)
        return jnp.asarray(jax.vmap(product, in_axes=1, out_axes=1)(X))

    def end(sign: float, key: jax.Array) -> Eigenpairs:
        X = jnp.linalg.qr(jax.random.normal(key, (A.size, num), A.dtype))[0]
        unit = tree.power_of_two(tree.max_norm(block(1.0, X)))
        # The iteration looks for the largest eigenvalues: of A, or of -A. Where the block spans an invariant subspace
        # it divides by zero; the block itself is then the answer, with residuals that say how good it is.
        _, U, _ = lobpcg_standard(lambda X: block(sign / unit, X), X, iterations, tol)
        U = jnp.where(jnp.all(jnp.isfinite(U)), U, X)
        U = U / jnp.linalg.norm(U, axis=0)
        AU = block(1.0 / unit, U)
        values = jnp.sum(U * AU, axis=0)
        order = jnp.argsort(-sign * values)
        U, AU, values = U[:, order], AU[:, order], values[order]
        residuals = unit * (jnp.linalg.norm(AU - U * values, axis=0) + rounding(values, A.eps, A.size))
        values = unit * values
        vectors = jax.vmap(lambda column: A.split(tree.unravel(column, template)), in_axes=1)(U)
        return Eigenpairs(values, vectors, residuals)

    low, high = jax.random.split(key)
    spent = 2 * (num + 1) * iterations + 6 * num
    return ExtremeEigenpairs(end(-1.0, low), end(1.0, high), jnp.int32(spent))


def krylov(A: LinearMap, steps: int, key: jax.Array) -> tuple[lanczos.Lanczos, lanczos.Ritz]:
    """Return a Lanczos decomposition of A from a random vector, and its Ritz pairs."""
    first, later = jax.random.split(key)
    decomposition = lanczos.decompose(A.apply, probes.normal(first, A.zero), steps, later, any_size=True)
    return decomposition, lanczos.ritz(decomposition)


def rounding(values: jax.Array, eps: float, size: int = 1) -> jax.Array:
    """Return the rounding error of a product of `size` entries, in the unit of the eigenvalues; shape ().

    Errors of sums add up like a random walk, as the square root of the number of terms (Higham & Mary 2019).
    """
    return max(FLOOR, size**0.5) * eps * jnp.max(jnp.abs(values))
