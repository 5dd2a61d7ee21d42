"""Random vectors that are trees: normal entries and random signs."""

from collections.abc import Callable

import jax

from secondorder.linalg import tree


def normal(key: jax.Array, like: tree.ArrayTree) -> tree.ArrayTree:
    """Return a tree of independent standard normal entries."""
    return _drawn(jax.random.normal, key, like)


def signs(key: jax.Array, like: tree.ArrayTree) -> tree.ArrayTree:
    """Return a tree of independent random signs; for z'Az they have the least variance of all such entries."""
    return _drawn(jax.random.rademacher, key, like)


def _drawn(draw: Callable[..., jax.Array], key: jax.Array, like: tree.ArrayTree) -> tree.ArrayTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [tree.spread(draw(k, leaf.shape, leaf.dtype), leaf) for k, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)
