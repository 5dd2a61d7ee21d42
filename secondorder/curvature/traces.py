"""Trace and diagonal of a curvature matrix from random probes, with the errors of the estimates.

Hutchinson (1990) for the trace, Hutch++ (Meyer, Musco, Musco & Woodruff 2021) where a few eigenvalues carry it,
Bekas, Kokiopoulou & Saad (2007) for the diagonal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.curvature.estimate import Estimate, from_samples
from secondorder.curvature.linear_map import linear_map
from secondorder.curvature.products import Product
from secondorder.curvature.program import compiled
from secondorder.linalg import probes as random
from secondorder.linalg import tree

PRODUCTS = 99  # default of Hutch++
ROUNDING = 100.0  # a variance below ROUNDING eps ||A||_F² is the difference of two rounded numbers


class Diagonal(NamedTuple):
    """Estimated diagonal of a matrix, as trees like params."""

    value: tree.ArrayTree
    standard_error: tree.ArrayTree  # of every entry
    products: jax.Array  # int32: matrix-vector products spent


@compiled
def trace(hvp_fn: Product, params: tree.ArrayTree, *, probes: int = 100, key: jax.Array | None = None) -> Estimate:
    """Estimate the trace by Hutchinson's method: the mean of z'Az over random signs z.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays, finite.
      probes: Random vectors, >= 2. Default 100.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `Estimate(value, standard_error, margin, products)`; unbiased, variance 2 (||A||_F² - sum of A_ii²) / probes;
      the standard error is the larger of two estimates of it, from the spread of z'Az and from ||Az||².
      Cost: `probes` products; memory a few vectors.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> float(curvature.trace(curvature.hvp(lambda x: jnp.sum(x**2)), jnp.zeros(3)).value)
      6.0

    References: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix", Comm. Stat. 19.
    """
    A = linear_map("trace", hvp_fn, params)
    _at_least("trace", "probes", probes, 2)
    samples, deviation = _hutchinson(A.apply, A.zero, _key(key), probes)
    return from_samples(samples, probes, deviation=deviation)


@compiled
def trace_hutchpp(
    hvp_fn: Product, params: tree.ArrayTree, *, products: int | None = None, key: jax.Array | None = None
) -> Estimate:
    """Estimate the trace by Hutch++: exactly on the range of a random sketch, by Hutchinson's method beyond it.

    tr A = tr(Q'AQ) + tr((I - QQ')A(I - QQ')), Q an orthonormal basis of A S, S random signs with products / 3 columns.
    For positive semidefinite A the error falls with the number of products, not with its root; where the eigenvalues
    are as many as they are alike, it is no better than `trace`.

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays with n entries in all, finite. Sharded leaves are gathered.
      products: Matrix-vector products, a third for each of sketch, exact part and rest; 6 <= products <= 3 n. Default:
        99. Where a third is n, by the default of small problems, say, the trace is computed exactly by n products.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `Estimate`; the error is that of the random rest. Cost: `products` products; memory 2 products / 3 vectors.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> loss = lambda x: jnp.sum(x[:2]) ** 2 + 1e-3 * jnp.sum(x**2)
      >>> round(float(curvature.trace_hutchpp(curvature.hvp(loss), jnp.zeros(20), products=12).value), 2)
      4.04

    References: Meyer, Musco, Musco & Woodruff (2021), "Hutch++: Optimal stochastic trace estimation", SOSA,
    Algorithm 1.
    """
    who = "trace_hutchpp"
    A = linear_map(who, hvp_fn, params)
    if products is None:
        products = min(PRODUCTS, 3 * A.size)
    else:
        _at_least(who, "products", products, 6)
        if products > 3 * A.size:
            raise ValueError(
                f"{who}: products must be at most 3 n = {3 * A.size}, got {products}; leave it out for the exact trace."
            )
    columns = products // 3
    sketch_key, rest_key = jax.random.split(_key(key))
    apply = lambda v: tree.ravel(A.apply(tree.unravel(v, A.zero)), A.dtype)
    flat = jnp.zeros(A.size, A.dtype)
    if columns == A.size:
        entries = jax.lax.map(lambda v: tree.dot(v, apply(v)), jnp.eye(A.size, dtype=A.dtype))
        nothing = jnp.zeros((), A.dtype)
        return Estimate(jnp.sum(entries), nothing, nothing, jnp.int32(A.size))

    # 1. An orthonormal basis of the range of A S.
    sketch = jax.lax.map(lambda k: apply(random.signs(k, flat)), jax.random.split(sketch_key, columns)).T
    Q, _ = jnp.linalg.qr(sketch)
    # 2. The trace on the range.
    AQ = jax.lax.map(apply, Q.T).T
    exact = jnp.sum(Q * AQ)

    # 3. Hutchinson's method on what is left.
    def rest(z: jax.Array) -> jax.Array:
        w = apply(_beyond(Q, z))
        return _beyond(Q, w)

    probes = products - 2 * columns
    samples, deviation = _hutchinson(rest, flat, rest_key, probes)
    return from_samples(samples, products, exact, deviation)


@compiled
def diagonal(hvp_fn: Product, params: tree.ArrayTree, *, probes: int = 100, key: jax.Array | None = None) -> Diagonal:
    """Estimate the diagonal: the mean of z * Az over random signs z (Bekas, Kokiopoulou & Saad 2007).

    Args:
      hvp_fn: hvp_fn(params, vector) -> A vector, A symmetric.
      params: Where; any pytree of real arrays, finite.
      probes: Random vectors, >= 2. Default 100.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `Diagonal(value, standard_error, products)`, unbiased; the variance of entry i is the sum of A_ij², j ≠ i, over
      `probes`. Cost: `probes` products; memory a few vectors.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> curvature.diagonal(curvature.hvp(lambda x: jnp.sum(x**3)), jnp.array([1.0, 2.0])).value.tolist()
      [6.0, 12.0]

    References: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57.
    """
    A = linear_map("diagonal", hvp_fn, params)
    _at_least("diagonal", "probes", probes, 2)

    def add(carry: tuple, key: jax.Array) -> tuple:  # running mean and sum of squares (Welford 1962)
        count, mean, squares, unit = carry
        z = random.signs(key, A.zero)
        sample = jax.tree.map(jnp.multiply, z, A.apply(z))
        # In the unit of the first sample squares neither overflow nor underflow.
        unit = jnp.where(count > 0, unit, tree.power_of_two(tree.max_norm(sample)))
        sample = tree.scale(1.0 / unit, sample)
        before = tree.sub(sample, mean)
        mean = tree.axpy(1.0 / (count + 1), before, mean)
        squares = jax.tree.map(lambda s, a, b, m: s + a * (b - m), squares, before, sample, mean)
        return (count + 1, mean, squares, unit), None

    start = (jnp.zeros((), A.dtype), A.zero, A.zero, jnp.ones((), A.dtype))
    (_, mean, squares, unit), _ = jax.lax.scan(add, start, jax.random.split(_key(key), probes))
    error = jax.tree.map(lambda s: unit * jnp.sqrt(s / (probes * (probes - 1))), squares)
    return Diagonal(A.split(tree.scale(unit, mean)), A.split(error), jnp.int32(probes))


def _hutchinson(
    apply: Callable[[tree.ArrayTree], tree.ArrayTree], zero: tree.ArrayTree, key: jax.Array, probes: int
) -> tuple[jax.Array, jax.Array]:
    """Return z'Az for random signs z, shape (probes,), and an estimate of their standard deviation, shape ().

    The variance is 2 (||A||_F² - sum of A_ii²). The mean of ||Az||² estimates the first term, the products of z * Az of
    different probes the second. Where a few eigenvalues dominate, the samples are skewed, and few of them
    underestimate their own variance: with this one beside it, 95 % intervals hold in 95 % of the cases (30 probes on
    a logistic regression: 91 % without).
    """

    def add(carry: tuple, key: jax.Array) -> tuple:
        total, squares, lengths, unit = carry
        z = random.signs(key, zero)
        Az = apply(z)
        # In the unit of the first product squares neither overflow nor underflow.
        unit = jnp.where(unit > 0, unit, tree.power_of_two(tree.max_norm(Az)))
        Az = tree.scale(1.0 / unit, Az)
        entries = jax.tree.map(jnp.multiply, z, Az)
        total = tree.axpy(1.0, entries, total)
        squares, lengths = squares + tree.dot(entries, entries), lengths + tree.dot(Az, Az)
        return (total, squares, lengths, unit), unit * tree.dot(z, Az)

    nothing = jnp.zeros((), tree.scalar_dtype(zero))
    sums, samples = jax.lax.scan(add, (zero, nothing, nothing, nothing), jax.random.split(key, probes))
    total, squares, lengths, unit = sums
    on_diagonal = (tree.dot(total, total) - squares) / (probes * (probes - 1))
    variance = 2 * (lengths / probes - on_diagonal)
    visible = variance > ROUNDING * jnp.finfo(variance.dtype).eps * lengths / probes
    return samples, unit * jnp.sqrt(jnp.where(visible, variance, 0.0))


def _beyond(Q: jax.Array, v: jax.Array) -> jax.Array:
    """Return (I - QQ') v."""
    return v - tree.matmul(Q, tree.matmul(Q.T, v))


def _at_least(who: str, name: str, value: Any, low: int) -> None:
    checks.integer(who, name, value, low, hint="100 gives a standard error of a tenth of one probe's.")


def _key(key: jax.Array | None) -> jax.Array:
    return jax.random.key(0) if key is None else key
