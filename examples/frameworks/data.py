"""The task that the examples of this folder share: two interleaved half moons, told apart by a small network."""

import jax
import jax.numpy as jnp
import optax


def moons(samples=200, noise=0.1, seed=0):
    """Return points, shape (samples, 2), and labels in {0, 1}."""
    angle, jitter = jax.random.split(jax.random.key(seed))
    t = jnp.pi * jax.random.uniform(angle, (samples,))
    label = jnp.arange(samples) % 2
    upper = jnp.stack([jnp.cos(t), jnp.sin(t)], axis=1)
    lower = jnp.stack([1 - jnp.cos(t), 0.5 - jnp.sin(t)], axis=1)
    x = jnp.where(label[:, None] == 0, upper, lower)
    return x + noise * jax.random.normal(jitter, x.shape), label


def cross_entropy(logits, labels):
    """Return the mean cross-entropy of logits, shape (samples, 2)."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def report(name, first, last, accuracy):
    """Print the outcome of a training, and fail if it did not learn."""
    print(f"{name}: loss {first:.4f} -> {last:.4f}, accuracy {accuracy:.3f}")
    assert last < 0.1 * first, "the loss should fall to a tenth"
    assert accuracy > 0.97
