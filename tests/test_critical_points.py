"""The second-derivative test: constructed critical points of every kind, and what it does when it cannot tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, precision, with_spectrum

from secondorder import curvature, problems
from secondorder.curvature import Kind
from secondorder.problems import critical_points as table


@pytest.fixture(scope="module", params=DTYPES)
def classify(request):
    """Return the precision and a compiled classification of a point of the table."""
    with precision(request.param):
        yield request.param, jax.jit(lambda x, *args: curvature.classify_critical_point(table.fun, x, *args))


def test_forty_constructed_points_are_told_apart_at_every_scale(classify):
    dtype, program = classify
    assert len(table.CASES) == 40
    wrong = []
    for seed, case in enumerate(table.CASES):
        for scale in table.SCALES:
            found = program(*table.arguments(case, scale, seed, dtype))
            counts = tuple(int(count) for count in (found.negative, found.zero, found.positive))
            if (Kind(int(found.kind)), *counts) != (Kind[case.kind], case.negative, case.zero, case.positive):
                wrong.append((case.name, scale, Kind(int(found.kind)).name, counts))
    assert wrong == []


def test_points_that_are_not_critical_are_called_so_at_every_scale(classify):
    dtype, program = classify
    for seed, case in enumerate(table.CASES):
        if case.name in ("constant", "ridge", "valley"):
            continue
        for scale in table.SCALES:
            x, *rest = table.arguments(case, scale, seed, dtype)
            assert int(program(x + 0.1, *rest).kind) == Kind.NOT_CRITICAL, (case.name, scale)


def test_a_point_a_little_off_an_inflection_is_no_minimum(classify):
    dtype, program = classify
    case = next(case for case in table.CASES if case.name == "x³")
    x, Q, *rest = table.arguments(case, 1.0, 0, dtype)
    step = 1e-5 if dtype == "float32" else 1e-9
    found = program(x + step * Q.sum(axis=0), Q, *rest)  # all eigenvalues are 6 step > 0
    assert float(found.smallest) > 0
    assert int(found.kind) == Kind.DEGENERATE


def plane(x, c):
    """Return a polynomial of degree 4 in the plane; (1, -1, 1, 0, 0) is `problems.saddle`."""
    monkey = x[0] ** 3 - 3 * x[0] * x[1] ** 2
    return c[0] * x[0] ** 2 + c[1] * x[1] ** 2 + c[2] * x[1] ** 4 + c[3] * x[1] + c[4] * monkey


@jax.jit
def at_zero(c):
    return curvature.classify_critical_point(plane, jnp.zeros(2), c, gtol=1e-2)


def test_escape_leads_down_by_what_is_predicted():
    loss, c = problems.saddle().fun, jnp.array([1.0, -1.0, 1.0, 0.0, 0.0])
    assert float(plane(jnp.array([0.3, 0.4]), c)) == pytest.approx(float(loss(jnp.array([0.3, 0.4]))))
    found = at_zero(c)
    assert int(found.kind) == Kind.SADDLE
    assert float(found.minimum_ratio) == 0.5
    there = found.escape_length * found.escape_direction
    np.testing.assert_allclose(np.abs(there), [0.0, 0.5**0.5], atol=2e-3)
    np.testing.assert_allclose(found.predicted_decrease, 0.25, rtol=1e-4)  # the loss is a polynomial of degree 4
    np.testing.assert_allclose(loss(jnp.zeros(2)) - loss(there), found.predicted_decrease, rtol=1e-4)


def test_the_escape_goes_the_way_that_the_gradient_shows():
    for sign in (1.0, -1.0):
        found = at_zero(jnp.array([1.0, -1.0, 1.0, sign * 1e-3, 0.0]))
        assert np.sign(found.escape_direction[1]) == -sign


def test_the_monkey_saddle_is_inconclusive_and_a_minimum_has_no_way_out():
    monkey = at_zero(jnp.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    assert int(monkey.kind) == Kind.DEGENERATE
    assert "inconclusive" in Kind(int(monkey.kind)).message
    bowl = at_zero(jnp.array([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert int(bowl.kind) == Kind.MINIMUM
    assert float(bowl.predicted_decrease) == 0.0
    np.testing.assert_array_equal(bowl.escape_direction, 0.0)


def test_traced_coefficients_that_are_not_finite_make_no_critical_point():
    assert int(at_zero(jnp.full(5, jnp.nan)).kind) == Kind.NOT_CRITICAL


@pytest.mark.slow
def test_lanes_of_a_vmap_are_classified_alone():
    dtype = "float32"
    chosen = [table.CASES[i] for i in (0, 2, 4, 25, 27)]
    arguments = [table.arguments(case, 1.0, i, dtype) for i, case in enumerate(chosen)]
    stacked = tuple(jnp.stack(column) for column in zip(*arguments, strict=True))
    lanes = jax.jit(jax.vmap(lambda x, *args: curvature.classify_critical_point(table.fun, x, *args)))(*stacked)
    assert [Kind(int(kind)) for kind in lanes.kind] == [Kind[case.kind] for case in chosen]


N = 400


@jax.jit
def from_lanczos(A):
    loss = lambda x: 0.5 * jnp.dot(x, jnp.matmul(A, x, precision="highest"), precision="highest")
    return curvature.classify_critical_point(loss, jnp.zeros(N), dense_limit=100, probes=8)


class TestLargePoints:
    """Above `dense_limit`, from Lanczos alone."""

    def matrix(self, values):
        return jnp.asarray(with_spectrum(0, np.sort(values)), jnp.float32)

    def test_a_saddle_is_proven_and_its_index_estimated(self):
        values = np.r_[np.linspace(-2, -0.5, 100), np.linspace(0.5, 3, 300)]
        found = from_lanczos(self.matrix(values))
        assert int(found.kind) == Kind.SADDLE
        assert not bool(found.exact)
        assert abs(float(found.negative) - 100) < 20
        assert float(found.negative + found.zero + found.positive) == pytest.approx(N, rel=1e-4)
        assert abs(float(found.minimum_ratio) - 0.75) < 0.05
        np.testing.assert_allclose(found.smallest, -2.0, rtol=1e-3)
        assert float(found.smallest_bound) < -2.0

    def test_a_well_conditioned_minimum_is_claimed_and_an_ill_conditioned_one_is_not(self):
        well = from_lanczos(self.matrix(np.linspace(1, 3, N)))
        assert int(well.kind) == Kind.MINIMUM
        assert 0 < float(well.smallest_bound) <= 1.0 + 1e-3
        ill = from_lanczos(self.matrix(np.geomspace(1e-4, 3, N)))
        assert int(ill.kind) == Kind.DEGENERATE  # a negative eigenvalue cannot be excluded
        assert int(from_lanczos(self.matrix(-np.linspace(1, 3, N))).kind) == Kind.MAXIMUM


def test_a_difference_of_large_parameters_is_no_saddle():
    def fun(p):  # the curvature of z is a - b - 0.1, which float32 knows to 6e-5
        return (p["a"] + p["b"] - 1999.9) ** 2 + (p["a"] - p["b"] - 0.1) * p["z"] ** 2

    point = {"a": jnp.array(1000.0), "b": jnp.array(999.9), "z": jnp.array(0.0)}
    for seed in range(8):
        found = curvature.classify_critical_point(fun, point, key=jax.random.key(seed))
        assert Kind(int(found.kind)) == Kind.DEGENERATE


def test_a_gradient_whose_square_underflows_is_a_gradient():
    found = curvature.classify_critical_point(lambda x: 1e-25 * (x[0] ** 2 + x[1] ** 2 + x[0]), jnp.zeros(2))
    assert Kind(int(found.kind)) == Kind.NOT_CRITICAL
    far = curvature.classify_critical_point(lambda x: jnp.sum(x**2), jnp.array([3e19, 1.0]))
    assert Kind(int(far.kind)) == Kind.NOT_CRITICAL


def test_a_loss_with_reverse_rules_alone_is_classified():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * x**2 * g,))
    found = curvature.classify_critical_point(lambda x: x[0] ** 2 - x[1] ** 2 + jnp.sum(cube(x)), jnp.zeros(2))
    assert Kind(int(found.kind)) == Kind.SADDLE
    outputs = curvature.gnvp(lambda p, x: cube(p * x), lambda z, y: jnp.sum((z - y) ** 2) / 2, 1.0, 0.0)
    with pytest.raises(TypeError, match="custom_vjp"):  # the model itself is needed forward
        outputs(jnp.array(2.0), jnp.array(1.0))
