"""Textbook facts: finite termination, secant equations, orders of convergence, invariances, and counted costs."""

import functools
import re
from typing import ClassVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    DTYPES,
    GTOL,
    OPTIMIZERS,
    bfgs_inverse,
    convex,
    precision,
    quadratic,
    rosenbrock,
    rosenbrock_start,
    rotation,
    spd,
    with_spectrum,
)
from jax.interpreters import ad, mlir

import secondorder as so
from secondorder import secant
from secondorder.linalg import compact_bfgs, inverse_hessian, tree

EXACT = so.line_search(c1=1e-9, c2=1e-7, max_trials=60)


evaluate = jax.jit(jax.value_and_grad(rosenbrock))
_POINTS = []


def _record(step):
    _POINTS.append(np.asarray(step.params))


def accepted_points(fun, x0, optimizer, **options):
    """Return the result and every accepted point, the start first, shape (steps + 1, n).

    The callback is the same object every time, so that runs that differ in `args` alone share a program.
    """
    _POINTS.clear()
    result = so.minimize(fun, x0, optimizer, callback=_record, **options)
    jax.effects_barrier()
    points = [np.asarray(x0), *_POINTS]
    assert len(points) - int(result.steps) in (1, 2)  # the callback may have seen the start, too
    return result, np.array(points[len(points) - 1 - int(result.steps) :])


def rosenbrock_turned(x, Q):
    return rosenbrock(Q @ x)


def convex_changed(x, shift, T, c):
    return convex(T @ x + c, shift)


def scaled_rosenbrock(x, c):
    return c * rosenbrock(x)


class TestNewtonOnAQuadratic:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [1, 17])  # below and above one block of Hessian columns
    @pytest.mark.parametrize(
        "optimizer",
        [
            so.newton(so.trust_region(radius=1e4)),
            OPTIMIZERS["newton_modified_cholesky"],
            so.saddle_free_newton(region=so.trust_region(radius=1e4)),
        ],
        ids=["trust_region", "modified_cholesky", "saddle_free"],
    )
    def test_is_at_the_minimum_after_one_step(self, dtype, n, optimizer):
        with precision(dtype):
            A, b = spd(n, n), np.random.default_rng(n).normal(size=n)
            args = (jnp.asarray(A, dtype), jnp.asarray(b, dtype))
            result = so.minimize(quadratic, jnp.ones(n), optimizer, args=args, gtol=5e-5)
            assert (int(result.steps), int(result.evaluations), bool(result.success)) == (1, 2, True)
            assert int(result.hessians) <= 2  # the start, and the test for negative curvature at the end
            np.testing.assert_allclose(result.params, np.linalg.solve(A, b), atol=2e-5 if dtype == "float32" else 1e-12)

    def test_as_a_direction_is_the_whole_way(self):
        A, b = spd(1, 5), np.random.default_rng(1).normal(size=5)
        loss = lambda x: quadratic(x, jnp.asarray(A, "f"), jnp.asarray(b, "f"))
        for block in (so.scale_by_newton(), so.scale_by_saddle_free_newton()):
            x = jnp.ones(5)
            update, _ = block.update(jax.grad(loss)(x), block.init(x), x, value_fn=loss)
            np.testing.assert_allclose(x - update, np.linalg.solve(A, b), atol=1e-5)

    def test_shifted_by_levenberg_is_the_shifted_step(self):
        """The first accepted step is -(H + sigma I)^-1 g with sigma = tau times the largest eigenvalue."""
        with precision("float64"):
            A, b = spd(2, 5, 1.0, 8.0), np.random.default_rng(2).normal(size=5)
            args = (jnp.asarray(A), jnp.asarray(b))
            result = so.minimize(quadratic, jnp.zeros(5), so.newton(so.levenberg(tau=0.5)), args=args, max_steps=1)
            np.testing.assert_allclose(result.params, np.linalg.solve(A + 4.0 * np.eye(5), b), rtol=1e-10)

    def test_with_negative_curvature_is_mirrored_by_saddle_free_newton(self):
        with precision("float64"):
            values = np.array([-3.0, -0.5, 1.0, 4.0])
            A, Q, g = with_spectrum(3, values), rotation(3, 4), np.array([1.0, 2.0, -1.0, 0.5])
            optimizer = so.saddle_free_newton(region=so.trust_region(radius=1e3))
            x = jnp.zeros(4)
            move, _ = optimizer.update(
                jnp.asarray(g), optimizer.init(x), x, value=0.0, hvp_fn=lambda x, v: jnp.asarray(A) @ v
            )
            np.testing.assert_allclose(move, -Q @ (Q.T @ g / np.abs(values)), rtol=1e-10)


