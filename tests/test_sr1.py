"""SR1 in a trust region: the textbook's formula and theorem, skipped pairs, negative curvature, rejected trials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision, quadratic, rosenbrock, rosenbrock_start, rotation, spd, with_spectrum

import secondorder as so
from secondorder.globalization import trust_region
from secondorder.optimizers.sr1 import _learn

learn = jax.jit(_learn)


def textbook(B, s, y):
    """Return B after a pair, by Nocedal & Wright (6.24) and the skip rule (6.26)."""
    v = y - B @ s
    if abs(v @ s) < 1e-8 * np.linalg.norm(s) * np.linalg.norm(v):
        return B
    return B + np.outer(v, v) / (v @ s)


def double_well(x):
    """Minima -1/4 at (1, 0) and (-1, 0), and a saddle at the origin."""
    return x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2 / 2


class TestTheUpdate:
    def test_is_that_of_the_textbook(self):
        """Over twenty pairs of either sign of s'y: the matrix, its symmetry, the secant equation."""
        rng, n, signs = np.random.default_rng(0), 5, set()
        with precision("float64"):
            B = with_spectrum(1, np.linspace(-2.0, 3.0, n))
            for _ in range(20):
                s, y = rng.normal(size=(2, n))
                ours, changed = learn(jnp.asarray(B), jnp.asarray(s), jnp.asarray(y))
                B = textbook(B, s, y)
                assert changed
                np.testing.assert_allclose(ours, B, rtol=1e-8, atol=1e-10 * np.abs(B).max())
                np.testing.assert_allclose(ours @ s, y, atol=1e-9 * np.abs(B).max())
                np.testing.assert_array_equal(ours, ours.T)
                signs.add(s @ y > 0)
        assert signs == {True, False}

    def test_gives_the_hessian_after_n_independent_steps(self):
        """Nocedal & Wright, Theorem 6.1: whatever the steps, and whether the Hessian is definite or not."""
        n = 8
        with precision("float64"):
            A = with_spectrum(3, np.array([-40.0, -3.0, -1.0, 0.5, 1.0, 2.0, 10.0, 100.0]))
            B = jnp.zeros((n, n))
            for i, s in enumerate(rotation(5, n) * np.geomspace(1e-3, 10.0, n)[:, None]):
                B, changed = learn(B, jnp.asarray(s), jnp.asarray(A @ s))
                assert changed
                np.testing.assert_allclose(B @ s, A @ s, rtol=1e-6, atol=1e-9)
                assert (np.abs(B - A).max() < 1e-6) == (i == n - 1)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_leaves_out_pairs_that_would_blow_it_up(self, dtype):
        with precision(dtype):
            B, s = jnp.eye(3), jnp.array([1.0, 0.0, 0.0])
            v = jnp.array([0.5 * jnp.finfo(dtype).eps ** 0.5, 1.0, 0.0])
            for y in (s, s + v, jnp.full(3, jnp.nan), jnp.full(3, jnp.inf)):  # v = 0, v nearly orthogonal to s, walls
                new, changed = learn(B, s, y)
                assert not changed
                np.testing.assert_array_equal(new, B)
            new, changed = learn(B, s, s + v * jnp.array([4.0, 1.0, 1.0]))
            assert changed
            assert jnp.all(jnp.isfinite(new))
            new, changed = learn(B, jnp.zeros(3), s)
            assert not changed

    def test_scales_the_first_matrix(self):
        """Beyond s and y, curvature is y'y / s'y (6.20), or its size where s and y point apart."""
        for sign in (1.0, -1.0):
            s, y = jnp.array([1.0, 0.0, 0.0]), jnp.array([3.0 * sign, 1.0, 0.0])
            B, _ = learn(jnp.zeros((3, 3)), s, y)
            np.testing.assert_allclose(B[2], [0.0, 0.0, 10.0 / 3.0], rtol=1e-6)
            np.testing.assert_allclose(B @ s, y, rtol=1e-6, atol=1e-6)


