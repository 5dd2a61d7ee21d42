"""Nonlinear least squares: the linear algebra, the methods, and the drivers `least_squares` and `curve_fit`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import precision

import secondorder as so
from secondorder import Status, curvature
from secondorder.curvature import linear_model, residuals
from secondorder.globalization import robust
from secondorder.globalization.damping import Levenberg
from secondorder.globalization.trust_region import Damping, Trial
from secondorder.linalg import golub_kahan, thin_svd

pytestmark = pytest.mark.x64
RNG = np.random.default_rng(0)
T = np.linspace(0.0, 4.0, 60)
Y = 3.0 * np.exp(-0.7 * T) + 0.5 + 0.02 * RNG.normal(size=T.size)
Y[::10] += 2.0 * RNG.normal(size=6)
START = np.array([1.0, 1.0, 0.0])
# For tests in single precision: JAX keeps the dtype in which it met an array of NumPy, whatever precision comes next.
T32, Y32 = T.astype(np.float32), Y.astype(np.float32)


def decay(p, t):
    return p[0] * jnp.exp(-p[1] * t) + p[2]


def misfit(p, t, y):
    return decay(p, t) - y


def numpy_misfit(p):
    return p[0] * np.exp(-p[1] * T) + p[2] - Y


def scipy_fit(**options):
    tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 2000}
    return scipy.optimize.least_squares(numpy_misfit, START, **tight, **options)


def says(*parts):
    return re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)


def matrix(m, n, seed=0, spread=2.0):
    """Return a matrix with singular values over `spread` decades, and a right-hand side."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(k, min(m, n))))[0] for k in (m, n))
    return U @ np.diag(10.0 ** -np.linspace(0, spread, min(m, n))) @ V.T, rng.normal(size=m)


# Linear algebra


@pytest.mark.parametrize(("m", "n"), [(9, 4), (4, 4), (5, 4), (3, 7)])
def test_the_thin_decomposition_is_that_of_the_matrix(m, n):
    A, b = matrix(m, n)
    R, c = thin_svd.triangle(jnp.asarray(A), jnp.asarray(b))
    svd = thin_svd.factorize(R, c)
    U, s, Vt = np.linalg.svd(A, full_matrices=False)
    np.testing.assert_allclose(svd.singular[::-1], s, rtol=1e-13)
    rebuilt = svd.vectors * svd.projected  # each column is v_i u_i'b, whatever the sign of the pair
    np.testing.assert_allclose(rebuilt[:, ::-1], Vt.T * (U.T @ b), atol=1e-13)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_krylov_space_of_full_dimension_solves_every_damped_problem(preconditioned):
    A, b = (jnp.asarray(x) for x in matrix(12, 6))
    M = jnp.diag(jnp.linspace(0.5, 3.0, 6)) if preconditioned else jnp.eye(6)
    space = golub_kahan.decompose(
        lambda v: A @ v, lambda u: A.T @ u, b, 6, 6, 0.0, precondition=(lambda v: M @ v) if preconditioned else None
    )
    for shift in (1e-3, 0.1, 10.0):
        c = -space.singular * space.projected / (space.singular**2 + shift)
        expected = -np.linalg.solve(A.T @ A + shift * np.linalg.inv(M), A.T @ b)
        np.testing.assert_allclose(space.vectors @ c, expected, rtol=1e-9, atol=1e-12)


def test_a_truncated_krylov_space_gives_the_iterate_of_lsqr():
    A, b = matrix(30, 20)
    space = golub_kahan.decompose(lambda v: A @ v, lambda u: A.T @ u, jnp.asarray(b), 20, 5, 0.0)
    step = space.vectors @ (-space.projected / space.singular)
    expected = scipy.sparse.linalg.lsqr(A, -b, iter_lim=5, atol=0, btol=0, conlim=0)[0]
    np.testing.assert_allclose(step, expected, rtol=1e-8, atol=1e-10)


def test_a_seed_enters_the_space():
    A, b = (jnp.asarray(x) for x in matrix(30, 20, spread=4.0))
    solution = -jnp.linalg.lstsq(A, b)[0]
    space = golub_kahan.decompose(lambda v: A @ v, lambda u: A.T @ u, b, 20, 4, 0.0, seed=(solution, solution))
    step = space.vectors @ (-space.projected / jnp.where(space.singular > 0, space.singular, jnp.inf))
    np.testing.assert_allclose(step, solution, rtol=1e-9)  # four dimensions, one of which is the answer


def model_of(A, b, x, solver=None):
    solver = so.direct() if solver is None else solver
    n = x.size
    free = jnp.full(n, jnp.inf)
    return solver.model(lambda p: A @ p - b, jnp.asarray(x), (-free, free), solver.initial(n, x.dtype))


def scale_of(A, x):
    """Return D at a start without zeros: column norms, with the floor ||N x|| / |x|."""
    N = np.linalg.norm(A, axis=0)
    return np.maximum(N, np.linalg.norm(N * x) / np.abs(x))


def test_a_parameter_that_starts_at_zero_or_is_rounding_has_no_part_in_the_floor():
    A, b = matrix(11, 3)
    N, x = np.linalg.norm(A, axis=0), np.array([0.5, 0.0, -3.0])
    first = model_of(A, b, x)
    size = np.linalg.norm(N * x)
    np.testing.assert_allclose(first.scale, [max(N[0], size / 0.5), N[1], max(N[2], size / 3.0)], rtol=1e-12)
    free = jnp.full(3, jnp.inf)
    x2 = np.array([-0.1, 1e-17, 5.0])
    second = so.direct().model(lambda p: A @ p - b, jnp.asarray(x2), (-free, free), first)
    size = np.linalg.norm(N * x2)
    np.testing.assert_allclose(second.scale, [max(N[0], size / 0.5), N[1], max(N[2], size / 5.0)], rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"normal_equations": True}, {"scaled": False}])
def test_every_shift_gives_the_solution_of_the_stacked_least_squares_problem(options):
    A, b = matrix(11, 5)
    x = np.ones(5)
    model = model_of(A, b, x, so.direct(**options))
    D = scale_of(A, x) if options.get("scaled", True) else np.ones(5)
    np.testing.assert_allclose(model.scale, D, rtol=1e-12)
    for shift in (1e-6, 1e-2, 1e3):
        c = Levenberg(1e-3, 1e-4).step(model.values, model.rotated, linear_shift(shift))
        stacked = np.vstack([A, np.sqrt(shift) * np.diag(D)])
        expected = np.linalg.lstsq(stacked, -np.concatenate([A @ x - b, np.zeros(5)]), rcond=None)[0]
        np.testing.assert_allclose(linear_model.to_params(model, c), expected, rtol=1e-8)


