"""The cards against the published table: value at the start, value and gradient at the minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder import problems

pytestmark = pytest.mark.x64

# Value at the start and the minimum: Moré, Garbow & Hillstrom (1981), section 3, evaluated by hand where the paper
# gives residuals only; for the others, by hand from the formulas.
TABLE = {
    "rosenbrock_2": (24.2, 0.0),
    "rosenbrock_100": (1210.0, 0.0),
    "freudenstein_roth": (400.5, 0.0),
    "powell_badly_scaled": (1.0 + (np.exp(-1.0) - 0.0001) ** 2, 0.0),
    "brown_badly_scaled": (999999.0**2 + (1 - 2e-6) ** 2 + 1.0, 0.0),
    "beale": (1.5**2 + 2.25**2 + 2.625**2, 0.0),
    "helical_valley": (2500.0, 0.0),
    "powell_singular_4": (215.0, 0.0),
    "wood": (19192.0, 0.0),
    "brown_dennis": (7926693.337, 85822.2),
    "trigonometric_10": (7.07576e-3, 0.0),
    "himmelblau": (106.0, 0.0),
    "booth": (74.0, 0.0),
    "saddle": (1.0, -0.25),
    "monkey_saddle": (1.25, -6.75),
}
KNOWN = [problem for problem in problems.PROBLEMS if problem.name in TABLE]
STATED = {  # minimizers that the paper gives to a few digits, by problem
    "powell_badly_scaled": ([1.098e-5, 9.106], 1e-3),
}


def ids(cards):
    return [card.name for card in cards]


def test_table_covers_every_analytic_card():
    assert {p.name for p in problems.PROBLEMS} - set(TABLE) == {"quadratic_4"}
    assert len(set(ids(problems.PROBLEMS))) == len(problems.PROBLEMS)


@pytest.mark.parametrize("problem", KNOWN, ids=ids(KNOWN))
def test_value_at_the_start_is_the_published_one(problem):
    np.testing.assert_allclose(problem.fun(jnp.asarray(problem.start)), TABLE[problem.name][0], rtol=1e-6)


@pytest.mark.parametrize("problem", KNOWN, ids=ids(KNOWN))
def test_minimum_is_the_published_one_and_the_gradient_vanishes_there(problem):
    evaluate = jax.jit(jax.value_and_grad(problem.fun))
    value, gradient = evaluate(problem.minimizer)
    _, start_gradient = evaluate(problem.start)
    np.testing.assert_allclose(problem.minimum, TABLE[problem.name][1], rtol=1e-6)
    np.testing.assert_allclose(value, problem.minimum, rtol=1e-12, atol=1e-15)
    assert np.max(np.abs(gradient)) <= 1e-8 * max(1.0, float(np.max(np.abs(start_gradient))))


@pytest.mark.parametrize("problem", KNOWN, ids=ids(KNOWN))
def test_the_minimizer_is_a_minimizer(problem):
    H = np.asarray(jax.jit(jax.hessian(problem.fun))(problem.minimizer))
    values = np.linalg.eigvalsh(H)
    assert values[0] >= -1e-10 * values[-1]


@pytest.mark.parametrize(("name", "stated"), STATED.items())
def test_minimizer_agrees_with_the_digits_of_the_paper(name, stated):
    problem = next(p for p in problems.PROBLEMS if p.name == name)
    np.testing.assert_allclose(problem.minimizer, stated[0], rtol=stated[1])


def test_local_minima_are_where_newton_ends():
    """Freudenstein & Roth from its start: 48.9842 at (11.41, -0.8968), as the paper says."""
    problem = problems.freudenstein_roth()
    result = so.minimize(problem.fun, problem.start, so.newton())
    np.testing.assert_allclose(result.params, [11.41, -0.8968], rtol=1e-3)
    np.testing.assert_allclose(result.value, problem.local_minima[0], rtol=1e-10)


def test_starts_of_the_saddles_lie_on_a_ridge():
    for problem in (problems.saddle(), problems.monkey_saddle()):
        gradient = jax.grad(problem.fun)(jnp.asarray(problem.start))
        np.testing.assert_allclose(gradient[1], 0.0)


def test_quadratic_has_the_given_spectrum():
    spectrum = [-1.0, 2.0, 30.0]
    problem = problems.quadratic(spectrum)
    H = jax.jit(jax.hessian(problem.fun))(problem.start)
    np.testing.assert_allclose(np.linalg.eigvalsh(H), spectrum, rtol=1e-12)
    assert problem.minimum == -np.inf
    assert problem.minimizer is None
    convex = problems.quadratic([1.0, 4.0], seed=3)
    np.testing.assert_allclose(jax.grad(convex.fun)(jnp.ones(2)), 0.0, atol=1e-14)


def test_learning_losses_start_at_the_entropy_of_a_blind_guess():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((50, 4)), np.arange(50) % 3
    binary = problems.logistic_regression(features, labels > 0)
    np.testing.assert_allclose(binary.fun(jnp.asarray(binary.start)), np.log(2.0))
    softmax = problems.softmax_regression(features, labels)
    np.testing.assert_allclose(softmax.fun(jax.tree.map(jnp.asarray, softmax.start)), np.log(3.0))


def test_learning_losses_match_numpy():
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((20, 4)), np.arange(20) % 3
    x = rng.standard_normal(4)
    margin = (2.0 * (labels > 0) - 1) * (features @ x)
    expected = np.mean(np.log1p(np.exp(-margin))) + 0.5 * 0.1 * x @ x
    binary = problems.logistic_regression(features, labels > 0, ridge=0.1)
    np.testing.assert_allclose(binary.fun(jnp.asarray(x)), expected)

    network = problems.mlp(features, labels, hidden=5, ridge=0.1, seed=2)
    w = network.start
    logits = np.tanh(features @ w["W1"] + w["b1"]) @ w["W2"] + w["b2"]
    entropy = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels])
    expected = entropy + 0.05 * (np.sum(w["W1"] ** 2) + np.sum(w["W2"] ** 2))
    np.testing.assert_allclose(network.fun(jax.tree.map(jnp.asarray, w)), expected)


def test_losses_keep_the_precision_of_the_parameters():
    network = problems.mlp(np.ones((4, 2)), np.array([0, 1, 0, 1]), hidden=3)
    analytic = [(p.fun, jnp.asarray(p.start, jnp.float32)) for p in problems.PROBLEMS]
    learned = (network.fun, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), network.start))
    for fun, x in [*analytic, learned]:
        assert jax.eval_shape(fun, x).dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: problems.rosenbrock(3), "rosenbrock: n must be a positive multiple of 2, got 3"),
        (lambda: problems.powell_singular(6), "powell_singular: n must be a positive multiple of 4, got 6"),
        (lambda: problems.trigonometric(0), "trigonometric: n must be >= 1, got 0"),
        (lambda: problems.quadratic([]), "quadratic: spectrum must be a vector"),
        (lambda: problems.logistic_regression(np.ones((3, 2)), [0, 1, 2]), "labels must be 0 or 1"),
        (lambda: problems.mlp(np.ones((3, 2)), [0, 1]), "mlp: features must have shape"),
    ],
)
def test_bad_input_names_the_function_and_the_remedy(build, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build()