class TestRuns:
    def test_take_the_exact_step_of_an_indefinite_model_and_leave_the_saddle(self):
        """From a point near the saddle: some steps run along negative curvature of B to the boundary."""
        with precision("float64"):
            optimizer, x = so.sr1(), jnp.array([1e-3, 0.5])
            state, used = optimizer.init(x), 0
            update, evaluate = jax.jit(optimizer.update), jax.jit(jax.value_and_grad(double_well))
            for _ in range(40):
                value, grad = evaluate(x)
                move, state = update(grad, state, x, value=value)
                x = x + move
                values, vectors = state.spectrum
                np.testing.assert_allclose(vectors @ (values[:, None] * vectors.T), state.matrix, atol=1e-9)
                if values[0] < -1e-3 and not state.fresh and jnp.linalg.norm(state.grad) > 1e-6:
                    step = x - state.params
                    g = vectors.T @ state.grad
                    best = vectors @ trust_region.solve(values, g, state.damping.size)
                    np.testing.assert_allclose(step, best, atol=1e-12)
                    np.testing.assert_allclose(jnp.linalg.norm(step), state.damping.size, rtol=1e-9)
                    used += 1
            assert used >= 2
            accepted = so.accepted(state)
            np.testing.assert_allclose(accepted.value, -0.25, atol=1e-12)

    def test_learn_from_a_rejected_trial(self):
        """Algorithm 6.2 updates B whether the step is taken or not; x and f stay."""
        with precision("float64"):
            fun = lambda x: jnp.sum(x**2) + jnp.where(x[0] < 0.5, 1e3 * (0.5 - x[0]) ** 2, 0.0)
            optimizer, x = so.sr1(so.trust_region(radius=1.0)), jnp.array([1.0, 0.1])
            state = optimizer.init(x)
            update, evaluate = jax.jit(optimizer.update), jax.jit(jax.value_and_grad(fun))
            value, grad = evaluate(x)
            move, state = update(grad, state, x, value=value)
            trial = x + move
            value, other = evaluate(trial)
            move, state = update(other, state, trial, value=value)
            assert not state.info.accepted
            np.testing.assert_array_equal(state.params, x)
            np.testing.assert_allclose(state.matrix @ (trial - x), other - grad, rtol=1e-9)
            assert state.damping.size < 1.0
            # The next trial minimizes the new model from the old point.
            values, vectors = state.spectrum
            best = vectors @ trust_region.solve(values, vectors.T @ grad, state.damping.size)
            np.testing.assert_allclose(trial + move - x, best, atol=1e-12)

    @pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_end_on_a_quadratic_soon_after_n_steps(self, seed):
        n = 6
        with precision("float64"):
            A, b = spd(seed, n), np.random.default_rng(seed).normal(size=n)
            result = so.minimize(quadratic, jnp.ones(n), so.sr1(), args=(jnp.asarray(A), jnp.asarray(b)), gtol=1e-9)
            assert result.success
            assert int(result.evaluations) <= n + 6
            np.testing.assert_allclose(result.params, np.linalg.solve(A, b), rtol=1e-7, atol=1e-8)

    @pytest.mark.parametrize(("n", "budget"), [(2, 66), pytest.param(20, 200, marks=pytest.mark.slow)])
    def test_solve_rosenbrock_in_few_evaluations_without_a_hessian(self, n, budget):
        with precision("float64"):
            result = so.minimize(rosenbrock, rosenbrock_start(n), so.sr1(), gtol=1e-8)
            assert result.success
            np.testing.assert_allclose(result.params, 1.0, atol=1e-6)
            assert int(result.evaluations) <= budget
            assert int(result.hessians) == int(result.hessian_products) == 0

    @pytest.mark.slow
    def test_keep_the_matrix_and_make_no_pair_when_data_change(self):
        shifted = lambda x, shift: rosenbrock(x - shift)
        with precision("float64"):
            args = (jnp.zeros(6),)
            first = so.minimize(shifted, rosenbrock_start(6), so.sr1(), args=args, max_steps=12)
            options = {"args": (jnp.full(6, 1e-2),), "state": first.state, "max_steps": 0}
            second = so.minimize(shifted, first.params + 1e-3, so.sr1(), **options)
            assert np.abs(first.state.matrix).max() > 1.0
            np.testing.assert_array_equal(second.state.matrix, first.state.matrix)


def test_another_damping_is_refused():
    with pytest.raises(TypeError, match=r"sr1: damping must be made by trust_region"):
        so.sr1(so.levenberg())
