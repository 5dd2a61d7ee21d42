"""Optimizers, losses and the precision switch that the test modules share."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from conftest import float64

import secondorder as so

OPTIMIZERS = {
    "lbfgs": so.lbfgs(),
    "bfgs": so.bfgs(),
    "newton_trust_region": so.newton(),
    "newton_levenberg": so.newton(so.levenberg()),
    "newton_modified_cholesky": so.newton(so.modified_cholesky()),
    "saddle_free_newton": so.saddle_free_newton(),
}
SECOND_DERIVATIVES = tuple(name for name in OPTIMIZERS if "newton" in name)
DTYPES = ("float32", "float64")
GTOL = {"float32": 1.2e-4, "float64": 1e-5}  # at least the default of `minimize`


def precision(dtype: str) -> contextlib.AbstractContextManager[None]:
    """Run with arrays of this dtype by default."""
    return float64(dtype == "float64")


def rosenbrock(x: jax.Array) -> jax.Array:
    """Chained Rosenbrock function (Moré, Garbow & Hillstrom 1981, problem 1 for n = 2); minimum 0 at ones."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def rosenbrock_start(n: int) -> jax.Array:
    """Return the standard start, (-1.2, 1) repeated."""
    return jnp.array(np.tile([-1.2, 1.0], n // 2))


def convex(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Return a smooth, strictly convex loss that is not quadratic; its gradient vanishes at one point."""
    return jnp.sum(jnp.exp(x - shift)) - jnp.sum(x) + 0.5 * jnp.sum(x**2) + 0.1 * jnp.sum(x) ** 2


def quadratic(x: jax.Array, A: jax.Array, b: jax.Array) -> jax.Array:
    """Return x'Ax/2 - b'x."""
    return 0.5 * jnp.vdot(x, A @ x) - jnp.vdot(b, x)


def spd(seed: int, n: int, low: float = 1.0, high: float = 20.0) -> np.ndarray:
    """Return a symmetric matrix with eigenvalues evenly spaced from `low` to `high`, in float64."""
    return with_spectrum(seed, np.linspace(low, high, n))


def with_spectrum(seed: int, values: np.ndarray) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors, in float64."""
    Q = rotation(seed, len(values))
    A = Q @ np.diag(values) @ Q.T
    return (A + A.T) / 2


def rotation(seed: int, n: int) -> np.ndarray:
    """Return a random orthogonal matrix, in float64."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def bfgs_inverse(pairs: list, gamma: float) -> np.ndarray:
    """Return the inverse Hessian of the BFGS formula from gamma I (N&W 6.17)."""
    H = gamma * np.eye(len(pairs[0][0]))
    for s, y in pairs:
        V = np.eye(s.size) - np.outer(s, y) / (s @ y)
        H = V @ H @ V.T + np.outer(s, s) / (s @ y)
    return H