def linear_shift(size):
    return Damping(jnp.asarray(size), jnp.asarray(2.0))


def test_much_damping_gives_steepest_descent_and_none_gauss_newton():
    A, b = matrix(11, 5)
    x = np.ones(5)
    model = model_of(A, b, x)
    step = lambda shift: linear_model.to_params(
        model, Levenberg(1e-3, 1e-4).step(model.values, model.rotated, linear_shift(shift))
    )
    D2 = scale_of(A, x) ** 2
    np.testing.assert_allclose(1e12 * step(1e12), -A.T @ (A @ x - b) / D2, rtol=1e-9)
    np.testing.assert_allclose(x + step(0.0), np.linalg.lstsq(A, b, rcond=None)[0], rtol=1e-9)
    p = RNG.normal(size=5)
    r = A @ x - b
    expected = 0.5 * r @ r - 0.5 * np.sum((r + A @ p) ** 2)
    np.testing.assert_allclose(linear_model.decrease(model, jnp.asarray(p)), expected, rtol=1e-10)


def test_forward_and_reverse_mode_give_the_same_jacobian():
    def fun(x):
        return {"a": jnp.outer(jnp.sin(x["u"]), x["v"]), "b": x["v"] ** 2}

    x = {"u": jnp.arange(1.0, 22.0), "v": jnp.array([0.3, 0.7])}
    forward, reverse, chosen = (curvature.jacobian(fun, x, mode=mode) for mode in ("forward", "reverse", None))
    flat, back = jax.flatten_util.ravel_pytree(x)
    expected = jax.jacfwd(lambda v: jax.flatten_util.ravel_pytree(fun(back(v)))[0])(flat)
    for J in (forward, reverse, chosen):
        np.testing.assert_allclose(J, expected, rtol=1e-14)


@pytest.mark.parametrize("by_rows", [True, False])
def test_the_second_derivative_along_a_direction(by_rows):
    v = jnp.array([0.5, -1.0])
    fun = lambda x: jnp.array([x[0] ** 2 * x[1], jnp.exp(x[1])])
    x = jnp.array([1.5, 0.3])
    expected = jnp.einsum("ijk,j,k->i", jax.jacfwd(jax.jacfwd(fun))(x), v, v)
    r_vv, pulled = residuals.second_derivative(fun, x, v, by_rows=by_rows)
    np.testing.assert_allclose(r_vv, expected, rtol=1e-14)
    np.testing.assert_allclose(pulled, jax.jacfwd(fun)(x).T @ expected, rtol=1e-14)


# Methods


def valley(x):
    return {"bend": 10 * (x[1:] - x[:-1] ** 2), "shift": 1 - x[:-1]}


VALLEY = np.tile([-1.2, 1.0], 3)


@pytest.mark.parametrize(
    "optimizer",
    [
        so.levenberg_marquardt(),
        pytest.param(so.levenberg_marquardt(so.levenberg()), marks=pytest.mark.slow),
        so.levenberg_marquardt(solver=so.iterative(), geodesic=True),
        pytest.param(
            so.levenberg_marquardt(solver=so.iterative(4, preconditioner=lambda v: v / (1 + jnp.arange(6.0)))),
            marks=pytest.mark.slow,
        ),
        so.gauss_newton(),
        pytest.param(so.lbfgs(), marks=pytest.mark.slow),
        pytest.param(so.newton(), marks=pytest.mark.slow),
        pytest.param(so.levenberg_marquardt(geodesic=True), marks=pytest.mark.slow),
        so.levenberg_marquardt(so.target_ratio()),
        pytest.param(so.levenberg_marquardt(solver=so.direct("reverse")), marks=pytest.mark.slow),
        pytest.param(so.gauss_newton(solver=so.iterative()), marks=pytest.mark.slow),
    ],
    ids=[
        "trust region",
        "shift",
        "iterative geodesic",
        "iterative preconditioned",
        "gauss_newton",
        "lbfgs",
        "newton",
        "geodesic",
        "target ratio",
        "reverse",
        "gauss_newton iterative",
    ],
)
def test_every_way_leads_through_the_valley(optimizer):
    result = so.least_squares(valley, jnp.asarray(VALLEY), optimizer)
    assert result.success
    if optimizer is so.newton():  # by the Hessian of the loss: it ends in the other minimum (Shang & Qiu 2006)
        other = [-0.98657498, 0.98339823, 0.97210667, 0.94743744, 0.89865118, 0.80757395]
        np.testing.assert_allclose(result.params, other, rtol=1e-5)
        return
    np.testing.assert_allclose(result.params, np.ones(6), rtol=1e-5)
    assert float(result.value) < 1e-9


def test_a_linear_problem_is_solved_at_once_with_its_textbook_covariance():
    A, b = matrix(20, 4)
    fit = so.least_squares(lambda x, A, b: A @ x - b, jnp.zeros(4), args=(A, b))
    x, rss, _, _ = np.linalg.lstsq(A, b, rcond=None)
    np.testing.assert_allclose(fit.params, x, rtol=1e-11)
    assert int(fit.evaluations) <= 5  # the region about the start may not hold the solution
    np.testing.assert_allclose(fit.covariance, np.linalg.inv(A.T @ A) * rss[0] / 16, rtol=1e-9)
    np.testing.assert_allclose(fit.standard_errors, np.sqrt(np.diag(fit.covariance)), rtol=1e-14)
    np.testing.assert_allclose(fit.residual, A @ x - b, atol=1e-12)
    np.testing.assert_allclose(2 * fit.value, rss[0], rtol=1e-12)


@pytest.mark.slow
def test_units_of_the_parameters_change_nothing():
    units = jnp.array([1e5, 1e-4, 30.0])
    run = jax.jit(lambda units: so.least_squares(lambda x: misfit(x * units, T, Y), jnp.asarray(START) / units))
    plain, other = run(jnp.ones(3)), run(units)
    assert int(plain.evaluations) == int(other.evaluations)
    np.testing.assert_allclose(other.params * units, plain.params, rtol=1e-9)
    np.testing.assert_allclose(other.standard_errors * units, plain.standard_errors, rtol=1e-7)


