"""The curvature tools on real models, against dense eigendecompositions; and every tool in every way of calling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision
from scipy import stats
from sklearn.datasets import load_digits

from secondorder import curvature, problems


def digits_network(hidden, steps):
    """Return the loss, the point after `steps` steps of gradient descent, and the dense eigenvalues there."""
    images, labels = load_digits(return_X_y=True)
    card = problems.mlp(images / 16, labels, hidden=hidden)
    step = lambda p: jax.tree.map(lambda a, g: a - 0.5 * g, p, jax.grad(card.fun)(p))

    @jax.jit
    def run(p):
        p = jax.lax.fori_loop(0, steps, lambda _, p: step(p), p)
        return p, curvature.hessian(card.fun, p)

    params, H = run(jax.tree.map(jnp.asarray, card.start))
    return card.fun, params, np.linalg.eigvalsh(H)


@pytest.mark.parametrize(
    ("hidden", "steps"),
    [
        (8, 20),
        pytest.param(32, 0, marks=pytest.mark.slow),
        pytest.param(32, 20, marks=pytest.mark.slow),
        pytest.param(32, 200, marks=pytest.mark.slow),
    ],
)
def test_sixty_products_give_both_ends_of_the_spectrum_of_a_network_to_six_digits(hidden, steps):
    with precision("float64"):
        fun, params, values = digits_network(hidden, steps)
        hvp = curvature.hvp(fun)

        @jax.jit
        def run(p):
            density = curvature.spectral_density(hvp, p, steps=60, probes=4, reorthogonalize=False)
            return curvature.extreme_eigenpairs(hvp, p), density

        found, density = run(params)
        assert int(found.products) == 60
        np.testing.assert_allclose(found.largest.values[0], values[-1], rtol=1e-6)
        np.testing.assert_allclose(found.smallest.values[0], values[0], rtol=1e-6)
        for end, exact in ((found.largest, values[-1]), (found.smallest, values[0])):
            assert abs(float(end.values[0]) - exact) <= float(end.residuals[0]) < 1e-3
        nodes, weights = np.asarray(density.nodes).ravel(), np.asarray(density.weights).ravel()
        assert stats.wasserstein_distance(values, nodes, None, weights) < 0.02 * np.ptp(values)


@pytest.mark.slow
def test_where_sixty_products_are_too_few_the_residual_says_so():
    with precision("float64"):
        A = np.geomspace(1e-6, 1.0, 500)
        found = curvature.extreme_eigenpairs(lambda p, v: jnp.asarray(A) * v, jnp.zeros(500))
        error = float(found.smallest.values[0]) - A[0]
        assert error > 0.1 * A[0]
        assert float(found.smallest.residuals[0]) >= error


def test_one_hessian_product_counts_at_most_two_and_a_half_gradients():
    images, labels = load_digits(return_X_y=True)
    card = problems.mlp(images / 16, labels)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), card.start)

    def count(fun, *args):
        return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]

    gradient = count(jax.grad(card.fun), params)
    assert count(curvature.hvp(card.fun), params, params) <= 2.5 * gradient


def loss(params, x):
    return jnp.mean(jnp.log(jnp.cosh(x @ params["W"] + params["b"]))) + 0.05 * jnp.sum(params["W"] ** 2)


TOOLS = {
    "extreme_eigenpairs": lambda hvp, p, f: curvature.extreme_eigenpairs(hvp, p, 2, products=8),
    "lobpcg_eigenpairs": lambda hvp, p, f: curvature.lobpcg_eigenpairs(hvp, p, iterations=20).largest.values,
    "trace": lambda hvp, p, f: curvature.trace(hvp, p, probes=4),
    "trace_hutchpp": lambda hvp, p, f: curvature.trace_hutchpp(hvp, p, products=9),
    "diagonal": lambda hvp, p, f: curvature.diagonal(hvp, p, probes=4),
    "spectral_density": lambda hvp, p, f: curvature.spectral_density(hvp, p, steps=5, probes=2).weights.sum(),
    "log_determinant": lambda hvp, p, f: curvature.log_determinant(hvp, p, shift=0.5, probes=2),
    "effective_dimension": lambda hvp, p, f: curvature.effective_dimension(hvp, p, 0.1, probes=2),
    "condition_number": lambda hvp, p, f: curvature.condition_number(hvp, p),
    "jacobian_condition_number": lambda hvp, p, f: (
        curvature.jacobian_condition_number(lambda p: jnp.tanh(p["W"]), p).largest
    ),
    "classify_critical_point": lambda hvp, p, f: curvature.classify_critical_point(f, p).positive,
    "sharpness": lambda hvp, p, f: curvature.sharpness(f, p, products_per_figure=6),
    "loss_slice": lambda hvp, p, f: curvature.loss_slice(f, p, [p], points=5),
    "hessian": lambda hvp, p, f: curvature.hessian(f, p),
    "hessian_blocks": lambda hvp, p, f: curvature.hessian_blocks(f, p),
    "jacobian": lambda hvp, p, f: curvature.jacobian(lambda p: jnp.tanh(p["W"]), p),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_gives_the_same_eagerly_jitted_and_per_lane(name):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (20, 4))
    many = {"W": jax.random.normal(keys[1], (3, 4, 3)), "b": jax.random.normal(keys[2], (3, 1, 3))}
    fun = lambda p: loss(p, x)
    tool = lambda p: TOOLS[name](curvature.hvp(fun), p, fun)
    lanes, jitted = jax.jit(jax.vmap(tool))(many), jax.jit(tool)
    for i in range(3):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        alone = jitted(params)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=2e-4)
        jax.tree.map(close, jax.tree.map(lambda leaf, i=i: leaf[i], _signless(lanes)), _signless(alone))
        if i == 0:
            jax.tree.map(close, _signless(tool(params)), _signless(alone))


def _signless(found):
    """Return magnitudes: the sign of an eigenvector is arbitrary."""
    return jax.tree.map(jnp.abs, found)
