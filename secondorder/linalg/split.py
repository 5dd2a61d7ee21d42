"""A vector taken apart into the leaves of a tree, in few compiled kernels.

XLA compiles a slice at a fixed place to a kernel of its own, some 8 milliseconds each on a CPU, and programs here take
the vector apart two or three times: for a network of sixty leaves that was more than all the rest. Slices at places
that are known at run time alone are the same kernel for all leaves of one size, and XLA compiles equal kernels once. So
the places come from a small kernel that XLA does not look into (`one_kernel`). Where it may, on other devices for
instance, it turns them into fixed places again.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from secondorder import one_kernel
from secondorder.linalg import tree

FEWEST = 8  # leaves for which it pays; fewer are taken apart in one kernel, where they are small


def split(vector: jax.Array, like: tree.ArrayTree) -> tree.ArrayTree:
    """Return the vector, shape (n,), as a tree with the shapes of `like`, in the order of `ravel_pytree`."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size for leaf in leaves]
    # Vectors first, then their shapes: a loop over one index is compiled to a plain copy.
    few = one_kernel.as_one(lambda x: jax.lax.split(x, sizes))
    parts = few(vector) if len(leaves) < FEWEST else _many(sizes)(vector)
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _many(sizes: list[int]) -> Callable[[jax.Array], list[jax.Array]]:
    """Return the function that takes a vector apart into pieces of these sizes."""
    begins = [end - size for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]

    @jax.custom_batching.custom_vmap
    def moving(x: jax.Array) -> list[jax.Array]:
        places = one_kernel.as_one(lambda zero: [zero + np.uint32(begin) for begin in begins])
        known = places(jnp.zeros((), jnp.uint32))  # (unsigned: JAX would look for negative places)
        return [jax.lax.dynamic_slice(x, (begin,), (size,)) for begin, size in zip(known, sizes, strict=True)]

    @moving.def_vmap
    def _(_: int, __: list[bool], x: jax.Array) -> tuple[list[jax.Array], list[bool]]:
        # JAX would make a gather of each slice.
        return list(jax.lax.split(x, sizes, axis=1)), [True] * len(sizes)

    pieces = jax.custom_jvp(moving)

    @pieces.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        # Linear; what `custom_vmap` made has no reverse mode.
        return pieces(*primals), list(jax.lax.split(tangents[0], sizes))

    return pieces