@pytest.mark.parametrize(
    ("residual", "start", "answer"),
    [
        (lambda x: jnp.array([jnp.log(x[0]) + 3.0, 10 * (x[1] - x[0])]), [3.0, 1.0], np.exp([-3.0, -3.0])),
        (lambda x: jnp.array([jnp.sqrt(x[0]) - 0.01, x[1] - jnp.sqrt(x[0])]), [4.0, 1.0], [1e-4, 1e-2]),
    ],
    ids=["log", "sqrt"],
)
@pytest.mark.parametrize(
    "optimizer",
    [so.levenberg_marquardt(), pytest.param(so.gauss_newton(), marks=pytest.mark.slow)],
    ids=["levenberg_marquardt", "gauss_newton"],
)
def test_a_residual_that_is_nan_at_a_trial_never_ends_the_run(residual, start, answer, optimizer):
    seen = []

    def watched(x):
        jax.debug.callback(lambda r: seen.append(bool(np.isnan(r).any())), residual(x))
        return residual(x)

    result = so.least_squares(watched, jnp.array(start), optimizer)
    jax.effects_barrier()
    assert any(seen)  # a trial did leave the domain
    np.testing.assert_allclose(result.params, answer, rtol=1e-6)


def test_a_start_that_is_not_finite_is_reported():
    result = so.least_squares(lambda x: jnp.log(x), jnp.array([-1.0, 2.0]))
    assert Status(int(result.status)) == Status.NONFINITE_START
    assert int(result.evaluations) == 1
    np.testing.assert_array_equal(result.params, [-1.0, 2.0])


def iterative():
    return so.levenberg_marquardt(solver=so.iterative())


def normal_equations():
    return so.levenberg_marquardt(solver=so.direct(normal_equations=True))


def truncated():
    return so.levenberg_marquardt(so.truncation())


def shifted():
    return so.levenberg_marquardt(so.levenberg())


DISTANCE = lambda p: jnp.array([jnp.linalg.norm(p) - 1.0, p[0] - 2.0])  # its Jacobian is NaN at 0


@pytest.mark.parametrize("residual", [DISTANCE, lambda p: jnp.sqrt(p - 1.0) + p], ids=["nan", "inf"])
@pytest.mark.parametrize("make", [so.levenberg_marquardt, so.gauss_newton, iterative, normal_equations])
def test_a_start_whose_jacobian_is_not_finite_is_reported(residual, make):
    x0 = jnp.zeros(2) if residual is DISTANCE else jnp.ones(2)
    result = so.least_squares(residual, x0, make())
    assert result.status == Status.NONFINITE_START
    assert not result.success
    np.testing.assert_array_equal(result.params, x0)


@pytest.mark.parametrize("make", [so.levenberg_marquardt, iterative, truncated, shifted])
def test_a_point_whose_jacobian_is_not_finite_is_a_wall(make):
    smooth, x0 = lambda p: jnp.exp(-p) - jnp.exp(-2.0), jnp.array([4.5])
    one = so.least_squares(smooth, x0, make(), max_steps=1)
    assert abs(one.params[0] - 2.0) > 0.01

    def residual(p):  # as it is; but its derivative is NaN around the first point that would be accepted
        hole = jnp.abs(p - one.params) < 1e-3
        return smooth(p) + jnp.where(hole, 0.0 * jnp.sqrt(jnp.where(hole, 0.0 * p, 1.0)), 0.0)

    result = so.least_squares(residual, x0, make(), history=True)
    assert result.status == Status.CONVERGED
    np.testing.assert_allclose(result.params, 2.0, rtol=1e-8)
    steps = int(result.steps)
    assert steps == np.sum(np.isfinite(result.history.value[1:]))
    assert np.all(np.diff(result.history.value[: steps + 1]) < 0)
    # Where the budget ends with the step that is taken back, all figures are those of the start.
    cut = so.least_squares(residual, x0, make(), max_evaluations=int(one.evaluations))
    start = so.least_squares(residual, x0, make(), max_evaluations=1)
    assert int(cut.steps) == 0
    np.testing.assert_array_equal(
        [cut.params[0], cut.value, cut.residual[0], cut.grad_norm, cut.optimality],
        [start.params[0], start.value, start.residual[0], start.grad_norm, start.optimality],
    )
    alone = so.least_squares(residual, one.params, make())
    assert alone.status == Status.NONFINITE_START


@pytest.mark.parametrize("make", [so.levenberg_marquardt, normal_equations])
def test_residuals_that_round_coarsely_do_not_hide_the_others(make):
    for weight in (1e8, 1e12, 1e17):
        result = so.least_squares(
            lambda p, w=weight: jnp.array([w * (p[0] - 1.0), jnp.exp(p[1]) - 5.0]), jnp.array([1.0, 0.0]), make()
        )
        assert result.status == Status.CONVERGED
        np.testing.assert_allclose(result.params, [1.0, np.log(5.0)], rtol=1e-7)
    sigma = np.ones(T.size)
    sigma[0] = 1e-8
    fit = so.curve_fit(decay, T, Y, jnp.asarray(START), sigma=sigma)
    known = so.curve_fit(decay, T, Y, jnp.asarray(START), sigma=np.where(sigma < 1, 1e-6, sigma))
    assert fit.success
    np.testing.assert_allclose(fit.params, known.params, rtol=1e-6)


def test_units_of_the_data_change_nothing_in_single_precision():
    with precision("float32"):
        plain = so.curve_fit(decay, T32, Y32, jnp.asarray(START, jnp.float32), sigma=1e-2)
        tiny = so.curve_fit(
            lambda p, t: 1e-20 * decay(p, t), T32, 1e-20 * Y32, jnp.asarray(START, jnp.float32), sigma=1e-22
        )
        p0 = jnp.asarray(START, jnp.float32) * jnp.array([1e-20, 1.0, 1e-20])
        small = so.curve_fit(decay, T32, 1e-20 * Y32, p0, sigma=1e-22)  # a Jacobian of 1e22
    assert plain.success
    for other in (tiny, small):
        assert other.success
        assert int(other.steps) <= int(plain.steps) + 1
    np.testing.assert_allclose(tiny.params, plain.params, rtol=1e-5)
    np.testing.assert_allclose(small.params / np.array([1e-20, 1.0, 1e-20]), plain.params, rtol=1e-5)


