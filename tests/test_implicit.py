"""Derivatives of a minimum, against finite differences, formulas and an unrolled loop."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import spd

import secondorder as so
from secondorder import Status

pytestmark = pytest.mark.x64

THETA = np.array([0.1, 0.4, -0.3])
WEIGHTS = np.array([1.0, 2.0, -1.0])
LABELS = np.array([0, 1, 1])


def loss(x, shift, scale, labels):
    """Return a strictly convex loss that is not quadratic; labels are integers."""
    x = jnp.concatenate([x["a"][None], x["b"]])
    shift = shift["s"] + 0.1 * labels
    return jnp.sum(jnp.exp(x - shift)) - jnp.sum(x) + 0.5 * scale * jnp.sum(x**2) + 0.1 * jnp.sum(x) ** 2


def start():
    return {"a": jnp.zeros(()), "b": jnp.zeros(2)}


def solved(shift, scale=1.3, optimizer=None):
    return so.minimize(loss, start(), optimizer, args=({"s": shift}, scale, jnp.array(LABELS)), gtol=1e-12)


def figure(shift, scale=1.3, optimizer=None):
    """Return one number made of the minimum."""
    x = solved(shift, scale, optimizer).params
    return WEIGHTS[0] * x["a"] ** 2 + jnp.sin(WEIGHTS[1:] @ x["b"])


def differences(f, x, h=1e-5):
    return np.array([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(len(x))])


gradient = jax.jit(jax.grad(figure, argnums=(0, 1)))


class TestOfAMinimum:
    def test_gradients_in_both_modes_agree_with_finite_differences(self):
        by_shift, by_scale = gradient(THETA, 1.3)
        run = jax.jit(figure)
        np.testing.assert_allclose(by_shift, differences(run, THETA), atol=1e-8)
        np.testing.assert_allclose(by_scale, (run(THETA, 1.3 + 1e-5) - run(THETA, 1.3 - 1e-5)) / 2e-5, atol=1e-8)
        tangent = np.array([0.3, -1.0, 0.5])
        forward = jax.jvp(figure, (THETA, 1.3), (tangent, 0.7))[1]
        np.testing.assert_allclose(forward, by_shift @ tangent + 0.7 * by_scale, rtol=1e-10)

    def test_gradients_agree_with_those_of_an_unrolled_loop(self):
        def looped(shift):
            f = lambda y: loss(y, {"s": shift}, 1.3, jnp.array(LABELS))
            step = lambda x, _: (jax.tree.map(lambda u, g: u - 0.3 * g, x, jax.grad(f)(x)), None)
            x = jax.lax.scan(step, start(), None, length=400)[0]
            return WEIGHTS[0] * x["a"] ** 2 + jnp.sin(WEIGHTS[1:] @ x["b"])

        np.testing.assert_allclose(gradient(THETA, 1.3)[0], jax.jit(jax.grad(looped))(THETA), atol=1e-9)

    def test_second_derivatives_agree_with_differences_of_gradients_and_with_each_other(self):
        H = jax.jit(jax.hessian(figure))(THETA)  # forward over reverse
        np.testing.assert_allclose(H, H.T, atol=1e-10)
        np.testing.assert_allclose(H, differences(lambda t: gradient(t, 1.3)[0], THETA), atol=1e-8)

    def test_the_jacobian_is_the_same_by_rows_and_by_columns_and_lane_by_lane(self):
        params = lambda t: jnp.concatenate(jax.tree.leaves(jax.tree.map(jnp.atleast_1d, solved(t).params)))
        forward = jax.jit(jax.jacfwd(params))
        lanes = np.stack([THETA, 2 * THETA])
        np.testing.assert_allclose(jax.jit(jax.jacrev(params))(THETA), forward(THETA), atol=1e-12)
        batched = jax.jit(jax.vmap(jax.jacfwd(params)))(lanes)
        np.testing.assert_allclose(batched, [forward(t) for t in lanes], atol=1e-10)

    @pytest.mark.slow
    def test_the_value_moves_by_the_envelope_theorem_and_twice(self):
        value = jax.jit(lambda t: solved(t).value)
        np.testing.assert_allclose(jax.grad(value)(THETA), differences(value, THETA), atol=1e-8)
        by_value = jax.jit(jax.grad(value))
        np.testing.assert_allclose(jax.jit(jax.hessian(value))(THETA), differences(by_value, THETA), atol=1e-8)

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [so.lbfgs, so.bfgs], ids=["lbfgs", "bfgs"])
    def test_the_optimizer_has_no_influence_on_the_derivatives(self, make):
        found = jax.jit(jax.grad(functools.partial(figure, optimizer=make())))(THETA)
        np.testing.assert_allclose(found, gradient(THETA, 1.3)[0], atol=1e-9)

    def test_the_start_and_fields_without_meaning_beyond_the_run_do_not_move(self):
        def from_start(x0, t):
            result = so.minimize(loss, x0, args=({"s": t}, 1.3, jnp.array(LABELS)))
            return jnp.sum(result.params["b"]), (result.grad_norm, result.state)

        zero = jax.grad(lambda x0: from_start(x0, THETA)[0])(start())
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(zero))
        norm_dot = jax.jvp(lambda t: from_start(start(), t)[1][0], (THETA,), (np.ones(3),))[1]
        assert norm_dot == 0

    def test_values_that_the_loss_closes_over_are_differentiated_too(self):
        def closed(t):
            f = lambda x: loss(x, {"s": t}, 1.3, jnp.array(LABELS))
            x = so.minimize(f, start(), gtol=1e-12).params
            return WEIGHTS[0] * x["a"] ** 2 + jnp.sin(WEIGHTS[1:] @ x["b"])

        np.testing.assert_allclose(jax.jit(jax.grad(closed))(THETA), gradient(THETA, 1.3)[0], atol=1e-10)

    def test_auxiliary_output_moves_with_the_minimum(self):
        def with_aux(x, t):
            return jnp.sum((x - t) ** 2), {"sum": jnp.sum(x * t), "label": jnp.int32(7)}

        aux = lambda t: so.minimize(with_aux, jnp.zeros(3), args=(t,), has_aux=True).aux["sum"]
        np.testing.assert_allclose(jax.grad(aux)(THETA), 2 * THETA, atol=1e-10)  # x(t) = t

    def test_many_parameters_are_solved_by_conjugate_gradients(self):
        n = 300
        A = jnp.array(spd(0, n, 0.5, 20.0))
        quadratic = lambda x, b: 0.5 * x @ A @ x - b @ x + 0.01 * jnp.sum(x**4)
        total = jax.jit(lambda b: jnp.sum(so.minimize(quadratic, jnp.zeros(n), args=(b,), gtol=1e-9).params ** 2))
        b = jnp.array(np.random.default_rng(0).normal(size=n))
        x = so.minimize(quadratic, jnp.zeros(n), args=(b,), gtol=1e-9).params
        known = np.linalg.solve(A + np.diag(0.12 * x**2), 2 * x)
        np.testing.assert_allclose(jax.jit(jax.grad(total))(b), known, atol=1e-8)

    def test_within_bounds_the_free_parameters_move_and_the_held_ones_follow_their_bound(self):
        A, b = jnp.array([[3.0, 1.0], [1.0, 2.0]]), jnp.array([5.0, 5.0])

        def solution(top, b):
            f = lambda x, b: 0.5 * x @ A @ x - b @ x
            return so.minimize(f, jnp.zeros(2), args=(b,), bounds=(-1.0, jnp.array([top, 9.0])), gtol=1e-12).params

        by_top, by_b = jax.jit(jax.jacrev(solution, (0, 1)))(0.5, b)  # x = (top, (b_2 - top)/2)
        np.testing.assert_allclose(by_top, [1.0, -0.5], atol=1e-12)
        np.testing.assert_allclose(by_b, [[0.0, 0.0], [0.0, 0.5]], atol=1e-12)

    @pytest.mark.slow
    def test_complex_parameters_move_as_pairs_of_real_ones(self):
        def f(z, t):
            return jnp.sum(jnp.abs(z - t[0] * (1 + 2j)) ** 2) + 0.3 * jnp.sum(jnp.real(z) ** 2) * t[1] ** 2

        point = lambda t: so.minimize(f, jnp.zeros(2, complex), so.lbfgs(), args=(t,), gtol=1e-12).params[0]
        t = np.array([0.7, 0.9])
        shrunk = 1 + 0.3 * t[1] ** 2
        real = jax.grad(lambda t: jnp.real(point(t)))(t)
        np.testing.assert_allclose(real, [1 / shrunk, -t[0] / shrunk**2 * 0.6 * t[1]], atol=1e-9)
        np.testing.assert_allclose(jax.grad(lambda t: jnp.imag(point(t)))(t), [2.0, 0.0], atol=1e-9)


class TestWhereDerivativesAreInDoubt:
    @staticmethod
    def valley(x, t):
        return (x[0] + x[1] - t) ** 2  # every point of a line is a minimum

    def test_a_singular_hessian_is_damped_and_said_so(self):
        def run(t):
            result = so.minimize(self.valley, jnp.zeros(2), args=(t,))
            return result.params @ jnp.array([1.0, 3.0]), result

        slope, result = jax.grad(run, has_aux=True)(1.0)
        np.testing.assert_allclose(slope, 2.0, atol=1e-9)  # along (1, 1)/2, the shortest move
        assert Status(int(result.status)) == Status.RANK_DEFICIENT
        assert result.success
        assert "singular" in result.message
        assert run(1.0)[1].status == Status.CONVERGED  # without derivatives nobody has looked

    @pytest.mark.slow
    def test_a_flat_loss_has_zero_derivatives(self):
        flat = lambda x, t: 0.0 * jnp.sum(x) * t
        assert jax.grad(lambda t: jnp.sum(so.minimize(flat, jnp.ones(2), args=(t,)).params))(1.0) == 0.0

    def test_a_run_cut_short_has_finite_derivatives_and_its_own_status(self):
        def run(t):
            result = so.minimize(loss, start(), args=({"s": t}, 1.3, jnp.array(LABELS)), max_steps=1)
            return jnp.sum(result.params["b"]), result

        slope, result = jax.grad(run, has_aux=True)(THETA)
        assert np.all(np.isfinite(slope))
        assert Status(int(result.status)) == Status.MAX_STEPS

    def test_a_start_that_is_not_finite_has_derivatives_that_are_nan(self):
        bad = lambda x, t: jnp.log(x[0]) * t
        slope = jax.grad(lambda t: so.minimize(bad, jnp.array([-1.0]), args=(t,)).params[0])(1.0)
        assert np.isnan(slope)


class TestOfAFit:
    x = np.linspace(0.0, 3.0, 12)
    noise = 0.05 * np.sin(7 * x)

    @staticmethod
    def residual(p, x, y):
        return p["a"] * jnp.exp(-p["k"] * x) - y

    def fitted(self, y, **options):
        p0 = {"a": jnp.array(1.0), "k": jnp.array(1.0)}
        return so.least_squares(self.residual, p0, args=(self.x, y), **options)

    @property
    def y(self):
        return 3 * np.exp(-0.5 * self.x) + self.noise

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"loss": "soft_l1", "f_scale": 0.02}, id="robust"),
            pytest.param({}, id="plain", marks=pytest.mark.slow),
            pytest.param({"bounds": (0.0, 2.95)}, id="bounds", marks=pytest.mark.slow),
        ],
    )
    def test_gradients_with_respect_to_the_data_agree_with_finite_differences(self, options):
        rate = jax.jit(lambda y: self.fitted(y, **options).params["k"])
        np.testing.assert_allclose(jax.jit(jax.grad(rate))(self.y), differences(rate, self.y, 1e-4), atol=1e-6)

    @pytest.mark.slow
    def test_a_parameter_at_a_bound_moves_with_it_and_takes_the_others_along(self):
        run = jax.jit(lambda top: self.fitted(self.y, bounds=(0.0, {"a": top, "k": jnp.array(9.0)})))
        slopes = jax.jacfwd(lambda top: run(top).params)(2.5)
        assert run(2.5).active["a"] == 1
        np.testing.assert_allclose(slopes["a"], 1.0, atol=1e-12)
        difference = (run(2.5 + 1e-5).params["k"] - run(2.5 - 1e-5).params["k"]) / 2e-5
        np.testing.assert_allclose(slopes["k"], difference, atol=1e-7)
        value = jax.grad(lambda top: run(top).value)(2.5)
        np.testing.assert_allclose(value, (run(2.5 + 1e-5).value - run(2.5 - 1e-5).value) / 2e-5, atol=1e-7)

    @pytest.mark.slow
    def test_residuals_move_with_the_fit_and_second_derivatives_exist(self):
        residual = jax.jit(lambda y: jnp.sum(jnp.cos(3 * self.fitted(y).residual)))
        slopes = jax.jit(jax.grad(residual))
        np.testing.assert_allclose(slopes(self.y), differences(residual, self.y), atol=1e-7)
        curvature = jax.jit(jax.hessian(residual))(self.y)
        np.testing.assert_allclose(curvature, differences(slopes, self.y), atol=1e-5)

    @pytest.mark.slow
    def test_curve_fit_is_differentiable_in_the_data(self):
        model = lambda p, x: p["a"] * jnp.exp(-p["k"] * x)
        p0 = {"a": jnp.array(1.0), "k": jnp.array(1.0)}
        rate = jax.jit(lambda y: so.curve_fit(model, self.x, y, p0).params["k"])
        np.testing.assert_allclose(jax.jit(jax.grad(rate))(self.y), differences(rate, self.y, 1e-4), atol=1e-6)


def test_leaves_that_do_not_depend_on_the_arguments_stand_still():
    apart = lambda x, t: jnp.sum((x["moves"] - t) ** 2) + jnp.sum((x["stays"] - 1.0) ** 2)
    start = {"moves": jnp.zeros(2), "stays": jnp.zeros(300)}  # by conjugate gradients

    def solution(t):
        return so.minimize(apart, start, args=(t,)).params

    np.testing.assert_allclose(jax.grad(lambda t: solution(t)["moves"][0])(jnp.ones(2)), [1.0, 0.0], atol=1e-10)
    np.testing.assert_array_equal(jax.grad(lambda t: solution(t)["stays"][0])(jnp.ones(2)), [0.0, 0.0])


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import secondorder as so
sharding = NamedSharding(jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec("d"))
d, b, x0 = (jax.device_put(x, sharding) for x in (jnp.linspace(1.0, 4.0, 1024), jnp.ones(1024), jnp.zeros(1024)))
f = lambda x, b: jnp.sum(0.5 * d * x**2 + 0.01 * x**4 - b * x)
solution = lambda b: so.minimize(f, x0, so.lbfgs(), args=(b,), gtol=1e-9).params
gradient = jax.jit(jax.grad(lambda b: jnp.sum(solution(b) ** 2)))
found, x = gradient(b), solution(b)
print(found.sharding.spec == sharding.spec, gradient.lower(b).compile().as_text().count("all-gather"))
print(float(jnp.max(jnp.abs(found - 2 * x / (d + 0.12 * x**2)))))
"""


