"""The Hessian as a matrix, and its eigendecomposition."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from secondorder import checks
from secondorder.curvature import products
from secondorder.linalg import tree

BLOCK = 16  # directions pushed through the linearized gradient at once; 8 to 16 measured best on CPUs


class Spectrum(NamedTuple):
    """H = vectors diag(values) vectors'."""

    values: jax.Array  # ascending, shape (n,) [f/x^2]
    vectors: jax.Array  # columns are eigenvectors, shape (n, n)


def hessian(fun: Callable[..., jax.Array], params: tree.ArrayTree, *args: object) -> jax.Array:
    """Return the Hessian of a loss as one symmetric matrix.

    Args:
      fun: Loss; fun(params, *args) is a scalar.
      params: Where; any pytree of real arrays with n entries in all.
      *args: Further arguments of `fun`.

    Returns:
      Shape (n, n), rows and columns in the order of `jax.flatten_util.ravel_pytree(params)`.
      Cost: n Hessian-vector products that share one linearization of the gradient, taken in blocks of 16, so that
      the temporary memory is that of 16 gradients.

    Raises:
      TypeError: if `params` has leaves that are not real floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> curvature.hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 3.0])).tolist()
      [[6.0, 2.0], [2.0, 0.0]]
    """
    checks.params("hessian", params)
    return from_products(products.hvp(fun, *args), params)


def from_products(
    hvp_fn: Callable[[tree.ArrayTree, tree.ArrayTree], tree.ArrayTree], params: tree.ArrayTree
) -> jax.Array:
    """Return the symmetric matrix, shape (n, n), of v -> hvp_fn(params, v), linearized once."""
    zero, unravel = ravel_pytree(tree.zeros_like(params))
    dtype = tree.scalar_dtype(params)
    n = zero.size
    if n == 0:
        return jnp.zeros((0, 0), dtype)

    def product(v: jax.Array) -> jax.Array:
        return ravel_pytree(hvp_fn(params, unravel(v)))[0].astype(zero.dtype)

    # The product is linear in v: linearizing it leaves only the part that depends on v in the loop over directions.
    _, linear = jax.linearize(product, zero)
    block = min(BLOCK, n)
    blocks = -(-n // block)  # n is padded to whole blocks: a remainder would compile the body twice
    starts = block * jnp.arange(blocks)

    def push(start: jax.Array) -> jax.Array:
        index = start + jnp.arange(block)
        directions = (index[:, None] == jnp.arange(n)[None, :]).astype(zero.dtype)
        return jax.vmap(linear)(directions)

    rows = jax.lax.map(push, starts).reshape(blocks * block, n)[:n].astype(dtype)
    return 0.5 * (rows + rows.T)


def spectrum(matrix: jax.Array) -> Spectrum:
    """Return the eigendecomposition of a symmetric matrix; a non-finite matrix counts as zero (a linear model)."""
    if matrix.shape[0] == 0:
        return Spectrum(jnp.zeros((0,), matrix.dtype), matrix)
    clean = jnp.where(jnp.all(jnp.isfinite(matrix)), matrix, 0.0)
    vectors, values = jax.lax.linalg.eigh(clean, symmetrize_input=False)
    return Spectrum(values, vectors)


def indefinite(values: jax.Array) -> jax.Array:
    """Return whether the least of the ascending eigenvalues, shape (n,), is negative beyond rounding; shape ()."""
    if values.size == 0:
        return jnp.array(False)
    rounding = 10 * values.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return values[0] < -rounding
