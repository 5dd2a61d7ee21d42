"""Hessian and Jacobian as matrices, built in blocks of directions, and the eigendecomposition."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks, one_kernel
from secondorder.curvature import products, residuals
from secondorder.curvature.program import compiled
from secondorder.linalg import blocks, tree


class Spectrum(NamedTuple):
    """H = vectors diag(values) vectors'."""

    values: jax.Array  # ascending, shape (n,) [f/x^2]
    vectors: jax.Array  # columns are eigenvectors, shape (n, n)


@compiled
def hessian(
    fun: Callable[..., jax.Array], params: tree.ArrayTree, *args: object, memory: float | None = None
) -> jax.Array:
    """Return the Hessian of a loss as one symmetric matrix.

    Args:
      fun: Loss; fun(params, *args) is a scalar.
      params: Where; any pytree of real arrays with n entries in all.
      *args: Further arguments of `fun`.
      memory: Bytes that the directions in flight may take, > 0, besides the matrix. Default: at most 16 directions,
        on a CPU no more than its caches hold (16 MB).

    Returns:
      Shape (n, n), rows and columns in the order of `jax.flatten_util.ravel_pytree(params)`; `unravel` makes a row or
      an eigenvector a tree.
      Cost: n Hessian-vector products that share one linearization of the gradient, taken in blocks, so that the
      temporary memory is that of 16 gradients, or of as many as `memory` holds.

    Raises:
      TypeError: if `params` has leaves that are not real floating-point arrays.
      ValueError: if the loss is not a scalar, or `memory` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> curvature.hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 3.0])).tolist()
      [[6.0, 2.0], [2.0, 0.0]]
    """
    _check_loss("hessian", fun, params, args)
    _check_memory("hessian", memory)
    return from_products(products.hvp(fun, *args), params, memory)


@compiled
def hessian_blocks(
    fun: Callable[..., jax.Array], params: tree.ArrayTree, *args: object, memory: float | None = None
) -> tree.ArrayTree:
    """Return the diagonal blocks of the Hessian, one per leaf: the curvature within a layer, without the cross terms.

    Args:
      fun: Loss; fun(params, *args) is a scalar.
      params: Where; any pytree of real arrays.
      *args: Further arguments of `fun`.
      memory: As in `hessian`.

    Returns:
      A tree like `params`; in place of a leaf with k entries, its symmetric block, shape (k, k).
      Cost: as many products as `hessian`; memory the sum of k² instead of its square.

    Raises:
      TypeError, ValueError: as `hessian`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> loss = lambda p: p["a"] ** 2 * p["b"][0] * p["b"][1]
      >>> blocks = curvature.hessian_blocks(loss, {"a": jnp.array(3.0), "b": jnp.array([1.0, 2.0])})
      >>> blocks["a"].tolist(), blocks["b"].tolist()
      ([[4.0]], [[0.0, 9.0], [9.0, 0.0]])
    """
    who = "hessian_blocks"
    _check_loss(who, fun, params, args)
    _check_memory(who, memory)
    params = jax.tree.map(jnp.asarray, params)
    product = products.hvp(fun, *args)
    linear = products.linear(lambda v: product(params, v), tree.zeros_like(params))
    leaves, structure = jax.tree.flatten(params)

    def block(i: int) -> jax.Array:
        def within(v: jax.Array) -> jax.Array:
            zeros = [jnp.zeros_like(leaf) for leaf in leaves]
            zeros[i] = v.reshape(leaves[i].shape)
            return jax.tree.leaves(linear(jax.tree.unflatten(structure, zeros)))[i].ravel()

        if leaves[i].size == 0:
            return jnp.zeros((0, 0), leaves[i].dtype)
        rows = blocks.matrix(within, jnp.zeros(leaves[i].size, leaves[i].dtype), memory)
        return 0.5 * (rows + rows.T)

    return jax.tree.unflatten(structure, [block(i) for i in range(len(leaves))])


@compiled
def jacobian(
    fun: Callable[..., tree.ArrayTree],
    params: tree.ArrayTree,
    *args: object,
    mode: str | None = None,
    memory: float | None = None,
) -> jax.Array:
    """Return the Jacobian of a function with many outputs as one matrix.

    Args:
      fun: fun(params, *args) -> outputs, any pytree of real arrays with m entries in all.
      params: Where; any pytree of real arrays with n entries in all.
      *args: Further arguments of `fun`.
      mode: "forward" (n products J v), "reverse" (m products Jᵀu), or None for the cheaper one: forward if n <= 2 m.
      memory: Bytes that the directions in flight may take, > 0, besides the matrix. Default: at most 16 directions,
        on a CPU no more than its caches hold (16 MB).

    Returns:
      Shape (m, n), rows in the order of `ravel_pytree(outputs)`, columns in that of `ravel_pytree(params)`.
      Cost: one linearization, then n forward derivatives or m backward ones.

    Raises:
      TypeError: if `fun` is no function, or parameters or outputs are not real floating-point arrays.
      ValueError: if `memory` is not positive, or for an unknown `mode`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> curvature.jacobian(lambda x: {"sum": x.sum(), "squares": x**2}, jnp.array([1.0, 3.0])).tolist()
      [[2.0, 0.0], [0.0, 6.0], [1.0, 1.0]]
    """
    who = "jacobian"
    checks.function(who, "fun", fun)
    checks.params(who, params)
    _check_memory(who, memory)
    residuals.check_mode(who, mode)
    checks.params(who, jax.eval_shape(lambda x: fun(x, *args), params), name="fun(params)")
    linear = residuals.linearize(lambda x: fun(x, *args), jax.tree.map(jnp.asarray, params))
    dtype = jnp.promote_types(linear.residual.dtype, jnp.float32)
    return residuals.matrix(linear, mode, memory).astype(dtype)


