"""Natural gradient in the space of samples: the dense formula, small damping, batches, faults."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import secondorder as so


def problem(m: int, n: int, dtype="float64"):
    rng = np.random.default_rng(m)
    A = jnp.asarray(rng.normal(size=(m, n)), dtype)
    scores = lambda x: jnp.tanh(A @ jnp.concatenate([x["a"], x["b"].ravel()]))
    x = {"a": jnp.asarray(rng.normal(size=n - 4) * 0.1, dtype), "b": jnp.asarray(rng.normal(size=(2, 2)) * 0.1, dtype)}
    J = jax.jacobian(lambda v: scores({"a": v[:-4], "b": v[-4:]}))(jnp.concatenate([x["a"], x["b"].ravel()]))
    return scores, x, np.asarray(J), rng


def split(v: np.ndarray) -> dict[str, jax.Array]:
    return {"a": jnp.asarray(v[:-4]), "b": jnp.asarray(v[-4:].reshape(2, 2))}


def direction(scores, damping, g, x, **extra) -> np.ndarray:
    block = so.scale_by_natural_gradient(scores, damping)
    p, _ = jax.jit(lambda g, x: block.update(split(g), block.init(x), x, **extra))(g, x)
    return np.concatenate([p["a"], np.ravel(p["b"])])


@pytest.mark.x64
@pytest.mark.parametrize(("m", "n"), [(5, 30), (30, 12)], ids=["fewer samples", "more samples"])
@pytest.mark.parametrize("inside", [True, False])
def test_it_is_the_dense_formula_in_either_space(m, n, inside):
    scores, x, J, rng = problem(m, n)
    g = J.T @ rng.normal(size=m) if inside else rng.normal(size=n)
    p = direction(scores, 0.03, g, x)
    np.testing.assert_allclose(p, np.linalg.solve(J.T @ J + 0.03 * np.eye(n), g), rtol=1e-9, atol=1e-11)
    if inside and m < n:
        u = np.linalg.lstsq(J.T, g, rcond=None)[0]
        np.testing.assert_allclose(p, J.T @ np.linalg.solve(J @ J.T + 0.03 * np.eye(m), u), rtol=1e-9, atol=1e-11)


@pytest.mark.x64
def test_a_small_damping_leaves_no_rounding_outside_of_the_rows():
    scores, x, J, rng = problem(5, 30)
    g = J.T @ rng.normal(size=5)
    exact = np.linalg.pinv(J.T @ J, rcond=1e-12) @ g
    for damping in (1e-14, 0.0):
        np.testing.assert_allclose(direction(scores, damping, g, x), exact, rtol=1e-8, atol=1e-11)


def test_in_float32_it_is_as_exact_as_the_condition_of_the_rows_lets_it_be():
    scores, x, J, rng = problem(5, 30, "float32")
    wide = J.astype(np.float64)
    g = wide.T @ rng.normal(size=5)
    p = direction(scores, 1e-6, g.astype(np.float32), x)
    expected = wide.T @ np.linalg.solve(wide @ wide.T + 1e-6 * np.eye(5), np.linalg.lstsq(wide.T, g, rcond=None)[0])
    np.testing.assert_allclose(p, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_batches_are_handed_to_the_scores_and_it_trains_in_a_chain():
    rng = np.random.default_rng(0)
    inputs, truth = jnp.asarray(rng.normal(size=(200, 40)), jnp.float32), jnp.asarray(rng.normal(size=40), jnp.float32)
    targets = inputs @ truth
    residual = lambda w, batch: (batch[0] @ w - batch[1]) / 16**0.5
    loss = lambda w, batch: 0.5 * jnp.sum(residual(w, batch) ** 2)
    optimizer = optax.chain(so.scale_by_natural_gradient(residual, 1e-3), optax.scale_by_learning_rate(1.0))

    @jax.jit
    def step(w, state, index):
        batch = inputs[index], targets[index]
        move, state = optimizer.update(jax.grad(loss)(w, batch), state, w, batch=batch, other=3)
        return optax.apply_updates(w, move), state

    w = jnp.zeros(40)
    state = optimizer.init(w)
    for turn in range(40):
        w, state = step(w, state, jnp.asarray(np.random.default_rng(turn).integers(0, 200, 16)))
    assert float(jnp.linalg.norm(w - truth)) < 1e-2 * float(jnp.linalg.norm(truth))


def test_what_is_not_finite_gives_no_update_and_bad_options_an_error():
    g, x = jnp.ones(3), jnp.zeros(3)
    block = so.scale_by_natural_gradient(jnp.sqrt, 1e-2)
    np.testing.assert_array_equal(block.update(g, block.init(x), x)[0], np.zeros(3))
    with pytest.raises(TypeError, match="scale_by_natural_gradient: scores must be"):
        so.scale_by_natural_gradient(3, 1e-2)
    with pytest.raises(ValueError, match="scale_by_natural_gradient: damping must be"):
        so.scale_by_natural_gradient(jnp.sin, -1.0)
    with pytest.raises(ValueError, match=r"scale_by_natural_gradient: .*the parameters"):
        block.update(g, block.init(x))