@pytest.mark.parametrize("make", [so.levenberg_marquardt, so.gauss_newton, iterative])
def test_a_loss_that_underflows_is_no_minimum(make):
    with precision("float32"):
        result = so.least_squares(lambda p: 1e-21 * (decay(p, T32) - Y32), jnp.asarray(START, jnp.float32), make())
        zero = so.least_squares(lambda p: 1.0 * p, jnp.array([1.0, 2.0]), make())
    assert result.status == Status.STALLED
    assert zero.status == Status.CONVERGED


def test_a_singular_jacobian_is_a_status_and_undetermined_parameters_have_no_error():
    def residual(x):  # x0 and x1 enter by their sum alone
        return jnp.array([1.0, 2.0, 3.0, 4.0]) * (x[0] + x[1]) + x[2] - jnp.array([1.0, 3.0, 4.0, 7.0])

    result = so.least_squares(residual, jnp.array([1.0, 0.0, 0.0]))
    assert Status(int(result.status)) == Status.RANK_DEFICIENT
    assert result.success
    assert "singular" in result.message
    assert int(result.rank) == 2
    assert int(result.degrees_of_freedom) == 2
    np.testing.assert_array_equal(np.isfinite(result.standard_errors), [False, False, True])
    slope, offset = np.polyfit([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 4.0, 7.0], 1)
    np.testing.assert_allclose([result.params[0] + result.params[1], result.params[2]], [slope, offset], rtol=1e-10)
    np.testing.assert_allclose(result.params[0] - result.params[1], 1.0, rtol=1e-10)  # no move in the null space


def test_fewer_residuals_than_parameters_are_solved_in_their_own_space():
    A, b = matrix(3, 40)
    assert linear_model.by_size(3, 40) == so.direct(residuals=3)
    optimizer = so.levenberg_marquardt(solver=so.direct(residuals=3, scaled=False))
    result = so.least_squares(lambda x: jnp.sinh(A @ x - b), jnp.zeros(40), optimizer)
    assert Status(int(result.status)) == Status.CONVERGED
    assert result.state.model.vectors.shape == (40, 3)
    np.testing.assert_allclose(result.params, np.linalg.pinv(A) @ b, atol=1e-9)  # all steps lie in the row space
    assert result.covariance is None
    with pytest.raises(ValueError, match=says("3 entries", "built for 2")):
        so.least_squares(lambda x: A @ x, jnp.zeros(40), so.levenberg_marquardt(solver=so.direct(residuals=2)))


def test_the_jacobian_is_made_once_per_accepted_point():
    made = []

    @jax.custom_jvp
    def watched(x):
        return x

    @watched.defjvp
    def rule(primals, tangents):
        jax.debug.callback(lambda: made.append(None))
        return primals[0], tangents[0]

    def residual(x):
        x = watched(x)
        return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0], jnp.exp(x[0]) - 1])

    result = so.least_squares(residual, jnp.array([-3.0, 8.0]))
    jax.effects_barrier()
    assert int(result.evaluations) > int(result.steps) + 1  # some trials are rejected
    assert len(made) == int(result.jacobians) == int(result.steps) + 1


@pytest.mark.slow
def test_large_problems_go_without_a_dense_jacobian():
    n = linear_model.DIRECT_LIMIT + 1
    target = jnp.sin(jnp.arange(n))

    def residual(x):
        return jnp.concatenate([x - target, 0.1 * jnp.diff(x)])

    result = so.least_squares(residual, jnp.zeros(n))
    assert result.success
    assert int(result.jacobians) == 0
    assert int(result.jacobian_products) > 0
    np.testing.assert_allclose(jax.grad(lambda x: 0.5 * jnp.sum(residual(x) ** 2))(result.params), 0.0, atol=1e-8)


def test_a_loop_that_reverse_mode_cannot_differentiate_is_fitted():
    def residual(rate):  # explicit Euler with a step count that depends on data only
        body = lambda c: (c[0] + 1, c[1] - 0.01 * rate[0] * c[1])
        return jax.lax.while_loop(lambda c: c[0] < 100, body, (0, rate[1]))[1] - jnp.array([0.5, 0.5])

    result = so.least_squares(residual, jnp.array([1.0, 1.0]), so.levenberg_marquardt(solver=so.direct("forward")))
    assert result.success
    assert float(result.value) < 1e-25


def test_lanes_of_vmap_end_as_alone_each_with_its_own_status():
    data = np.stack([Y, 2 * np.exp(-T), np.full_like(T, np.nan)])
    one = jax.jit(lambda y: so.curve_fit(decay, T, y, jnp.asarray(START))._replace(state=None))
    lanes = jax.jit(jax.vmap(one))(data)
    codes = [Status(int(code)) for code in lanes.status]
    assert codes == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE_START]
    assert lanes.message[2].startswith("the loss")
    alone = one(Y)
    np.testing.assert_allclose(lanes.params[0], alone.params, rtol=1e-9)
    np.testing.assert_allclose(lanes.standard_errors[0], alone.standard_errors, rtol=1e-7)
    np.testing.assert_allclose(lanes.params[1], [2.0, 1.0, 0.0], atol=1e-9)
    assert int(lanes.evaluations[0]) == int(alone.evaluations)


def test_float32_ends_at_its_own_precision():
    with precision("float32"):
        fit = so.curve_fit(decay, T32, Y32, jnp.asarray(START, jnp.float32))
    assert fit.success
    assert fit.params.dtype == jnp.float32
    # What cosines at gtol leave of (JᵀJ)⁻¹Jᵀr, parameter by parameter, and rounding.
    best, gtol = scipy_fit(), np.finfo(np.float32).eps ** 0.75
    gradient = gtol * np.linalg.norm(best.fun) * np.linalg.norm(best.jac, axis=0)
    left = np.abs(np.linalg.inv(best.jac.T @ best.jac)) @ gradient
    assert np.all(np.abs(fit.params - best.x) <= left + 3e-6 * np.abs(best.x))


# Bounds

BOXES = {
    "inactive": ([-np.inf, -1.0, -np.inf], [np.inf, 5.0, np.inf], 0),
    "upper": ([0.0, 0.0, 0.0], [2.5, 5.0, 5.0], 1),
    "lower": ([0.0, 0.0, 0.6], [10.0, 10.0, 10.0], 1),
    "large residual": ([0.0, 0.0, 0.6], [2.0, 10.0, 10.0], 1),
}
POINTS = []


def watched_misfit(p, t, y):
    jax.debug.callback(lambda x: POINTS.append(np.array(x)), p)
    return misfit(p, t, y)