def inverse(state):
    """Return the inverse Hessian approximation of a BFGS state, in float64."""
    return np.asarray(inverse_hessian.current(state.inverse), float)


class TestBFGS:
    @pytest.mark.parametrize("scale", [True, False])
    @pytest.mark.parametrize("n", [2, 5, 9])
    def test_with_an_exact_search_ends_a_quadratic_in_n_steps_with_the_inverse_hessian(self, n, scale):
        """Nocedal & Wright (2006), Theorem 6.4."""
        with precision("float64"):
            A, b = spd(n, n), np.random.default_rng(n).normal(size=n)
            optimizer = so.bfgs(scale_init_precond=scale, linesearch=EXACT)
            result = so.minimize(quadratic, jnp.ones(n), optimizer, args=(jnp.asarray(A), jnp.asarray(b)), gtol=1e-9)
            assert result.success
            assert int(result.steps) == n
            np.testing.assert_allclose(inverse(result.state) @ A, np.eye(n), atol=1e-7)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [True, False])
    def test_inverse_maps_y_to_s_is_symmetric_and_positive_definite_after_every_update(self, dtype, scale):
        with precision(dtype):
            optimizer = so.bfgs(scale_init_precond=scale)
            step = jax.jit(optimizer.update)
            x = rosenbrock_start(6)
            state, before, seen, peak = optimizer.init(x), None, 0, 1.0
            for _ in range(60):
                value, grad = evaluate(x)
                move, state = step(grad, state, x, value=value)
                if bool(state.info.accepted):
                    if before is not None and int(state.inverse.pairs) > seen:
                        s, y = (np.asarray(a - b, float) for a, b in zip((x, grad), before, strict=True))
                        H = inverse(state)
                        peak = max(peak, np.abs(H).max())
                        tolerance = 200 * np.finfo(dtype).eps * peak * np.linalg.norm(y)
                        assert np.abs(H @ y - s).max() <= tolerance + 1e-30
                        assert np.abs(H - H.T).max() <= 20 * np.finfo(dtype).eps * peak
                        assert np.linalg.eigvalsh(H)[0] > 0
                    before, seen = (x, grad), int(state.inverse.pairs)
                x = x + move
            assert seen > 20

    def test_refuses_a_pair_of_negative_curvature(self):
        """-x'x/2 has y = -s everywhere: H must stay as it was, for the direction-only block too."""
        optimizer = so.scale_by_bfgs()
        x = jnp.array([1.0, 2.0])
        state = optimizer.init(x)
        for k in range(3):
            _, state = optimizer.update(-x * (k + 1), state, x * (k + 1))
        np.testing.assert_array_equal(inverse(state), np.eye(2))

    def test_direction_is_minus_h_times_the_gradient(self):
        """The direction is got by vector algebra from H g of the old H; here by the product with the new one."""
        with precision("float64"):
            result = so.minimize(rosenbrock, rosenbrock_start(6), so.bfgs(), max_steps=20)
            state = result.state
            expected = -inverse(state) @ np.asarray(state.grad)
            np.testing.assert_allclose(state.direction, expected, rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(state.slope, expected @ np.asarray(state.grad), rtol=1e-8)


def two_loops(pairs, g, gamma):
    """Return H g by Nocedal & Wright (2006), Algorithm 7.4, in the precision of the input."""
    q, alphas = g.copy(), []
    for s, y in reversed(pairs):
        alpha = s @ q / (s @ y)
        q = q - alpha * y
        alphas.append(alpha)
    r = gamma * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - y @ r / (s @ y))
    return r


