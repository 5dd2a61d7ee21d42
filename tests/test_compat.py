"""`secondorder.compat.minimize` against SciPy: the same call, the same fields, the same minimum."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import rosenbrock

import secondorder as so
from secondorder import compat

pytestmark = pytest.mark.x64
START = np.array([-1.2, 1.0, -1.2, 1.0])
FIELDS = ("x", "fun", "jac", "success", "status", "message", "nit", "nfev")


def numpy_rosenbrock(x, a=1.0):
    return float(np.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (a - x[:-1]) ** 2))


def numpy_pair(x):
    return numpy_rosenbrock(x), scipy.optimize.rosen_der(x)


# One name for each kind of optimizer; the others are slow repeats of the same programs.
@pytest.mark.parametrize(
    "method",
    [
        name if name in ("BFGS", "trust-exact") else pytest.param(name, marks=pytest.mark.slow)
        for name in compat.METHODS
    ],
)
def test_every_name_finds_the_minimum_that_scipy_finds(method):
    ours = compat.minimize(rosenbrock, START, method=method.lower())
    theirs = scipy.optimize.minimize(numpy_rosenbrock, START, jac=scipy.optimize.rosen_der, method="BFGS")
    assert ours.success
    assert ours.status == 0
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-3)
    assert np.max(np.abs(ours.jac)) <= 1e-5
    assert all(name in ours and name in theirs for name in FIELDS)
    assert isinstance(ours.x, np.ndarray)
    assert isinstance(ours.fun, float)
    assert ours["nfev"] == ours.nfev >= ours.nit > 0


def test_newton_types_of_scipy_form_no_matrix_where_it_would_be_large():
    chosen = {name: compat._optimizer(name, 2000, {}, True, bounded=False) for name in ("trust-krylov", "L-BFGS-B")}
    assert chosen == {"trust-krylov": so.newton_cg(), "L-BFGS-B": so.lbfgs()}


def test_the_inverse_hessian_of_bfgs_is_that_of_the_minimum():
    A = np.diag([1.0, 2.0, 5.0])
    result = compat.minimize(lambda x: 0.5 * x @ jnp.array(A) @ x + x[0], np.ones(3), method="BFGS", tol=1e-10)
    np.testing.assert_allclose(result.hess_inv, np.linalg.inv(A), atol=5e-3)  # right along the steps, near it elsewhere


@pytest.mark.parametrize(
    ("method", "second"),
    [
        ("BFGS", {}),
        ("trust-exact", {"hess": lambda x, a: scipy.optimize.rosen_hess(x)}),
        pytest.param(
            "Newton-CG", {"hessp": lambda x, p, a: scipy.optimize.rosen_hess_prod(x, p)}, marks=pytest.mark.slow
        ),
    ],
    ids=["gradient", "hess", "hessp"],
)
def test_numpy_code_with_its_own_derivatives_runs_point_by_point(method, second):
    calls = []

    def fun(x, a):
        calls.append(x.copy())
        x += 0.0  # old code may write into its argument
        return numpy_rosenbrock(x, a)

    result = compat.minimize(
        fun,
        list(START),
        args=1.0,
        method=method,
        jac=lambda x, a: scipy.optimize.rosen_der(x),
        **second,
    )
    assert result.success
    np.testing.assert_allclose(result.x, np.ones(4), atol=1e-4)
    assert len(calls) == result.nfev + 1  # and one look whether JAX can trace it


@pytest.mark.slow
def test_a_pair_of_value_and_gradient_is_taken_from_one_call():
    result = compat.minimize(numpy_pair, START, jac=True, method="L-BFGS-B", options={"maxcor": 5})
    assert result.success
    np.testing.assert_allclose(result.x, np.ones(4), atol=1e-4)


@pytest.mark.parametrize("given", ["hess", pytest.param("hessp", marks=pytest.mark.slow)])
def test_given_derivatives_are_used_in_place_of_those_of_jax(given):
    used = []
    A = jnp.diag(jnp.array([1.0, 4.0]))

    def note(name, out):
        used.append(name)
        return out

    second = {"hess": lambda x: note("hess", A)} if given == "hess" else {"hessp": lambda x, p: note("hessp", A @ p)}
    result = compat.minimize(
        lambda x: 0.5 * x @ A @ x - x[0], [3.0, 3.0], jac=lambda x: note("jac", A @ x - jnp.eye(2)[0]), **second
    )
    np.testing.assert_allclose(result.x, [1.0, 0.0], atol=1e-8)
    assert set(used) == {"jac", given}


def test_equal_calls_share_a_program():
    traces = []

    def fun(x, a):
        traces.append(1)
        return jnp.sum((x - a) ** 2)

    compat.minimize(fun, [0.0], args=(1.0,), method="BFGS")
    first = len(traces)
    compat.minimize(fun, [3.0], args=(2.0,), method="BFGS")
    assert len(traces) == first + 1  # the look whether JAX can trace it


def test_callbacks_of_both_kinds_see_the_points_and_may_stop():
    points, results = [], []

    def stops(intermediate_result):
        results.append(intermediate_result)
        if len(results) == 3:
            raise StopIteration

    whole = compat.minimize(rosenbrock, START, method="BFGS", callback=lambda xk: points.append(xk))
    assert len(points) == whole.nit
    np.testing.assert_array_equal(points[-1], whole.x)
    for fun, jac in ((rosenbrock, None), (numpy_rosenbrock, scipy.optimize.rosen_der)):
        results.clear()
        cut = compat.minimize(fun, START, method="BFGS", jac=jac, callback=stops)
        assert (cut.status, cut.success, cut.nit, len(results)) == (99, False, 3, 3)
        assert results[0].fun > results[-1].fun
        np.testing.assert_allclose(results[-1].fun, rosenbrock(results[-1].x), rtol=1e-14)


@pytest.mark.parametrize(("options", "status"), [({"maxiter": 2}, 1), ({"maxfun": 3}, 1)])
def test_budgets_end_both_kinds_of_run_with_the_same_status(options, status):
    for fun, jac in ((rosenbrock, None), (numpy_rosenbrock, scipy.optimize.rosen_der)):
        result = compat.minimize(fun, START, method="BFGS", jac=jac, options=options)
        assert (result.status, result.success) == (status, False)
        assert "max_" in result.message


def test_what_numpy_code_raises_reaches_the_caller():
    def fails(x):
        raise RuntimeError("the simulator is down")

    with pytest.raises(RuntimeError, match="simulator"):
        compat.minimize(fails, START, jac=scipy.optimize.rosen_der)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "Nelder-Mead"}, "no derivatives"),
        ({"method": "gradient"}, "method must be one of BFGS"),
        ({"bounds": [(0, None)] * 4, "method": "BFGS"}, "BFGS takes no bounds"),
        ({"bounds": [(0, None)] * 3}, "per entry of x0, 4, got 3"),
        ({"bounds": scipy.optimize.Bounds(1.0, 0.0)}, "exceeds the upper one"),
        ({"constraints": [{"type": "eq", "fun": rosenbrock}]}, "constraints are not supported"),
        ({"options": {"maxitre": 3}}, "unknown option 'maxitre'"),
        ({"options": {"norm": 2}}, "norm must be inf"),
        ({"jac": "forward"}, "jac must be a function"),
        ({"tol": -1.0}, "tol.*-1.0"),
        ({"options": {"maxiter": -5}}, "maxiter.*-5"),
        ({"options": {"maxfun": 0}}, "maxfun.*0"),
        ({"bounds": [(np.nan, np.nan)] * 4}, "a bound is NaN"),
    ],
)
def test_what_is_not_supported_says_so_and_names_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        compat.minimize(rosenbrock, START, **arguments)


def test_numpy_code_without_a_gradient_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"pass jac, or write fun with jax\.numpy"):
        compat.minimize(numpy_rosenbrock, START)
    with pytest.raises(ValueError, match="needs the Hessian"):
        compat.minimize(numpy_rosenbrock, START, jac=scipy.optimize.rosen_der, method="trust-exact")


@pytest.mark.parametrize("fun", [rosenbrock, numpy_rosenbrock])
@pytest.mark.parametrize(
    "method", ["L-BFGS-B", *(pytest.param(name, marks=pytest.mark.slow) for name in (None, "TNC", "SLSQP"))]
)
def test_bounds_are_those_of_scipy(fun, method):
    bounds = [(None, 0.8), (-2.0, None), (0.1, 0.9), (None, None)]
    call = {"jac": scipy.optimize.rosen_der} if fun is numpy_rosenbrock else {}
    if fun is numpy_rosenbrock and method == "TNC":
        call["hess"] = scipy.optimize.rosen_hess
    ours = compat.minimize(fun, START, method=method, bounds=bounds, **call)
    theirs = scipy.optimize.minimize(
        numpy_rosenbrock, START, jac=scipy.optimize.rosen_der, method="L-BFGS-B", bounds=bounds
    )
    assert ours.success
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-3)
    assert all(
        (low is None or x >= low) and (high is None or x <= high) for x, (low, high) in zip(ours.x, bounds, strict=True)
    )


def test_infinite_bounds_bound_nothing():
    assert compat.minimize(rosenbrock, START, method="BFGS", bounds=[(None, np.inf)] * 4).success


def test_a_given_hessian_stands_beside_the_gradient_of_jax():
    seen = []

    def hess(x):
        seen.append(x)
        return 12 * jnp.diag((x - 1.0) ** 2)

    result = compat.minimize(lambda x: jnp.sum((x - 1.0) ** 4), [3.0, 2.0], hess=hess, method="trust-exact")
    assert seen
    np.testing.assert_allclose(result.x, 1.0, atol=0.02)
    with pytest.raises(TypeError, match="cannot trace hess"):
        compat.minimize(lambda x: jnp.sum(x**4), [3.0, 2.0], hess=lambda x: np.diag(12 * np.asarray(x) ** 2))


def test_equal_products_of_numpy_code_share_a_program():
    square, bend = lambda x: float(np.sum((x - 1) ** 2)), lambda x: 2 * np.eye(len(x))
    products = [compat._host_product(compat._Loss(square, False, None, bend, None), ()) for _ in range(2)]
    assert products[0] == products[1]
    assert hash(products[0]) == hash(products[1])
