"""Small problems are compiled with options of their own, at the top level alone: JAX refuses them inside a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder import compiler

X = jnp.zeros(2)


@pytest.fixture
def asked(monkeypatch):
    """Return what `quick` answered while a test ran."""
    asked = []
    quick = compiler.quick
    monkeypatch.setattr(compiler, "quick", lambda *args: asked.append(quick(*args)) or asked[-1])
    return asked


def loss(x, target=1.0):
    return jnp.sum((x - target) ** 2) + jnp.sum((x - target) ** 4)


def residual(x, target=1.0):
    return jnp.concatenate([x - target, (x - target) ** 2])


def one_update(x, target):
    optimizer = so.bfgs()
    grad = jax.grad(loss)(x, target)
    move, _ = optimizer.update(grad, optimizer.init(x), x, value=loss(x, target))
    return jnp.sum(move)


CALLS = {
    "minimize": lambda x, target: jnp.sum(so.minimize(loss, x, so.bfgs(), args=(target,)).params),
    "least_squares": lambda x, target: jnp.sum(so.least_squares(residual, x, args=(target,)).params),
    "update": one_update,
    "closure": lambda x, target: so.minimize(lambda y: loss(y, target), x, so.bfgs()).params[0],
    "curvature": lambda x, target: so.curvature.condition_number(so.curvature.hvp(lambda y: loss(y, target)), x)[0],
}


known = pytest.mark.skipif(compiler.QUICK is None, reason="this compiler may not know the option")


@known
def test_the_compiler_knows_the_option():
    double = compiler.jit(lambda x: 2 * x)
    np.testing.assert_array_equal(double(True, X + 1), [2.0, 2.0])


@known
@pytest.mark.parametrize("name", CALLS)
def test_an_eager_call_takes_it(name, asked):
    CALLS[name](X, jnp.ones(()))
    assert asked
    assert all(asked)


@known
@pytest.mark.parametrize(
    ("params", "is_small"),
    [(np.zeros(compiler.SMALL), True), (np.zeros(compiler.SMALL + 1), False), ({"a": X, "b": None}, True), ({}, False)],
)
def test_the_number_of_parameters_decides(params, is_small):
    assert compiler.quick(jax.tree.map(jnp.asarray, params)) == is_small


# The start is a constant in each of these, so that it tells nothing of the trace around it.
TRACES = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0),
    "jacfwd": lambda f: jax.jacfwd(f)(1.0),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "scan": lambda f: jax.lax.map(f, jnp.ones(2)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(1.0),
}


def calls(*traces, of=CALLS):
    return [pytest.param(name, trace, id=f"{name}-{trace}") for trace in traces for name in of]


@pytest.mark.parametrize(
    ("name", "trace"),
    [*calls(*TRACES, of=("minimize", "closure")), *calls("jit", "grad", of=("least_squares", "update", "curvature"))],
)
def test_a_call_inside_a_trace_does_without(name, trace):
    out = TRACES[trace](lambda target: CALLS[name](X, target) + 0 * target)
    assert jnp.all(jnp.isfinite(out))


@pytest.mark.parametrize(("name", "trace"), [*calls("grad", "vmap", of=("minimize", "closure")), *calls("jit")])
def test_so_does_a_call_that_the_trace_has_nothing_to_do_with(name, trace):
    constant = jnp.ones(())
    out = TRACES[trace](lambda unused: CALLS[name](X, constant) + 0 * unused)
    assert jnp.all(jnp.isfinite(out))


def test_it_changes_the_outcome_by_rounding_alone(monkeypatch):
    results = []
    for chosen in (False, True):
        monkeypatch.setattr(compiler, "quick", lambda *_, chosen=chosen: chosen and compiler.QUICK is not None)
        results.append(so.minimize(loss, X, so.lbfgs()))
    assert results[0].evaluations == results[1].evaluations
    np.testing.assert_allclose(results[0].params, results[1].params, rtol=1e-6)
