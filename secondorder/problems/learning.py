"""Losses of machine learning, built from arrays of data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from secondorder.problems.card import Problem


def logistic_regression(features: np.ndarray, labels: np.ndarray, ridge: float = 1e-3) -> Problem:
    """Return mean log(1 + exp(-y a'x)) + ridge ||x||² / 2, strictly convex; the start is 0, the loss there log 2.

    Args:
      features: a, shape (samples, n).
      labels: Shape (samples,), 0 and 1, or False and True.
      ridge: >= 0, no unit.

    Returns:
      The card; its minimum is not known (NaN). The loss holds the data in the precision of `x`.

    Raises:
      ValueError: if the shapes do not fit, or a label is neither 0 nor 1.
    """
    a, labels = _data("logistic_regression", features, labels)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("logistic_regression: labels must be 0 or 1; for more classes take softmax_regression.")
    sign = 2.0 * labels - 1.0

    def fun(x: jax.Array) -> jax.Array:
        margin = jnp.asarray(sign, x.dtype) * (jnp.asarray(a, x.dtype) @ x)
        return jnp.mean(jnp.logaddexp(0, -margin)) + 0.5 * ridge * jnp.vdot(x, x)

    return Problem("logistic_regression", fun, np.zeros(a.shape[1]), np.nan, None, "ours")


def softmax_regression(features: np.ndarray, labels: np.ndarray, ridge: float = 1e-3) -> Problem:
    """Return the mean cross-entropy of a linear classifier + ridge ||W||² / 2, convex; the start is 0.

    Args:
      features: Shape (samples, n).
      labels: Integers from 0 on, shape (samples,).
      ridge: >= 0, no unit.

    Returns:
      The card, with parameters {"W": (n, classes), "b": (classes,)}; its minimum is not known (NaN).

    Raises:
      ValueError: if the shapes do not fit.
    """
    a, labels = _data("softmax_regression", features, labels)
    classes = int(labels.max()) + 1

    def fun(x: dict[str, jax.Array]) -> jax.Array:
        logits = jnp.asarray(a, x["W"].dtype) @ x["W"] + x["b"][None]
        return _cross_entropy(logits, labels) + 0.5 * ridge * jnp.sum(x["W"] ** 2)

    start = {"W": np.zeros((a.shape[1], classes)), "b": np.zeros(classes)}
    return Problem("softmax_regression", fun, start, np.nan, None, "ours")


def mlp(features: np.ndarray, labels: np.ndarray, hidden: int = 32, ridge: float = 1e-3, seed: int = 0) -> Problem:
    """Return the mean cross-entropy of a network with one hidden layer of tanh + ridge ||W||² / 2; not convex.

    Args:
      features: Shape (samples, n).
      labels: Integers from 0 on, shape (samples,).
      hidden: Hidden units, >= 1.
      ridge: >= 0, no unit; on the weight matrices.
      seed: Of the start: normal weights of variance 1 / fan-in, zero biases.

    Returns:
      The card, with parameters {"W1", "b1", "W2", "b2"}; its minimum is not known (NaN).

    Raises:
      ValueError: if the shapes do not fit.
    """
    a, labels = _data("mlp", features, labels)
    n, classes = a.shape[1], int(labels.max()) + 1
    rng = np.random.default_rng(seed)

    def fun(x: dict[str, jax.Array]) -> jax.Array:
        layer = jnp.tanh(jnp.asarray(a, x["W1"].dtype) @ x["W1"] + x["b1"][None])
        logits = layer @ x["W2"] + x["b2"][None]
        return _cross_entropy(logits, labels) + 0.5 * ridge * (jnp.sum(x["W1"] ** 2) + jnp.sum(x["W2"] ** 2))

    start = {
        "W1": rng.standard_normal((n, hidden)) / n**0.5,
        "b1": np.zeros(hidden),
        "W2": rng.standard_normal((hidden, classes)) / hidden**0.5,
        "b2": np.zeros(classes),
    }
    return Problem("mlp", fun, start, np.nan, None, "ours")


def _data(who: str, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, labels = np.asarray(features), np.asarray(labels)
    if a.ndim != 2 or labels.shape != a.shape[:1] or a.size == 0:
        raise ValueError(
            f"{who}: features must have shape (samples, n) and labels (samples,), got {a.shape} and {labels.shape}."
        )
    return a, labels.astype(np.int32)


def _cross_entropy(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)))