@pytest.mark.slow
def test_sharded_parameters_are_never_gathered():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | flags, check=True)
    facts, error = done.stdout.splitlines()
    assert facts == "True 0"
    assert float(error) < 1e-9


def test_without_differentiation_nothing_of_it_is_in_the_program():
    primitives = str(jax.make_jaxpr(lambda t: solved(t, optimizer=so.lbfgs()).params)(THETA))
    assert "custom_linear_solve" not in primitives
    assert "eigh" not in primitives


def test_an_eager_gradient_compiles_once():
    traces = []

    def counted(x, t):
        traces.append(1)
        return jnp.sum((x - t) ** 2)

    slope = jax.grad(lambda t: jnp.sum(so.minimize(counted, jnp.zeros(2), so.lbfgs(), args=(t,)).params))
    slope(jnp.ones(2))
    first = len(traces)
    slope(3 * jnp.ones(2))
    assert len(traces) == first > 0


class TestWhatIsClosedOver:
    """Labels, masks, keys, counters and options are traced, but cannot be perturbed: a rule must be handed them all."""

    def figure(self, t, label, key, rate=None):
        noise = 0.1 * jax.random.normal(key, (2,))
        inner = lambda x, t: jnp.sum((x - t[label] - jax.random.normal(key, (2,)) - noise) ** 2)
        return so.minimize(inner, jnp.zeros(2), so.lbfgs(rate), args=(t,), gtol=1e-10, max_steps=1000).params[0]

    T, LABEL = np.array([1.0, 2.0, 3.0]), np.array([1, 0])

    def check(self, slope):
        np.testing.assert_allclose(slope, [0.0, 1.0, 0.0], atol=1e-6)

    @pytest.mark.parametrize("rate", [None, 0.3])
    def test_may_be_traced_around_a_derivative(self, rate):
        slope = lambda label, key, rate: jax.grad(self.figure)(jnp.array(self.T), label, key, rate)
        operands = (jnp.array(self.LABEL), jax.random.key(0), rate)
        self.check(jax.jit(slope)(*operands))
        many = jax.vmap(slope, (0, None, None))(jnp.stack([operands[0], 1 + operands[0]]), *operands[1:])
        self.check(many[0])
        np.testing.assert_allclose(many[1], [0.0, 0.0, 1.0], atol=1e-6)
        self.check(
            jax.lax.scan(lambda c, _: (c + 1, slope(c % 2 + operands[0], *operands[1:])), 0, None, length=1)[1][0]
        )

    def test_may_be_traced_inside_of_a_derivative(self):
        self.check(jax.grad(jax.jit(self.figure))(jnp.array(self.T), jnp.array(self.LABEL), jax.random.key(0), 0.3))

    def test_options_do_not_move_a_minimum(self):
        rate = lambda rate: self.figure(jnp.array(self.T), jnp.array(self.LABEL), jax.random.key(0), rate)
        assert jax.grad(rate)(0.3) == 0.0
        radius = lambda r: (
            so.minimize(loss, start(), so.newton(so.trust_region(r)), args=({"s": THETA}, 1.3, LABELS)).value
        )
        assert jax.jit(jax.grad(radius))(0.5) == 0.0

    def test_a_preconditioner_may_hold_traced_data(self):
        def value(t, d):
            optimizer = so.newton_cg(preconditioner=lambda _, v: v / d)
            return so.minimize(lambda x: jnp.sum(d * (x - t) ** 2), jnp.zeros(2), optimizer, gtol=1e-10).params[0]

        np.testing.assert_allclose(jax.jit(jax.grad(value, (0, 1)))(2.0, jnp.array([1.0, 9.0]))[0], 1.0)

    def test_a_fit_may_close_over_a_mask(self):
        def rate(mask, t):
            residual = lambda x, t: jnp.where(mask, x - t**2, x)
            return jnp.sum(so.least_squares(residual, jnp.zeros(2), args=(t,)).params)

        np.testing.assert_allclose(jax.jit(jax.grad(rate, 1))(jnp.array([True, False]), 1.5), 3.0, rtol=1e-6)
