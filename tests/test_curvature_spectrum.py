"""Lanczos, extreme eigenpairs, traces and spectra, against dense eigendecompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, precision, with_spectrum
from scipy import stats

from secondorder import curvature
from secondorder.curvature import estimate
from secondorder.linalg import lanczos, probes

N = 120


def matrix_product(A):
    """Return the product of a matrix with vectors that are trees {"a": (n - 20,), "b": (4, 5)}, and the params."""

    def product(params, vector):
        flat = jnp.concatenate([vector["a"], vector["b"].ravel()])
        out = jnp.matmul(A, flat, precision="highest")
        return {"a": out[:-20], "b": out[-20:].reshape(4, 5)}

    return product


def point(dtype="float32"):
    return {"a": jnp.zeros(N - 20, dtype), "b": jnp.zeros((4, 5), dtype)}


def flat(tree, axis=0):
    lead = jax.tree.leaves(tree)[0].shape[:axis]
    return jnp.concatenate([leaf.reshape(*lead, -1) for leaf in jax.tree.leaves(tree)], axis=axis)


VALUES = np.sort(np.concatenate([np.linspace(-1, 1, N - 4), [-4.0, 5.0, 9.0, 20.0]]))


@pytest.fixture(params=DTYPES)
def dtype(request):
    with precision(request.param):
        yield request.param


@jax.jit
def pairs_of(A, params, key):
    return curvature.extreme_eigenpairs(matrix_product(A), params, 2, products=60, key=key)


class TestLanczos:
    def test_decomposition_satisfies_its_equation_with_an_orthonormal_basis(self, dtype):
        A = jnp.asarray(with_spectrum(0, VALUES), dtype)
        k = 50
        decompose = jax.jit(lambda A: lanczos.decompose(lambda v: A @ v, jnp.ones(N, dtype), k, jax.random.key(0)))
        found = decompose(A)
        Q, alpha, beta = (np.asarray(part, float) for part in (found.vectors.T, found.alpha, found.beta))
        T = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
        eps = float(jnp.finfo(dtype).eps)
        assert np.abs(Q.T @ Q - np.eye(k)).max() < 50 * eps
        rest = np.asarray(A, float) @ Q - Q @ T
        assert np.abs(rest[:, :-1]).max() < 50 * eps * 20
        assert abs(np.linalg.norm(rest[:, -1]) - beta[-1]) < 100 * eps * 20

    def test_after_an_invariant_subspace_it_goes_on_in_another_and_finds_every_eigenvalue(self, dtype):
        start, key = jnp.ones(12, dtype), jax.random.key(0)
        ritz = jax.jit(lambda A: lanczos.ritz(lanczos.decompose(lambda v: A @ v, start, 12, key)).values)
        for values in ([2.0] * 12, [0.0] * 12, [1.0] * 6 + [3.0] * 6, [0.0] * 11 + [5.0]):
            found = ritz(jnp.asarray(with_spectrum(1, np.array(values)), dtype))
            np.testing.assert_allclose(found, np.sort(values), atol=200 * float(jnp.finfo(dtype).eps) * max(values))

    def test_without_reorthogonalization_the_recurrence_is_the_same_before_anything_converges(self):
        A = jnp.asarray(with_spectrum(0, np.linspace(1, 2, 40)), jnp.float32)
        start = probes.normal(jax.random.key(1), jnp.zeros(40))
        kept = lanczos.decompose(lambda v: A @ v, start, 6, jax.random.key(0))
        light = lanczos.tridiagonal(lambda v: A @ v, start, 6)
        np.testing.assert_allclose(light.alpha, kept.alpha, rtol=1e-4)
        np.testing.assert_allclose(light.beta, kept.beta, rtol=1e-3)
        assert light.vectors is None

    def test_memory_without_reorthogonalization_does_not_grow_with_the_steps(self):
        def temp(steps, keep):
            def run(x):
                density = curvature.spectral_density(lambda p, v: p * v, x, steps=steps, probes=2, reorthogonalize=keep)
                return density.nodes

            return jax.jit(run).lower(jnp.ones(100_000)).compile().memory_analysis().temp_size_in_bytes

        vector = 400_000
        light, longer, kept = temp(10, keep=False), temp(60, keep=False), temp(60, keep=True)
        assert longer - light < vector / 2
        assert longer < 12 * vector
        assert 58 * vector < kept - longer < 72 * vector  # n k floats, once


class TestExtremeEigenpairs:
    def test_both_ends_are_those_of_the_dense_matrix_and_the_residuals_bound_the_errors(self, dtype):
        A = with_spectrum(3, VALUES)
        found = pairs_of(jnp.asarray(A, dtype), point(dtype), jax.random.key(0))
        digits = 1e-6 if dtype == "float32" else 1e-9
        np.testing.assert_allclose(found.largest.values, VALUES[::-1][:2], rtol=digits * 10)
        np.testing.assert_allclose(found.smallest.values[0], VALUES[0], rtol=digits * 10)
        for end in (found.smallest, found.largest):
            U = flat(end.vectors, axis=1)
            np.testing.assert_allclose(jnp.linalg.norm(U, axis=1), 1.0, rtol=1e-5)
            residual = np.linalg.norm(np.asarray(U, float) @ A - np.asarray(end.values, float)[:, None] * U, axis=1)
            assert np.all(residual <= np.asarray(end.residuals))
            nearest = np.min(np.abs(VALUES[:, None] - np.asarray(end.values, float)), axis=0)
            assert np.all(nearest <= np.asarray(end.residuals))
        assert int(found.products) == 60

    def test_before_convergence_the_bounds_hold_and_are_no_triviality(self):
        A = with_spectrum(3, np.linspace(0, 1, N) ** 3)  # the lower end is crowded
        found = pairs_of(jnp.asarray(A, jnp.float32), point(), jax.random.key(0))
        values, residuals = np.asarray(found.smallest.values), np.asarray(found.smallest.residuals)
        nearest = np.min(np.abs((np.linspace(0, 1, N) ** 3)[:, None] - values), axis=0)
        assert np.all(nearest <= residuals)
        assert residuals[1] > 1e-5  # not converged, and it says so
        assert found.largest.residuals[0] < 1e-5

    def test_lanes_of_a_vmap_are_those_of_single_calls(self):
        A = jnp.stack([jnp.asarray(with_spectrum(seed, VALUES * (seed + 1)), jnp.float32) for seed in range(3)])
        together = jax.vmap(lambda A: pairs_of(A, point(), jax.random.key(0)))(A)
        for i in range(3):
            alone = pairs_of(A[i], point(), jax.random.key(0))
            np.testing.assert_allclose(together.largest.values[i], alone.largest.values, rtol=1e-5)
            np.testing.assert_allclose(together.smallest.values[i], alone.smallest.values, rtol=1e-5)

    def test_parameters_may_have_mixed_precision_and_vectors_come_in_theirs(self):
        with precision("float64"):
            params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(2, jnp.float64)}
            loss = lambda p: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * p["a"] ** 2) + 10 * jnp.sum(p["b"] ** 2)
            found = curvature.extreme_eigenpairs(curvature.hvp(loss), params)
            np.testing.assert_allclose(found.smallest.values, 2.0, rtol=1e-6)
            assert {k: v.dtype.name for k, v in found.largest.vectors.items()} == {"a": "float32", "b": "float64"}

    def test_lobpcg_agrees(self):
        A = with_spectrum(3, VALUES)
        found = jax.jit(lambda A: curvature.lobpcg_eigenpairs(matrix_product(A), point(), 2, iterations=80))(
            jnp.asarray(A, jnp.float32)
        )
        np.testing.assert_allclose(found.largest.values, VALUES[::-1][:2], rtol=1e-4)
        np.testing.assert_allclose(found.smallest.values[0], VALUES[0], rtol=1e-4)
        nearest = np.min(np.abs(VALUES[:, None] - np.asarray(found.largest.values)), axis=0)
        assert np.all(nearest <= np.asarray(found.largest.residuals))

    def test_traced_parameters_that_are_not_finite_give_nan(self):
        run = jax.jit(lambda x: curvature.extreme_eigenpairs(curvature.hvp(lambda x: jnp.sum(x**4)), x))
        assert np.isnan(run(jnp.array([1.0, jnp.nan, 2.0])).largest.values).all()
        np.testing.assert_allclose(run(jnp.array([1.0, 0.5, 2.0])).largest.values, [48.0], rtol=1e-5)


class TestTraces:
    @pytest.mark.parametrize("kind", [pytest.param("flat", marks=pytest.mark.slow), "outliers"])
    def test_the_trace_lies_in_its_own_interval_for_95_of_100_seeds(self, kind):
        values = np.linspace(0.5, 1.5, N) if kind == "flat" else np.sort(np.r_[np.full(N - 3, 1e-3), 1.0, 3.0, 10.0])
        A = jnp.asarray(with_spectrum(4, values), jnp.float32)
        keys = jax.random.split(jax.random.key(7), 100)
        one = lambda key: curvature.trace(matrix_product(A), point(), probes=50, key=key)
        two = lambda key: curvature.trace_hutchpp(matrix_product(A), point(), products=60, key=key)
        plain, plus = jax.jit(jax.vmap(one))(keys), jax.jit(jax.vmap(two))(keys)
        exact = values.sum()
        for found in (plain, plus):
            # The products, in float32, err by rounding as well.
            inside = np.abs(np.asarray(found.value) - exact) <= np.asarray(found.margin) + 1e-6 * exact
            assert inside.sum() >= 95
        spread = np.std(plain.value)
        assert 0.6 < np.mean(plain.standard_error) / spread < 1.8  # no interval that holds because it is wide
        if kind == "outliers":
            assert np.std(plus.value) < spread / 100
        assert int(plain.products[0]) == 50
        assert int(plus.products[0]) == 60

    @pytest.mark.parametrize("n", [1, 2, 33])
    def test_hutchpp_is_exact_by_default_on_few_parameters(self, n):
        A = jnp.asarray(with_spectrum(4, np.arange(1.0, n + 1)), jnp.float32)
        found = curvature.trace_hutchpp(lambda _, v: A @ v, jnp.zeros(n))
        np.testing.assert_allclose(found.value, n * (n + 1) / 2, rtol=1e-5)
        assert (float(found.standard_error), float(found.margin), int(found.products)) == (0.0, 0.0, n)

    def test_student_quantiles_are_those_of_scipy(self):
        for freedom in (1, 2, 3, 4, 5, 7, 10, 30, 99, 1000):
            assert estimate.student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)

    def test_the_trace_of_a_diagonal_matrix_is_exact_and_says_so(self):
        found = curvature.trace(lambda p, v: jnp.arange(10.0) * v, jnp.zeros(10), probes=5)
        assert float(found.value) == 45.0
        assert float(found.margin) < 1e-3

    def test_the_diagonal_errs_as_it_says(self):
        A = with_spectrum(5, VALUES)
        found = jax.jit(lambda A: curvature.diagonal(matrix_product(A), point(), probes=200))(
            jnp.asarray(A, jnp.float32)
        )
        z = (np.asarray(flat(found.value)) - np.diag(A)) / np.asarray(flat(found.standard_error))
        assert 0.8 < np.sqrt(np.mean(z**2)) < 1.25  # n = 120 entries
        exact = np.sqrt((np.sum(A**2, axis=1) - np.diag(A) ** 2) / 200)
        np.testing.assert_allclose(flat(found.standard_error), exact, rtol=0.4)


class TestSpectra:
    @pytest.mark.parametrize("keep", [True, False])
    def test_the_density_is_within_2_percent_of_the_range_in_wasserstein_distance(self, keep):
        A = jnp.asarray(with_spectrum(6, VALUES), jnp.float32)
        found = jax.jit(
            lambda A: curvature.spectral_density(matrix_product(A), point(), steps=40, reorthogonalize=keep)
        )(A)
        np.testing.assert_allclose(jnp.sum(found.weights), 1.0, rtol=1e-5)
        nodes, weights = np.asarray(found.nodes).ravel(), np.asarray(found.weights).ravel()
        distance = stats.wasserstein_distance(VALUES, nodes, None, weights)
        assert distance < 0.02 * (VALUES[-1] - VALUES[0])
        assert np.all(np.min(np.abs(nodes[None] - VALUES[[0, -2, -1], None]), axis=1) < 1e-3)  # outliers are found
        grid = jnp.linspace(-10, 30, 4001)
        assert float(jnp.trapezoid(found.density(grid), grid)) == pytest.approx(1.0, abs=1e-3)

    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    @pytest.mark.parametrize("n", [1, 8])
    def test_equal_eigenvalues_are_widened_by_their_own_size(self, n, scale):
        A = jnp.asarray(with_spectrum(2, np.full(n, 4.0)), jnp.float32)
        found = curvature.spectral_density(lambda _, v: scale * (A @ v), jnp.zeros(n))
        grid = scale * jnp.linspace(2.8, 5.2, 2001)
        assert float(jnp.trapezoid(found.density(grid), grid)) == pytest.approx(1.0, abs=1e-3)

    def test_with_n_steps_the_quadrature_of_every_probe_is_exact(self):
        with precision("float64"):
            values = np.array([0.5, 1.0, 2.0, 5.0, 9.0])
            A = jnp.asarray(with_spectrum(1, values))
            hvp, x = lambda p, v: A @ v, jnp.zeros(5)
            many = 1000
            logdet = jax.jit(lambda: curvature.log_determinant(hvp, x, probes=many, shift=0.1))()
            dimension = jax.jit(lambda: curvature.effective_dimension(hvp, x, 1.0, probes=many))()
            for found, exact in (
                (logdet, np.sum(np.log(values + 0.1))),
                (dimension, np.sum(values / (values + 1))),
            ):
                assert abs(float(found.value) - exact) < 4 * float(found.standard_error)
                assert float(found.standard_error) < 0.12

    def test_the_log_determinant_of_an_indefinite_matrix_is_no_number_and_a_shift_mends_it(self):
        A = jnp.asarray(with_spectrum(2, VALUES), jnp.float32)
        run = jax.jit(lambda A, shift: curvature.log_determinant(matrix_product(A), point(), shift=shift, probes=4))
        assert np.isnan(run(A, jnp.float32(0.0)).value)
        exact = np.sum(np.log(VALUES + 5.0))
        found = run(A, jnp.float32(5.0))
        assert abs(float(found.value) - exact) < 4 * float(found.standard_error)
        assert float(found.standard_error) < 0.05 * exact

    def test_effective_dimension_counts_what_exceeds_the_regularization(self):
        values = np.concatenate([np.full(30, 1e3), np.full(N - 30, 1e-4)])
        A = jnp.asarray(with_spectrum(2, values), jnp.float32)
        found = curvature.effective_dimension(matrix_product(A), point(), 0.1, probes=8)
        assert abs(float(found.value) - 30) < max(4 * float(found.standard_error), 0.3)

    def test_condition_numbers(self):
        both = jax.jit(
            lambda A: (
                curvature.condition_number(matrix_product(A), point()),
                curvature.condition_number(matrix_product(A), point(), dense_limit=0, products=60),
            )
        )
        of = lambda values: both(jnp.asarray(with_spectrum(2, np.sort(values)), jnp.float32))
        exact, lanczos_only = of(np.r_[0.01, np.linspace(1, 10, N - 1)])
        for found in (exact, lanczos_only):
            np.testing.assert_allclose(found.value, 1000.0, rtol=1e-3)
            assert bool(found.definite)
        assert (bool(exact.exact), bool(lanczos_only.exact)) == (True, False)
        exact, lanczos_only = of(VALUES)
        np.testing.assert_allclose(exact.value, 20 / np.abs(VALUES).min(), rtol=1e-3)
        assert np.isinf(lanczos_only.value)  # it does not see the inside of the spectrum, and says so
        assert not bool(exact.definite)
        assert np.isinf(of(np.r_[0.0, np.linspace(1, 10, N - 1)])[0].value)

    def test_condition_number_of_a_jacobian_is_not_squared(self):
        U = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 4)))[0]
        V = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
        J = jnp.asarray(U * [1.0, 1e-1, 1e-3, 1e-5] @ V.T, jnp.float32)
        found = curvature.jacobian_condition_number(lambda x: J @ x, jnp.zeros(4))
        np.testing.assert_allclose(found.value, 1e5, rtol=0.05)  # 1e10 from J'J: not to be seen in float32
        deficient = curvature.jacobian_condition_number(lambda x: x[0] * jnp.ones(3) + x[1] * jnp.ones(3), jnp.zeros(2))
        assert np.isinf(deficient.value)


class TestExtremes:
    """Sizes near the ends of the precision, sums over many samples, matrices that leave no Krylov space."""

    DIAGONAL = np.arange(1.0, 11.0)

    @pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
    def test_units_of_the_loss_change_nothing(self, scale):
        d = jnp.asarray(self.DIAGONAL, jnp.float32)
        product, x = lambda x, v: scale * (d * v), jnp.zeros(10)
        pairs = curvature.extreme_eigenpairs(product, x)
        np.testing.assert_allclose(pairs.smallest.values / scale, 1.0, rtol=1e-5)
        np.testing.assert_allclose(pairs.largest.values / scale, 10.0, rtol=1e-5)
        assert 0 < pairs.largest.residuals[0] / scale < 1e-3
        for keep in (True, False):
            nodes = curvature.spectral_density(product, x, probes=2, reorthogonalize=keep).nodes
            np.testing.assert_allclose(nodes[0] / scale, self.DIAGONAL, rtol=1e-4)
        np.testing.assert_allclose(curvature.condition_number(product, x, dense_limit=0).value, 10.0, rtol=1e-5)
        skewed = lambda x, v: scale * (d * v + jnp.roll(v, 1) + jnp.roll(v, -1))
        one, other = (curvature.trace(f, x, probes=20) for f in (skewed, lambda x, v: skewed(x, v) / scale))
        np.testing.assert_allclose(one.margin / scale, other.margin, rtol=1e-3)
        assert other.margin > 0
        errors = curvature.diagonal(skewed, x, probes=20).standard_error
        assert np.all(errors / scale > 0.05)
        best = curvature.lobpcg_eigenpairs(product, x)
        np.testing.assert_allclose(
            [best.smallest.values[0] / scale, best.largest.values[0] / scale], [1, 10], rtol=1e-3
        )

    @pytest.mark.parametrize("d", [np.ones(50), np.eye(50)[0], np.zeros(50)], ids=["identity", "rank one", "zero"])
    @pytest.mark.parametrize("num", [1, 2])
    def test_lobpcg_has_an_answer_with_an_honest_residual(self, d, num):
        found = curvature.lobpcg_eigenpairs(lambda x, v: jnp.asarray(d, jnp.float32) * v, jnp.zeros(50), num)
        for end in (found.smallest, found.largest):
            gaps = np.min(np.abs(np.asarray(end.values)[:, None] - d[None, :]), axis=1)
            assert np.all(gaps <= np.asarray(end.residuals) + 1e-12)

    def test_sums_over_many_samples_are_no_negative_curvature(self):
        labels = jax.random.randint(jax.random.key(2), (300_000,), 0, 3)
        X = jnp.concatenate([jax.nn.one_hot(labels, 3), jnp.ones((labels.size, 1))], 1)  # its columns are dependent
        fun, x = lambda p, X: jnp.mean((X @ p) ** 2), jnp.zeros(4)
        exact = np.linalg.eigvalsh(2 * np.asarray(X, float).T @ np.asarray(X, float) / labels.size)
        pairs = curvature.extreme_eigenpairs(curvature.hvp(fun, X), x)
        for end, value in ((pairs.smallest, exact[0]), (pairs.largest, exact[-1])):
            assert abs(float(end.values[0]) - value) <= float(end.residuals[0])
            assert float(end.residuals[0]) < 0.02 * exact[-1]
        for limit in (1000, 0):
            point = curvature.classify_critical_point(fun, x, X, dense_limit=limit)
            assert curvature.Kind(int(point.kind)) == curvature.Kind.DEGENERATE
        assert np.isinf(curvature.condition_number(curvature.hvp(fun, X), x).value)

    def test_what_is_no_number_has_no_log_determinant(self):
        for bad in (jnp.nan, jnp.inf):
            for tool in (curvature.log_determinant, lambda *a: curvature.effective_dimension(*a, 1.0)):
                assert np.isnan(tool(lambda x, v, bad=bad: bad * v, jnp.zeros(3)).value)

    def test_two_lines_stay_two_without_reorthogonalization(self):
        d = jnp.where(jnp.arange(60) < 30, 100.0, 101.0)
        lines = [
            curvature.spectral_density(lambda x, v: d * v, jnp.zeros(60), reorthogonalize=keep)
            for keep in (True, False)
        ]
        grid = jnp.array([100.0, 100.5, 101.0])
        np.testing.assert_allclose(lines[0].density(grid), lines[1].density(grid), rtol=1e-2, atol=1e-3)


def test_equal_numbers_of_other_types_are_other_programs():
    fun = lambda p, c: jnp.sum(p**2) * (2 if isinstance(c[0], int) else 7)
    assert [float(curvature.hessian(fun, jnp.ones(1), (c,))[0, 0]) for c in (1, 1.0)] == [4.0, 14.0]


def test_numpy_scalars_are_options_like_any_number():
    product, x = curvature.hvp(lambda x: jnp.sum(x**4)), jnp.arange(1.0, 5.0)
    assert int(curvature.trace(product, x, probes=np.int64(5)).products) == 5
    with pytest.raises(ValueError, match=r"shift.*-1"):
        curvature.log_determinant(product, x, shift=np.float64(-1))
    with pytest.raises(TypeError, match="shift must be a real number"):
        curvature.log_determinant(product, x, shift=jnp.ones(4))
    with pytest.raises(TypeError, match="reorthogonalize must be True or False"):
        curvature.spectral_density(product, x, reorthogonalize="no")


def test_functions_and_integers_are_arguments_of_a_loss():
    fun = lambda p, f, k: sum(jnp.sum(f(p) ** i) for i in range(k))
    point = curvature.classify_critical_point(fun, jnp.zeros(2), jnp.tanh, 3, gtol=2.0)
    assert np.isfinite(point.value)
    assert curvature.hessian(fun, jnp.zeros(2), jnp.tanh, 3).shape == (2, 2)
    assert np.isfinite(curvature.sharpness(fun, jnp.zeros(2), jnp.tanh, 3).epsilon_sharpness)
