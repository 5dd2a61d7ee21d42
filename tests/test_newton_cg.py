"""Newton's method by conjugate gradients: the path in the ball, rejected trials, faults of the curvature, memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bfgs_inverse, rosenbrock, rosenbrock_start, rotation, spd, with_spectrum
from sklearn.datasets import load_digits

import secondorder as so
from secondorder import Status
from secondorder.globalization import trust_region
from secondorder.linalg import compact_bfgs
from secondorder.linalg import steihaug as cg

N = 12
INDEFINITE = np.concatenate([[-3.0, -0.5], np.linspace(1.0, 20.0, N - 2)])


@functools.partial(jax.jit, static_argnames="preconditioned")
def path(H, g, radius, tolerance=1e-10, limit=N, promise=jnp.inf, inverse=None, preconditioned=False):
    """Return the end of the path for a dense H, with M^-1 = inverse if `preconditioned`."""
    apply = (lambda v: inverse @ v) if preconditioned else None
    return cg.truncated(lambda v: H @ v, g, jnp.asarray(radius), tolerance, limit, promise, apply)


def point(end: Any) -> np.ndarray:
    """Return the end of the path as a vector."""
    path, d0, _ = end
    return np.asarray(path.last[0] * d0 + path.last[1] * path.s + path.last[2] * path.d)


def decrease(H, g, p) -> float:
    """Return the decrease of the quadratic model at p."""
    return -float(g @ p + 0.5 * p @ H @ p)


def exact(H, g, radius) -> np.ndarray:
    """Return the minimizer of the model over the ball."""
    values, vectors = np.linalg.eigh(H)
    return vectors @ np.asarray(trust_region.solve(jnp.asarray(values), jnp.asarray(vectors.T @ g), radius))


def gradient(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=N)


# The path of conjugate gradients


@pytest.mark.x64
def test_without_a_boundary_it_solves_the_newton_equations_in_n_products():
    H, g = spd(0, N), gradient()
    end = path(H, g, 1e6)
    assert end[0].exit in (cg.RESIDUAL, cg.LIMIT)
    assert end[0].products <= N
    np.testing.assert_allclose(point(end), -np.linalg.solve(H, g), rtol=1e-8)


@pytest.mark.x64
def test_it_needs_as_many_products_as_there_are_different_eigenvalues():
    H, g = with_spectrum(0, np.repeat([1.0, 5.0, 30.0], N // 3)), gradient()
    end = path(H, g, 1e6)
    assert end[0].products == 3
    np.testing.assert_allclose(point(end), -np.linalg.solve(H, g), rtol=1e-8)


@pytest.mark.x64
@pytest.mark.parametrize("radius", [1e-3, 0.05, 0.2])
@pytest.mark.parametrize("spectrum", [np.linspace(1.0, 20.0, N), INDEFINITE], ids=["definite", "indefinite"])
def test_it_ends_on_the_boundary_between_the_cauchy_point_and_the_exact_solution(radius, spectrum):
    H, g = with_spectrum(0, spectrum), gradient()
    end = path(H, g, radius)
    p = point(end)
    assert end[0].exit in (cg.BOUNDARY, cg.CURVATURE)
    np.testing.assert_allclose(np.linalg.norm(p), radius, rtol=1e-10)
    steepest = -g * radius / np.linalg.norm(g)
    best = decrease(H, g, exact(H, g, radius))
    assert decrease(H, g, steepest) <= decrease(H, g, p) * (1 + 1e-12)
    assert decrease(H, g, p) <= best * (1 + 1e-12)
    if spectrum[0] > 0:
        assert decrease(H, g, p) >= 0.5 * best  # Yuan (2000), "On the truncated conjugate gradient method"


@pytest.mark.x64
def test_it_leaves_along_a_direction_of_negative_curvature_and_knows_how_negative_it_is():
    H, g = with_spectrum(0, INDEFINITE), gradient()
    end, _, _ = path(H, g, 1e3)
    assert end.exit == cg.CURVATURE
    assert end.negative
    d = np.asarray(end.d)
    np.testing.assert_allclose(end.least, d @ H @ d / (d @ d), rtol=1e-8)
    assert INDEFINITE[0] <= end.least < 0


@pytest.mark.x64
@pytest.mark.parametrize("radius", [0.05, 1e3])
def test_the_reduced_model_is_the_model_on_its_three_vectors(radius):
    H, g = with_spectrum(0, INDEFINITE), gradient()
    end, d0, _ = path(H, g, radius)
    V = np.stack([d0, end.s, end.d], axis=1)
    np.testing.assert_allclose(end.reduced.gram, V.T @ V, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(end.reduced.hessian, V.T @ H @ V, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(end.reduced.gradient, V.T @ g, rtol=1e-9, atol=1e-9)


@pytest.mark.x64
def test_a_preconditioner_changes_the_variables_and_nothing_else():
    H, g = with_spectrum(0, INDEFINITE), gradient()
    M = spd(3, N, 0.5, 8.0)
    values, vectors = np.linalg.eigh(M)
    root = vectors @ np.diag(values**0.5) @ vectors.T  # y = root x: ||x||_M = ||y||
    back = np.linalg.inv(root)
    one = path(H, g, 0.4, inverse=np.linalg.inv(M), preconditioned=True)
    two = path(back @ H @ back, back @ g, 0.4)
    assert one[0].exit == two[0].exit
    assert one[0].products == two[0].products
    np.testing.assert_allclose(root @ point(one), point(two), rtol=1e-9, atol=1e-12)
    V = np.stack([one[1], one[0].s, one[0].d], axis=1)
    np.testing.assert_allclose(one[0].reduced.gram, V.T @ M @ V, rtol=1e-9, atol=1e-9)


@pytest.mark.x64
def test_a_model_that_promises_too_much_is_followed_as_far_as_it_is_trusted():
    H, g = spd(0, N), gradient()
    full = decrease(H, g, -np.linalg.solve(H, g))
    end = path(H, g, 1e6, promise=0.3 * full)
    np.testing.assert_allclose(decrease(H, g, point(end)), 0.3 * full, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(point(end)), end[2], rtol=1e-9)  # the radius of that point


# The optimizer


@pytest.mark.x64
@pytest.mark.parametrize("n", [2, 50])
def test_it_minimizes_rosenbrock_as_newton_does(n):
    x0 = rosenbrock_start(n)
    result = so.minimize(rosenbrock, x0, so.newton_cg())
    dense = so.minimize(rosenbrock, x0, so.newton())
    assert result.success
    np.testing.assert_allclose(result.params, np.ones(n), rtol=1e-5)
    assert result.hessians == 0
    if n > 2:
        assert result.hessian_products < 0.2 * n * dense.hessians


def bounded(x: jax.Array) -> jax.Array:
    """Return a convex loss with a steep wall: Newton steps from far away overshoot."""
    return jnp.sum(jnp.sqrt(1.0 + (x - 1.0) ** 2)) + 0.01 * jnp.sum((x[1:] - x[:-1]) ** 2)


@pytest.mark.x64
def test_a_rejected_trial_costs_no_product():
    optimizer = so.newton_cg(so.trust_region(radius=100.0))
    step = jax.jit(lambda g, s, x, v: optimizer.update(g, s, x, value=v, hvp_fn=so.curvature.hvp(bounded)))
    x = jnp.linspace(-6.0, 5.0, 8)
    state = optimizer.init(x)
    rejected, spent = 0, 0
    for turn in range(20):
        value, grad = jax.value_and_grad(bounded)(x)
        if np.max(np.abs(grad)) < 1e-8:
            break
        move, state = step(grad, state, x, value)
        if turn and not state.info.accepted:
            rejected += 1
            assert state.info.hessian_products == spent
        spent = int(state.info.hessian_products)
        x = x + move
    assert rejected >= 2
    assert np.max(np.abs(grad)) < 1e-8


@pytest.mark.x64
def test_a_trial_after_a_rejection_is_better_than_the_old_one_scaled_back():
    H, g = jnp.asarray(with_spectrum(0, INDEFINITE)), jnp.asarray(gradient())
    loss = lambda x: g @ x + 0.5 * x @ H @ x
    optimizer = so.newton_cg(so.trust_region(radius=1.0))
    x0 = jnp.zeros(N)
    state = optimizer.init(x0)
    move, state = optimizer.update(g, state, x0, value=0.0, hvp_fn=so.curvature.hvp(loss))
    rejected, after = optimizer.update(g, state, x0 + move, value=jnp.inf, hvp_fn=so.curvature.hvp(loss))
    assert not after.info.accepted
    second = np.asarray(move + rejected)
    radius = float(after.damping.size)
    assert radius < 0.5
    assert np.linalg.norm(second) <= radius * 1.01
    scaled = np.asarray(move) * radius / np.linalg.norm(move)
    assert decrease(H, g, second) > decrease(H, g, scaled)
    np.testing.assert_allclose(after.step.promised, decrease(H, g, second), rtol=1e-8)


@pytest.mark.x64
def test_the_inverse_of_the_hessian_as_preconditioner_leaves_one_product_per_solve():
    scale = jnp.logspace(-1.5, 1.5, 40)
    loss = lambda x: jnp.sum(jnp.cosh(scale * (x - 1.0)))
    inverse = lambda x, v: v / (scale**2 * jnp.cosh(scale * (x - 1.0)))
    x0 = 1.0 + 1.0 / scale
    plain = so.minimize(loss, x0, so.newton_cg(), gtol=1e-9)
    helped = so.minimize(loss, x0, so.newton_cg(preconditioner=inverse), gtol=1e-9)
    assert plain.success
    assert helped.success
    assert helped.hessian_products - 10 <= helped.steps + 1  # the last ten look for negative curvature
    assert helped.hessian_products < plain.hessian_products


@pytest.mark.x64
def test_minimize_shows_the_preconditioner_trees_like_the_parameters():
    x0 = {"a": jnp.ones(3), "b": jnp.zeros(2)}
    loss = lambda x: jnp.sum(jnp.cosh(x["a"])) + 50.0 * jnp.sum((x["b"] - 1.0) ** 2)
    inverse = lambda x, v: {"a": v["a"] / jnp.cosh(x["a"]), "b": v["b"] / 100.0}
    result = so.minimize(loss, x0, so.newton_cg(preconditioner=inverse))
    assert result.success
    np.testing.assert_allclose(result.params["b"], 1.0, rtol=1e-6)


# Preconditioners that the optimizer makes for itself


def written(m: int, pairs: list) -> compact_bfgs.Memory:
    """Return the memory of m pairs at most, the last ones."""
    memory = compact_bfgs.empty(jnp.zeros(N), m)
    rows, count = memory.rows, memory.pairs
    for s, y in pairs:
        rows, count = compact_bfgs.write(rows, count, jnp.asarray(s), jnp.asarray(y), jnp.array(True), m)
        rows, count = compact_bfgs.write(rows, count, jnp.asarray(s), jnp.asarray(-s), jnp.array(False), m)
    return compact_bfgs.measured(memory, rows, count)


@pytest.mark.x64
@pytest.mark.parametrize("count", [3, 5, 12])
def test_pairs_that_were_written_and_then_measured_make_the_bfgs_matrix_of_the_last_ones(count):
    m, A, rng = 5, spd(0, N), np.random.default_rng(5)
    pairs = [(s, A @ s) for s in rng.normal(size=(count, N))]
    s, y = pairs[-1]
    H = bfgs_inverse(pairs[-m:], s @ y / (y @ y))
    made = np.stack([compact_bfgs.applied(written(m, pairs), e) for e in jnp.eye(N)])
    np.testing.assert_allclose(made, H, rtol=1e-9, atol=1e-11)


@pytest.mark.x64
def test_a_pair_of_negative_curvature_is_switched_off():
    A, rng = spd(0, N), np.random.default_rng(5)
    a, b, c = rng.normal(size=(3, N))
    y = A @ c
    H = bfgs_inverse([(a, A @ a), (c, y)], c @ y / (y @ y))
    memory = written(3, [(a, A @ a), (b, -A @ b), (c, y)])
    np.testing.assert_allclose(compact_bfgs.applied(memory, jnp.asarray(a)), H @ a, rtol=1e-9)


SCALES = jnp.asarray(np.logspace(0, 3, 60))
TURN = jnp.asarray(rotation(4, 60))


def cliffs(x: jax.Array) -> jax.Array:
    """Return a convex loss whose curvatures span six decades, along no axis."""
    z = SCALES * (TURN @ (x - 1.0))
    return jnp.sum(jnp.sqrt(1.0 + (z / 30.0) ** 2)) + 1e-3 * jnp.sum(z**2)


@pytest.mark.x64
def test_pairs_of_conjugate_gradients_save_products_of_later_solves():
    x0 = jnp.zeros(60)
    plain = so.minimize(cliffs, x0, so.newton_cg(), gtol=1e-8)
    helped = so.minimize(cliffs, x0, so.newton_cg(preconditioner=so.lbfgs_preconditioner()), gtol=1e-8)
    assert plain.success
    assert helped.success
    np.testing.assert_allclose(helped.params, 1.0, rtol=1e-4)
    assert helped.hessian_products < 0.8 * plain.hessian_products


@pytest.mark.slow
@pytest.mark.x64
def test_a_diagonal_of_random_signs_saves_products_where_the_scales_differ():
    loss = lambda x: jnp.sum(jnp.sqrt(1 + (SCALES * (x - 1.0)) ** 2)) + 0.1 * jnp.sum((x[1:] - x[:-1]) ** 2)
    x0 = 1.0 + 3.0 / SCALES
    plain = so.minimize(loss, x0, so.newton_cg(), gtol=1e-8)
    helped = so.minimize(loss, x0, so.newton_cg(preconditioner=so.diagonal_preconditioner(probes=3)), gtol=1e-8)
    assert plain.success
    assert helped.success
    np.testing.assert_allclose(helped.params, 1.0, rtol=1e-6)
    assert helped.hessian_products < 0.8 * plain.hessian_products


@pytest.mark.x64
def test_the_estimated_diagonal_is_the_diagonal_and_positive_whatever_the_signs():
    A = with_spectrum(0, INDEFINITE)
    prepared = lambda made, memory, when: made.prepare(memory, lambda v: A @ v, jax.random.key(0), jnp.array(when))
    many, few = so.diagonal_preconditioner(probes=20_000), so.diagonal_preconditioner(probes=2)
    memory, products = prepared(many, many.empty(jnp.zeros(N)), True)
    assert products == 20_000
    np.testing.assert_allclose(memory.mean, np.diag(A), atol=0.2)
    np.testing.assert_allclose(1 / many.apply(memory, jnp.ones(N)), np.abs(np.diag(A)), atol=0.3)
    assert prepared(many, memory, True)[1] == 1
    assert prepared(many, memory, False)[1] == 0
    memory, _ = prepared(few, few.empty(jnp.zeros(N)), True)
    assert np.all(np.asarray(few.apply(memory, jnp.ones(N))) > 0)


@pytest.mark.slow
@pytest.mark.x64
def test_softmax_on_the_digits_takes_a_third_of_the_gradients_of_lbfgs_with_the_covariance_as_preconditioner():
    # A product costs as much as a gradient here. Without a preconditioner it takes more: docs/scaling.md.
    images, labels = load_digits(return_X_y=True)
    card = so.problems.softmax_regression(images / 16, labels, ridge=1e-3)
    x0 = jax.tree.map(jnp.asarray, card.start)
    inputs = jnp.concatenate([jnp.asarray(images / 16), jnp.ones((labels.size, 1))], axis=1)
    covariance = inputs.T @ inputs / labels.size
    ridge = jnp.diag(jnp.append(jnp.full(64, 1e-3), 1e-9))

    def inverse(x, v):
        p = jax.nn.softmax(inputs @ jnp.concatenate([x["W"], x["b"][None]]))
        M = jnp.mean(p * (1 - p)) * covariance + ridge
        u = jnp.linalg.solve(M, jnp.concatenate([v["W"], v["b"][None]]))
        return {"W": u[:-1], "b": u[-1]}

    spent = lambda result: int(result.evaluations + result.hessian_products)
    theirs = so.minimize(card.fun, x0, so.lbfgs(), gtol=1e-8)
    plain = so.minimize(card.fun, x0, so.newton_cg(), gtol=1e-8)
    ours = so.minimize(card.fun, x0, so.newton_cg(so.trust_region(radius=10.0), preconditioner=inverse), gtol=1e-8)
    assert theirs.success
    assert plain.success
    assert ours.success
    making = 65 * 65 / (2 * 65 * 10)  # the covariance, in gradients
    assert spent(ours) + making <= spent(theirs) / 3
    assert spent(plain) <= 0.75 * spent(theirs)  # 153 or 173: its ninth gradient is 1e-8 to rounding


def test_options_of_the_preconditioners_are_checked():
    with pytest.raises(ValueError, match="lbfgs_preconditioner: memory_size must be"):
        so.lbfgs_preconditioner(0)
    with pytest.raises(ValueError, match="diagonal_preconditioner: decay must be"):
        so.diagonal_preconditioner(decay=1.5)
    with pytest.raises(TypeError, match="newton_cg: preconditioner must be"):
        so.newton_cg(preconditioner="lbfgs")


def test_a_gauss_newton_product_makes_it_the_gauss_newton_method():
    rng = np.random.default_rng(0)
    A, y = jnp.asarray(rng.normal(size=(30, 6))), jnp.asarray(rng.normal(size=30))
    model = lambda x: jnp.tanh(A @ x)
    loss = lambda x: 0.5 * jnp.sum((model(x) - y) ** 2)
    product = so.curvature.gnvp(model, lambda out: 0.5 * jnp.sum((out - y) ** 2))
    optimizer = so.newton_cg(so.trust_region(radius=1e3), forcing=1e-6)
    x = jnp.full(6, 0.1)
    value, grad = jax.value_and_grad(loss)(x)
    move, _ = optimizer.update(grad, optimizer.init(x), x, value=value, hvp_fn=product)
    J = jax.jacobian(model)(x)
    np.testing.assert_allclose(move, -np.linalg.solve(J.T @ J, grad), rtol=2e-3)


@pytest.mark.x64
def test_the_natural_gradient_is_newton_cg_on_the_fisher_product_and_stays_in_the_space_of_few_samples():
    rng = np.random.default_rng(0)
    A, y = jnp.asarray(rng.normal(size=(5, 40))), jnp.asarray(rng.normal(size=5))
    model = lambda x: jnp.tanh(A @ x["w"])
    loss = lambda x: 0.5 * jnp.sum((model(x) - y) ** 2)
    product = so.curvature.gnvp(model, lambda out: 0.5 * jnp.sum((out - y) ** 2))
    x = {"w": jnp.full(40, 0.01)}
    value, grad = jax.value_and_grad(loss)(x)
    ends = []
    for optimizer, extra in (
        (so.natural_gradient(product, so.trust_region(radius=1e3), forcing=1e-9), {}),
        (so.newton_cg(so.trust_region(radius=1e3), forcing=1e-9), {"hvp_fn": product}),
    ):
        move, state = optimizer.update(grad, optimizer.init(x), x, value=value, **extra)
        assert state.info.hessian_products <= 6  # five samples in 40 parameters
        ends.append(move["w"])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)
    J = jax.jacobian(model)(x)["w"]
    inside = J.T @ np.linalg.solve(J @ J.T, J @ np.asarray(ends[0]))
    np.testing.assert_allclose(ends[0], inside, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(ends[0], -np.linalg.pinv(J.T @ J, rtol=1e-9) @ grad["w"], rtol=1e-6, atol=1e-9)
    with pytest.raises(TypeError, match="fisher must be a function"):
        so.natural_gradient(3)


# Faults of the curvature


def turns(optimizer: Any, loss: Any, x: jax.Array, count: int, **extra: Any) -> tuple[jax.Array, Any]:
    step = jax.jit(lambda g, s, x, v: optimizer.update(g, s, x, value=v, **extra))
    state = optimizer.init(x)
    for _ in range(count):
        value, grad = jax.value_and_grad(loss)(x)
        move, state = step(grad, state, x, value)
        x = optax.apply_updates(x, move)
    return x, state


def bowl(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(jnp.arange(1.0, 1.0 + x.size) * (x - 1.0) ** 2)


def test_a_product_that_is_not_symmetric_is_a_status():
    A = jnp.asarray(spd(0, 6) + 8.0 * np.triu(np.random.default_rng(1).normal(size=(6, 6)), 1), jnp.float32)
    _, state = turns(so.newton_cg(), bowl, jnp.linspace(-2.0, 2.0, 6), 4, hvp_fn=lambda x, v: A @ v)
    assert Status(int(state.info.status)) == Status.NOT_SYMMETRIC
    assert "symmetric" in Status(int(state.info.status)).message


def test_a_preconditioner_that_is_not_positive_definite_is_a_status():
    flip = jnp.array([1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    for factors in (flip, -jnp.ones(6)):
        optimizer = so.newton_cg(preconditioner=lambda x, v, factors=factors: factors * v)
        result = so.minimize(bowl, jnp.linspace(-2.0, 2.0, 6), optimizer)
        assert Status(int(result.status)) == Status.NOT_POSITIVE_DEFINITE
        assert not result.success
        assert np.all(np.isfinite(result.params))


def test_a_product_that_is_not_finite_leaves_steps_of_steepest_descent():
    x, state = turns(so.newton_cg(), bowl, jnp.linspace(-2.0, 2.0, 6), 200, hvp_fn=lambda x, v: v * jnp.nan)
    assert state.model.exit == cg.NONFINITE
    assert np.all(np.isfinite(x))
    assert state.info.iterations > 10
    np.testing.assert_allclose(so.accepted(state).params, np.ones(6), atol=0.05)


def test_a_saddle_between_two_valleys_is_seen_by_a_random_vector_although_the_gradient_does_not_see_it():
    # On the ridge x_0 = 0 the gradient has no part along it, and its Krylov space stays on the ridge.
    loss = lambda x: jnp.sum(jnp.cosh(x[1:])) - x[0] ** 2 + 0.25 * x[0] ** 4
    x0 = jnp.concatenate([jnp.zeros(1), jnp.linspace(0.5, 1.5, 7)])
    result = so.minimize(loss, x0, so.newton_cg())
    assert result.success
    np.testing.assert_allclose(np.abs(result.params[0]), 2.0**0.5, rtol=1e-4)


# Costs


def test_the_loss_stands_twice_in_the_program_of_minimize():
    def program(optimizer: Any) -> str:
        loss = lambda x: jnp.sum(jax.lax.erf_inv(x) ** 2)
        return str(jax.make_jaxpr(lambda x: so.minimize(loss, x, optimizer).params)(jnp.full(300, 0.5)))

    # One value with its gradient for the driver, one gradient for the products: erf_inv stands once in each (the
    # random vector takes one more).
    assert program(so.lbfgs()).count("erf_inv") == 1
    assert program(so.newton_cg()).count("erf_inv") == 3


def peak(program: Any, *args: Any, **options: Any) -> float:
    """Return the bytes that a compiled program needs at its peak, donated buffers counted once."""
    memory = jax.jit(program, **options).lower(*args).compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return total - memory.alias_size_in_bytes


@pytest.mark.parametrize(
    ("optimizer", "most"),
    [
        pytest.param(so.newton_cg(), 9, id="newton_cg"),
        pytest.param(so.newton_cg(preconditioner=lambda x, v: 0.5 * v), 10, id="newton_cg, preconditioned"),
        pytest.param(so.lbfgs(memory_size=5), 2 * 5 + 5, id="lbfgs, m = 5"),
        pytest.param(so.lbfgs(memory_size=20), 2 * 20 + 5, id="lbfgs, m = 20"),
    ],
)
def test_a_step_needs_few_copies_of_the_parameters_besides_those_of_the_loss(optimizer, most):
    n = 1_000_000
    loss = lambda x: jnp.sum(jnp.cos(x))
    extra = {"hvp_fn": lambda x, v: 3.0 * v} if most <= 10 else {}

    def step(x: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(loss)(x)
        move, state = optimizer.update(grad, state, x, value=value, **extra)
        return x + move, state

    x = jax.ShapeDtypeStruct((n,), jnp.float32)
    state = jax.eval_shape(optimizer.init, x)
    own = peak(jax.value_and_grad(loss), x)  # parameters and gradient
    copies = (peak(step, x, state, donate_argnums=(0, 1)) - own) / (4 * n)
    assert 4 <= copies <= most + 0.1


def test_leaves_of_bfloat16_are_solved_in_float32():
    x = {"half": jnp.ones(4, jnp.bfloat16), "whole": jnp.ones(4, jnp.float32)}
    state = jax.eval_shape(so.newton_cg().init, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.model.s, state.model.d))} == {jnp.dtype(jnp.float32)}


def test_random_vectors_of_the_tests_are_orthogonal():
    np.testing.assert_allclose(rotation(0, N) @ rotation(0, N).T, np.eye(N), atol=1e-12)


@pytest.mark.parametrize("scale", [1e6, 1e12, 1e16])
@pytest.mark.parametrize(
    "make",
    [
        so.newton_cg,
        lambda: so.newton_cg(so.capped_cg()),
        lambda: so.newton_cg(preconditioner=so.lbfgs_preconditioner()),
    ],
)
def test_a_loss_of_any_size_takes_the_same_evaluations_in_float32(make, scale):
    """g'Hg overflows where g and H are 1e13; powers of two round nothing, other factors little."""
    weights, x0 = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.5, -2.0, 0.7])
    loss = lambda x, scale: scale * jnp.sum(weights * (x - 1) ** 2 + 0.1 * (x - 1) ** 4)
    one, other = (so.minimize(loss, x0, make(), args=(s,), gtol=1e-4 * s) for s in (1.0, scale))
    assert one.success
    assert other.success
    assert (other.evaluations, other.hessian_products) == (one.evaluations, one.hessian_products)
    np.testing.assert_allclose(other.params, one.params, atol=1e-4)


@pytest.mark.x64
@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_a_quadratic_takes_a_dozen_steps_although_rounding_costs_more_than_n_products(condition):
    n = 20
    root = with_spectrum(3, np.geomspace(1.0, condition**0.5, n))  # the loss is a sum of squares: no cancellation
    target = np.random.default_rng(0).normal(size=n)
    result = so.minimize(lambda x: jnp.sum((root @ (x - target)) ** 2) / 2, jnp.zeros(n), so.newton_cg())
    assert result.success
    assert int(result.evaluations) <= 15
    assert int(result.hessian_products) > n
