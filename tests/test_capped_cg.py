"""Capped conjugate gradients: solution, negative curvature, the cap; and the line search on its directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rosenbrock, rosenbrock_start, spd, with_spectrum

import secondorder as so
from secondorder.linalg import capped_cg as capped

N, EPS = 12, 0.3


@functools.partial(jax.jit, static_argnames="accuracy")
def end(H, g, damping=EPS, share=0.0, tolerance=1e-8, accuracy=None, limit=10_000):
    """Return the end for a dense H."""
    return capped.capped(lambda v: H @ v, g, damping, share, tolerance, accuracy, limit)


def gradient(seed: int = 1, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


# Algorithm 1


@pytest.mark.x64
def test_on_a_definite_matrix_it_solves_the_damped_system():
    H, g = spd(0, N), gradient()
    found = end(H, g)
    assert found.kind == capped.SOLUTION
    assert found.products <= N
    np.testing.assert_allclose(found.d, -np.linalg.solve(H + 2 * EPS * np.eye(N), g), rtol=1e-6)


@pytest.mark.x64
def test_the_residual_is_as_small_as_the_accuracy_asks():
    H, g = spd(0, N), gradient()
    found = end(H, g, accuracy=0.5)
    assert found.kind == capped.SOLUTION
    kappa = (float(found.bound) + 2 * EPS) / EPS
    assert np.linalg.eigvalsh(H)[0] < found.bound <= np.linalg.eigvalsh(H)[-1] * (1 + 1e-12)
    residual = (H + 2 * EPS * np.eye(N)) @ np.asarray(found.d) + g
    assert np.linalg.norm(residual) <= 0.5 / (3 * kappa) * np.linalg.norm(g) * (1 + 1e-9)


@pytest.mark.x64
@pytest.mark.parametrize("accuracy", [None, 0.5])
def test_on_an_indefinite_matrix_it_ends_with_a_direction_of_curvature_below_minus_eps(accuracy):
    kinds = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        spectrum = np.concatenate([-rng.uniform(0.5, 3.0, size=1 + seed % 3), rng.uniform(0.0, 20.0, size=N)])[:N]
        H, g = with_spectrum(seed, spectrum), gradient(seed)
        found = end(H, g, accuracy=accuracy)
        d = np.asarray(found.d)
        kinds.add(int(found.kind))
        assert found.kind == capped.CURVATURE
        assert d @ H @ d <= -EPS * d @ d * (1 - 1e-9)
        np.testing.assert_allclose(found.curvature, d @ H @ d / (d @ d), rtol=1e-6)
        assert found.products <= N + 1


@pytest.mark.x64
@pytest.mark.parametrize("lowest", [-0.2, -0.5, -1.0])
def test_it_ends_within_the_cap_which_knows_nothing_of_the_dimension(lowest):
    n = 600
    spectrum = np.linspace(lowest, 1.0, n)
    cap = capped.most_products(1.0, EPS, 0.5)
    assert cap < n / 3
    for seed in range(3):
        found = end(np.diag(spectrum), gradient(seed, n), accuracy=0.5)
        assert found.kind in (capped.SOLUTION, capped.CURVATURE)
        assert found.products <= min(n, cap) + 1
        if lowest == -0.2:  # all curvatures lie above eps - 2 eps
            assert found.kind == capped.SOLUTION


@pytest.mark.x64
def test_where_the_residual_falls_too_slowly_two_iterates_differ_by_a_direction_of_negative_curvature():
    # Plain conjugate gradients until such a pair exists, although no direction and no iterate has such curvature.
    H, g = np.concatenate([[-0.59] * 3, np.linspace(-0.2, 40.0, 60)]), gradient(0, 63)
    damped = H + 2 * EPS
    ys, rs, p = [0 * g], [g], -g
    found: list[int] = []
    while not found:
        assert p @ (damped * p) >= EPS * p @ p
        assert ys[-1] @ (damped * ys[-1]) >= EPS * ys[-1] @ ys[-1]
        step = rs[-1] @ rs[-1] / (p @ (damped * p))
        ys.append(ys[-1] + step * p)
        rs.append(rs[-1] + step * damped * p)
        p = -rs[-1] + rs[-1] @ rs[-1] / (rs[-2] @ rs[-2]) * p
        apart = [ys[-1] - y for y in ys[:-1]]
        found = [i for i, d in enumerate(apart) if d @ (damped * d) < EPS * d @ d]
    zero, flag = jnp.zeros(()), jnp.array(False)
    end = capped._Carry(
        jnp.int32(len(ys) - 1), ys[-1], rs[-1], p, p, zero, zero, jnp.asarray(EPS), zero, zero,
        flag, jnp.int32(capped.CAPPED),
    )  # fmt: skip
    again = capped._difference(lambda v: H * v, jnp.asarray(g), end)
    assert again.found
    assert again.i == found[0] + 1
    d = ys[-1] - np.asarray(again.y)
    np.testing.assert_allclose(d, apart[found[0]], rtol=1e-6, atol=1e-9)
    assert d @ (H * d) <= -EPS * d @ d
    np.testing.assert_allclose(again.least, d @ (H * d) / (d @ d), rtol=1e-6)
    idle = capped._difference(lambda v: H * v, jnp.asarray(g), end._replace(kind=jnp.int32(capped.SOLUTION)))
    assert idle.i == 0


@pytest.mark.x64
def test_a_cap_that_is_met_by_rounding_leaves_the_last_iterate(monkeypatch):
    monkeypatch.setattr(capped, "CAP", 1e-9)  # the true factor is met by what theory says alone
    H, g = spd(0, N), gradient()
    found = capped.capped(lambda v: H @ v, jnp.asarray(g), EPS, 0.0, 1e-8, 0.5, 10_000)
    assert found.kind == capped.LIMIT
    assert found.products <= 2 * N + 2
    assert np.asarray(found.d) @ g < 0


@pytest.mark.x64
def test_products_that_are_spent_or_not_finite_leave_a_direction_of_descent():
    H, g = spd(0, N), gradient()
    short = end(H, g, limit=3)
    assert short.kind == capped.LIMIT
    assert short.products == 3
    assert np.asarray(short.d) @ g < 0
    broken = end(H * np.nan, g)
    assert broken.kind == capped.NONFINITE
    np.testing.assert_array_equal(broken.d, -g)


@pytest.mark.x64
def test_without_a_damping_it_is_a_share_of_the_curvature_along_the_gradient():
    H, g = spd(0, N), gradient()
    found = end(H, g, damping=0.0, share=1e-3)
    np.testing.assert_allclose(found.damping, 1e-3 * np.linalg.norm(H @ g) / np.linalg.norm(g), rtol=1e-12)


# Algorithm 2


@pytest.mark.x64
@pytest.mark.parametrize("accuracy", [None, 0.5])
def test_it_minimizes_rosenbrock(accuracy):
    result = so.minimize(rosenbrock, rosenbrock_start(2), so.newton_cg(so.capped_cg(accuracy=accuracy)))
    assert result.success
    np.testing.assert_allclose(result.params, np.ones(2), rtol=1e-4)
    assert result.hessians == 0


def valleys(x: jax.Array) -> jax.Array:
    """Return a loss with negative curvature in every direction near the origin."""
    return jnp.sum(x**4 / 4 - jnp.arange(1.0, x.size + 1) * x**2 / 2)


@pytest.mark.x64
def test_a_step_along_negative_curvature_is_as_long_as_the_curvature_and_goes_downhill():
    x, search = jnp.full(5, 0.01), so.capped_cg()
    value, grad = jax.value_and_grad(valleys)(x)
    optimizer = so.newton_cg(search)
    move, state = optimizer.update(grad, optimizer.init(x), x, value=value, hvp_fn=so.curvature.hvp(valleys))
    assert state.model.exit == capped.CURVATURE
    assert state.info.indefinite
    H = np.asarray(jax.hessian(valleys)(x))
    curvature = np.asarray(move) @ H @ np.asarray(move) / float(move @ move)
    np.testing.assert_allclose(jnp.linalg.norm(move), -curvature, rtol=1e-9)
    assert move @ grad < 0


@pytest.mark.slow
@pytest.mark.x64
def test_every_accepted_step_lowers_the_loss_by_the_cube_of_its_length_and_trials_cost_no_products():
    decrease = 0.5
    optimizer = so.newton_cg(so.capped_cg(decrease=decrease))
    step = jax.jit(lambda g, s, x, v: optimizer.update(g, s, x, value=v, hvp_fn=so.curvature.hvp(rosenbrock)))
    evaluate = jax.jit(jax.value_and_grad(rosenbrock))
    x = rosenbrock_start(6)
    state, last, spent, accepted, rejected = optimizer.init(x), None, 0, 0, 0
    for _ in range(400):
        value, grad = evaluate(x)
        if jnp.max(jnp.abs(grad)) < 1e-6:
            break
        move, state = step(grad, state, x, value)
        if last is not None and state.info.accepted:
            accepted += 1
            assert value < last[1] - decrease / 6 * jnp.linalg.norm(x - last[0]) ** 3
        if last is not None and not state.info.accepted:
            rejected += 1
            assert state.info.hessian_products == spent
            np.testing.assert_allclose(x + move - last[0], 0.5 * (x - last[0]), rtol=1e-6, atol=1e-12)
        spent = int(state.info.hessian_products)
        last = (x, value) if last is None or state.info.accepted else last
        x = x + move
    assert jnp.max(jnp.abs(grad)) < 1e-6
    assert accepted >= 8
    assert rejected >= 3


def test_options_are_checked():
    with pytest.raises(ValueError, match="capped_cg: backtrack must be"):
        so.capped_cg(backtrack=1.5)
    with pytest.raises(ValueError, match="capped_cg takes no preconditioner"):
        so.newton_cg(so.capped_cg(), preconditioner=so.lbfgs_preconditioner())
    with pytest.raises(TypeError, match=r"region must be made by secondorder.trust_region\(...\) or capped_cg"):
        so.newton_cg(so.line_search())