@pytest.mark.parametrize(
    "box", [pytest.param(box, marks=pytest.mark.slow if box == "inactive" else ()) for box in BOXES]
)
def test_bounds_give_the_bounded_minimum_without_ever_leaving_the_box(box):
    lower, upper, held = BOXES[box]
    start = np.clip(START, lower, upper)
    POINTS.clear()
    result = so.least_squares(
        watched_misfit, jnp.asarray(start), args=(T, Y), bounds=(jnp.asarray(lower), jnp.asarray(upper))
    )
    jax.effects_barrier()
    assert len(POINTS) >= int(result.evaluations)
    assert all(np.all((point >= lower) & (point <= upper)) for point in POINTS)
    assert result.success
    inside = np.clip(start, np.array(lower) + 1e-6, np.array(upper) - 1e-6)
    options = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    expected = scipy.optimize.least_squares(numpy_misfit, inside, bounds=(lower, upper), **options)
    np.testing.assert_allclose(result.params, expected.x, rtol=2e-6)
    assert float(result.value) <= expected.cost * (1 + 1e-12)
    assert np.sum(np.asarray(result.active) != 0) == held == np.sum(expected.active_mask != 0)
    np.testing.assert_array_equal(result.active, expected.active_mask)
    assert ("active bound" in result.message) == bool(held)
    assert np.all((np.asarray(result.standard_errors) == 0) == (np.asarray(result.active) != 0))


@pytest.mark.slow
def test_bounds_of_a_tree_and_a_fixed_parameter():
    def residual(p):
        return p["a"] * jnp.exp(-p["k"] * T) + p["c"] - Y

    start = {"a": jnp.array(1.0), "k": jnp.array(0.7), "c": jnp.array(0.0)}
    lower = {"a": 0.0, "k": 0.7, "c": -np.inf}
    result = so.least_squares(residual, start, bounds=(lower, {"a": 10.0, "k": 0.7, "c": np.inf}))
    assert result.success
    assert float(result.params["k"]) == 0.7
    A = np.stack([np.exp(-0.7 * T), np.ones_like(T)], axis=1)
    solution = np.linalg.lstsq(A, Y, rcond=None)[0]
    np.testing.assert_allclose([result.params["a"], result.params["c"]], solution, rtol=1e-10)
    assert int(result.active["k"]) != 0


def test_a_run_that_goes_on_without_bounds_has_none():
    bounded = so.least_squares(lambda p: p - 5.0, jnp.ones(1), bounds=(0.0, 2.0))
    np.testing.assert_array_equal(bounded.params, 2.0)
    free = so.least_squares(lambda p: p - 5.0, bounded.params, state=bounded.state)
    assert free.success
    np.testing.assert_allclose(free.params, 5.0)


# Robust losses and weights


@pytest.mark.parametrize(
    "loss", ["cauchy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("huber", "soft_l1", "arctan"))]
)
def test_robust_losses_are_those_of_scipy(loss):
    result = so.least_squares(misfit, jnp.array([3.0, 0.7, 0.5]), args=(T, Y), loss=loss, f_scale=0.05)
    expected = scipy.optimize.least_squares(
        numpy_misfit, [3.0, 0.7, 0.5], loss=loss, f_scale=0.05, ftol=1e-15, xtol=1e-15, gtol=1e-15
    )
    assert result.success
    np.testing.assert_allclose(result.params, expected.x, rtol=1e-6)
    np.testing.assert_allclose(result.value, expected.cost, rtol=1e-10)
    assert np.max(np.abs(np.asarray(result.params) - [3.0, 0.7, 0.5])) < 0.05  # outliers have lost their pull


@pytest.mark.parametrize("name", [name for name in robust.LOSSES if name != "linear"])
def test_the_reweighted_residual_has_the_gradient_and_curvature_of_the_robust_loss(name):
    rho, C = robust.LOSSES[name], 0.7
    r = jnp.array([1e-9, 0.2, 0.69, 3.0, -40.0])
    loss = lambda r: 0.5 * C**2 * rho((r / C) ** 2)
    weigh = lambda r: robust._reweighted(rho, r, jnp.asarray(C))
    value, slope = jax.jvp(weigh, (r,), (jnp.ones_like(r),))
    gradient, bend = (jax.vmap(f)(r) for f in (jax.grad(loss), jax.grad(jax.grad(loss))))
    np.testing.assert_allclose(value * slope, gradient, rtol=1e-12)
    np.testing.assert_allclose(slope**2, np.maximum(bend, robust.FLOOR * gradient / r), rtol=1e-9)


@pytest.mark.slow
def test_a_loss_of_ones_own():
    result = so.least_squares(misfit, jnp.asarray(START), args=(T, Y), loss=lambda z: z)
    np.testing.assert_allclose(result.params, scipy_fit().x, rtol=1e-6)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["deviations", pytest.param("covariance", marks=pytest.mark.slow)])
def test_sigma_and_errors_are_those_of_scipy(kind, absolute):
    deviations = 0.05 + 0.01 * T
    sigma = deviations if kind == "deviations" else np.diag(deviations**2) + 1e-3 * np.exp(-np.abs(T[:, None] - T))
    fit = so.curve_fit(decay, T, Y, jnp.asarray(START), sigma=sigma, absolute_sigma=absolute)
    plain = lambda t, a, k, c: a * np.exp(-k * t) + c
    popt, pcov = scipy.optimize.curve_fit(
        plain, T, Y, START, sigma=sigma, absolute_sigma=absolute, ftol=1e-14, xtol=1e-14, gtol=1e-14
    )
    np.testing.assert_allclose(fit.params, popt, rtol=1e-5)  # SciPy differentiates by differences
    np.testing.assert_allclose(fit.covariance, pcov, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fit.standard_errors, np.sqrt(np.diag(pcov)), rtol=1e-4)


@pytest.mark.parametrize("sigma", [None, np.full(T.size, 0.1), 0.01 * np.eye(T.size)], ids=["none", "errors", "matrix"])
def test_data_that_a_compiled_function_closes_over_are_checked_as_ever(sigma):
    t, y = jnp.asarray(T), jnp.asarray(Y)
    s = None if sigma is None else jnp.asarray(sigma)
    inside = jax.jit(lambda p: so.curve_fit(decay, t, y, p, sigma=s).params)(jnp.asarray(START))
    np.testing.assert_allclose(inside, so.curve_fit(decay, T, Y, jnp.asarray(START), sigma=sigma).params, rtol=1e-9)
    bad = y.at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="ydata has entries"):
        jax.jit(lambda p: so.curve_fit(decay, t, bad, p, sigma=s).params)(jnp.asarray(START))


