"""L-BFGS histories of lower precision: the matrix of the rounded pairs, in float32; the default does without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bfgs_inverse, rosenbrock, rosenbrock_start, with_spectrum

import secondorder as so
from secondorder.linalg import compact_bfgs, tree


def walk(optimizer, loss, x, turns):
    """Return the states of a run."""
    step = jax.jit(lambda g, s, x, v: optimizer.update(g, s, x, value=v))
    evaluate = jax.jit(jax.value_and_grad(loss))
    state, states = optimizer.init(x), []
    for _ in range(turns):
        value, grad = evaluate(x)
        move, state = step(grad, state, x, value)
        x = optax.apply_updates(x, move)
        states.append(state)
    return states


def test_the_default_histories_are_those_of_the_parameters_to_the_last_bit():
    x0 = rosenbrock_start(8)
    default, named = (walk(so.lbfgs(history_dtype=d), rosenbrock, x0, 15)[-1] for d in (None, jnp.float32))
    assert default.memory.rows.dtype == jnp.float32
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b, True), default, named))


def test_the_state_keeps_its_structure_and_half_the_bytes():
    x0 = {"a": jnp.ones(1000), "b": jnp.ones((10, 10))}
    loss = lambda x: jnp.sum((x["a"] - 2) ** 4) + jnp.sum(jnp.cosh(x["b"]))
    first = jax.eval_shape(so.lbfgs(history_dtype="bfloat16").init, x0)
    last = walk(so.lbfgs(history_dtype="bfloat16"), loss, x0, 5)[-1]
    shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes(first) == shapes(last)
    assert {leaf.dtype for leaf in jax.tree.leaves(last.memory.rows)} == {jnp.dtype(jnp.bfloat16)}
    assert last.memory.products.dtype == last.memory.inv_r.dtype == jnp.float32
    whole = jax.eval_shape(so.lbfgs().init, x0)
    size = lambda state: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.memory.rows))
    assert size(first) * 2 == size(whole)


def test_the_matrix_is_that_of_the_rounded_pairs_and_inner_products_are_those_of_float32():
    rng, m, n = np.random.default_rng(0), 6, 200
    H = with_spectrum(0, np.linspace(1.0, 8.0, n))
    memory, g = compact_bfgs.empty(jnp.zeros(n), m, jnp.bfloat16), np.zeros(n, np.float32)
    pairs, errors = [], []
    for _ in range(15):
        s = rng.normal(size=n).astype(np.float32)
        y = (H @ s).astype(np.float32)
        g = g + y
        memory = compact_bfgs.learn(
            memory, jnp.asarray(s), jnp.asarray(y), tree.norm(s), jnp.asarray(g), jnp.dot(g, g), jnp.array(True),
            True, -jnp.inf, positive=True,
        )  # fmt: skip
        rounded = [np.asarray(jnp.asarray(v).astype(jnp.bfloat16).astype(jnp.float32), np.float64) for v in (s, y)]
        pairs = [*pairs, rounded][-m:]
        s, y = rounded
        expected = bfgs_inverse(pairs, s @ y / (y @ y)) @ g.astype(np.float64)
        p, slope = compact_bfgs.direction(memory, jnp.asarray(g), jnp.dot(g, g))
        errors.append(np.linalg.norm(-np.asarray(p) - expected) / np.linalg.norm(expected))
        np.testing.assert_allclose(slope, -g @ expected, rtol=1e-4)
    assert max(errors) < 1e-4  # rounding of bfloat16 is 4e-3


@pytest.mark.parametrize("n", [2, 16])
def test_it_minimizes_rosenbrock_and_falls_at_every_direction(n):
    result = so.minimize(rosenbrock, rosenbrock_start(n), so.lbfgs(history_dtype=jnp.bfloat16), gtol=1e-3)
    whole = so.minimize(rosenbrock, rosenbrock_start(n), so.lbfgs(), gtol=1e-3)
    assert result.success
    assert result.evaluations <= 1.5 * whole.evaluations + 10
    states = walk(so.lbfgs(history_dtype=jnp.bfloat16), rosenbrock, rosenbrock_start(n), 20)
    assert all(float(state.slope) < 0 for state in states)


@pytest.mark.slow
def test_an_ill_conditioned_quadratic_takes_a_few_more_steps():
    H = jnp.asarray(with_spectrum(1, np.logspace(0, 3, 60)), jnp.float32)
    loss = lambda x: 0.5 * x @ H @ x
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=60), jnp.float32)
    half = so.minimize(loss, x0, so.lbfgs(history_dtype=jnp.bfloat16), gtol=1e-3)
    whole = so.minimize(loss, x0, so.lbfgs(), gtol=1e-3)
    assert whole.success
    assert half.success
    assert half.evaluations <= 1.5 * whole.evaluations


def test_a_chain_takes_it_too_and_bad_dtypes_are_errors():
    x, g = jnp.ones(4), jnp.arange(4.0)
    block = so.scale_by_lbfgs(history_dtype="bfloat16")
    updates, state = block.update(g, block.init(x), x)
    assert updates.dtype == jnp.float32
    assert state.memory.rows.dtype == jnp.bfloat16
    for wrong in ("int8", "lower", jnp.complex64):
        with pytest.raises(TypeError, match="lbfgs: history_dtype must be a floating dtype"):
            so.lbfgs(history_dtype=wrong)
    with pytest.raises(ValueError, match="holds no complex parameters"):
        so.lbfgs(history_dtype="bfloat16").init(jnp.ones(3, jnp.complex64))
