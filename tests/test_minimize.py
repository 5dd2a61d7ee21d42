"""The driver: every argument of `minimize`, every field of its result, every status."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPTIMIZERS, precision, quadratic, rosenbrock, rosenbrock_start, spd
from jax import export
from jax.experimental import io_callback

import secondorder as so
from secondorder import Status

START = rosenbrock_start(2)
evaluate = jax.jit(jax.value_and_grad(rosenbrock))


def shifted(x, target):
    return jnp.sum((x - target) ** 2) + jnp.sum((x - target) ** 4)


def with_aux(x, target):
    value = shifted(x, target)
    return value, {"x": x, "twice": 2 * value, "label": jnp.int32(7)}


class TestArgs:
    def test_reach_the_loss_in_order(self):
        loss = lambda x, a, b: jnp.sum((a * x - b["shift"]) ** 2)
        result = so.minimize(loss, jnp.zeros(2), args=(2.0, {"shift": jnp.array([2.0, 6.0])}))
        np.testing.assert_allclose(result.params, [1.0, 3.0], atol=1e-4)

    def test_may_be_numpy_arrays_and_python_numbers(self):
        result = so.minimize(shifted, np.zeros(2, np.float32), so.lbfgs(), args=(np.float32(3.0),))
        np.testing.assert_allclose(result.params, [3.0, 3.0], atol=1e-3)

    def test_with_new_data_do_not_trace_the_loss_again(self):
        traces = []

        def loss(x, target):
            traces.append(1)
            return shifted(x, target)

        for value in (1.0, 2.0, 3.0):
            result = so.minimize(loss, jnp.zeros(2), so.lbfgs(), args=(jnp.full(2, value),))
            np.testing.assert_allclose(result.params, [value, value], atol=1e-3)
            assert len(traces) == 2  # for what the loss closes over, and in the loop


class TestRepeatedCalls:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: so.lbfgs(memory_size=5),
            lambda: so.bfgs(linesearch=so.line_search(c2=0.5)),
            lambda: so.newton(so.trust_region(radius=2.0)),
            lambda: so.saddle_free_newton(damping=0.1),
        ],
        ids=["lbfgs", "bfgs", "newton", "saddle_free_newton"],
    )
    def test_with_a_newly_built_equal_optimizer_compile_nothing(self, make):
        traces = []

        def loss(x):
            traces.append(1)
            return rosenbrock(x)

        so.minimize(loss, START, make())
        first = len(traces)
        so.minimize(loss, START + 1, make(), gtol=1e-3, max_steps=7, max_evaluations=9)
        assert len(traces) == first > 0

    def test_with_other_options_compile_anew(self):
        traces = []

        def loss(x):
            traces.append(1)
            return rosenbrock(x)

        so.minimize(loss, START, so.lbfgs(memory_size=5))
        first = len(traces)
        so.minimize(loss, START, so.lbfgs(memory_size=6))
        assert len(traces) > first

    def test_get_the_same_optimizer_for_equal_options_and_another_for_others(self):
        assert so.lbfgs(memory_size=5) is so.lbfgs(memory_size=5)
        assert so.lbfgs() is so.lbfgs(memory_size=10)
        assert so.lbfgs(memory_size=5) is not so.lbfgs(memory_size=6)
        assert so.lbfgs(1.0) is not so.lbfgs()
        assert so.bfgs(linesearch=so.line_search(c2=0.5)) is so.bfgs(linesearch=so.line_search(c2=0.5))
        assert so.newton() is so.newton(damping=so.trust_region())
        assert so.newton(so.levenberg()) is not so.newton()
        assert so.saddle_free_newton(damping=0.5) is so.saddle_free_newton(0.5)
        assert so.scale_by_lbfgs(5) is so.scale_by_lbfgs(memory_size=5)


class TestAux:
    @pytest.mark.parametrize("name", [*OPTIMIZERS, "adam"])
    def test_belongs_to_the_returned_point(self, name):
        optimizer = OPTIMIZERS.get(name) or optax.adam(0.3)
        target = jnp.array([1.0, -2.0])
        result = so.minimize(with_aux, jnp.zeros(2), optimizer, args=(target,), has_aux=True, max_evaluations=6)
        np.testing.assert_array_equal(result.aux["x"], result.params)
        np.testing.assert_allclose(result.aux["twice"], 2 * result.value, rtol=1e-6)
        assert int(result.aux["label"]) == 7

    @pytest.mark.parametrize("budget", range(1, 12))
    def test_belongs_to_the_returned_point_at_every_end_of_a_budget(self, budget):
        """Rosenbrock rejects trials on the way: at some budgets the last evaluation is not the returned point."""
        result = so.minimize(lambda x: (rosenbrock(x), x), START, so.lbfgs(), has_aux=True, max_evaluations=budget)
        np.testing.assert_array_equal(result.aux, result.params)
        np.testing.assert_allclose(result.value, rosenbrock(result.params), rtol=1e-5)

    def test_is_none_without_has_aux(self):
        assert so.minimize(rosenbrock, START).aux is None


class TestTolerance:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_is_on_the_max_norm_of_the_gradient_and_ends_at_the_first_point_that_passes(self, name):
        result = so.minimize(rosenbrock, START, OPTIMIZERS[name], gtol=0.5, history=True, max_steps=99)
        norms = np.asarray(result.history.grad_norm)[: int(result.steps) + 1]
        assert result.success
        assert norms[-1] <= 0.5
        if name not in ("newton_trust_region", "saddle_free_newton", "newton_levenberg"):  # these know a saddle
            assert np.all(norms[:-1] > 0.5)
        np.testing.assert_allclose(result.grad_norm, np.abs(result.grad).max(), rtol=1e-6)

    def test_defaults_to_a_value_that_fits_the_precision(self):
        for dtype, gtol in (("float32", 1.2e-4), ("float64", 1e-5)):
            with precision(dtype):
                result = so.minimize(rosenbrock, rosenbrock_start(2), so.lbfgs(), history=True, max_steps=99)
                norms = np.asarray(result.history.grad_norm)[: int(result.steps) + 1]
            assert norms[-1] <= gtol < norms[-2]

    def test_may_be_traced(self):
        run = jax.jit(lambda gtol: so.minimize(rosenbrock, START, so.lbfgs(), gtol=gtol).grad_norm)
        assert float(run(1.0)) <= 1.0
        assert float(run(1e-3)) <= 1e-3


class TestBudgets:
    @pytest.mark.parametrize("name", [*OPTIMIZERS, "adam"])
    def test_of_evaluations_are_spent_exactly(self, name):
        optimizer = OPTIMIZERS.get(name) or optax.adam(1e-3)
        for budget in (1, 2, 5, 8):
            result = so.minimize(rosenbrock, START, optimizer, max_evaluations=budget)
            assert int(result.evaluations) == budget
            assert Status(int(result.status)) is Status.MAX_EVALUATIONS
            assert not result.success

    @pytest.mark.parametrize("name", [*OPTIMIZERS, "adam"])
    def test_of_steps_are_spent_exactly(self, name):
        optimizer = OPTIMIZERS.get(name) or optax.adam(1e-3)
        for budget in (0, 1, 3, 6):
            result = so.minimize(rosenbrock, START, optimizer, max_steps=budget)
            assert int(result.steps) == budget
            assert Status(int(result.status)) is Status.MAX_STEPS

    def test_of_no_step_evaluates_the_start_alone(self):
        result = so.minimize(rosenbrock, START, so.lbfgs(), max_steps=0)
        assert int(result.evaluations) == 1
        np.testing.assert_array_equal(result.params, START)
        np.testing.assert_allclose(result.value, 24.2, rtol=1e-6)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_of_evaluations_count_every_call_of_the_loss(self, name):
        calls = [0]

        def count(x):
            calls[0] += 1
            return np.zeros((), np.float32)

        def loss(x):
            zero = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(x))
            return rosenbrock(x) + zero

        result = so.minimize(loss, START, OPTIMIZERS[name], max_steps=10)
        jax.block_until_ready(result)
        linearizations = int(result.hessians)
        assert int(result.evaluations) <= calls[0] <= int(result.evaluations) + linearizations
        assert (linearizations > 0) == ("newton" in name)

    def test_more_steps_never_lead_to_a_worse_point(self):
        values = [float(so.minimize(rosenbrock, START, so.lbfgs(), max_evaluations=k).value) for k in range(1, 25)]
        assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(values))
        assert values[-1] < values[0]


class TestHistory:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_holds_one_entry_per_accepted_point_and_nan_beyond(self, name):
        result = so.minimize(rosenbrock, START, OPTIMIZERS[name], history=True, max_steps=60)
        history, steps = jax.tree.map(np.asarray, result.history), int(result.steps)
        assert history.value.shape == (61,)
        for row in history[:4]:
            assert np.all(np.isfinite(row[: steps + 1]))
            assert np.all(np.isnan(row[steps + 1 :]))
        np.testing.assert_allclose(history.value[0], 24.2, rtol=1e-6)
        np.testing.assert_allclose(history.value[steps], result.value)
        np.testing.assert_allclose(history.grad_norm[steps], result.grad_norm)
        assert history.step_length[0] == 0.0 == history.step_norm[0]
        assert history.evaluations[0] == 1
        assert np.all(np.diff(history.evaluations[: steps + 1]) >= 1)
        assert history.evaluations[steps] <= int(result.evaluations)

    def test_records_the_points_that_a_callback_sees(self):
        seen = []
        result = so.minimize(rosenbrock, START, so.bfgs(), history=True, max_steps=12, callback=seen.append)
        jax.effects_barrier()
        for step in seen:
            k = int(step.step)
            np.testing.assert_allclose(result.history.value[k], step.value)
            np.testing.assert_allclose(result.history.grad_norm[k], step.grad_norm)
            assert int(result.history.evaluations[k]) == int(step.evaluations)
        points = {int(step.step): step.params for step in seen} | {0: START}
        for k in range(1, 13):
            moved = float(jnp.linalg.norm(points[k] - points[k - 1]))
            np.testing.assert_allclose(result.history.step_norm[k], moved, rtol=1e-4)

    def test_is_none_unless_asked_for(self):
        assert so.minimize(rosenbrock, START).history is None

    def test_works_under_jit_and_vmap(self):
        starts = jnp.stack([START, START + 1])
        run = jax.jit(jax.vmap(lambda x: so.minimize(rosenbrock, x, so.lbfgs(), history=True, max_steps=15).history))
        assert run(starts).value.shape == (2, 16)
        np.testing.assert_allclose(run(starts).value[:, 0], jax.vmap(rosenbrock)(starts), rtol=1e-6)


class TestCallback:
    def test_is_called_once_after_every_step_with_python_numbers_in_order(self):
        seen = []
        result = so.minimize(rosenbrock, START, so.lbfgs(), callback=seen.append, max_steps=9)
        jax.effects_barrier()
        assert [int(step.step) for step in seen if int(step.step) > 0] == list(range(1, int(result.steps) + 1))
        np.testing.assert_array_equal(seen[-1].params, result.params)
        np.testing.assert_allclose(seen[-1].value, result.value)

    @pytest.mark.parametrize("kind", [bool, np.bool_, np.asarray, jnp.asarray], ids=["bool", "numpy", "array", "jax"])
    def test_ends_the_run_by_returning_true(self, kind):
        result = so.minimize(rosenbrock, START, so.lbfgs(), callback=lambda step: kind(int(step.step) == 4))
        assert Status(int(result.status)) is Status.CALLBACK
        assert int(result.steps) == 4
        assert not result.success

    def test_may_return_anything_else(self):
        for answer in (None, "go on", 1, np.ones(2)):
            result = so.minimize(
                rosenbrock, START, so.lbfgs(), callback=lambda step, answer=answer: answer, max_steps=3
            )
            assert int(result.steps) == 3

    def test_sees_the_structure_of_the_parameters(self):
        seen = []
        loss = lambda p: jnp.sum(p["a"] ** 2) + (p["b"] - 1.0) ** 2
        so.minimize(loss, {"a": jnp.ones((2, 2)), "b": jnp.float32(0.0)}, so.lbfgs(), callback=seen.append)
        jax.effects_barrier()
        assert seen[-1].params["a"].shape == (2, 2)
        np.testing.assert_allclose(seen[-1].params["b"], 1.0, atol=1e-3)


class TestProgress:
    def test_shows_a_bar_in_eager_runs(self, capfd):
        so.minimize(rosenbrock, START, so.lbfgs(), progress=True, max_steps=5)
        jax.effects_barrier()
        assert "5/5" in capfd.readouterr().err

    def test_shows_a_bar_in_jitted_runs(self, capfd):
        jax.jit(lambda x: so.minimize(rosenbrock, x, so.lbfgs(), progress=True, max_steps=4).value)(
            START
        ).block_until_ready()
        jax.effects_barrier()
        assert "4/4" in capfd.readouterr().err

    def test_does_not_change_the_result(self):
        with precision("float64"):
            x0 = rosenbrock_start(2)
            plain = so.minimize(rosenbrock, x0, so.lbfgs(), max_steps=8)
            shown = so.minimize(rosenbrock, x0, so.lbfgs(), max_steps=8, progress=True)
            np.testing.assert_allclose(plain.params, shown.params, rtol=1e-12)  # (another program rounds otherwise)


class TestState:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_of_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(self, name):
        """Cut after an accepted step; the start of the second half is evaluated again, and nothing else changes."""
        with precision("float64"):
            run = functools.partial(so.minimize, rosenbrock, optimizer=OPTIMIZERS[name], gtol=1e-9)
            whole = run(rosenbrock_start(2), max_steps=14)
            half = run(rosenbrock_start(2), max_steps=7)
            rest = run(half.params, state=half.state, max_steps=7)
            assert int(half.steps) + int(rest.steps) == int(whole.steps) == 14
            np.testing.assert_allclose(rest.params, whole.params, rtol=1e-6)
            assert int(rest.evaluations) - 1 <= int(whole.evaluations) - int(half.evaluations) + 2

    def test_keeps_its_curvature(self):
        """On a quadratic of 20 unknowns a warm BFGS needs a few steps where a cold one needs many."""
        with precision("float64"):
            A = jnp.asarray(spd(1, 20, 1.0, 1e3))
            first = so.minimize(quadratic, jnp.ones(20), so.bfgs(), args=(A, jnp.zeros(20)))
            b = jnp.ones(20)
            warm = so.minimize(quadratic, first.params, so.bfgs(), args=(A, b), state=first.state)
            cold = so.minimize(quadratic, first.params, so.bfgs(), args=(A, b))
            assert warm.success
            assert cold.success
            assert 2 * int(warm.evaluations) < int(cold.evaluations)
            np.testing.assert_allclose(warm.params, np.linalg.solve(A, b), atol=1e-5)

    def test_counts_evaluations_and_steps_of_this_run_alone(self):
        half = so.minimize(rosenbrock, START, so.newton(), max_steps=5)
        rest = so.minimize(rosenbrock, half.params, so.newton(), state=half.state, max_steps=3)
        assert (int(half.steps), int(rest.steps)) == (5, 3)
        assert int(rest.hessians) <= 5

    def test_of_adam_goes_on_with_its_momentum_and_loses_one_step_at_most(self):
        """The move that the first run had computed last is not in the state; its moments are. One step is 0.05."""
        run = functools.partial(so.minimize, shifted, optimizer=optax.adam(0.05), args=(1.0,))
        whole, half = run(jnp.zeros(2), max_steps=20), run(jnp.zeros(2), max_steps=10)
        rest, cold = run(half.params, max_steps=10, state=half.state), run(half.params, max_steps=10)
        assert float(rest.value) < float(half.value)
        assert abs(float(rest.params[0] - whole.params[0])) <= 0.05
        assert float(jnp.abs(rest.params - cold.params).max()) > 1e-3

    def test_goes_on_for_a_pytree(self):
        loss = lambda p: rosenbrock(jnp.concatenate([p["a"], p["b"][None]]))
        start = {"a": jnp.array([-1.2, 1.0]), "b": jnp.float32(-1.2)}
        half = so.minimize(loss, start, so.lbfgs(), max_steps=5)
        rest = so.minimize(loss, half.params, so.lbfgs(), state=half.state)
        assert rest.success


class TestForeignOptimizers:
    def test_adam_takes_the_steps_of_a_plain_loop(self):
        optimizer, x = optax.adam(0.1), jnp.zeros(2)
        state, values, at = optimizer.init(x), [], jax.jit(jax.value_and_grad(shifted))
        for _ in range(31):
            value, grad = at(x, 1.0)
            values.append(float(value))
            move, state = optimizer.update(grad, state, x)
            x = optax.apply_updates(x, move)
        result = so.minimize(shifted, jnp.zeros(2), optax.adam(0.1), args=(1.0,), max_steps=30, history=True)
        np.testing.assert_allclose(result.history.value, values, rtol=1e-4)
        np.testing.assert_allclose(result.value, min(values), rtol=1e-4)

    def test_the_best_point_is_returned_not_the_last(self):
        """A gradient step of 1.2 times the stable length diverges from the very start."""
        result = so.minimize(lambda x: jnp.sum(x**2), jnp.ones(2), optax.sgd(1.2), max_steps=6)
        np.testing.assert_array_equal(result.params, [1.0, 1.0])
        assert float(result.value) == 2.0

    def test_optax_lbfgs_solves_rosenbrock(self):
        result = so.minimize(rosenbrock, START, optax.lbfgs())
        assert result.success
        np.testing.assert_allclose(result.params, [1.0, 1.0], atol=1e-3)

    def test_a_chain_with_a_direction_of_ours_solves(self):
        chain = optax.chain(so.scale_by_newton(), optax.scale_by_learning_rate(1.0))
        result = so.minimize(shifted, jnp.zeros(2), chain, args=(1.0,))
        assert result.success
        assert int(result.evaluations) < 20

    def test_a_chain_around_our_optimizer_solves(self):
        result = so.minimize(rosenbrock, START, optax.chain(so.lbfgs(), optax.identity()))
        assert result.success
        assert int(result.evaluations) < 60

    def test_masked_leaves_the_other_parameters_where_they_are(self):
        optimizer = optax.chain(
            optax.masked(optax.sgd(0.2), {"free": True, "fixed": False}),
            optax.masked(optax.set_to_zero(), {"free": False, "fixed": True}),
        )
        loss = lambda p: jnp.sum((p["free"] - 1.0) ** 2) + jnp.sum(p["fixed"] ** 2)
        start = {"free": jnp.zeros(2), "fixed": jnp.ones(2)}
        result = so.minimize(loss, start, optimizer, max_steps=60)
        np.testing.assert_array_equal(result.params["fixed"], [1.0, 1.0])
        np.testing.assert_allclose(result.params["free"], [1.0, 1.0], atol=1e-3)
        assert not result.success

    def test_a_foreign_optimizer_that_leaves_the_domain_has_diverged(self):
        result = so.minimize(lambda x: jnp.sum(-jnp.log(1.0 - x) - 5.0 * x), jnp.zeros(1), optax.sgd(1.0))
        assert Status(int(result.status)) is Status.DIVERGED
        assert np.all(np.isfinite(result.params))
        assert np.isfinite(result.value)


class TestDefaultOptimizer:
    def test_is_newton_by_matrices_then_by_products_then_lbfgs(self):
        loss = lambda x: jnp.sum(jnp.cosh(x - 1.0))
        for n, by_matrices, by_products in (
            (200, True, False),
            (201, False, True),
            (1000, False, True),
            (1001, False, False),
        ):
            result = so.minimize(loss, jnp.zeros(n))
            assert result.success
            assert (int(result.hessians) > 0, int(result.hessian_products) > 0) == (
                by_matrices,
                by_matrices or by_products,
            )

    def test_takes_straight_steps_where_the_hessian_comes_from_the_host(self):
        hessian = lambda x: jax.pure_callback(
            lambda x: np.diag(np.cosh(x)).astype(x.dtype), jnp.zeros((2, 2), x.dtype), x
        )

        @jax.custom_jvp
        def gradient(x):
            return jnp.sinh(x)

        gradient.defjvp(lambda x, t: (gradient(*x), hessian(*x) @ t[0]))

        @jax.custom_jvp
        def loss(x):
            return jnp.sum(jnp.cosh(x))

        loss.defjvp(lambda x, t: (loss(*x), gradient(*x) @ t[0]))
        start = jnp.array([1.0, -0.5])
        result = so.minimize(loss, start)
        assert result.success
        assert int(result.hessian_products) == 0
        assert int(result.evaluations) == int(
            so.minimize(lambda x: jnp.sum(jnp.cosh(x)), start, so.newton()).evaluations
        )
        with pytest.raises(ValueError, match="JVP"):
            so.minimize(loss, start, so.newton(chebyshev=True))

    @pytest.mark.parametrize(
        "error",
        [RuntimeError, *(pytest.param(e, marks=pytest.mark.slow) for e in (NotImplementedError, AssertionError))],
    )
    def test_takes_straight_steps_whatever_a_rule_raises_also_in_a_run_that_goes_on(self, error):
        @jax.custom_jvp
        def second(x):
            return jnp.cosh(x)

        @second.defjvp
        def _(x, t):
            raise error("no third derivative")

        gradient = jax.custom_jvp(jnp.sinh)
        gradient.defjvp(lambda x, t: (gradient(*x), second(*x) * t[0]))
        rough = jax.custom_jvp(lambda x: jnp.sum(jnp.cosh(x)))
        rough.defjvp(lambda x, t: (rough(*x), gradient(*x) @ t[0]))
        with precision("float64"):
            begun = so.minimize(lambda x: jnp.sum(jnp.cosh(x)), jnp.array([1.0, -0.5]), max_evaluations=2)
            assert np.any(begun.state.bend != 0)
            fresh = so.minimize(rough, begun.params)
            resumed = so.minimize(rough, begun.params, state=begun.state)
        for run in (fresh, resumed):
            assert run.success
            np.testing.assert_array_equal(run.state.bend, 0.0)

    def test_asks_the_host_no_more_often_where_it_takes_straight_steps(self):
        asked = []

        def host(x):
            asked.append(x)
            return np.cosh(x)

        def rule(x, t):
            return gradient(*x), io_callback(host, x[0], *x) * t[0]

        gradient = jax.custom_jvp(jnp.sinh)
        gradient.defjvp(rule)
        loss = jax.custom_jvp(lambda x: jnp.sum(jnp.cosh(x)))
        loss.defjvp(lambda x, t: (loss(*x), gradient(*x) @ t[0]))
        result = so.minimize(loss, jnp.array([1.0, -0.5]))
        jax.effects_barrier()
        assert len(asked) == int(result.hessians)

    @pytest.mark.parametrize("name", ["minimize", pytest.param("newton", marks=pytest.mark.slow), "curvature.hessian"])
    def test_can_be_exported_for_data_of_any_size(self, name):
        def loss(x, t):
            return jnp.mean((jnp.tanh(x[0] * t) + x[1] * t - jnp.sin(t)) ** 2)

        run = {
            "minimize": lambda x, t: so.minimize(loss, x, args=(t,)).params,
            "newton": lambda x, t: so.minimize(loss, x, so.newton(), args=(t,)).params,
            "curvature.hessian": lambda x, t: so.curvature.hessian(loss, x, t, memory=1e6),
        }[name]
        x, t = jnp.array([0.5, 0.0]), jnp.linspace(0.0, 1.0, 7)
        (size,) = export.symbolic_shape("size")
        exported = export.export(jax.jit(run))(x, jax.ShapeDtypeStruct((size,), t.dtype))
        np.testing.assert_allclose(exported.call(x, t), run(x, t), rtol=1e-4, atol=1e-5)

    def test_counts_the_parameters_of_all_leaves(self):
        loss = lambda p: sum(jnp.sum(jnp.cosh(leaf - 1.0)) for leaf in jax.tree.leaves(p))
        assert int(so.minimize(loss, {"a": jnp.zeros(150), "b": jnp.zeros((3, 17))}).hessians) == 0


class Unhashable:
    """A loss, or residuals, with arrays in it that make it unhashable, as those of frozen dataclasses are."""

    __hash__ = None

    def __init__(self, power):
        self.target, self.power = jnp.linspace(-1.0, 1.0, 60), power

    def __call__(self, x):
        r = x - self.target
        return r if self.power == 1 else jnp.sum(r**self.power)


def test_callables_that_cannot_be_hashed_are_minimized():
    np.testing.assert_allclose(so.minimize(Unhashable(2), jnp.zeros(60)).params, Unhashable(2).target, atol=1e-5)
    np.testing.assert_allclose(so.least_squares(Unhashable(1), jnp.zeros(60)).params, Unhashable(1).target, atol=1e-5)


class Pair(NamedTuple):
    """A small pytree."""

    first: jax.Array
    second: dict


class TestPytrees:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_come_back_in_their_own_structure_shapes_and_values(self, name):
        start = Pair(jnp.zeros((2, 1)), {"scalar": jnp.float32(3.0), "empty": {}, "none": None, "list": [jnp.ones(3)]})
        loss = lambda p: (
            jnp.sum((p.first - 1.0) ** 2) + (p.second["scalar"] + 2.0) ** 4 + jnp.sum(p.second["list"][0] ** 2)
        )
        result = so.minimize(loss, start, OPTIMIZERS[name])
        assert result.success
        assert jax.tree.structure(result.params) == jax.tree.structure(start) == jax.tree.structure(result.grad)
        assert [leaf.shape for leaf in jax.tree.leaves(result.params)] == [(2, 1), (3,), ()]
        np.testing.assert_allclose(result.params.first, np.ones((2, 1)), atol=1e-3)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_take_the_steps_of_one_vector(self, name):
        with precision("float64"):
            split = lambda p: rosenbrock(jnp.concatenate([p["a"], p["b"].ravel()]))
            start = {"a": jnp.array([-1.2]), "b": jnp.array([[1.0, -1.2, 1.0]])}
            tree = so.minimize(split, start, OPTIMIZERS[name], max_steps=10)
            flat = so.minimize(rosenbrock, rosenbrock_start(4), OPTIMIZERS[name], max_steps=10)
        np.testing.assert_allclose(
            np.concatenate([tree.params["a"], np.ravel(tree.params["b"])]), flat.params, rtol=1e-8
        )
        assert int(tree.evaluations) == int(flat.evaluations)

    def test_of_mixed_precision_keep_each_its_own(self):
        with precision("float64"):
            start = {"wide": jnp.zeros(2), "narrow": jnp.zeros(2, jnp.float32)}
            loss = lambda p: jnp.sum((p["wide"] - 1.0) ** 2) + jnp.sum((p["narrow"] - 2.0) ** 2)
            for name, optimizer in OPTIMIZERS.items():
                result = so.minimize(loss, start, optimizer, gtol=1e-4)
                assert result.success, name
                assert (result.params["wide"].dtype, result.params["narrow"].dtype) == (jnp.float64, jnp.float32)
                np.testing.assert_allclose(result.params["narrow"], [2.0, 2.0], atol=1e-3)

    def test_may_be_a_python_float(self):
        result = so.minimize(lambda x: (x - 2.0) ** 2, 0.5)
        assert result.success
        assert jnp.shape(result.params) == ()
        np.testing.assert_allclose(result.params, 2.0, atol=1e-3)


class TestTransformations:
    @pytest.mark.parametrize("name", ["lbfgs", "newton_trust_region"])
    def test_jit_gives_what_the_eager_call_gives(self, name):
        with precision("float64"):
            x0 = rosenbrock_start(2)
            eager = so.minimize(rosenbrock, x0, OPTIMIZERS[name])
            jitted = jax.jit(lambda x: so.minimize(rosenbrock, x, OPTIMIZERS[name]))(x0)
        np.testing.assert_allclose(jitted.params, eager.params, rtol=1e-6)
        assert (int(jitted.evaluations), int(jitted.status)) == (int(eager.evaluations), int(eager.status))

    def test_vmap_over_starts_data_and_tolerances(self):
        targets, gtols = jnp.array([1.0, 2.0, 3.0]), jnp.array([1e-3, 1.0, 1e-3])
        run = lambda target, gtol: so.minimize(shifted, jnp.zeros(2), so.lbfgs(), args=(target,), gtol=gtol)
        result = jax.jit(jax.vmap(run))(targets, gtols)
        assert np.all(result.success)
        np.testing.assert_array_less(np.abs(result.params[:, 0] - targets), [1e-3, 0.5, 1e-3])
        assert float(result.grad_norm[2]) <= 1e-3

    def test_the_solution_in_a_jitted_function_depends_on_traced_data(self):
        best = jax.jit(lambda target: so.minimize(shifted, jnp.zeros(2), args=(target,)).params)
        for value in (1.0, -3.0):
            np.testing.assert_allclose(best(value), [value, value], atol=1e-3)

    def test_a_loss_may_close_over_traced_data_inside_jit(self):
        best = jax.jit(lambda target: so.minimize(lambda x: shifted(x, target), jnp.zeros(2), so.bfgs()).params)
        np.testing.assert_allclose(best(2.0), [2.0, 2.0], atol=1e-3)


class TestResult:
    def test_is_a_pytree(self):
        result = so.minimize(rosenbrock, START, so.lbfgs())
        doubled = jax.tree.map(lambda leaf: leaf, result)
        assert type(doubled) is type(result)
        np.testing.assert_array_equal(doubled.params, result.params)

    def test_tells_success_as_a_bool_and_the_status_in_words(self):
        good, cut = so.minimize(rosenbrock, START, so.lbfgs()), so.minimize(rosenbrock, START, so.lbfgs(), max_steps=2)
        assert (good.success, cut.success) == (True, False)
        assert "converged" in good.message
        assert "max_steps" in cut.message

    def test_of_a_stall_on_an_accelerator_names_what_rounds_the_loss(self, monkeypatch):
        result = so.minimize(rosenbrock, START, so.lbfgs())._replace(status=jnp.int32(so.Status.STALLED))
        option = "jax_default_matmul_precision"
        assert option not in result.message
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert option in result.message
        assert option not in result._replace(status=jnp.int32(so.Status.CONVERGED)).message
        assert option not in result._replace(value=np.zeros((), np.float64)).message
        with jax.default_matmul_precision("highest"):
            assert option not in result.message

    def test_of_a_batch_has_an_axis_of_lanes_and_a_message_for_each(self):
        run = jax.jit(jax.vmap(lambda x, steps: so.minimize(rosenbrock, x, so.lbfgs(), max_steps=steps)))
        result = run(jnp.stack([START, START]), jnp.array([500, 2]))
        assert result.params.shape == (2, 2)
        np.testing.assert_array_equal(result.success, [True, False])
        assert [("converged" in message, "max_steps" in message) for message in result.message] == [
            (True, False),
            (False, True),
        ]

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_holds_value_and_gradient_of_its_own_parameters(self, name):
        for budget in (3, 7, 200):
            result = so.minimize(rosenbrock, START, OPTIMIZERS[name], max_evaluations=budget)
            value, grad = evaluate(result.params)
            np.testing.assert_allclose(result.value, value, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(result.grad, grad, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(result.grad_norm, jnp.abs(result.grad).max(), rtol=1e-6)

    def test_counts_hessians_of_the_newton_methods(self):
        for name, optimizer in OPTIMIZERS.items():
            result = so.minimize(rosenbrock, START, optimizer)
            expected = int(result.steps) + 1
            assert int(result.hessians) in ((expected, expected - 1) if "newton" in name else (0,)), name

    def test_tells_the_smallest_eigenvalue_at_the_solution(self):
        with precision("float64"):
            result = so.minimize(rosenbrock, rosenbrock_start(2), so.newton(), gtol=1e-10)
            expected = np.linalg.eigvalsh(jax.hessian(rosenbrock)(result.params))[0]
        np.testing.assert_allclose(result.curvature, expected, rtol=1e-4)

    def test_conjugates_nothing_for_complex_parameters(self):
        result = so.minimize(lambda z: jnp.sum(jnp.abs(z - 1j) ** 2), jnp.ones(2) * (1 + 0j), so.lbfgs(), max_steps=0)
        np.testing.assert_allclose(result.grad, jax.grad(lambda z: jnp.sum(jnp.abs(z - 1j) ** 2))(jnp.ones(2) + 0j))


class TestStatus:
    """Each status by one constructed example."""

    def status(self, *args, **options):
        return Status(int(so.minimize(*args, **options).status))

    def test_converged(self):
        assert self.status(rosenbrock, START) is Status.CONVERGED

    def test_stalled(self):
        kink = lambda x: jnp.sum(jnp.maximum(x, -2.0 * x))  # no gradient vanishes, at the minimum it is -1/2
        assert self.status(kink, START, so.lbfgs()) is Status.STALLED

    def test_max_steps(self):
        assert self.status(rosenbrock, START, max_steps=2) is Status.MAX_STEPS

    def test_max_evaluations(self):
        assert self.status(rosenbrock, START, max_evaluations=2) is Status.MAX_EVALUATIONS

    def test_unbounded(self):
        assert self.status(lambda x: jnp.sum(x), START, so.lbfgs()) is Status.UNBOUNDED

    def test_nonfinite_start(self):
        assert self.status(lambda x: jnp.sum(jnp.log(x)), -jnp.ones(2)) is Status.NONFINITE_START

    def test_diverged(self):
        assert self.status(lambda x: jnp.sum(jnp.sqrt(x)), jnp.ones(2), optax.sgd(10.0)) is Status.DIVERGED

    def test_callback(self):
        assert self.status(rosenbrock, START, callback=lambda step: True) is Status.CALLBACK

    def test_success_wins_over_the_end_of_a_budget(self):
        """The last step that the budget allows reaches the minimum: that is a success."""
        whole = so.minimize(rosenbrock, START, so.lbfgs())
        exact = {"max_steps": int(whole.steps), "max_evaluations": int(whole.evaluations)}
        assert self.status(rosenbrock, START, so.lbfgs(), **exact) is Status.CONVERGED

    def test_every_status_has_its_own_words(self):
        assert len({status.message for status in Status}) == len(Status)


def tilted(x, b):
    return jnp.sum((x - b) ** 2 * (1 + (x - b) ** 2))


@pytest.mark.parametrize("make", [so.lbfgs, so.newton, lambda: optax.chain(so.bfgs()), lambda: optax.adam(0.1)])
def test_what_a_state_knows_says_nothing_about_new_data_that_are_not_finite(make):
    first = so.minimize(tilted, jnp.zeros(2), make(), args=(jnp.ones(2),), max_steps=300)
    assert first.success
    for x, b in ((first.params, jnp.full(2, jnp.nan)), (jnp.nan * first.params, jnp.ones(2))):
        second = so.minimize(tilted, x, make(), args=(b,), state=first.state)
        assert second.status == Status.NONFINITE_START
        np.testing.assert_array_equal(second.params, first.params)


@pytest.mark.parametrize("make", [so.newton, so.lbfgs, so.cubic_newton], ids=["newton", "lbfgs", "cubic"])
@pytest.mark.parametrize("wrap", [optax.chain, so.track], ids=["chain", "track"])
def test_a_wrapped_run_resumes_like_a_bare_one(make, wrap):
    x0 = rosenbrock_start(4)
    results = []
    for optimizer in (make(), wrap(make())):
        short = so.minimize(rosenbrock, x0, optimizer, max_steps=5)
        results.append(so.minimize(rosenbrock, short.params, optimizer, state=short.state))
    bare, wrapped = results
    assert wrapped.success
    assert int(wrapped.evaluations) == int(bare.evaluations)
    # They are two programs, which a compiler may round in two ways.
    np.testing.assert_allclose(wrapped.params, bare.params, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("wrapper", [optax.clip_by_global_norm(1e-5), optax.scale(1e-6)], ids=["clip", "scale"])
def test_the_gradient_that_is_tested_is_that_of_the_loss(wrapper):
    result = so.minimize(rosenbrock, rosenbrock_start(2), optax.chain(wrapper, so.lbfgs()), gtol=1e-3)
    assert result.status == Status.CONVERGED
    assert np.max(np.abs(jax.grad(rosenbrock)(result.params))) <= 1.01e-3
    np.testing.assert_allclose(result.grad_norm, np.max(np.abs(result.grad)))


@pytest.mark.parametrize(
    "make",
    [lambda: optax.apply_if_finite(so.lbfgs(), 10**6), lambda: optax.MultiSteps(so.lbfgs(0.1), 4)],
    ids=["apply_if_finite", "MultiSteps"],
)
def test_evaluations_that_a_wrapper_hides_count(make):
    seen = []

    def fun(x):
        jax.debug.callback(lambda _: seen.append(1), x[0])
        return jnp.sum((jnp.sqrt(x) - 0.1) ** 2 + 5 * x)  # a long step leaves its domain

    result = so.minimize(fun, jnp.array([4.0, 9.0]), make(), max_evaluations=30)
    jax.effects_barrier()
    assert int(result.evaluations) == len(seen) <= 30
    assert result.status in (Status.DIVERGED, Status.MAX_EVALUATIONS)


def test_a_fixed_rate_resumes_with_the_scale_of_its_pairs():
    with precision("float64"):
        x0, optimizer = rosenbrock_start(4), so.lbfgs(0.05)
        whole = so.minimize(rosenbrock, x0, optimizer, max_steps=20, gtol=0.0)
        part = so.minimize(rosenbrock, x0, optimizer, max_steps=5, gtol=0.0)
        rest = so.minimize(rosenbrock, part.params, optimizer, max_steps=15, gtol=0.0, state=part.state)
        np.testing.assert_allclose(rest.params, whole.params, rtol=1e-11)


def test_no_step_of_a_resumed_foreign_optimizer_is_no_step():
    first = so.minimize(tilted, jnp.zeros(2), optax.adam(0.1), args=(jnp.ones(2),), max_steps=5)
    again = so.minimize(tilted, first.params, optax.adam(0.1), args=(jnp.ones(2),), max_steps=0, state=first.state)
    assert (int(again.steps), int(again.evaluations)) == (0, 1)


def test_a_traced_budget_with_a_history_is_refused_by_name():
    with pytest.raises(TypeError, match="minimize: with history=True, max_steps must be known"):
        jax.jit(lambda k: so.minimize(jnp.sum, jnp.zeros(2), so.lbfgs(), max_steps=k, history=True).params)(3)
