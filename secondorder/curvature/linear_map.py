"""A curvature product at fixed parameters, as a linear map on vectors of one working precision."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from secondorder import checks
from secondorder.curvature import products
from secondorder.curvature.products import Product
from secondorder.linalg import tree


class LinearMap(NamedTuple):
    """v -> A v, A symmetric n by n; a *vector* is one array of shape (n,), or a tree where leaves may be sharded."""

    apply: Callable[[tree.ArrayTree], tree.ArrayTree]  # vector -> vector
    zero: tree.ArrayTree  # the zero vector
    split: Callable[[tree.ArrayTree], tree.ArrayTree]  # vector -> tree like params, with the params' dtypes
    join: Callable[[tree.ArrayTree], tree.ArrayTree]  # tree like params -> vector
    size: int  # n
    dtype: jax.typing.DTypeLike  # of the vectors: the widest of the parameters, at least float32
    eps: float  # rounding of the parameters, in the coarsest of their dtypes


def linear_map(who: str, hvp_fn: Product, params: tree.ArrayTree) -> LinearMap:
    """Return v -> hvp_fn(params, v), linearized once, after the checks that every tool makes.

    Leaves are joined into one vector where `tree.joinable` allows it: many small ones cost several times one.
    """
    checks.product(who, hvp_fn)
    checks.params(who, params)
    checks.finite(who, params)
    params = jax.tree.map(jnp.asarray, params)
    n, dtype = tree.size(params), tree.scalar_dtype(params)
    if n == 0:
        raise ValueError(f"{who}: params must hold at least one entry, got none.")
    wide = jax.tree.map(lambda x: tree.zeros_like(x).astype(dtype), params)
    joined = tree.joinable(wide)  # decided once: inside a trace the leaves do not tell their sharding
    unravel = ravel_pytree(wide)[1] if joined else None

    def split(vector: tree.ArrayTree) -> tree.ArrayTree:
        return tree.cast_like(vector if unravel is None else unravel(vector), params)

    def join(x: tree.ArrayTree) -> tree.ArrayTree:
        x = jax.tree.map(lambda leaf: leaf.astype(dtype), x)
        return ravel_pytree(x)[0] if joined else x

    zero = join(wide)
    apply = products.linear(lambda v: join(_symmetric(who, hvp_fn, params, split(v))), zero)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    return LinearMap(apply, zero, split, join, n, dtype, eps)


def number_of_steps(who: str, name: str, steps: int | None, default: int, n: int) -> int:
    """Return the Lanczos steps asked for, at most n."""
    if steps is None:
        return min(default, n)
    checks.integer(who, name, steps, 1, hint=f"{default} is the default.")
    if steps > n:
        raise ValueError(f"{who}: {name} must be at most n, the {n} entries of params, got {steps}; leave it out.")
    return int(steps)


def number_of_pairs(who: str, num: int, n: int) -> None:
    """Raise a TypeError or ValueError that names `who` and `num`, unless 1 <= num <= n, the entries of params."""
    checks.integer(who, "num", num, 1)
    if num > n:
        raise ValueError(f"{who}: num must be at most n, the {n} entries of params, got {num}.")


def _symmetric(who: str, hvp_fn: Product, params: tree.ArrayTree, vector: tree.ArrayTree) -> tree.ArrayTree:
    """Return the product, checked to be a tree like params."""
    out = hvp_fn(params, vector)
    remedy = "hvp_fn(params, vector) must return a tree like params, as secondorder.curvature.hvp(loss) does"
    checks.same_shapes(who, out, params, "the result of hvp_fn", remedy=remedy)
    return jax.tree.map(jnp.asarray, out)