class TestCompactLBFGS:
    DIRECTION_ERROR: ClassVar = {"float32": 2e-5, "float64": 5e-14}

    @staticmethod
    def walk(dtype, n, m, steps, seed, scale=True, odd=lambda s, y: y):
        """Feed the direction-only block random points of a quadratic; yield its H g, g, the live pairs and gamma.

        Every third change of the gradient is replaced by `odd(s, y)`. A pair counts as live if its cosine is not zero.
        """
        rng = np.random.default_rng(seed)
        A = spd(seed, n, 1.0, 10.0)
        optimizer = so.scale_by_lbfgs(memory_size=m, scale_init_precond=scale)
        update = jax.jit(optimizer.update)
        x = np.asarray(rng.normal(size=n), dtype)
        g = np.asarray(A @ x, dtype)
        state, pairs = optimizer.init(jnp.asarray(x)), []
        _, state = update(jnp.asarray(g), state, jnp.asarray(x))
        for k in range(steps):
            step = rng.normal(size=n) * 10.0 ** rng.uniform(-2, 1)
            change = odd(step, A @ step) if k % 3 == 2 else A @ step
            new_x, new_g = np.asarray(x + step, dtype), np.asarray(g + change, dtype)
            s, y = np.float64(new_x - x), np.float64(new_g - g)
            x, g = new_x, new_g
            Hg, state = update(jnp.asarray(g), state, jnp.asarray(x))
            if abs(s @ y) > 0.01 * np.linalg.norm(s) * np.linalg.norm(y):
                pairs = [*pairs, (s, y)][-m:]
            s, y = pairs[-1]
            yield np.float64(Hg), np.float64(g), pairs, (s @ y) / (y @ y) if scale else 1.0

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "m"), [(20, 1), (20, 4), (20, 7), (12, 12)])
    def test_equals_the_two_loop_recursion_and_the_dense_formula_also_after_the_ring_has_wrapped(self, dtype, n, m):
        with precision(dtype):
            worst = 0.0
            for Hg, g, pairs, gamma in self.walk(dtype, n, m, 3 * m + 4, seed=n + m):
                expected = two_loops(pairs, g, gamma)
                np.testing.assert_allclose(bfgs_inverse(pairs, gamma) @ g, expected, rtol=1e-9, atol=1e-9)
                worst = max(worst, np.linalg.norm(Hg - expected) / np.linalg.norm(expected))
        assert worst <= self.DIRECTION_ERROR[dtype]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_without_scaling_starts_from_the_identity(self, dtype):
        with precision(dtype):
            for Hg, g, pairs, gamma in self.walk(dtype, 12, 5, 16, seed=3, scale=False):
                expected = two_loops(pairs, g, gamma)
                assert np.linalg.norm(Hg - expected) <= 3 * self.DIRECTION_ERROR[dtype] * np.linalg.norm(expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_skips_pairs_without_curvature_and_keeps_the_older_ones(self, dtype):
        across = lambda s, y: y - s * (s @ y) / (s @ s)
        with precision(dtype):
            for Hg, g, pairs, gamma in self.walk(dtype, 12, 4, 20, seed=4, odd=across):
                expected = two_loops(pairs, g, gamma)
                assert np.linalg.norm(Hg - expected) <= 5 * self.DIRECTION_ERROR[dtype] * np.linalg.norm(expected)

    def test_as_a_direction_alone_takes_pairs_of_negative_curvature_as_optax_does(self):
        with precision("float64"):
            for Hg, g, pairs, gamma in self.walk("float64", 12, 4, 12, seed=4, odd=lambda s, y: -y):
                expected = two_loops(pairs, g, gamma)
                assert np.linalg.norm(Hg - expected) <= 1e-9 * np.linalg.norm(expected)

    def test_with_a_search_keeps_its_inverse_positive_definite_on_a_loss_of_negative_curvature(self):
        """-cos changes the sign of its curvature: every direction must descend nevertheless."""
        loss = lambda x: -jnp.sum(jnp.cos(x)) + 0.1 * jnp.sum(x[1:] * x[:-1]) ** 2
        optimizer = so.lbfgs(memory_size=3)
        x, update = jnp.array([3.0, -2.9, 2.0, 2.5]), jax.jit(optimizer.update)
        evaluate_this = jax.jit(jax.value_and_grad(loss))
        state = optimizer.init(x)
        for _ in range(40):
            value, grad = evaluate_this(x)
            if float(jnp.abs(grad).max()) < 1e-3:
                break
            move, state = update(grad, state, x, value=value)
            assert float(state.slope) < 0
            x = x + move
        assert float(jnp.abs(grad).max()) < 1e-3

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_satisfies_the_secant_equation_for_the_newest_pair(self, dtype):
        """H y = s: the memory of a run, applied to y in place of the gradient."""
        with precision(dtype):
            optimizer = so.lbfgs(memory_size=4)
            x, update, pairs = rosenbrock_start(8), jax.jit(optimizer.update), 0
            state, last = optimizer.init(x), None
            for _ in range(30):
                value, grad = evaluate(x)
                move, state = update(grad, state, x, value=value)
                if bool(state.info.accepted):
                    if last is not None and int(state.memory.pairs) > pairs:
                        s, y = x - last[0], grad - last[1]
                        memory = state.memory._replace(products=tree.matmul(state.memory.rows, y))
                        p, slope = compact_bfgs.direction(memory, y, y @ y)
                        bound = 1000 * np.finfo(dtype).eps * float(jnp.linalg.norm(s))
                        np.testing.assert_allclose(-p, s, atol=bound)
                        assert float(slope) == pytest.approx(-float(s @ y), rel=1e-3 if dtype == "float32" else 1e-10)
                    last, pairs = (x, grad), int(state.memory.pairs)
                x = x + move
            assert pairs > 10

    def test_keeps_six_digits_in_float32(self):
        """A median error below 1e-6, against 1e-7 for the two loops, on steps whose lengths span three decades."""
        ours, theirs = [], []
        for Hg, g, pairs, gamma in self.walk("float32", 50, 10, 60, seed=6):
            expected = two_loops(pairs, g, gamma)
            low = two_loops([(np.float32(s), np.float32(y)) for s, y in pairs], np.float32(g), np.float32(gamma))
            ours.append(np.linalg.norm(Hg - expected) / np.linalg.norm(expected))
            theirs.append(np.linalg.norm(low - expected) / np.linalg.norm(expected))
        assert np.median(theirs) <= 2e-7
        assert np.median(ours) <= 1e-6

    def test_forgets_everything_at_a_reset(self):
        memory = so.minimize(rosenbrock, rosenbrock_start(8), so.lbfgs(memory_size=4), max_steps=9).state.memory
        g = jnp.asarray(np.random.default_rng(7).normal(size=8), jnp.float32)
        memory = compact_bfgs.forget(memory, jnp.array(True))._replace(products=tree.matmul(memory.rows, g))
        p, slope = compact_bfgs.direction(memory, g, g @ g)
        np.testing.assert_allclose(p, -memory.gamma * g, rtol=1e-6)
        assert float(slope) == pytest.approx(-float(memory.gamma * g @ g), rel=1e-6)

    def test_with_room_for_all_pairs_takes_the_steps_of_bfgs(self):
        with precision("float64"):
            x0, steps = rosenbrock_start(16), 14
            options = {"max_steps": steps, "gtol": 0.0}
            unit = secant.optimizer("bfgs", None, False, so.line_search(), cautious=False)  # begins as `lbfgs` does
            _, ours = accepted_points(rosenbrock, x0, so.lbfgs(memory_size=steps, scale_init_precond=False), **options)
            _, dense = accepted_points(rosenbrock, x0, unit, **options)
            np.testing.assert_allclose(ours, dense, rtol=1e-7, atol=1e-9)

    def test_on_complex_parameters_takes_the_steps_of_the_real_pairs(self):
        with precision("float64"):
            target = jnp.array([1.0, -2.0, 0.5, 3.0])
            real = lambda x: rosenbrock(x) + jnp.sum((x - target) ** 4)
            split = lambda z: real(jnp.concatenate([jnp.real(z), jnp.imag(z)]))
            options = {"max_steps": 15, "gtol": 0.0}
            _, pairs = accepted_points(real, jnp.array([0.3, -0.7, 0.1, 0.9]), so.lbfgs(memory_size=3), **options)
            _, numbers = accepted_points(
                split, jnp.array([0.3 + 0.1j, -0.7 + 0.9j]), so.lbfgs(memory_size=3), **options
            )
            np.testing.assert_allclose(
                np.concatenate([numbers.real, numbers.imag], axis=1), pairs, rtol=1e-7, atol=1e-9
            )


def orders(optimizer, **options):
    """Return the gradient norms above rounding on the way, and log e_{k+1} - log e_k ratios of them."""
    with precision("float64"):
        args = (jnp.array([0.3, 1.0, -0.4]),)
        start = jnp.array([1.0, -2.0, 0.5])
        result = so.minimize(convex, start, optimizer, args=args, gtol=1e-13, history=True, max_steps=60, **options)
        e = np.asarray(result.history.grad_norm)[: int(result.steps) + 1]
    e = e[e > 1e-13]
    return e, np.log(e[2:] / e[1:-1]) / np.log(e[1:-1] / e[:-2])


class TestOrderOfConvergence:
    @pytest.mark.parametrize("name", ["newton_trust_region", "newton_modified_cholesky", "saddle_free_newton"])
    def test_of_newton_is_two(self, name):
        e, order = orders(OPTIMIZERS[name])
        assert e[-1] < 1e-8
        assert 1.8 <= order[-1] <= 2.2

    def test_of_chebyshevs_method_is_three(self):
        e, order = orders(so.newton(chebyshev=True))
        assert e[-1] < 1e-8
        assert 2.6 <= order[-1] <= 3.4

    def test_of_levenberg_is_superlinear_as_the_shift_falls_by_three(self):
        """Nielsen's shift falls by 3 at best, so that e_{k+1}/e_k does; quadratic it is not."""
        e, _ = orders(OPTIMIZERS["newton_levenberg"])
        rate = e[1:] / e[:-1]
        assert e[-1] < 1e-8
        assert np.all(rate[1:] < rate[:-1] / 2.5)

    def test_of_bfgs_is_above_one(self):
        """Superlinear (N&W Theorem 6.6): the last four steps gain far more digits than the four before them.

        Linear convergence gains as many. Single steps alternate between good and poor ones.
        """
        e, order = orders(OPTIMIZERS["bfgs"])
        assert e[-1] < 1e-9
        assert np.log(e[-1] / e[-5]) / np.log(e[-5] / e[-9]) > 1.3
        assert np.mean(order[-4:]) > 1.05

    def test_of_lbfgs_with_one_pair_is_no_better_than_linear(self):
        """The measure can tell: with one pair the rate does not go to zero, unlike with BFGS; six matrices each.

        That of one matrix is an accident of rounding (0.4 to 1.3), so that the mean counts."""
        quarters, halves = [], {"lbfgs": [], "bfgs": []}
        with precision("float64"):
            for seed in range(1, 7):
                args = jnp.asarray(spd(seed, 30, 1.0, 1e3)), jnp.zeros(30)
                for name, optimizer in (("lbfgs", so.lbfgs(memory_size=1)), ("bfgs", so.bfgs())):
                    options = {"args": args, "gtol": 1e-9, "history": True, "max_steps": 500}
                    result = so.minimize(quadratic, jnp.ones(30), optimizer, **options)
                    assert result.success
                    e = np.log(np.asarray(result.history.grad_norm)[: int(result.steps) + 1])
                    slope = lambda part: np.polyfit(np.arange(len(part)), part, 1)[0]
                    halves[name].append(slope(e[len(e) // 2 :]) / slope(e[: len(e) // 2]))
                    if name == "lbfgs":
                        quarters.append((e[len(e) // 2] - e[len(e) // 4], e[-1] - e[-1 - len(e) // 4]))
        middle, end = np.mean(quarters, axis=0)
        assert end > 2 * middle
        assert np.mean(halves["lbfgs"]) > 0.5
        assert max(halves["lbfgs"]) < 2.0 < min(halves["bfgs"])


def first_move(fun, x, optimizer, **functions):
    """Return where the first trial from x goes, less x."""
    with precision("float64"):
        x = jnp.asarray(x, float)
        value, grad = jax.value_and_grad(fun)(x)
        functions = functions or {"hvp_fn": so.curvature.hvp(fun)}
        return np.asarray(optimizer.update(grad, optimizer.init(x), x, value=value, **functions)[0])


def steep(x):
    return jnp.sum(x + x**2 / 2 + 5 * x**3 / 3)


class TestChebyshevsCorrection:
    """p + b with (H + sigma I) b = -T[p, p] / 2 (Gundersen & Steihaug 2006), in a region."""

    bent = so.newton(so.trust_region(radius=10.0), chebyshev=True)

    def test_is_that_of_the_textbook_where_the_radius_does_not_bind(self):
        fun = lambda x: jnp.exp(x[0]) - 2 * x[0] + x[1] ** 4 + x[0] * x[1]
        x = np.array([1.0, 0.7])
        g = np.array([np.e - 2 + 0.7, 4 * 0.7**3 + 1])
        H = np.array([[np.e, 1.0], [1.0, 12 * 0.7**2]])
        p = -np.linalg.solve(H, g)
        b = -np.linalg.solve(H, np.array([np.e * p[0] ** 2, 24 * 0.7 * p[1] ** 2])) / 2
        np.testing.assert_allclose(first_move(fun, x, self.bent), p + b, rtol=1e-12)

    def test_has_the_shift_of_the_step_where_the_radius_binds(self):
        fun = lambda x: jnp.sum(x**4) + jnp.sum(x) ** 2
        x, radius = np.array([1.0, 2.0]), 0.1
        g, H = 4 * x**3 + 6.0, np.diag(12 * x**2) + 2.0
        move = first_move(fun, x, so.newton(so.trust_region(radius=radius), chebyshev=True))
        p = first_move(fun, x, so.newton(so.trust_region(radius=radius)))
        sigma = -(g + H @ p) @ p / radius**2
        assert sigma > 1.0
        b = -np.linalg.solve(H + sigma * np.eye(2), 24 * x * p**2) / 2
        np.testing.assert_allclose(move, p + b, rtol=1e-9)

    def test_is_left_out_where_it_is_too_long_beside_the_step(self):
        np.testing.assert_allclose(first_move(steep, np.zeros(1), self.bent), -1.0)  # b would be -5

    def test_is_left_out_where_the_model_bends_down_along_the_step(self):
        fun = lambda x: jnp.sum(x**3) / 3 - x[0]
        x, radius = np.array([-0.5, 0.2]), 0.1
        straight, bent = (so.newton(so.trust_region(radius=radius), chebyshev=bends) for bends in (False, True))
        p = first_move(fun, x, straight)
        assert p @ np.diag(2 * x) @ p < 0
        np.testing.assert_allclose(first_move(fun, x, bent), p, rtol=1e-12)
        x = np.array([2.0, 1.0])  # there it bends up
        assert np.linalg.norm(first_move(fun, x, bent) - first_move(fun, x, straight)) > 1e-5

    def test_is_left_out_where_the_third_derivative_is_not_finite(self):
        fun = lambda x: jnp.sum((x - 1.0) ** 2) + jnp.sum(jnp.abs(x) ** 2.5)
        straight = so.newton(so.trust_region(radius=10.0))
        move = first_move(fun, np.zeros(2), self.bent)
        assert np.all(np.isfinite(move))
        np.testing.assert_allclose(move, first_move(fun, np.zeros(2), straight))

    def test_needs_a_product_that_can_be_differentiated(self):
        fun = lambda x: jnp.sum(x**2) + jnp.sum(x)
        on_the_host = lambda x, v: jax.pure_callback(lambda x: np.full_like(x, 2.0), x, x) * v
        allowed = so.newton(so.trust_region(radius=10.0), chebyshev=None)
        np.testing.assert_allclose(first_move(fun, np.ones(2), allowed, hvp_fn=on_the_host), -1.5)
        with pytest.raises(ValueError, match="JVP"):
            first_move(fun, np.ones(2), self.bent, hvp_fn=on_the_host)

    def test_comes_in_reverse_for_a_loss_with_reverse_rules_alone(self):
        @jax.custom_vjp
        def quartic(x):
            return jnp.sum(x**4)

        quartic.defvjp(lambda x: (jnp.sum(x**4), x), lambda x, ct: (ct * 4 * x**3,))
        fun = lambda quartic: lambda x: quartic(x) + jnp.sum((x - 1.0) ** 2)
        x = np.array([0.3, -2.0])
        expected = first_move(fun(lambda x: jnp.sum(x**4)), x, self.bent)
        np.testing.assert_allclose(first_move(fun(quartic), x, self.bent), expected, rtol=1e-12)

    def test_counts_as_two_products(self):
        result = so.minimize(rosenbrock, rosenbrock_start(2), so.newton(chebyshev=True))
        assert int(result.hessian_products) == 2 * int(result.evaluations)

    def test_saves_evaluations_where_a_valley_bends_and_is_the_default(self):
        with precision("float64"):
            runs = {
                name: so.minimize(rosenbrock, rosenbrock_start(2), optimizer)
                for name, optimizer in (
                    ("default", None),
                    ("bent", so.newton(chebyshev=True)),
                    ("straight", so.newton()),
                )
            }
        assert all(run.success for run in runs.values())
        assert int(runs["default"].evaluations) == int(runs["bent"].evaluations)
        assert int(runs["bent"].evaluations) < 0.8 * int(runs["straight"].evaluations)

    def test_stays_out_of_a_line_search(self):
        with pytest.raises(ValueError, match=r"chebyshev.*modified_cholesky.*trust_region"):
            so.newton(so.modified_cholesky(), chebyshev=True)
        assert so.newton(so.modified_cholesky(), chebyshev=None) is not None


SCALED = {**OPTIMIZERS, "cubic_newton": so.cubic_newton(), "newton_chebyshev": so.newton(chebyshev=True)}


class TestInvariance:
    @staticmethod
    @functools.cache
    def run(dtype, name, c):
        tolerance = 100 * GTOL[dtype]
        with precision(dtype):
            x0, gtol = jnp.array([-1.2, 1.0, -1.2, 1.0]), jnp.asarray(tolerance * c)
            options = {"args": (jnp.asarray(c),), "gtol": gtol, "history": True, "max_steps": 80}
            return jax.tree.map(np.asarray, so.minimize(scaled_rosenbrock, x0, SCALED[name], **options))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", SCALED)
    def test_a_unit_of_the_loss_that_is_a_power_of_two_changes_nothing_to_the_last_bit(self, name, dtype):
        one = self.run(dtype, name, 1.0)
        assert one.success
        for c in (2.0**-20, 2.0**20):
            other = self.run(dtype, name, c)
            assert (int(other.steps), int(other.evaluations)) == (int(one.steps), int(one.evaluations))
            np.testing.assert_array_equal(other.params, one.params)
            np.testing.assert_array_equal(other.history.step_norm, one.history.step_norm)
            np.testing.assert_array_equal(other.history.value, one.history.value * c)

    @pytest.mark.parametrize("c", [1e-6, 1e6])
    @pytest.mark.parametrize("name", SCALED)
    def test_any_other_unit_changes_the_accepted_points_by_rounding(self, name, c):
        one, other = self.run("float64", name, 1.0), self.run("float64", name, c)
        assert (int(other.steps), int(other.evaluations)) == (int(one.steps), int(one.evaluations))
        k = int(one.steps) + 1
        np.testing.assert_allclose(other.history.value[:k] / c, one.history.value[:k], rtol=1e-3, atol=1e-8)
        np.testing.assert_allclose(other.history.step_norm[:k], one.history.step_norm[:k], rtol=1e-3, atol=1e-8)
        np.testing.assert_allclose(other.params, one.params, atol=1e-8)

    @pytest.mark.parametrize("c", [1e-6, 1e6])
    @pytest.mark.parametrize("name", SCALED)
    def test_any_other_unit_changes_the_first_accepted_points_by_rounding_in_float32(self, name, c):
        """Rosenbrock's valley doubles a rounding error at every step or so: the first steps tell."""
        one, other, k = self.run("float32", name, 1.0), self.run("float32", name, c), 6
        assert other.success
        assert one.success
        np.testing.assert_allclose(other.history.value[:k] / c, one.history.value[:k], rtol=1e-3)
        np.testing.assert_allclose(other.history.step_norm[:k], one.history.step_norm[:k], rtol=1e-3)
        np.testing.assert_allclose(other.params, one.params, atol=2e-2)

    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "newton_modified_cholesky"])
    def test_a_rotation_about_the_origin_rotates_the_accepted_points(self, name):
        """Modified Cholesky is left out: where it modifies, it does so along the coordinate axes."""
        Q = rotation(1, 4)
        with precision("float64"):
            x0, options = rosenbrock_start(4), {"max_steps": 20, "gtol": 0.0}
            run = functools.partial(accepted_points, rosenbrock_turned, optimizer=OPTIMIZERS[name], **options)
            _, xs = run(x0, args=(jnp.eye(4),))
            _, zs = run(jnp.asarray(Q.T @ np.asarray(x0)), args=(jnp.asarray(Q),))
        np.testing.assert_allclose(zs @ Q.T, xs, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize(
        "optimizer",
        [so.newton(so.trust_region(radius=1e6)), so.newton(so.modified_cholesky())],
        ids=["region", "search"],
    )
    def test_an_affine_change_of_variables_carries_newtons_points_along(self, optimizer):
        """Where neither the radius nor E binds, x_k = T z_k + c for every k."""
        T, c = with_spectrum(2, np.array([0.1, 1.0, 30.0])), np.array([0.5, -1.0, 2.0])
        with precision("float64"):
            shift, x0 = jnp.array([0.3, 1.0, -0.4]), np.array([1.0, -2.0, 0.5])
            run = functools.partial(accepted_points, convex_changed, optimizer=optimizer, max_steps=5, gtol=0.0)
            _, xs = run(jnp.asarray(x0), args=(shift, jnp.eye(3), jnp.zeros(3)))
            _, zs = run(jnp.asarray(np.linalg.solve(T, x0 - c)), args=(shift, jnp.asarray(T), jnp.asarray(c)))
        k = min(len(xs), len(zs))
        assert k >= 4
        np.testing.assert_allclose(zs[:k] @ T.T + c, xs[:k], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "budget"), [(2, 46), (100, 633)])
@pytest.mark.parametrize("name", ["lbfgs", "bfgs"])
def test_rosenbrock_is_solved_in_no_more_evaluations_than_optax_needs(name, n, budget, dtype):
    with precision(dtype):
        result = so.minimize(rosenbrock, rosenbrock_start(n), OPTIMIZERS[name])
        assert result.success
        assert int(result.evaluations) <= budget
        np.testing.assert_allclose(result.params, np.ones(n), atol=1e-3)


@pytest.mark.parametrize("name", ["lbfgs", "bfgs"])
def test_parameters_of_very_different_size_do_not_slow_the_first_scale_down(name):
    """Curvatures differ by 1e13. With H0 = (s'y / y'y) I alone this takes 33 evaluations, as measured."""

    def loss(x):
        a, b = x[0] / 500, 1e4 * x[1]
        return (a - 0.5) ** 2 + (a * b - 2) ** 2

    with precision("float64"):
        result = so.minimize(loss, jnp.array([500.0, 1e-4]), OPTIMIZERS[name], gtol=1e-9)
        assert result.success
        np.testing.assert_allclose(result.params, [250.0, 4e-4], rtol=1e-6)
        assert int(result.evaluations) <= 25


@pytest.mark.parametrize(
    "name", ["newton_trust_region", "newton_levenberg", "newton_modified_cholesky", "saddle_free_newton"]
)
def test_rosenbrock_is_solved_by_every_newton(name):
    with precision("float32"):
        result = so.minimize(rosenbrock, rosenbrock_start(2), OPTIMIZERS[name])
        assert result.success
        assert int(result.evaluations) <= 35
        np.testing.assert_allclose(result.params, np.ones(2), atol=1e-3)


# A primitive that does nothing but can be counted in a program: once per copy of the loss.
marker = jax.extend.core.Primitive("marker")
marker.def_impl(lambda x: x)
marker.def_abstract_eval(lambda x: x.update(weak_type=False))
ad.defjvp2(marker, lambda tangent, _, x: tangent)
mlir.register_lowering(marker, mlir.lower_fun(jax.lax.cbrt, multiple_results=False))  # its trace in the lowered text


def marked(x):
    return rosenbrock(marker.bind(x))


class TestCopiesOfTheLoss:
    @staticmethod
    def copies(optimizer, **options):
        run = jax.jit(lambda x: so.minimize(marked, x, optimizer, **options).params)
        traced = run.trace(jnp.ones(4))
        return _count(traced.jaxpr.jaxpr), len(re.findall(r"stablehlo\.cbrt", traced.lower().as_text()))

    @pytest.mark.parametrize("name", ["lbfgs", "bfgs"])
    @pytest.mark.parametrize("options", [{}, {"history": True, "max_steps": 9}])
    def test_in_the_program_of_a_quasi_newton_method_is_one(self, name, options):
        assert self.copies(OPTIMIZERS[name], **options) == (1, 1)

    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "newton" in name])
    def test_in_the_program_of_a_newton_method_is_one_besides_the_hessian(self, name):
        in_jaxpr, in_text = self.copies(OPTIMIZERS[name])
        assert in_jaxpr <= 2
        assert in_text <= 2

    def test_in_the_program_of_chebyshevs_method_is_one_more(self):
        assert self.copies(so.newton(chebyshev=True)) == (3, 3)

    def test_marker_counts_every_copy(self):
        twice = jax.make_jaxpr(lambda x: jax.value_and_grad(marked)(x)[0] + marked(2 * x))(jnp.ones(4))
        assert _count(twice.jaxpr) == 2


def _count(jaxpr):
    """Return the number of markers in a program; a function that is called twice counts twice."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive is marker
        total += sum(_count(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


class TestVmap:
    """Loop turns are counted by a host callback that a batched loss calls once per turn for all lanes."""

    @staticmethod
    @functools.cache
    def batch(name):
        """Return the starts, the result of the batched run, and the number of batched calls of the loss."""
        turns = [0]

        def bump(x):
            turns[0] += 1
            return np.zeros(np.shape(x), np.float32)  # callbacks run in a thread without the precision switch

        def loss(x):
            first = jax.lax.stop_gradient(x[0])
            zero = jax.pure_callback(bump, jax.ShapeDtypeStruct((), jnp.float32), first, vmap_method="broadcast_all")
            return rosenbrock(x) + zero

        with precision("float64"):
            starts = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
            run = jax.jit(jax.vmap(lambda x: so.minimize(loss, x, OPTIMIZERS[name], max_evaluations=120)))
            result = jax.tree.map(np.asarray, run(starts))
        return starts, result, turns[0]

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_the_loop_turns_as_often_as_the_slowest_lane_evaluates(self, name):
        _, result, turns = self.batch(name)
        assert len(set(result.evaluations.tolist())) > 1
        if name in ("lbfgs", "bfgs"):
            assert turns == result.evaluations.max()
        else:  # the Hessian's own evaluation of the loss, at most once a turn
            assert result.evaluations.max() <= turns <= 2 * result.evaluations.max()

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_every_lane_ends_as_it_does_alone(self, name):
        starts, together, _ = self.batch(name)
        with precision("float64"):
            for lane, start in enumerate(starts):
                alone = so.minimize(rosenbrock, start, OPTIMIZERS[name], max_evaluations=120)
                assert together.status[lane] == alone.status
                assert together.evaluations[lane] == alone.evaluations
                np.testing.assert_allclose(together.params[lane], alone.params, atol=1e-6)
                np.testing.assert_allclose(together.value[lane], alone.value, rtol=1e-6, atol=1e-12)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("name", "budget"), [("lbfgs", 132), ("bfgs", 150)])
    def test_a_thousand_rosenbrock_lanes_need_few_batched_calls(self, name, budget, dtype):
        """132 and 150 are the figures of the sketch; 10 % are allowed for other starts."""
        with precision(dtype):
            starts = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 10)), dtype)
            result = jax.jit(jax.vmap(lambda x: so.minimize(rosenbrock, x, OPTIMIZERS[name])))(starts)
        assert np.asarray(result.evaluations).max() <= 1.1 * budget
        assert np.mean(np.asarray(result.status) == so.Status.CONVERGED) >= 0.99
