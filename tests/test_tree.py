"""Inner products: several of them at once are what they are one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.linalg import tree

SIZES = [0, 1, 4, 5, 6, 300, tree.SHORT, tree.SHORT + 1]


def both(a, b):
    """Return the products in one loop, and one by one."""
    pairs = ((a, b), (a, a), (b, b))
    return tree.products(*pairs, peak=b), (*(tree.dot(x, y) for x, y in pairs), tree.max_norm(b))


def vectors(n, dtype):
    rng = np.random.default_rng(n)
    draw = lambda: rng.normal(size=n) + (1j * rng.normal(size=n) if dtype == "complex64" else 0)
    return jnp.asarray(draw(), dtype), jnp.asarray(draw(), dtype)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("n", SIZES)
def test_they_are_those_of_dot_and_max_norm(n, dtype, compiled):
    together, apart = (jax.jit(both) if compiled else both)(*vectors(n, dtype))
    assert [x.dtype for x in together] == [x.dtype for x in apart] == [jnp.float32] * 4
    # The longest sum that is taken one entry after the other rounds by sqrt(n) eps.
    level = np.finfo(np.float32).eps * n**0.5 if n == tree.SHORT else 1e-6
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=level, atol=1e-6 * max(1, n) ** 0.5)


def test_trees_of_several_leaves_and_scalars_are_taken_leaf_by_leaf():
    a = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(2.0), "none": {}}
    together, apart = both(a, jax.tree.map(lambda x: -2.0 * x, a))
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [4, 6, tree.SHORT + 1])
def test_an_entry_that_is_not_finite_is_seen_by_the_products_that_it_enters_alone(n, bad):
    a, b = (v.at[n // 2].set(value) for v, value in zip(vectors(n, "float32"), (1.0, bad), strict=True))
    ab, aa, bb, peak = jax.jit(lambda a, b: both(a, b)[0])(a, b)
    assert not np.isfinite(ab)
    assert np.isfinite(aa)
    assert not np.isfinite(bb)
    assert not np.isfinite(peak)


def test_short_ones_are_one_reduction():
    """Counted in the program that XLA is given: one reduce of four, however many products there are."""
    program = lambda n: jax.jit(lambda a, b: both(a, b)[0]).lower(*vectors(n, "float32")).as_text()
    assert program(6).count("stablehlo.reduce") == 1
    assert program(tree.SHORT).count("stablehlo.reduce") == 1


def test_arrays_of_numpy_are_taken():
    x = np.arange(6.0, dtype=np.float32)
    assert float(tree.dot(x, x)) == 55.0
    assert float(tree.products((x, x), peak=x)[0]) == 55.0
    assert float(tree.max_norm(x)) == 5.0
