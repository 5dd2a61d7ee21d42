"""What cannot be right is refused by an error that names the function, the argument, the value and the remedy."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPTIMIZERS, SECOND_DERIVATIVES, precision, rosenbrock

import secondorder as so
from secondorder import Status

X = jnp.ones(3)
PUBLIC = {name: "newton" if name.startswith("newton") else name for name in OPTIMIZERS}  # as in error messages
BLOCKS = {
    "scale_by_lbfgs": so.scale_by_lbfgs(),
    "scale_by_bfgs": so.scale_by_bfgs(),
    "scale_by_newton": so.scale_by_newton(),
    "scale_by_saddle_free_newton": so.scale_by_saddle_free_newton(),
}


def says(*parts):
    """Match a message that holds these parts in this order."""
    return re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)


def hvp(x, v):
    return v


class TestConstructors:
    @pytest.mark.parametrize(
        ("build", "error", "parts"),
        [
            (lambda: so.lbfgs(memory_size=0), ValueError, ("lbfgs", "memory_size", ">= 1", "0", "10")),
            (lambda: so.lbfgs(memory_size=-3), ValueError, ("lbfgs", "memory_size", "-3", "10")),
            (lambda: so.lbfgs(memory_size=2.5), TypeError, ("lbfgs", "memory_size", "integer", "2.5")),
            (lambda: so.lbfgs(memory_size="ten"), TypeError, ("lbfgs", "memory_size", "'ten'")),
            (lambda: so.lbfgs(memory_size=True), TypeError, ("lbfgs", "memory_size", "True")),
            (lambda: so.scale_by_lbfgs(memory_size=0), ValueError, ("scale_by_lbfgs", "memory_size", "0")),
            (lambda: so.lbfgs(learning_rate=-0.1), ValueError, ("lbfgs", "learning_rate", "-0.1")),
            (lambda: so.lbfgs(learning_rate=np.nan), ValueError, ("lbfgs", "learning_rate", "nan")),
            (lambda: so.lbfgs(learning_rate="fast"), TypeError, ("lbfgs", "learning_rate", "'fast'")),
            (lambda: so.lbfgs(linesearch="wolfe"), TypeError, ("lbfgs", "linesearch", "line_search(", "'wolfe'")),
            (lambda: so.lbfgs(linesearch=so.line_search), TypeError, ("lbfgs", "linesearch", "line_search(")),
            (lambda: so.bfgs(learning_rate=0.0), ValueError, ("bfgs", "learning_rate", "0.0")),
            (lambda: so.bfgs(linesearch=3), TypeError, ("bfgs", "linesearch", "line_search(", "3")),
            (lambda: so.broyden_class(theta=-0.1), ValueError, ("broyden_class", "theta", "-0.1", "BFGS")),
            (lambda: so.broyden_class(self_scaling=2), TypeError, ("broyden_class", "self_scaling", "2")),
            (lambda: so.ssbroyden(linesearch=3), TypeError, ("ssbroyden", "linesearch", "line_search(", "3")),
            (lambda: so.newton(damping=0.1), TypeError, ("newton", "damping", "trust_region(", "0.1")),
            (lambda: so.newton(damping=so.levenberg), TypeError, ("newton", "damping", "levenberg(")),
            (lambda: so.saddle_free_newton(damping=-1.0), ValueError, ("saddle_free_newton", "damping", "-1.0")),
            (
                lambda: so.saddle_free_newton(region=1.0),
                TypeError,
                ("saddle_free_newton", "region", "trust_region(", "1.0"),
            ),
            (lambda: so.scale_by_newton(damping=-1.0), ValueError, ("scale_by_newton", "damping", "-1.0")),
            (
                lambda: so.scale_by_saddle_free_newton(damping=-1.0),
                ValueError,
                ("scale_by_saddle_free_newton", "damping"),
            ),
            (lambda: so.line_search(c1=-1e-4), ValueError, ("line_search", "c1", "-0.0001", "1e-4")),
            (lambda: so.line_search(c1=0.6), ValueError, ("line_search", "c1", "0.6")),
            (lambda: so.line_search(c2=1.0), ValueError, ("line_search", "c2", "1.0", "0.9")),
            (lambda: so.line_search(c1=0.2, c2=0.1), ValueError, ("line_search", "c2", "c1", "0.1")),
            (lambda: so.line_search(max_trials=0), ValueError, ("line_search", "max_trials", "0", "20")),
            (lambda: so.line_search(growth=1.0), ValueError, ("line_search", "growth", "1.0", "4")),
            (lambda: so.line_search(c1=0.4, falling=0.3), ValueError, ("line_search", "falling", "c1 = 0.4", "0.3")),
            (lambda: so.line_search(falling=1.0), ValueError, ("line_search", "falling", "1.0", "0.7")),
            (lambda: so.trust_region(radius=0.0), ValueError, ("trust_region", "radius", "0.0")),
            (lambda: so.trust_region(radius=np.ones(2)), TypeError, ("trust_region", "radius")),
            (lambda: so.trust_region(accept_ratio=0.25), ValueError, ("trust_region", "accept_ratio", "0.25", "1e-4")),
            (lambda: so.trust_region(growth=0.5), ValueError, ("trust_region", "growth", "0.5")),
            (lambda: so.levenberg(tau=0.0), ValueError, ("levenberg", "tau", "0.0", "1e-3")),
            (lambda: so.levenberg(accept_ratio=-1.0), ValueError, ("levenberg", "accept_ratio", "-1.0")),
            (
                lambda: so.modified_cholesky("wolfe"),
                TypeError,
                ("modified_cholesky", "linesearch", "line_search(", "'wolfe'"),
            ),
        ],
    )
    def test_refuse_options_that_cannot_be_right(self, build, error, parts):
        with pytest.raises(error, match=says(*parts)):
            build()

    @pytest.mark.parametrize(
        "build",
        [
            so.lbfgs, so.bfgs, so.newton, so.saddle_free_newton, so.scale_by_lbfgs, so.scale_by_bfgs,
            so.scale_by_newton, so.scale_by_saddle_free_newton, so.line_search, so.trust_region, so.levenberg,
            so.modified_cholesky,
        ],
    )  # fmt: skip
    def test_refuse_a_misspelt_option_by_name(self, build):
        with pytest.raises(TypeError, match="memroy_size"):
            build(memroy_size=5)


class TestMinimize:
    @pytest.mark.parametrize(
        ("options", "error", "parts"),
        [
            ({"gtol": -1e-3}, ValueError, ("minimize", "gtol", "-0.001", "leave it out")),
            ({"gtol": np.nan}, ValueError, ("minimize", "gtol", "nan")),
            ({"gtol": "small"}, TypeError, ("minimize", "gtol", "'small'")),
            ({"gtol": np.ones(3)}, TypeError, ("minimize", "gtol")),
            ({"max_steps": -1}, ValueError, ("minimize", "max_steps", "-1")),
            ({"max_steps": 10.5}, TypeError, ("minimize", "max_steps", "integer", "10.5")),
            ({"max_steps": None}, TypeError, ("minimize", "max_steps", "None")),
            ({"max_evaluations": 0}, ValueError, ("minimize", "max_evaluations", ">= 1", "0", "start")),
            ({"max_evaluations": 1e3}, TypeError, ("minimize", "max_evaluations", "integer", "1000.0")),
            ({"args": X}, TypeError, ("minimize", "args", "tuple", "args=(a,)")),
            ({"args": [X]}, TypeError, ("minimize", "args", "tuple", "list")),
            ({"optimizer": so.lbfgs}, TypeError, ("minimize", "optimizer", "lbfgs", "call it")),
            ({"optimizer": "lbfgs"}, TypeError, ("minimize", "optimizer", "'lbfgs'")),
            ({"optimizer": 0.1}, TypeError, ("minimize", "optimizer", "0.1")),
            ({"callback": 3}, TypeError, ("minimize", "callback", "3")),
            ({"state": "old"}, ValueError, ("minimize", "state", "Result.state")),
            ({"args": ("abs",)}, TypeError, ("minimize", "args[0]", "'abs'", "close over")),
            ({"args": ({"f": jnp.sin},)}, TypeError, ("minimize", "args[0]['f']", "functools.partial")),
            ({"max_steps": jnp.float32(3.0)}, TypeError, ("minimize", "max_steps")),
        ],
    )
    def test_refuses_arguments_that_cannot_be_right(self, options, error, parts):
        with pytest.raises(error, match=says(*parts)):
            so.minimize(rosenbrock, X, **options)

    def test_refuses_no_start_at_all_and_a_complex_one_with_bounds(self):
        with pytest.raises(TypeError, match=says("minimize", "x0", "None")):
            so.minimize(rosenbrock, None)
        with pytest.raises(TypeError, match=says("minimize", "bounds", "real", "complex")):
            so.minimize(lambda x: jnp.sum(jnp.abs(x) ** 2), X * 1j, bounds=(-1.0, 1.0))

    def test_takes_budgets_beyond_int32_and_scalar_arrays(self):
        run = functools.partial(so.minimize, lambda x: jnp.sum(x**2), X + 1)
        assert run(max_steps=10**12, max_evaluations=2**31).success
        assert int(run(max_steps=jnp.int32(0), max_evaluations=np.int64(9)).steps) == 0

    def test_refuses_a_callback_from_the_lanes_of_a_vmap(self):
        run = lambda x: so.minimize(rosenbrock, x, so.bfgs(), callback=print).value
        with pytest.raises(ValueError, match=says("minimize", "callback", "vmap", "history=True")):
            jax.vmap(run)(jnp.ones((2, 3)))

    def test_refuses_a_budget_of_no_evaluation_but_allows_no_step(self):
        assert int(so.minimize(rosenbrock, X + 1, so.lbfgs(), max_steps=0).evaluations) == 1

    def test_refuses_a_misspelt_option_by_name(self):
        with pytest.raises(TypeError, match="maxiter"):
            so.minimize(rosenbrock, X, maxiter=10)

    @pytest.mark.parametrize("name", ["lbfgs", "bfgs", "newton_cg", "scale_by_lbfgs", "sr1"])
    def test_refuses_a_misspelt_option_of_an_optimizer_with_the_list_of_options(self, name):
        known = next(iter(inspect.signature(getattr(so, name)).parameters))
        with pytest.raises(TypeError, match=says(name, "memorysize=3", known)):
            getattr(so, name)(memorysize=3)

    def test_names_the_optimizer_that_lacks_an_argument_or_has_too_many(self):
        with pytest.raises(TypeError, match=says("natural_gradient", "fisher")):
            so.natural_gradient()
        with pytest.raises(TypeError, match=says("bfgs", "too many")):
            so.bfgs(None, True, None, None, 4)

    @pytest.mark.parametrize("option", ["history", "progress", "has_aux"])
    def test_refuses_a_switch_that_is_no_bool(self, option):
        with pytest.raises(TypeError, match=says("minimize", option, "True or False", "'yes'")):
            so.minimize(rosenbrock, X, **{option: "yes"})

    @pytest.mark.parametrize("name", ["lbfgs", "scale_by_lbfgs", "bfgs", "scale_by_bfgs", "ssbroyden"])
    def test_refuses_a_first_scaling_that_is_no_bool(self, name):
        with pytest.raises(TypeError, match=says(name, "scale_init_precond", "True or False", "'no'")):
            getattr(so, name)(scale_init_precond="no")

    def test_refuses_a_value_that_is_no_number_and_a_value_fn_that_returns_a_vector(self):
        optimizer = so.lbfgs()
        state = optimizer.init(X)
        with pytest.raises(TypeError, match=says("lbfgs", "value", "number", "'a'")):
            optimizer.update(X, state, X, value="a")
        with pytest.raises(ValueError, match=says("lbfgs", "value_fn", "scalar", "(3,)", "sum")):
            optimizer.update(X, state, X, value=1.0, value_fn=lambda x: x)

    @pytest.mark.parametrize("name", [*OPTIMIZERS, "adam"])
    def test_refuses_a_vector_valued_loss(self, name):
        optimizer = OPTIMIZERS.get(name, optax.adam(1e-3))
        with pytest.raises(ValueError, match=says("minimize", "residuals_of_mine", "scalar", "(3,)", "sum")):
            so.minimize(residuals_of_mine, X, optimizer)

    def test_refuses_a_loss_of_shape_one(self):
        with pytest.raises(ValueError, match=says("minimize", "scalar", "(1,)")):
            so.minimize(lambda x: jnp.sum(x**2, keepdims=True), X)

    def test_refuses_a_complex_and_an_integer_valued_loss(self):
        with pytest.raises(TypeError, match=says("minimize", "real", "complex64")):
            so.minimize(lambda x: jnp.sum(x) * (1 + 1j), X)
        with pytest.raises(TypeError, match=says("minimize", "floating-point", "int32")):
            so.minimize(lambda x: jnp.sum(x).astype(int), X)

    def test_refuses_a_loss_that_returns_nothing(self):
        with pytest.raises((TypeError, ValueError), match=says("minimize", "fun", "scalar", "None")):
            so.minimize(lambda x: None, X)

    def test_refuses_a_pair_without_has_aux_and_a_scalar_with_it(self):
        with pytest.raises(TypeError, match=says("minimize", "pair", "has_aux=True")):
            so.minimize(lambda x: (jnp.sum(x**2), x), X)
        with pytest.raises(TypeError, match=says("minimize", "has_aux=True", "(value, aux)")):
            so.minimize(rosenbrock, X, has_aux=True)

    @pytest.mark.parametrize("fun", [None, 3.0, "rosenbrock"])
    def test_refuses_a_loss_that_is_no_function(self, fun):
        with pytest.raises(TypeError, match=says("minimize", "fun", "function", repr(fun))):
            so.minimize(fun, X)

    @pytest.mark.parametrize(
        "x0", [np.arange(3), jnp.arange(3), {"w": jnp.ones(2), "n": jnp.arange(2)}, np.array([True])]
    )
    def test_refuses_parameters_that_are_not_floating_point(self, x0):
        with pytest.raises(TypeError, match=says("minimize", "x0", "floating-point", "astype")):
            so.minimize(lambda x: 0.0, x0)

    @pytest.mark.parametrize("x0", ["start", object(), {"w": "start"}])
    def test_refuses_parameters_that_are_no_arrays(self, x0):
        with pytest.raises(TypeError, match=says("minimize", "x0", "floating-point")):
            so.minimize(lambda x: 0.0, x0)

    def test_refuses_a_start_without_any_parameter_or_calls_it_converged(self):
        result = so.minimize(lambda x: jnp.float32(3.0), {})
        assert result.success
        assert float(result.value) == 3.0

    @pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
    def test_refuses_complex_parameters_where_they_are_not_supported(self, name):
        with pytest.raises(TypeError, match=says(PUBLIC[name], "complex", "lbfgs")):
            so.minimize(lambda z: jnp.sum(jnp.abs(z) ** 2), jnp.ones(3) * 1j, OPTIMIZERS[name])

    def test_accepts_complex_parameters_for_lbfgs_and_by_default(self):
        loss = lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 2)
        for optimizer in (so.lbfgs(), None):
            result = so.minimize(loss, jnp.zeros(3) * 1j, optimizer)
            assert result.success
            np.testing.assert_allclose(result.params, (1 + 2j) * np.ones(3), atol=1e-3)

    def test_refuses_a_state_of_another_optimizer_or_size_or_precision(self):
        state = so.minimize(rosenbrock, X, so.lbfgs(memory_size=2)).state
        for x0, optimizer in [(X, so.bfgs()), (X, so.lbfgs(memory_size=3)), (jnp.ones(4), so.lbfgs(memory_size=2))]:
            with pytest.raises(ValueError, match=says("minimize", "state", "Result.state")):
                so.minimize(rosenbrock, x0, optimizer, state=state)
        with precision("float64"), pytest.raises(ValueError, match=says("minimize", "state", "dtypes")):
            so.minimize(rosenbrock, jnp.ones(3), so.lbfgs(memory_size=2), state=state)


def walled(x):
    """A bowl whose logarithm is Inf at 0 and NaN below; minimum near 2."""
    return jnp.sum((x - 2.0) ** 2 + (x - 2.0) ** 4 - jnp.log(x))


def given(x, value):
    """A loss without parameters."""
    return value


EDGES = {
    "newton": so.newton(),
    "default": None,
    "lbfgs": so.lbfgs(),
    "bfgs": so.bfgs(),
    "cubic_newton": so.cubic_newton(),
}
edges = pytest.mark.parametrize("name", EDGES)
less = pytest.mark.parametrize(  # a program each
    "name", [pytest.param(name, marks=() if name in ("newton", "default") else pytest.mark.slow) for name in EDGES]
)


class TestEdges:
    """Input that is unusual but defined; what must come out stands in the docstring of `minimize`."""

    @edges
    @pytest.mark.parametrize(
        "start", [(0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (3e38, 1.0)],
        ids=["Inf loss", "NaN loss", "NaN start", "Inf start", "overflow"],
    )  # fmt: skip
    def test_a_start_that_is_not_finite_is_returned_after_one_evaluation(self, name, start):
        x0 = np.asarray(start, np.float32)
        result = so.minimize(walled, x0, EDGES[name])
        assert Status(int(result.status)) is Status.NONFINITE_START
        assert (int(result.evaluations), int(result.steps), result.success) == (1, 0, False)
        assert "not finite at the start" in result.message
        np.testing.assert_array_equal(result.params, x0)
        assert (float(result.value), float(result.grad_norm)) == (np.inf, np.inf)
        np.testing.assert_array_equal(result.grad, [0.0, 0.0])

    @edges
    def test_a_tolerance_of_zero_ends_at_a_gradient_of_zero_or_at_rounding_level(self, name):
        result = so.minimize(walled, jnp.ones(2), EDGES[name], gtol=0, max_evaluations=1000)
        status = Status(int(result.status))
        assert status is Status.STALLED or (status is Status.CONVERGED and float(result.grad_norm) == 0.0)
        assert int(result.evaluations) < 60
        np.testing.assert_allclose(jax.grad(walled)(result.params), [0.0, 0.0], atol=1e-5)

    @edges
    def test_budgets_of_no_step_and_of_one_evaluation_show_the_start(self, name):
        for budget, status in (({"max_steps": 0}, Status.MAX_STEPS), ({"max_evaluations": 1}, Status.MAX_EVALUATIONS)):
            result = so.minimize(walled, jnp.ones(2), EDGES[name], **budget)
            assert (int(result.evaluations), int(result.steps)) == (1, 0)
            assert Status(int(result.status)) is status
            np.testing.assert_array_equal(result.params, [1.0, 1.0])
            np.testing.assert_allclose(result.value, walled(jnp.ones(2)), rtol=1e-6)
            np.testing.assert_allclose(result.grad, jax.grad(walled)(jnp.ones(2)), rtol=1e-6)
            assert so.minimize(walled, jnp.ones(2), EDGES[name], gtol=100.0, **budget).success

    @edges
    def test_a_budget_of_one_step_takes_one_step(self, name):
        result = so.minimize(walled, jnp.ones(2), EDGES[name], max_steps=1)
        assert int(result.steps) == 1
        assert Status(int(result.status)) is Status.MAX_STEPS
        assert float(result.value) < float(walled(jnp.ones(2)))

    @edges
    def test_a_budget_of_no_evaluation_is_refused(self, name):
        with pytest.raises(ValueError, match=says("minimize", "max_evaluations", ">= 1", "0", "start")):
            so.minimize(walled, jnp.ones(2), EDGES[name], max_evaluations=0)

    @edges
    @pytest.mark.parametrize("x0", [2, True, np.arange(1, 3), {"w": jnp.ones(2), "n": jnp.arange(2)}])
    def test_integer_parameters_are_refused(self, name, x0):
        with pytest.raises(TypeError, match=says("minimize", "x0", "floating-point")):
            so.minimize(walled, x0, EDGES[name])

    @less
    def test_a_scalar_comes_back_as_a_scalar(self, name):
        for x0 in (1.0, np.float32(1.0), jnp.float32(1.0)):
            result = so.minimize(walled, x0, EDGES[name])
            assert result.success
            assert jnp.shape(result.params) == jnp.shape(result.grad) == ()
            np.testing.assert_allclose(jax.grad(walled)(result.params), 0.0, atol=1.3e-4)

    @less
    def test_no_parameter_at_all_is_converged_at_once_if_the_loss_is_finite(self, name):
        for x0 in ({}, jnp.zeros(0), {"a": jnp.zeros((0, 3)), "b": ()}):
            result = so.minimize(given, x0, EDGES[name], args=(jnp.float32(3.0),))
            assert (result.success, float(result.value), int(result.evaluations)) == (True, 3.0, 1)
            assert jax.tree.structure(result.params) == jax.tree.structure(x0)
        result = so.minimize(given, jnp.zeros(0), EDGES[name], args=(jnp.float32(np.nan),))
        assert Status(int(result.status)) is Status.NONFINITE_START


def residuals_of_mine(x):
    return x**2


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestUpdate:
    def options(self, name):
        return {"hvp_fn": hvp} if name in SECOND_DERIVATIVES else {}

    def refuses(self, name, error, *parts, grads=X, params=X, value=1.0, **options):
        optimizer = OPTIMIZERS[name]
        state = optimizer.init(X)
        for update in (optimizer.update, jax.jit(optimizer.update, static_argnames=("hvp_fn", "value_fn"))):
            with pytest.raises(error, match=says(PUBLIC[name], *parts)):
                update(grads, state, params, value=value, **{**self.options(name), **options})

    def test_refuses_missing_params(self, name):
        self.refuses(name, ValueError, "parameters", "update(", params=None)

    def test_refuses_a_missing_value(self, name):
        self.refuses(name, ValueError, "value", "update(", "value=value", value=None)

    def test_refuses_a_value_that_is_no_scalar(self, name):
        self.refuses(name, ValueError, "value", "scalar", "(3,)", "sum", value=jnp.ones(3))
        self.refuses(name, ValueError, "value", "scalar", "(1,)", value=jnp.ones(1))

    def test_refuses_a_value_with_its_aux(self, name):
        self.refuses(name, TypeError, "value", "tuple", "alone", value=(jnp.float32(1.0), X))

    def test_refuses_a_complex_value(self, name):
        self.refuses(name, TypeError, "value", "real", "complex64", value=jnp.complex64(1j))

    def test_refuses_gradients_of_another_shape_or_structure(self, name):
        self.refuses(name, ValueError, "gradient", "(4,)", "(3,)", grads=jnp.ones(4))
        self.refuses(name, ValueError, "gradient", "structure", grads={"w": X})

    def test_refuses_a_value_fn_that_is_no_function(self, name):
        optimizer = OPTIMIZERS[name]
        with pytest.raises(TypeError, match=says(PUBLIC[name], "value_fn", "function", "1.0")):
            optimizer.update(X, optimizer.init(X), X, value=1.0, value_fn=1.0)

    def test_refuses_an_hvp_fn_that_is_no_function(self, name):
        optimizer = OPTIMIZERS[name]
        with pytest.raises(TypeError, match=says(PUBLIC[name], "hvp_fn", "function")):
            optimizer.update(X, optimizer.init(X), X, value=1.0, hvp_fn=X)

    def test_refuses_a_loss_as_hvp_fn_and_products_of_another_shape(self, name):
        self.refuses(name, TypeError, "hvp_fn", "(params, vector)", "rosenbrock", "curvature.hvp", hvp_fn=rosenbrock)
        if name in SECOND_DERIVATIVES:
            optimizer = OPTIMIZERS[name]
            for wrong in (lambda _, v: v[:2], lambda *_: None):
                with pytest.raises(ValueError, match=says("hvp_fn", "result", "params")):
                    optimizer.update(X, optimizer.init(X), X, value=1.0, hvp_fn=wrong)

    def test_refuses_a_state_that_is_none_of_this_run(self, name):
        with pytest.raises(TypeError, match=says(PUBLIC[name], "state", "init(params)", "NoneType")):
            OPTIMIZERS[name].update(X, None, X, value=1.0, **self.options(name))
        with pytest.raises(ValueError, match=says(PUBLIC[name], "state.params", "(4,)", "(3,)")):
            OPTIMIZERS[name].update(X, OPTIMIZERS[name].init(jnp.ones(4)), X, value=1.0, **self.options(name))

    @pytest.mark.parametrize("params", [jnp.arange(3), {"w": jnp.ones(2), "n": jnp.arange(2)}, "start"])
    def test_refuses_parameters_that_are_not_floating_point_at_init(self, name, params):
        with pytest.raises(TypeError, match=says(PUBLIC[name], "params", "floating-point")):
            OPTIMIZERS[name].init(params)

    def test_refuses_integer_parameters(self, name):
        self.refuses(name, TypeError, "params", "floating-point", "int32", params=jnp.arange(3))

    def test_refuses_complex_parameters_unless_it_is_lbfgs(self, name):
        if name == "lbfgs":
            OPTIMIZERS[name].init(X * 1j)
            return
        with pytest.raises(TypeError, match=says(PUBLIC[name], "complex", "lbfgs")):
            OPTIMIZERS[name].init(X * 1j)


@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
def test_missing_curvature_is_named_with_the_remedy(name):
    optimizer = OPTIMIZERS[name]
    with pytest.raises(ValueError, match=says(PUBLIC[name], "hvp_fn", "value_fn", "update(")):
        optimizer.update(X, optimizer.init(X), X, value=1.0)


@pytest.mark.parametrize("name", BLOCKS)
class TestBlocks:
    def test_refuse_missing_params(self, name):
        block = BLOCKS[name]
        with pytest.raises(ValueError, match=says(name, "parameters", "update(")):
            block.update(X, block.init(X))

    def test_refuse_gradients_of_another_shape(self, name):
        block = BLOCKS[name]
        options = {"hvp_fn": hvp} if "newton" in name else {}
        with pytest.raises(ValueError, match=says(name, "gradient", "(4,)", "(3,)")):
            block.update(jnp.ones(4), block.init(X), X, **options)

    def test_refuse_missing_curvature(self, name):
        if "newton" not in name:
            pytest.skip("needs no curvature")
        block = BLOCKS[name]
        with pytest.raises(ValueError, match=says(name, "hvp_fn", "value_fn")):
            block.update(X, block.init(X), X)

    def test_refuse_integer_parameters(self, name):
        with pytest.raises(TypeError, match=says(name, "params", "floating-point")):
            BLOCKS[name].init(jnp.arange(3))


def test_accepted_refuses_a_state_that_is_not_ours():
    with pytest.raises(ValueError, match=says("accepted", "state", "found 0")):
        so.accepted(optax.adam(1e-3).init(X))


def test_curvature_refuses_what_is_no_function_or_no_real_parameter():
    with pytest.raises(TypeError, match=says("hvp", "fun", "3")):
        so.curvature.hvp(3)
    with pytest.raises(TypeError, match=says("hessian", "params", "floating-point")):
        so.curvature.hessian(rosenbrock, jnp.arange(3))
    with pytest.raises(TypeError, match=says("hessian", "complex")):
        so.curvature.hessian(lambda z: jnp.sum(jnp.abs(z) ** 2), X * 1j)


@pytest.mark.parametrize("has_aux", [False, True])
def test_a_loss_that_returns_no_array_is_named(has_aux):
    def wordy_loss(x):
        return (jnp.sum(x), "words") if has_aux else "words"

    with pytest.raises(TypeError, match=r"wordy_loss.*'str'"):
        so.minimize(wordy_loss, jnp.ones(2), has_aux=has_aux)
