"""The branch that stays one under `vmap`: the same outcome as `lax.cond`, differentiable in every order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision

import secondorder as so
from secondorder.linalg.branch import branch

LANES = jnp.array([1.5, -0.5, 2.0, -3.0])


def by(decide, x):
    """Return 2 x log x where x > 0, a number and a counter; log is NaN or infinite on the other side."""
    return decide(
        x > 0,
        lambda a, b: (a * jnp.log(a) + b, jnp.int32(1)),
        lambda a, b: (a - b, jnp.int32(0)),
        x,
        x * jnp.log(jnp.abs(x)),
    )


ours, conditional = functools.partial(by, branch), functools.partial(by, jax.lax.cond)


@pytest.mark.parametrize(
    "transform",
    [
        jax.vmap,
        lambda f: jax.jit(jax.vmap(f)),
        lambda f: lambda x: jax.vmap(jax.vmap(f))(jnp.stack([x, -x])),
        lambda f: lambda x: jax.lax.map(f, x),
        lambda f: lambda x: jax.vmap(jax.grad(lambda a: f(a)[0]))(x),
        lambda f: lambda x: jax.grad(lambda a: jax.vmap(f)(a)[0].sum())(x),
        lambda f: lambda x: jax.jacfwd(lambda a: jax.vmap(f)(a)[0])(x),
        lambda f: lambda x: jax.hessian(lambda a: jax.vmap(f)(a)[0].sum())(x),
        lambda f: lambda x: jax.vmap(jax.hessian(lambda a: f(a)[0]))(x),
    ],
    ids=["vmap", "jit", "vmap of vmap", "map", "vmap of grad", "grad of vmap", "jacfwd", "hessian", "vmap of hessian"],
)
def test_it_is_a_cond_under_every_transformation(transform):
    expected = transform(conditional)(LANES)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), transform(ours)(LANES), expected)


def test_it_is_entered_under_vmap_only_if_a_lane_enters():
    """The side that no lane takes is not computed: a callback in it stays silent."""
    calls = []

    def noisy(x):
        jax.debug.callback(lambda _: calls.append(1), x)
        return 2.0 * x

    many = jax.jit(jax.vmap(lambda x: branch(x > 0, noisy, lambda x: x, x)))
    np.testing.assert_array_equal(many(-jnp.arange(1.0, 4.0)), [-1.0, -2.0, -3.0])
    jax.effects_barrier()
    assert not calls
    np.testing.assert_array_equal(many(jnp.array([-1.0, 2.0])), [-1.0, 4.0])
    jax.effects_barrier()
    assert calls


def test_a_condition_that_all_lanes_share_takes_one_side():
    many = jax.vmap(lambda flag, x: branch(flag, jnp.sin, jnp.cos, x), in_axes=(None, 0))
    np.testing.assert_allclose(many(True, LANES), jnp.sin(LANES), rtol=1e-6)
    np.testing.assert_allclose(many(False, LANES), jnp.cos(LANES), rtol=1e-6)


def last(shift, optimizer):
    """Return a number that depends on the point after three updates from a shifted start."""
    loss = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(1.0, 6.0))) + 0.1 * jnp.sum(x) ** 2
    x = jnp.full(5, 0.5) + shift
    state = optimizer.init(x)
    for _ in range(3):
        value, grad = jax.value_and_grad(loss)(x)
        move, state = optimizer.update(grad, state, x, value=value)
        x = x + move
    return jnp.sum(x**2)


@pytest.mark.parametrize("make", [so.bfgs, so.lbfgs])
def test_unrolled_updates_differentiate_over_lanes(make):
    """Backward with a fixed step, forward with a search too; beside differences."""
    with precision("float64"):
        shifts, eps = jnp.array([0.0, 0.3]), 1e-5
        fixed, searching = (
            jax.jit(jax.vmap(functools.partial(last, optimizer=optimizer))) for optimizer in (make(0.1), make())
        )
        slopes = lambda many: (many(shifts + eps) - many(shifts - eps)) / (2 * eps)
        backward = jax.jit(jax.grad(lambda s: fixed(s).sum()))(shifts)
        np.testing.assert_allclose(backward, slopes(fixed), rtol=1e-6)
        _, forward = jax.jit(lambda s: jax.jvp(searching, (s,), (jnp.ones(2),)))(shifts)
        np.testing.assert_allclose(forward, slopes(searching), rtol=1e-6)
