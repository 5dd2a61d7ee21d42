"""The problem of all programs in this folder: a ridge-penalized logistic regression with a known kind of answer."""

import jax
import jax.numpy as jnp
import numpy as np

N, FEATURES = 200, 5


def make():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, FEATURES))
    y = (X @ np.array([1.0, -2.0, 0.5, 0.0, 3.0]) + rng.normal(size=N) > 0).astype(float)
    return X, y


def loss(w, X, y):
    """Mean negative log-likelihood with a ridge: strictly convex, one minimum."""
    z = X @ w
    return jnp.mean(jax.nn.softplus(z) - y * z) + 0.01 * w @ w


def numpy_loss(w, X, y):
    """The same in NumPy, with its gradient."""
    z = X @ w
    value = np.mean(np.logaddexp(0.0, z) - y * z) + 0.01 * w @ w
    return value, X.T @ (1 / (1 + np.exp(-z)) - y) / len(y) + 0.02 * w
