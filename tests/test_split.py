"""A vector taken apart into leaves: the same numbers under every transformation, in few compiled kernels."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder import one_kernel
from secondorder.linalg import split

SHAPES = [(3, 2), (), (4,), (0,), (3, 2), (1, 1, 2), (4,), (3, 2), (), (5,)]


def leaves(number, dtype=jnp.float32):
    """Return a tree of that many leaves, whose entries are all different."""
    sizes = [int(np.prod(shape)) for shape in SHAPES[:number]]
    entries = iter(np.arange(1.0, 1.0 + sum(sizes)))
    made = [np.array([next(entries) for _ in range(size)]) for size in sizes]
    return {f"{k:02}": jnp.asarray(x.reshape(s), dtype) for k, (x, s) in enumerate(zip(made, SHAPES, strict=False))}


@pytest.mark.parametrize("number", [2, split.FEWEST - 1, len(SHAPES)])
def test_the_leaves_are_those_of_ravel_pytree(number):
    x = leaves(number)
    vector, restore = ravel_pytree(x)
    apart = lambda v: split.split(v, x)
    chex.assert_trees_all_equal(apart(vector), x)
    chex.assert_trees_all_equal(jax.jit(apart)(vector), x)
    lanes = jnp.stack([vector, -2 * vector])
    twice = lambda f: jax.vmap(jax.vmap(f))(lanes[None])
    along = lambda f: jax.jvp(f, (vector,), (vector**2,))
    for wrap in (lambda f: f, jax.jit):
        chex.assert_trees_all_equal(wrap(jax.vmap(apart))(lanes), jax.vmap(restore)(lanes))
        chex.assert_trees_all_equal(wrap(jax.vmap(apart, 1))(lanes.T), jax.vmap(restore)(lanes))
        chex.assert_trees_all_equal(twice(wrap(apart)), twice(restore))
        chex.assert_trees_all_equal(along(wrap(apart)), along(restore))
    loss = lambda f: lambda v: sum(k * jnp.sum(leaf**3) for k, leaf in enumerate(jax.tree.leaves(f(v))))
    chex.assert_trees_all_close(jax.jit(jax.grad(loss(apart)))(vector), jax.grad(loss(restore))(vector))
    product = lambda f: jax.jit(lambda v: jax.jvp(jax.grad(loss(f)), (v,), (v,)))(vector)
    chex.assert_trees_all_close(product(apart), product(restore))
    chex.assert_trees_all_close(jax.jit(jax.hessian(loss(apart)))(vector), jax.hessian(loss(restore))(vector))


def test_lanes_are_taken_apart_by_slices():
    """Not by gathers, which JAX makes of a slice at a place that it does not know."""
    x = leaves(len(SHAPES))
    lanes = jnp.ones((7, ravel_pytree(x)[0].size))
    lowered = jax.jit(jax.vmap(lambda v: split.split(v, x))).lower(lanes).as_text()
    assert "gather" not in lowered
    assert "dynamic_slice" not in lowered


@pytest.mark.skipif(not one_kernel.KNOWN, reason="the places are hidden where kernels of a whole program are known")
def test_equal_leaves_are_equal_slices():
    """Leaves of one size are slices that differ in a run-time place alone, of which XLA compiles one kernel."""
    x = [jnp.zeros((4, 8)), jnp.zeros(8)] * 6
    vector = ravel_pytree(x)[0]
    compiled = jax.jit(lambda v: split.split(v, x)).lower(vector).compile().as_text()
    assert re.findall(r"dynamic_slice_sizes=\{(\d+)\}", compiled).count("32") == 6
    assert re.findall(r"dynamic_slice_sizes=\{(\d+)\}", compiled).count("8") == 6
    assert not re.search(r"[^-]\bslice\(", compiled)  # none at a place of its own


@pytest.mark.parametrize("optimizer", [so.bfgs, so.lbfgs, so.newton, so.newton_cg])
def test_trees_of_many_leaves_are_minimized_as_vectors_are(optimizer):
    x = leaves(len(SHAPES))
    vector, restore = ravel_pytree(x)
    loss = lambda x: sum(jnp.sum(k * (u - 1.0) ** 2 + u**4 / 50) for k, u in enumerate(jax.tree.leaves(x), 1))
    ours = so.minimize(loss, x, optimizer())
    plain = so.minimize(lambda v: loss(restore(v)), vector, optimizer())
    assert ours.success
    assert ours.evaluations == plain.evaluations
    chex.assert_trees_all_close((ours.params, ours.grad), (restore(plain.params), restore(plain.grad)), atol=1e-4)