def test_tall_data_have_their_errors_and_undetermined_ones_are_infinite():
    assert isinstance(linear_model.by_size(10**8, 3), linear_model.Direct)
    assert isinstance(linear_model.by_size(10**6, 100), linear_model.Iterative)
    exact = so.least_squares(lambda p: jnp.array([p[0] - 2.0, p[1] ** 2 - 4.0]), jnp.ones(2))
    assert np.all(np.isinf(exact.covariance))
    line = so.least_squares(lambda p: jnp.array([p[0] + p[1] - 2.0] * 3), jnp.ones(2))
    assert np.all(np.isinf(line.standard_errors))


def test_as_many_data_as_parameters_leave_no_error_bar():
    fit = so.curve_fit(lambda p, x: p[0] * x + p[1], np.array([0.0, 1.0]), np.array([1.0, 3.0]), jnp.zeros(2))
    np.testing.assert_allclose(fit.params, [2.0, 1.0], atol=1e-14)
    assert int(fit.degrees_of_freedom) == 0
    assert np.all(np.isinf(fit.standard_errors))


# Drivers


def test_new_data_and_equal_options_compile_nothing():
    traces = []

    def residual(x, y):
        traces.append(x)
        return x - y

    first = so.least_squares(residual, jnp.zeros(2), args=(jnp.ones(2),))
    before = len(traces)
    second = so.least_squares(residual, jnp.zeros(2), args=(2 * jnp.ones(2),), gtol=1e-9)
    assert len(traces) == before
    np.testing.assert_allclose(second.params, 2 * first.params)


@pytest.mark.slow
def test_a_run_goes_on_from_its_state():
    short = so.least_squares(valley, jnp.asarray(VALLEY), max_steps=4)
    assert Status(int(short.status)) == Status.MAX_STEPS
    assert not short.success
    rest = so.least_squares(valley, short.params, state=short.state)
    whole = so.least_squares(valley, jnp.asarray(VALLEY))
    assert rest.success
    assert int(short.evaluations) + int(rest.evaluations) <= int(whole.evaluations) + 2


P = jnp.ones(2)
LINE = lambda p, x: p[0] * x + p[1]
X4, Y4 = np.arange(4.0), np.arange(4.0)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: so.least_squares(3, P), TypeError, ("least_squares", "residual_fn", "3")),
        (lambda: so.least_squares(lambda x: x, P, args=P), TypeError, ("least_squares", "args", "tuple")),
        (lambda: so.least_squares(lambda x: x * 1j, P), TypeError, ("least_squares", "real", "stack")),
        (lambda: so.least_squares(lambda x: jnp.int32(1), P), TypeError, ("least_squares", "floating-point", "astype")),
        (lambda: so.least_squares(lambda x: {}, P), ValueError, ("least_squares", "no entries")),
        (lambda: so.least_squares(lambda x: x, jnp.ones(2, int)), TypeError, ("least_squares", "x0", "int", "astype")),
        (lambda: so.least_squares(lambda x: x, P, bounds=3), TypeError, ("least_squares", "bounds", "lower", "3")),
        (lambda: so.least_squares(lambda x: x, P, bounds=(2.0, 1.0)), ValueError, ("lower bound exceeds", "swap")),
        (lambda: so.least_squares(lambda x: x, P, bounds=(2.0, 3.0)), ValueError, ("x0", "outside", "2.", "clip")),
        (lambda: so.least_squares(lambda x: x, P, bounds=(np.nan, 3.0)), ValueError, ("bound", "NaN", "inf")),
        (lambda: so.least_squares(lambda x: x, P, bounds=(np.zeros(3), 3.0)), ValueError, ("lower", "(3,)", "(2,)")),
        (lambda: so.least_squares(lambda x: x, P, bounds=({}, 3.0)), ValueError, ("lower", "structure")),
        (
            lambda: so.least_squares(lambda x: x, P, so.lbfgs(), bounds=(0.0, 3.0)),
            ValueError,
            ("bounds", "levenberg_marquardt"),
        ),
        (lambda: so.least_squares(lambda x: x, P, loss="l1"), ValueError, ("loss", "soft_l1", "'l1'")),
        (lambda: so.least_squares(lambda x: x, P, f_scale=0.0), ValueError, ("f_scale", "0.0")),
        (lambda: so.least_squares(lambda x: x, P, gtol=-1.0), ValueError, ("gtol", "-1.0")),
        (lambda: so.least_squares(lambda x: x, P, max_steps=-1), ValueError, ("max_steps", "-1")),
        (lambda: so.curve_fit(LINE, X4, Y4[:3], P), (ValueError, TypeError), ("curve_fit", "ydata", "(3,)")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, sigma=-np.ones(4)), ValueError, ("curve_fit", "sigma", "> 0", "-1")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, sigma=np.ones(3)), ValueError, ("curve_fit", "sigma", "(3,)", "(4,)")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, sigma=-np.eye(4)), ValueError, ("sigma", "positive definite")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, sigma=np.eye(4) + np.eye(4, k=1)), ValueError, ("sigma", "symmetric")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, sigma="a"), TypeError, ("curve_fit", "sigma", "'a'")),
        (
            lambda: so.curve_fit(LINE, X4, Y4, P, optimizer=so.lbfgs()),
            ValueError,
            ("curve_fit", "covariance", "direct"),
        ),
        (lambda: so.curve_fit(LINE, X4, Y4, P, optimizer=so.lbfgs), TypeError, ("curve_fit", "optimizer", "call it")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, loss=jnp.sum), ValueError, ("curve_fit", "loss", "rho(z)", "()")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, bounds=("a", 1.0)), TypeError, ("lower bound of p0", "'a'")),
        (lambda: so.least_squares(lambda x: x, P, "lm"), TypeError, ("least_squares", "optimizer", "'lm'")),
        (lambda: so.least_squares(lambda x: x, P, covariance=1), TypeError, ("least_squares", "covariance", "1")),
        (lambda: so.least_squares(lambda x: x[:1], P, covariance=True), ValueError, ("covariance", "1 and 2")),
        (lambda: so.least_squares(lambda x: x[:0], P), ValueError, ("least_squares", "no residuals")),
        (lambda: so.curve_fit(LINE, X4[:1], Y4[:1], P), ValueError, ("curve_fit", "1 data", "2 parameters")),
        (lambda: so.curve_fit(LINE, X4, Y4 + 1j, P), TypeError, ("curve_fit", "ydata", "real")),
        (lambda: so.curve_fit(LINE, X4, Y4 / 0 * 0, P), ValueError, ("curve_fit", "ydata", "not finite")),
        (lambda: so.curve_fit(LINE, X4, Y4, P, bounds=(2.0, 3.0)), ValueError, ("curve_fit", "outside")),
        (lambda: so.direct("sideways"), ValueError, ("direct", "forward", "'sideways'")),
        (lambda: so.direct(residuals=0), ValueError, ("direct", "residuals", "0")),
        (lambda: so.iterative(dimension=1), ValueError, ("iterative", "dimension", "1")),
        (lambda: so.iterative(forcing=1.0), ValueError, ("iterative", "forcing", "1.0")),
        (lambda: so.levenberg_marquardt(solver="qr"), TypeError, ("levenberg_marquardt", "solver", "direct(", "'qr'")),
        (lambda: so.levenberg_marquardt(damping=1.0), TypeError, ("levenberg_marquardt", "damping", "1.0")),
        (lambda: so.truncation(cutoff=0.1), ValueError, ("truncation", "cutoff", "0.1", "1e-10")),
        (lambda: so.truncation(accept_ratio=0.3), ValueError, ("truncation", "accept_ratio", "0.3")),
        (lambda: so.target_ratio(ratio=1.0), ValueError, ("target_ratio", "ratio", "1.0", "0.1")),
        (lambda: so.target_ratio(growth=0.5), ValueError, ("target_ratio", "growth", "0.5")),
        (lambda: so.target_ratio(shrinkage=1.0), ValueError, ("target_ratio", "shrinkage", "1.0")),
        (lambda: so.target_ratio(radius=0.0), ValueError, ("target_ratio", "radius", "0.0")),
        (lambda: so.gauss_newton(linesearch=1), TypeError, ("gauss_newton", "linesearch", "1")),
        (lambda: so.minimize(lambda x: x @ x, P, so.gauss_newton()), ValueError, ("residual_fn", "least_squares")),
        (lambda: curvature.jacobian(lambda x: x, P, mode="up"), ValueError, ("jacobian", "'up'")),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_right_is_refused_by_name(call, error, parts):
    with pytest.raises(error, match=says(*parts)):
        call()