def unravel(vector: jax.Array, params: tree.ArrayTree) -> tree.ArrayTree:
    """Return a vector in the order of `hessian` or of the columns of `jacobian` as a tree like `params`.

    Args:
      vector: Shape (n,), or (rows, n).
      params: Any pytree of real arrays with n entries in all.

    Returns:
      A tree like `params`, with a leading axis of rows if `vector` has one.

    Raises:
      ValueError: if `vector` has another length.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> {name: leaf.tolist() for name, leaf in curvature.unravel(
      ...     jnp.arange(3.0), {"a": jnp.array(0.0), "b": jnp.zeros(2)}).items()}
      {'a': 0.0, 'b': [1.0, 2.0]}
    """
    checks.params("unravel", params)
    vector, n = jnp.asarray(vector), tree.size(params)
    if vector.ndim not in (1, 2) or vector.shape[-1] != n:
        raise ValueError(f"unravel: vector must have shape ({n},) or (rows, {n}), got {vector.shape}.")
    params = jax.tree.map(jnp.asarray, params)
    back = lambda row: tree.unravel(row, params)
    return jax.vmap(back)(vector) if vector.ndim == 2 else back(vector)


def from_products(
    hvp_fn: Callable[[tree.ArrayTree, tree.ArrayTree], tree.ArrayTree],
    params: tree.ArrayTree,
    memory: float | None = None,
) -> jax.Array:
    """Return the symmetric matrix, shape (n, n), of v -> hvp_fn(params, v), linearized once."""
    dtype = tree.scalar_dtype(params)
    zero = tree.ravel(tree.zeros_like(params), dtype)
    if zero.size == 0:
        return jnp.zeros((0, 0), dtype)

    def product(v: jax.Array) -> jax.Array:
        out = hvp_fn(params, tree.unravel(v, params))
        checks.same_shapes(
            "hvp_fn", out, params, "the result of hvp_fn(params, vector)", remedy="return a tree like params"
        )
        return tree.ravel(out, dtype)

    # The product is linear in v: linearizing it leaves only the part that depends on v in the loop over directions.
    linear = products.linear(one_kernel.apart(product), zero)
    rows = blocks.matrix(linear, zero, memory)
    return 0.5 * (rows + rows.T)


def spectrum(matrix: jax.Array) -> Spectrum:
    """Return the eigendecomposition of a symmetric matrix; a non-finite matrix counts as zero (a linear model)."""
    if matrix.shape[0] == 0:
        return Spectrum(jnp.zeros((0,), matrix.dtype), matrix)
    clean = jnp.where(jnp.all(jnp.isfinite(matrix)), matrix, 0.0)
    vectors, values = jax.lax.linalg.eigh(clean, symmetrize_input=False)
    return Spectrum(values, vectors)


def eigenvalues(matrix: jax.Array) -> jax.Array:
    """Return the eigenvalues of a symmetric matrix, ascending; NaN if an entry is not finite."""
    values = jnp.linalg.eigvalsh(jnp.where(jnp.isfinite(matrix), matrix, 0.0), symmetrize_input=False)
    return jnp.where(jnp.all(jnp.isfinite(matrix)), values, jnp.nan)


def indefinite(values: jax.Array) -> jax.Array:
    """Return whether the least of the ascending eigenvalues, shape (n,), is negative beyond rounding; shape ()."""
    if values.size == 0:
        return jnp.array(False)
    rounding = 10 * values.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return values[0] < -rounding


def _check_loss(who: str, fun: Callable[..., jax.Array], params: tree.ArrayTree, args: tuple[object, ...]) -> None:
    checks.function(who, "fun", fun)
    checks.params(who, params)
    checks.scalar_loss(who, fun, jax.eval_shape(lambda x: fun(x, *args), params), has_aux=False)


def _check_memory(who: str, memory: float | None) -> None:
    if memory is not None:
        checks.number(who, "memory", memory, hint="It counts bytes; leave it out for blocks of at most 16 directions.")
