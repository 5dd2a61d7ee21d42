"""Quadratics with a prescribed spectrum."""

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.problems.card import Problem


def quadratic(spectrum: np.ndarray | list[float], seed: int = 0) -> Problem:
    """Return (x - 1)' H (x - 1) / 2 with H = Q diag(spectrum) Q' for a random rotation Q; the start is 0.

    Args:
      spectrum: Eigenvalues of H [f/x²], shape (n,), n >= 1. With a negative one there is no minimum.
      seed: Of the rotation.

    Returns:
      The card. The loss holds H, so that a new call makes a new loss (and a new compilation).

    Raises:
      ValueError: if `spectrum` is not a vector of finite numbers.
    """
    values = np.asarray(spectrum, float)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"quadratic: spectrum must be a vector of finite numbers, got {spectrum!r}; try [1.0, 10.0].")
    n = values.size
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    H = (rotation * values) @ rotation.T
    H = 0.5 * (H + H.T)

    def fun(x: jax.Array) -> jax.Array:
        d = x - 1
        return 0.5 * jnp.vdot(d, jnp.matmul(jnp.asarray(H, x.dtype), d, precision=jax.lax.Precision.HIGHEST))

    convex = values.min() >= 0
    minimum, minimizer = (0.0, np.ones(n)) if convex else (-np.inf, None)
    return Problem(f"quadratic_{n}", fun, np.zeros(n), minimum, minimizer, "ours")