def test_an_update_without_residuals_says_what_is_missing():
    optimizer = so.levenberg_marquardt()
    with pytest.raises(ValueError, match=says("levenberg_marquardt", "residual_fn", "update(")):
        optimizer.update(P, optimizer.init(P), P, value=1.0)
    with pytest.raises(ValueError, match=says("levenberg_marquardt", "upper", "(3,)", "(2,)")):
        optimizer.update(P, optimizer.init(P), P, value=1.0, residual_fn=lambda x: x, bounds=(P, jnp.ones(3)))


def test_a_truncated_step_is_a_share_of_the_pseudo_inverse_and_the_ladder_coarsens():
    """Shares 1, 1/4, 1/16 of the step over s > 1e-8 s_max, then over s > 1e-7 s_max, ...; then shorter ones."""
    with precision("float64"):
        s = np.array([3e-10, 3e-9, 3e-8, 1e-4, 1.0, 2.0])
        g = np.arange(1.0, 7.0)
        damping, given = so.truncation(cutoff=1e-8), (jnp.asarray(s**2), jnp.asarray(g))
        size = damping.start(*given, jnp.array(1.0), jnp.array(1.0))
        rejected = Trial(*(jnp.array(0.0) for _ in Trial._fields))._replace(accepted=jnp.array(False))
        for failed in range(4 * 3 * 7):
            done, rest = divmod(failed, 21)
            kept, share = s > 1e-8 * 10.0 ** (rest // 3) * s[-1], 0.25 ** (3 * done + rest % 3)
            whole = np.where(kept, -g / s**2, 0.0)
            assert not bool(damping.exhausted(size, *given, jnp.array(1.0)))
            np.testing.assert_allclose(damping.solve(*given, size), whole, rtol=1e-9)
            np.testing.assert_allclose(damping.step(*given, size), share * whole, rtol=1e-9)
            predicted = damping.predict(*given, jnp.asarray(share * whole), size)
            decrease = np.sum(np.where(kept, g / s, 0.0) ** 2)
            np.testing.assert_allclose(predicted, (share - share**2 / 2) * decrease, rtol=1e-9)
            size = damping.resize(size, rejected)
        assert bool(damping.exhausted(size, *given, jnp.array(1.0)))
        assert float(damping.resize(size, rejected._replace(accepted=jnp.array(True))).size) == 0.0


def degenerate(x):
    """A chain of three factors, of which only the product is seen: the Jacobian has rank 1 along the solutions."""
    return jnp.array([jnp.prod(x) - 2.0, 10.0 * (jnp.prod(x) - 2.0)])


def test_truncation_solves_what_leaves_directions_undetermined():
    with precision("float64"):
        result = so.least_squares(degenerate, jnp.array([1.0, 0.5, 3.0]), so.levenberg_marquardt(so.truncation()))
        assert float(jnp.prod(result.params)) == pytest.approx(2.0, abs=1e-12)
        assert int(result.steps) <= 8


def path(x):
    """A residual that is bent along x0: second-order in the step."""
    return jnp.array([x[0] + 0.5 * x[0] ** 2 - 2.0, x[1] - x[0] ** 2])


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_share_of_a_truncated_step_is_a_point_on_its_parabola(failed):
    """x + t v + t² a / 2, with v and a of the whole step, for t = 1, 1/4, 1/16."""
    with precision("float64"):
        x = jnp.array([0.7, 0.3])
        optimizer = so.levenberg_marquardt(so.truncation())
        r, J = path(x), jax.jacobian(path)(x)
        v = -jnp.linalg.solve(J, r)
        r_vv = jax.jvp(lambda y: jax.jvp(path, (y,), (v,))[1], (x,), (v,))[1]
        a = -jnp.linalg.solve(J, r_vv)
        assert 2 * jnp.linalg.norm(a) < 1.5 * jnp.linalg.norm(v)
        state, shown = optimizer.init(x), x
        update = jax.jit(lambda g, state, x, value: optimizer.update(g, state, x, value=value, residual_fn=path))
        move, state = update(J.T @ r, state, x, r @ r / 2)
        for _ in range(failed):
            shown = shown + move
            move, state = update(J.T @ r, state, shown, jnp.array(1e3))
            np.testing.assert_array_equal(state.params, x)
        t = 0.25**failed
        np.testing.assert_allclose(shown + move, x + t * v + 0.5 * t**2 * a, rtol=1e-10)


@pytest.mark.parametrize("damping", [so.trust_region(radius=0.3), so.target_ratio(radius=0.3)])
def test_the_bend_of_a_step_in_a_region_has_the_shift_of_the_step(damping):
    """x + v + a / 2, (JᵀJ + shift) v = -Jᵀr with ||v|| = 0.3, and (JᵀJ + shift) a = -Jᵀr_vv with the same shift."""
    with precision("float64"):
        x = jnp.array([0.7, 0.3])
        optimizer = so.levenberg_marquardt(damping, so.direct(scaled=False), geodesic=True)
        r, J = path(x), jax.jacobian(path)(x)
        damped = lambda shift, q: -np.linalg.solve(J.T @ J + shift * np.eye(2), q)
        shift = scipy.optimize.brentq(lambda s: np.linalg.norm(damped(s, J.T @ r)) - 0.3, 0.0, 1e3, xtol=1e-13)
        v = damped(shift, J.T @ r)
        r_vv = jax.jvp(lambda y: jax.jvp(path, (y,), (jnp.asarray(v),))[1], (x,), (jnp.asarray(v),))[1]
        a = damped(shift, J.T @ r_vv)
        assert 0.1 < 2 * np.linalg.norm(a) / np.linalg.norm(v) < 0.75
        move, _ = optimizer.update(J.T @ r, optimizer.init(x), x, value=r @ r / 2, residual_fn=path)
        np.testing.assert_allclose(move, v + 0.5 * a, rtol=1e-9)


def still(x):
    """A residual whose gradient at (0.5, 1) is zero along the second parameter, and whose bend is not."""
    return jnp.stack([x[0] - 2.0, 3.0 * (x[1] - 1.0) + 0.1 * (x[0] - 0.5) ** 2])


@pytest.mark.parametrize("damping", [so.levenberg(), so.trust_region(radius=0.9)], ids=["levenberg", "region"])
def test_a_direction_without_gradient_has_its_bend(damping):
    with precision("float64"):
        x = jnp.array([0.5, 1.0])
        optimizer = so.levenberg_marquardt(damping, so.direct(scaled=False), geodesic=True)
        r, J = still(x), jax.jacobian(still)(x)
        move, state = optimizer.update(J.T @ r, optimizer.init(x), x, value=r @ r / 2, residual_fn=still)
        v = move - 0.5 * state.acceleration
        np.testing.assert_allclose(v[1], 0.0, atol=1e-15)
        shift = -r[0] / v[0] - 1.0  # J'J is diagonal: (1 + shift) v = -r
        bend = -3.0 * 0.2 * v[0] ** 2 / (9.0 + shift)
        np.testing.assert_allclose(state.acceleration, [0.0, bend], rtol=1e-6, atol=1e-15)


def test_a_region_at_a_target_ratio_grows_after_every_success_and_shrinks_a_little_else():
    damping = so.target_ratio(ratio=0.2, growth=2.0, shrinkage=0.75)
    assert damping.accept_ratio == 0.2
    trial = Trial(*(jnp.array(0.0) for _ in Trial._fields))
    new = lambda accepted, length: float(
        damping.resize(Damping(jnp.array(4.0), jnp.array(1.0)), trial._replace(accepted=accepted, length=length)).size
    )
    for length in (2.6, 4.0, 5.4):  # on the boundary, bent
        assert new(jnp.array(True), jnp.array(length)) == 8.0
        assert new(jnp.array(False), jnp.array(length)) == 3.0
    assert new(jnp.array(True), jnp.array(1.0)) == 4.0  # the region did not bind
    assert new(jnp.array(False), jnp.array(1.0)) == 0.75


def few_directions(x, points, rank):
    """A linear residual of 60 parameters that sees `rank` combinations of them."""
    waves = jnp.cos(jnp.outer(points, jnp.arange(1.0, rank + 1.0)))
    return waves @ (jnp.cos(jnp.outer(jnp.arange(rank), jnp.arange(60.0))) @ x) - jnp.exp(-points)


@pytest.mark.parametrize(("rank", "truncated"), [(20, True), (55, False)])
def test_the_default_truncates_where_the_jacobian_is_far_from_full_rank(rank, truncated):
    with precision("float64"):
        points = jnp.linspace(0.0, 3.0, 200)
        fit = lambda **more: so.least_squares(
            lambda x, points: few_directions(x, points, rank), jnp.zeros(60), args=(points,), max_steps=5, **more
        )
        result = fit()
        assert (result.state.acceleration.size > 0) == truncated
        if truncated:
            residual = lambda x: few_directions(x, points, rank)
            J, r = jax.jacobian(residual)(jnp.zeros(60)), residual(jnp.zeros(60))
            least = jnp.linalg.lstsq(J, -r, rcond=1e-10)[0]
            np.testing.assert_allclose(residual(result.params), residual(least), atol=1e-9)
            assert fit(state=result.state).state.acceleration.size > 0


@pytest.mark.slow
def test_the_default_ends_a_network_at_an_error_below_a_millionth():
    """-u'' = pi² sin(pi x), u = 0 at both ends, a network of 20: damping by a trust region alone ends at 1e-4."""
    with precision("float64"):
        points = jnp.linspace(0.01, 0.99, 100)

        def u(p, x):
            return x * (1 - x) * jnp.dot(p[2], jnp.tanh(p[0] * x + p[1]))

        def equation(p, x):
            return jax.grad(jax.grad(u, argnums=1), argnums=1)(p, x) / 10 + jnp.pi**2 * jnp.sin(jnp.pi * x) / 10

        for seed in range(2):
            start = jax.random.normal(jax.random.key(seed), (3, 20))
            result = so.least_squares(so.pointwise(equation), start, args=(points,), max_steps=100)
            assert result.state.acceleration.size > 0
            ours = jax.vmap(u, (None, 0))(result.params, points)
            assert jnp.abs(ours - jnp.sin(jnp.pi * points)).max() < 1e-6
