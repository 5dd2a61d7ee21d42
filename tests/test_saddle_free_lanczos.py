"""Saddle-free Newton in a Krylov space: the dense method at full rank, damping outside of it, saddles, faults."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rosenbrock, rosenbrock_start, spd, with_spectrum

import secondorder as so
from secondorder import Status
from secondorder.optimizers import saddle_free_newton as module

N = 10


def run(optimizer: Any, loss: Any, x: jax.Array, turns: int) -> tuple[jax.Array, Any]:
    """Return the points shown to the optimizer, with a leading axis, and the state at the end."""

    def turn(carry: Any, _: None) -> Any:
        x, state = carry
        value, grad = jax.value_and_grad(loss)(x)
        move, state = optimizer.update(grad, state, x, value=value, hvp_fn=so.curvature.hvp(loss))
        return (x + move, state), x + move

    (_, state), points = jax.lax.scan(turn, (x, optimizer.init(x)), None, turns)
    return points, state


@pytest.mark.x64
def test_at_full_rank_it_takes_the_steps_of_the_dense_method():
    x0 = rosenbrock_start(N)
    lanczos, state = jax.jit(lambda x: run(so.saddle_free_newton(rank=N), rosenbrock, x, 12))(x0)
    dense, _ = jax.jit(lambda x: run(so.saddle_free_newton(), rosenbrock, x, 12))(x0)
    np.testing.assert_allclose(lanczos, dense, rtol=1e-7, atol=1e-7)
    assert state.info.hessians == 0
    assert state.info.hessian_products == N * (1 + state.info.iterations)


@pytest.mark.x64
def test_every_lane_of_vmap_runs_as_if_alone_and_a_rank_below_n_converges():
    starts = jnp.stack([rosenbrock_start(N), jnp.linspace(-1.0, 2.0, N)])
    minimum = jax.jit(lambda x: so.minimize(rosenbrock, x, so.saddle_free_newton(rank=6)))
    lanes = jax.vmap(minimum)(starts)
    assert np.all(lanes.success)
    for i, x0 in enumerate(starts):
        alone = minimum(x0)
        assert alone.evaluations == lanes.evaluations[i]
        np.testing.assert_allclose(lanes.params[i], alone.params, rtol=1e-6)


@pytest.mark.parametrize("start", [(0.0, 0.0), (1.0, 0.0)], ids=["on the saddle", "on the ridge"])
def test_it_leaves_a_saddle_that_the_gradient_does_not_see(start):
    loss = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4
    result = so.minimize(loss, jnp.array(start), so.saddle_free_newton(rank=2))
    assert result.success
    np.testing.assert_allclose(result.value, -0.25, atol=1e-6)
    np.testing.assert_allclose(result.curvature, 2.0, rtol=1e-2)


@pytest.mark.x64
def test_outside_of_the_subspace_the_gradient_is_damped_by_the_smallest_ritz_value_or_the_damping():
    H, rng = with_spectrum(0, np.concatenate([[-4.0], np.linspace(1.0, 20.0, N - 1)])), np.random.default_rng(0)
    g, start = jnp.asarray(rng.normal(size=N)), jnp.asarray(rng.normal(size=N))
    for damping in (0.0, 7.0):
        model, skew = module._krylov("test", lambda x, v: H @ v, jnp.zeros(N), g, start, 4, damping)
        assert not skew
        Q = np.asarray(model.rows)
        outside = g - Q.T @ (Q @ g)
        least = max(damping, float(np.min(np.abs(model.values[:4]))))
        np.testing.assert_allclose(model.values[4], least)
        sizes = np.maximum(np.abs(model.values), damping)
        p = module._combine(model, g, -model.rotated / sizes)
        np.testing.assert_allclose(p - Q.T @ (Q @ p), -outside / least, rtol=1e-9, atol=1e-12)
        T = Q @ H @ Q.T
        values, vectors = np.linalg.eigh(T)
        inside = -vectors @ (vectors.T @ (Q @ g) / np.maximum(np.abs(values), damping))
        np.testing.assert_allclose(Q @ p, inside, rtol=1e-9)


@pytest.mark.x64
def test_the_block_of_full_rank_is_the_dense_block():
    H, g = with_spectrum(1, np.concatenate([[-4.0, -1.0], np.linspace(1.0, 20.0, N - 2)])), jnp.linspace(-1.0, 2.0, N)
    x, hvp = jnp.zeros(N), lambda x, v: H @ v
    ends = []
    for rank in (None, N):
        block = so.scale_by_saddle_free_newton(rank=rank)
        ends.append(block.update(g, block.init(x), x, hvp_fn=hvp)[0])
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-8)


def test_a_rank_above_n_is_an_error_that_names_both_numbers():
    for make in (so.saddle_free_newton, so.scale_by_saddle_free_newton):
        with pytest.raises(ValueError, match="rank must be at most n, the 3 entries of params, got 4"):
            make(rank=4).init(jnp.zeros(3))
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        so.saddle_free_newton(rank=0)


def bowl(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.arange(1.0, 1.0 + x.size) * (x - 1.0) ** 2)


def turns(hvp: Any, count: int) -> tuple[jax.Array, Any]:
    optimizer = so.saddle_free_newton(rank=4)
    step = jax.jit(lambda g, s, x, v: optimizer.update(g, s, x, value=v, hvp_fn=hvp))
    x = jnp.linspace(-2.0, 2.0, 6)
    state = optimizer.init(x)
    for _ in range(count):
        value, grad = jax.value_and_grad(bowl)(x)
        move, state = step(grad, state, x, value)
        x = x + move
    return x, state


def test_a_product_that_is_not_symmetric_is_a_status():
    A = jnp.asarray(spd(0, 6) + 8.0 * np.triu(np.random.default_rng(1).normal(size=(6, 6)), 1), jnp.float32)
    _, state = turns(lambda x, v: A @ v, 2)
    assert Status(int(state.info.status)) == Status.NOT_SYMMETRIC


def test_a_product_that_is_not_finite_leaves_steps_of_steepest_descent():
    x, state = turns(lambda x, v: v * jnp.nan, 150)
    chex.assert_tree_all_finite(x)
    assert state.info.iterations > 10
    np.testing.assert_allclose(so.accepted(state).params, np.ones(6), atol=0.05)
