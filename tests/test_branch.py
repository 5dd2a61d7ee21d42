"""The branch that stays one under `vmap`: the same outcome as `lax.cond`, differentiable in every order."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision

import secondorder as so
from secondorder.linalg import compact_bfgs
from secondorder.linalg.branch import branch

MODULE = importlib.import_module("secondorder.linalg.branch")
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


def pretend(monkeypatch, accelerator):
    """Take the default device for one that a branch interrupts, or not, in what is traced from here on."""
    for module in (MODULE, compact_bfgs):
        monkeypatch.setattr(module, "interrupts", lambda: accelerator)


@pytest.fixture(params=["a CPU", "an accelerator"])
def device(request, monkeypatch):
    """Take the default device for this one."""
    pretend(monkeypatch, request.param == "an accelerator")


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
@pytest.mark.usefixtures("device")
def test_it_is_a_cond_under_every_transformation(transform):
    expected = transform(conditional)(LANES)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), transform(ours)(LANES), expected)


@pytest.mark.parametrize("device", ["a CPU"], indirect=True)
@pytest.mark.usefixtures("device")
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


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("good", [True, False])
def test_one_pass_gives_what_either_branch_of_the_memory_would(small, good):
    m, n = 4, 30
    keys = jax.random.split(jax.random.key(3), 5)
    rows, products = jax.random.normal(keys[0], (2 * m, n)), jax.random.normal(keys[1], (2 * m,))
    s, y, g = (jax.random.normal(key, (n,)) for key in keys[2:])
    facts = (rows, s, y, g, products, jnp.int32(2), jnp.array(good))
    expected = (compact_bfgs._of_change if small else compact_bfgs._of_gradient)(*facts)
    found = compact_bfgs._of_either(jnp.array(small), *facts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("make", [so.bfgs, functools.partial(so.lbfgs, memory_size=4), so.ssbroyden])
def test_accelerators_run_the_same_search_without_a_branch(make, monkeypatch):
    """The same evaluations to a minimum, whatever is chosen between."""
    loss = lambda x: jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)
    counts = []
    for accelerator in (False, True):
        pretend(monkeypatch, accelerator)
        optimizer = make(linesearch=so.line_search(max_trials=30 + accelerator))  # two, each traced for one device
        step = lambda x, state, optimizer=optimizer: optimizer.update(x, state, x, value=loss(x))
        with precision("float64"):
            x = jnp.array([-1.2, 1.0, -0.5, 0.8, 1.5])
            result = so.minimize(loss, x, optimizer, gtol=1e-8)
            branches = str(jax.make_jaxpr(step)(x, optimizer.init(x))).count("cond[")
        assert result.status == so.Status.CONVERGED
        np.testing.assert_allclose(result.params, 1.0, rtol=1e-7)
        counts.append((int(result.evaluations), int(result.steps)))
        assert (branches == 0) == accelerator, branches
    assert counts[0] == counts[1]


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
