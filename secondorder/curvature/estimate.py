"""A mean over random probes with the error that it admits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
FEW = {1: 12.706204736432095, 2: 4.302652729911275, 3: 3.182446305284263}  # Student's, where the expansion is poor


class Estimate(NamedTuple):
    """A random estimate and its error."""

    value: jax.Array  # the mean over independent probes
    standard_error: jax.Array  # its standard deviation, estimated from the probes; NaN for a single one
    margin: jax.Array  # half width of the 95 % confidence interval, by Student's distribution
    products: jax.Array  # int32: matrix-vector products spent


def from_samples(
    samples: jax.Array, products: int, exact: jax.Array | float = 0.0, deviation: jax.Array | float = 0.0
) -> Estimate:
    """Return the estimate exact + mean of `samples`, shape (probes,), independent of each other.

    Their own standard deviation is taken, or `deviation` if that is more: a further estimate, of another origin.
    """
    probes = samples.shape[0]
    unit = tree.power_of_two(jnp.max(jnp.abs(samples)))  # in which no square overflows or underflows
    spread = unit * jnp.std(samples / unit, ddof=1) if probes > 1 else jnp.full((), jnp.nan, samples.dtype)
    spread = jnp.maximum(spread, deviation)
    error = spread / probes**0.5
    value = exact + jnp.mean(samples)
    return Estimate(value, error, error * student(probes - 1) if probes > 1 else error, jnp.int32(products))


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution (Abramowitz & Stegun 1972, 26.7.5; error below 1e-3)."""
    if freedom in FEW:
        return FEW[freedom]
    z, v = NORMAL, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4
