"""The trust-region subproblem, and what damps a Newton step.

Optimality is judged by Nocedal & Wright (2006), Theorem 4.1, with everything recomputed in float64 by NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, precision, rotation, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

import secondorder as so
from secondorder.globalization import cubic, trust_region
from secondorder.globalization.cubic import Cubic
from secondorder.globalization.damping import Levenberg
from secondorder.globalization.trust_region import Damping
from secondorder.linalg import modified_cholesky
from secondorder.optimizers.saddle_free_newton import SaddleFreeRegion

N = 6
ROUNDING = {"float32": 3e-6, "float64": 1e-13}  # of the residuals, relative to their terms; a few hundred eps for N = 6
solve = jax.jit(trust_region.solve)
drawn = settings(max_examples=60, deadline=None, derandomize=True)


def numbers(low: float, high: float, size: int = N) -> st.SearchStrategy[np.ndarray]:
    """Draw a float32 vector (exact in both precisions)."""
    each = st.floats(low, high, width=32)
    return st.lists(each, min_size=size, max_size=size).map(lambda xs: np.array(xs, np.float32))


radii = st.sampled_from([2.0**-10, 0.1, 1.0, 3.0, 2.0**10])


def answer(values: np.ndarray, g: np.ndarray, radius: float, dtype: str) -> np.ndarray:
    """Return the step that the library takes, in float64."""
    with precision(dtype):
        p = solve(jnp.asarray(values, dtype), jnp.asarray(g, dtype), jnp.asarray(radius, dtype))
        return np.asarray(p, np.float64)


def assert_optimal(values: np.ndarray, g: np.ndarray, radius: float, dtype: str) -> None:
    """Assert the conditions of N&W Theorem 4.1 for the step in the eigenbasis.

    Without a multiplier from the solver the conditions are tested through the model itself: the step is feasible, and
    its value is that of the best multiplier by Lagrange duality, which has no gap here:
    m(p*) = max over sigma >= max(0, -values[0]) of -1/2 sum g_i^2 / (values_i + sigma) - sigma radius^2 / 2.
    """
    values, g, radius = np.float64(np.asarray(values, dtype)), np.float64(np.asarray(g, dtype)), float(radius)
    p = answer(values, g, radius, dtype)
    tolerance = ROUNDING[dtype]
    assert np.all(np.isfinite(p)), (values, g, radius, p)
    assert np.linalg.norm(p) <= radius * (1 + tolerance)
    model = g @ p + 0.5 * p @ (values * p)
    best = _dual(values, g, radius)
    size = np.linalg.norm(g) * radius + 0.5 * np.abs(values).max() * radius**2
    inside = np.linalg.norm(p)
    size = min(size, np.linalg.norm(g) * inside + 0.5 * np.abs(values).max() * inside**2) if inside else size
    assert model <= best + tolerance * size, (values, g, radius, p, model, best)


def _dual(values: np.ndarray, g: np.ndarray, radius: float) -> float:
    """Return the maximum of the concave dual, whose derivative (||p||^2 - radius^2) / 2 falls in sigma: bisection."""
    floor = max(0.0, -values.min())
    part = g != 0

    def dual(shift: float) -> float:
        with np.errstate(divide="ignore", over="ignore"):
            terms = g[part] ** 2 / (values[part] + floor + shift)
        return -0.5 * terms.sum() - 0.5 * (floor + shift) * radius**2

    def length(shift: float) -> float:
        with np.errstate(divide="ignore", over="ignore"):
            return np.linalg.norm(g[part] / (values[part] + floor + shift))

    if length(0.0) <= radius:
        return dual(0.0)
    high = np.linalg.norm(g) / radius
    low = high * 1e-80
    for _ in range(90):  # halves the logarithm
        middle = (low * high) ** 0.5
        low, high = (middle, high) if length(middle) > radius else (low, middle)
    return max(dual(low), dual(high))


@pytest.mark.parametrize("dtype", DTYPES)
class TestTheStepIsTheMinimizerInTheBall:
    @drawn
    @given(numbers(-10, 10), numbers(-10, 10), radii)
    def test_for_any_spectrum_and_gradient(self, dtype, values, g, radius):
        assert_optimal(np.sort(values), g, radius, dtype)

    @drawn
    @given(numbers(0.125, 10), numbers(-10, 10))
    def test_which_is_newtons_step_where_the_ball_does_not_bind(self, dtype, values, g):
        values = np.sort(values)
        np.testing.assert_allclose(answer(values, g, 2.0**20, dtype), -g.astype(float) / values, rtol=1e-6)

    @drawn
    @given(numbers(-10, 10), numbers(-10, 10), radii)
    def test_in_the_hard_case(self, dtype, values, g, radius):
        values = np.sort(values)
        values[0] = min(values[0], -0.5)
        assert_optimal(values, np.where(values == values[0], 0.0, g), radius, dtype)

    @drawn
    @given(numbers(-10, 10), numbers(-10, 10), radii, st.integers(1, 30))
    def test_nearly_in_the_hard_case(self, dtype, values, g, radius, k):
        values = np.sort(values)
        values[0] = min(values[0], -0.5)
        g[0] = 10.0**-k
        assert_optimal(values, g, radius, dtype)

    @drawn
    @given(numbers(-10, 10), numbers(-10, 10), radii, st.integers(1, N - 1))
    def test_with_a_repeated_lowest_eigenvalue(self, dtype, values, g, radius, k):
        values = np.sort(values)
        values[: k + 1] = values[0]
        g[:k] = 0.0
        assert_optimal(values, g, radius, dtype)

    @drawn
    @given(numbers(-10, 10), radii)
    def test_at_a_zero_gradient(self, dtype, values, radius):
        values = np.sort(values)
        assert_optimal(values, np.zeros(N), radius, dtype)
        length = np.linalg.norm(answer(values, np.zeros(N), radius, dtype))
        assert length == pytest.approx(radius if values[0] < 0 else 0.0, rel=1e-6)

    @drawn
    @given(numbers(-10, 10), radii)
    def test_with_zero_curvature_which_is_steepest_descent_to_the_boundary(self, dtype, g, radius):
        assert_optimal(np.zeros(N), g, radius, dtype)
        p, length = answer(np.zeros(N), g, radius, dtype), np.linalg.norm(g.astype(float))
        np.testing.assert_allclose(p, -radius * g / (length if length else 1.0), atol=1e-6 * radius)

    @drawn
    @given(numbers(0, 10), numbers(-10, 10), radii, st.integers(1, N - 1))
    def test_for_a_singular_matrix_with_the_gradient_in_its_range(self, dtype, values, g, radius, rank):
        values = np.sort(values)
        values[: N - rank], g[: N - rank] = 0.0, 0.0
        assert_optimal(values, g, radius, dtype)

    @drawn
    @given(numbers(0, 10), numbers(-10, 10), radii, st.integers(1, N - 1))
    def test_for_a_singular_matrix_with_the_gradient_outside_its_range(self, dtype, values, g, radius, rank):
        values = np.sort(values)
        values[: N - rank] = 0.0
        assert_optimal(values, g, radius, dtype)

    @pytest.mark.parametrize(
        ("values", "g", "radius"),
        [
            ([0, 0, 5], [0, 1, 0], 10.0),
            ([-1, -1, 5], [0, 1, 0], 10.0),
            ([-1, -1, -1], [0, 0, 1e-30], 2.0),
            ([-1, -1 + 2.0**-20, 1], [0, 1e-20, 1e-3], 2.0),
            ([1e-30, 1, 1], [1, 1, 1], 1e-3),
            ([-1e8, 1, 1e8], [1e-3, 1e3, 1], 1e-4),
            ([1e-12, 1e-6, 1], [1e-3, 1e3, 1], 1e6),
        ],
    )
    def test_in_corners_met_by_hand(self, dtype, values, g, radius):
        assert_optimal(np.array(values), np.array(g), radius, dtype)

    def test_against_random_feasible_competitors(self, dtype):
        rng = np.random.default_rng(1)
        for case in range(30):
            values, g, radius = np.sort(rng.normal(size=N)), rng.normal(size=N) * (case % 5), 10.0 ** rng.normal()
            p = answer(values, g, radius, dtype)
            rivals = rng.normal(size=(1000, N))
            rivals *= radius * rng.uniform(size=(1000, 1)) ** 0.2 / np.linalg.norm(rivals, axis=1, keepdims=True)
            points = np.vstack([p, rivals])
            model = points @ g + 0.5 * np.sum(values * points * points, axis=-1)
            assert model[0] <= model[1:].min() + 1e-6 * abs(model[0])

    def test_whatever_the_unit_of_the_loss(self, dtype):
        rng = np.random.default_rng(2)
        values, g = np.sort(rng.normal(size=N)).astype("f"), rng.normal(size=N).astype("f")
        for power in (-20, 20):
            scaled = answer(values * 2.0**power, g * 2.0**power, 0.7, dtype)
            np.testing.assert_array_equal(scaled, answer(values, g, 0.7, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_multiplier_solves_the_shifted_system(dtype):
    """(H + sigma I) p = -g and sigma (radius - ||p||) = 0 with one sigma >= max(0, -lambda_1), N&W (4.8)."""
    rng = np.random.default_rng(3)
    with precision(dtype):
        for _ in range(30):
            values, g = np.sort(rng.normal(size=N)), rng.normal(size=N)
            values, g = np.float64(np.asarray(values, dtype)), np.float64(np.asarray(g, dtype))
            radius = float(np.float32(10.0 ** rng.normal()))
            p = answer(values, g, radius, dtype)
            sigma = -(g @ p + values * p @ p) / (p @ p)
            tolerance = 100 * np.finfo(dtype).eps * (np.linalg.norm(g) + np.abs(values).max() * radius)
            assert np.abs((values + sigma) * p + g).max() <= 10 * tolerance
            assert sigma >= max(0.0, -values[0]) - tolerance / radius
            assert abs(sigma * (radius - np.linalg.norm(p))) <= tolerance


def test_the_radius_follows_algorithm_4_1():
    region, resize = so.trust_region(), lambda ratio, ok, length: _resized(so.trust_region(), 2.0, ratio, ok, length)
    assert resize(0.9, True, 2.0) == 2.0 * 2.0  # very good, on the boundary
    assert resize(0.9, True, 1.0) == 2.0  # very good, inside: the radius did not bind
    assert resize(0.5, True, 2.0) == 2.0  # good
    assert resize(0.1, True, 2.0) == pytest.approx(2.0 * 0.5)  # poor, yet accepted: half the way at most
    # Rejected: to the minimizer of the parabola f + slope t + bend t^2, within a tenth and a half.
    assert _resized(region, 2.0, -1.0, False, 2.0, change=1.0) == pytest.approx(2.0 * 0.25)
    assert _resized(region, 2.0, -1.0, False, 1.0, change=1.0) == pytest.approx(0.25)  # below the step that failed
    assert _resized(region, 2.0, -1.0, False, 2.0, change=99.0) == pytest.approx(0.2)
    assert _resized(region, 2.0, -np.inf, False, 2.0, change=np.nan) == pytest.approx(0.5)  # nothing is known
    # A poor ratio although the loss still falls at the trial: the model promised too much, the step was not too long.
    assert _resized(region, 2.0, 0.01, True, 2.0, change=-0.5, end_slope=-0.5) == 4.0
    assert _resized(region, 2.0, 0.01, True, 1.0, change=-0.5, end_slope=-0.5) == 2.0
    # How far it grows follows the error in the foretold gradient, which grows like the length.
    for misfit, factor in ((0.0, 10.0), (1e-3, 10.0), (0.025, 4.0), (0.2, 2.0), (np.nan, 2.0), (np.inf, 2.0)):
        assert _resized(region, 2.0, 0.9, True, 2.0, misfit=misfit) == pytest.approx(2.0 * factor)
        assert _resized(region, 2.0, 0.5, True, 2.0, misfit=misfit) == 2.0
    assert _resized(so.trust_region(growth=3.0), 2.0, 0.9, True, 2.0, misfit=0.0) == 6.0


def test_a_region_does_not_grow_at_once_to_a_length_that_has_just_failed():
    region, start = so.trust_region(), Damping(jnp.float32(8.0), jnp.float32(np.inf))
    failed = region.resize(start, _trial(-1.0, False, 8.0, change=99.0))
    assert float(failed.size) == pytest.approx(0.8)
    better = region.resize(failed, _trial(1.0, True, 0.8, misfit=0.0))
    assert float(better.size) == pytest.approx(16.0 / 3.0)  # two thirds of 8, and not ten times as far
    further = region.resize(better, _trial(1.0, True, float(better.size), misfit=0.0))
    assert float(further.size) == pytest.approx(10.0 * float(better.size))


def test_the_misfit_of_a_model_is_relative_to_the_change_it_foretold():
    foretold = jnp.array([3.0, 4.0])
    assert float(trust_region.misfit(foretold, foretold)) == 0.0
    assert float(trust_region.misfit(foretold, jnp.array([3.0, 4.5]))) == pytest.approx(0.1)
    assert np.isnan(float(trust_region.misfit(jnp.zeros(2), jnp.zeros(2))))


def test_a_region_grows_fast_on_a_quadratic_and_slowly_in_a_bent_valley():
    # From a radius of 1 to a minimum at a distance of 1e4: growth by 10 takes 6 evaluations, by 2 takes 15.
    result = so.minimize(lambda x: jnp.sum((x - 1e4) ** 2), jnp.zeros(2), so.newton(so.trust_region(radius=1.0)))
    assert result.success
    assert int(result.evaluations) <= 7
    doubling = so.newton(so.trust_region(radius=1.0, growth=2.0))
    assert int(so.minimize(lambda x: jnp.sum((x - 1e4) ** 2), jnp.zeros(2), doubling).evaluations) >= 14


def _resized(region, radius, ratio, accepted, length, **along):
    damping = Damping(jnp.float32(radius), jnp.float32(np.inf))
    return float(region.resize(damping, _trial(ratio, accepted, length, **along)).size)


def _trial(ratio, accepted, length, change=-0.01, slope=-1.0, end_slope=1.0, excess=0.0, misfit=np.nan):
    numbers = (jnp.float32(number) for number in (length, change, slope, end_slope, excess, misfit))
    return trust_region.Trial(jnp.float32(ratio), jnp.array(accepted), *numbers)


def test_the_first_radius_is_the_option_or_the_size_of_the_parameters():
    g = jnp.ones(3)
    start = lambda region, x_norm, loss=1e9: float(region.start(g, g, jnp.float32(x_norm), jnp.float32(loss)).size)
    assert start(so.trust_region(radius=0.125), 7.0) == 0.125
    assert start(so.trust_region(), 7.0) == 7.0
    assert start(so.trust_region(), 0.0) == 1.0
    assert start(so.trust_region(), 7.0, loss=0.0) == 7.0  # no scale to compare with
    assert start(so.trust_region(), 4.0, loss=0.1) == 4.0 / 2**6  # 4/32 would promise more than twice the loss


@given(numbers(-10, 10), numbers(-10, 10), radii, st.floats(2.0**-10, 2.0**10, width=32))
@drawn
def test_the_first_step_promises_no_more_decrease_than_twice_the_loss(values, g, x_norm, loss):
    values, g = jnp.asarray(np.sort(values), jnp.float32), jnp.asarray(g, jnp.float32)
    radius = trust_region.first_radius(values, g, jnp.float32(x_norm), jnp.float32(loss))
    promised = trust_region.decrease(values, g, trust_region.solve(values, g, radius))
    least = max(1.0, x_norm) * 2.0 ** (1 - trust_region.FIRST_RADII)
    assert float(promised) <= 2 * loss * (1 + 1e-5) or float(radius) <= least * (1 + 1e-6)


@given(st.floats(2.0**-10, 1.0, width=32), st.floats(2.0**-10, 2.0**10, width=32))
@drawn
def test_levenberg_shift_follows_nielsen(ratio, shift):
    """Nielsen (1999), (2.4): mu max(1/3, 1 - (2 rho - 1)^3) and nu = 2, or mu nu and 2 nu."""
    damping = Damping(jnp.float32(shift), jnp.float32(8.0))
    accepted, rejected = (so.levenberg().resize(damping, _trial(ratio, ok, 1.0)) for ok in (True, False))
    assert float(accepted.size) == pytest.approx(shift * max(1 / 3, 1 - (2 * ratio - 1) ** 3), rel=1e-5)
    assert float(accepted.factor) == 2.0
    assert float(rejected.size) == pytest.approx(8 * shift, rel=1e-6)
    assert float(rejected.factor) == 16.0


def test_levenberg_starts_from_tau_times_the_largest_curvature():
    values = jnp.array([-5.0, 1.0, 3.0])
    assert float(so.levenberg(tau=0.1).start(values, values, jnp.float32(1.0), jnp.float32(1.0)).size) == pytest.approx(
        0.5
    )


def test_levenberg_step_tends_to_newton_and_to_the_gradient():
    values, g = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, -1.0, 2.0])
    step = lambda shift: so.levenberg().step(values, g, Damping(jnp.float32(shift), jnp.float32(2.0)))
    np.testing.assert_allclose(step(1e-9), -g / values, rtol=1e-6)
    np.testing.assert_allclose(step(1e9) * 1e9, -g, rtol=1e-6)


REGIONS = {"trust_region": so.trust_region(), "levenberg": so.levenberg(), "cubic": Cubic(None, 1e-4)}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_exhausted_means_that_a_step_can_no_longer_move_x(region):
    """As soon as `exhausted` holds, ||p|| <= eps ||x||; and repeated rejection reaches it."""
    values, g, x_norm = jnp.array([0.5, 2.0]), jnp.array([1.0, 3.0]), jnp.float32(4.0)
    damping = region.start(values, g, x_norm, jnp.float32(1e9))
    for _ in range(200):
        if bool(region.exhausted(damping, values, g, x_norm)):
            break
        length = jnp.linalg.norm(region.step(values, g, damping))
        damping = region.resize(damping, _trial(-1.0, False, length, change=9.0, excess=10.0))
    assert bool(region.exhausted(damping, values, g, x_norm))
    assert float(jnp.linalg.norm(region.step(values, g, damping))) <= np.finfo(np.float32).eps * 4.0


@jax.jit
def _cubic_step(values, g, sigma):
    return cubic.solve(values, g, sigma)


def cubic_model(values, g, sigma, p):
    return g @ p + 0.5 * values * p @ p + sigma * np.linalg.norm(p) ** 3 / 3


@pytest.mark.parametrize("dtype", DTYPES)
class TestTheCubicStepIsTheGlobalMinimizer:
    def check(self, values, g, sigma, dtype):
        """Cartis, Gould & Toint (2011), Theorem 3.1: necessary and sufficient for the global minimizer."""
        with precision(dtype):
            values, g, sigma = (np.asarray(a, dtype) for a in (np.sort(values), g, sigma))
            p = np.asarray(_cubic_step(values, g, sigma)).astype(float)
        values, g, sigma, length = values.astype(float), g.astype(float), float(sigma), np.linalg.norm(p)
        shift = sigma * length
        size = np.linalg.norm(g) + (np.abs(values).max() + shift) * length
        tolerance = 200 * np.finfo(dtype).eps
        np.testing.assert_allclose((values + shift) * p, -g, atol=tolerance * size)
        assert shift >= -values[0] - tolerance * (np.abs(values).max() + shift)
        least = cubic_model(values, g, sigma, p)
        for competitor in np.random.default_rng(0).normal(size=(20, len(g))):
            competitor *= length / np.linalg.norm(competitor)
            assert least <= cubic_model(values, g, sigma, competitor) + tolerance * size * length

    @drawn
    @given(numbers(-10, 10), numbers(-10, 10), radii)
    def test_for_any_spectrum_and_gradient(self, dtype, values, g, sigma):
        self.check(values, g, sigma, dtype)

    @drawn
    @given(numbers(-10, 10), numbers(-10, 10), radii)
    def test_in_the_hard_case(self, dtype, values, g, sigma):
        values = np.sort(values)
        values[0] = min(values[0], -0.5)
        self.check(values, np.where(values == values[0], 0.0, g), sigma, dtype)

    @drawn
    @given(numbers(-10, 10), radii)
    def test_at_a_zero_gradient(self, dtype, values, sigma):
        self.check(values, np.zeros(N), sigma, dtype)


def test_the_cubic_weight_follows_the_loss_at_the_trial():
    """sigma l^3 / 3 = excess says which weight was right; kept within [2, 10] or [1/10, 1/2] of the last one."""
    damping, model = Damping(jnp.float32(1.0), jnp.float32(2.0)), Cubic(None, 1e-4)
    size = lambda *args, **along: float(model.resize(damping, _trial(*args, **along)).size)
    assert size(-1.0, False, 2.0, excess=12.0) == pytest.approx(3 * 12.0 / 8.0)
    assert size(-1.0, False, 2.0, excess=1.0) == 2.0
    assert size(-1.0, False, 2.0, excess=1e9) == 10.0
    assert size(-np.inf, False, 2.0, excess=np.nan) == 10.0
    assert size(0.05, True, 2.0, excess=1.0) == 2.0
    assert size(0.5, True, 2.0, excess=1.0) == 1.0
    assert size(0.9, True, 2.0, excess=0.8) == pytest.approx(0.3)
    assert size(0.9, True, 2.0, excess=-1.0) == pytest.approx(0.1)
    assert size(0.9, True, 0.0, excess=0.0) == 1.0


def test_the_cubic_weight_grows_faster_with_each_rejection():
    damping, model = Damping(jnp.float32(1e-15), jnp.float32(2.0)), Cubic(None, 1e-4)
    for i in range(10):
        damping = model.resize(damping, _trial(-1.0, False, 2.0, excess=0.0))
        assert damping.factor == 2.0 ** (i + 2)
    assert damping.size > 1.0
    assert model.resize(damping, _trial(0.5, True, 2.0, excess=0.0)).factor == 2.0


class TestGainRatio:
    ratio = staticmethod(lambda *args: float(trust_region.gain_ratio(*(jnp.float32(a) for a in args))))

    def test_is_actual_over_predicted_decrease(self):
        assert self.ratio(10.0, 7.0, -1.0, -1.0, 4.0) == pytest.approx(0.75)

    def test_is_minus_infinity_where_the_model_does_not_promise_a_decrease(self):
        assert self.ratio(10.0, 7.0, -1.0, -1.0, 0.0) == -np.inf
        assert self.ratio(10.0, 7.0, -1.0, -1.0, -1.0) == -np.inf

    @pytest.mark.parametrize("after", [np.nan, np.inf])
    def test_is_minus_infinity_for_a_non_finite_trial(self, after):
        assert self.ratio(10.0, after, -1.0, -1.0, 1.0) == -np.inf

    def test_comes_from_the_slopes_where_the_loss_drowns_in_rounding(self):
        """f = 1e4 + x^2/2 from x = 0.01: the decrease 5e-5 is far below the spacing of float32 at 1e4."""
        x, p = 0.01, -0.01
        assert self.ratio(1e4, 1e4, x * p, (x + p) * p, 0.5e-4) == pytest.approx(1.0)
        assert self.ratio(1e4, 1e4, x * p, (x + 3 * p) * p, 0.5e-4) == pytest.approx(-1.0)  # the slope has turned

    def test_rejects_an_increase_that_is_visible(self):
        assert self.ratio(1e4, 1e4 + 1.0, -1e-4, 0.0, 0.5e-4) < 0


class TestSaddleFreeStep:
    region = SaddleFreeRegion(0.0, so.trust_region())

    def step(self, values, g, radius):
        with precision("float64"):
            damping = Damping(jnp.asarray(radius, float), jnp.ones(()))
            return np.asarray(self.region.step(jnp.asarray(values, float), jnp.asarray(g, float), damping))

    def test_divides_by_the_magnitude_of_each_eigenvalue(self):
        values, g = np.array([-4.0, -1.0, 2.0]), np.array([1.0, 2.0, -3.0])
        np.testing.assert_allclose(self.step(values, g, 100.0), -g / np.abs(values), rtol=1e-12)

    def test_minimizes_the_model_with_magnitudes_in_the_ball(self):
        values, g, radius = np.array([-4.0, -1.0, 2.0]), np.array([1.0, 2.0, -3.0]), 0.5
        p = self.step(values, g, radius)
        order = np.argsort(np.abs(values))
        expected = np.empty(3)
        expected[order] = answer(np.abs(values)[order], g[order], radius, "float64")
        np.testing.assert_allclose(p, expected, rtol=1e-12)

    def test_leaves_a_saddle_of_zero_gradient_by_the_radius_along_the_most_negative_curvature(self):
        np.testing.assert_allclose(np.abs(self.step([-4.0, -1.0, 2.0], [0.0, 0.0, 0.0], 0.5)), [0.5, 0.0, 0.0])

    def test_leaves_downhill_where_a_tiny_gradient_tells_the_side(self):
        assert self.step([-4.0, 1.0], [1e-30, 0.0], 0.5)[0] == -0.5
        assert self.step([-4.0, 1.0], [-1e-30, 0.0], 0.5)[0] == 0.5

    def test_stays_at_a_minimum(self):
        np.testing.assert_array_equal(self.step([1.0, 2.0], [0.0, 0.0], 0.5), [0.0, 0.0])

    def test_stays_on_a_plateau(self):
        np.testing.assert_array_equal(self.step([0.0, 0.0], [0.0, 0.0], 0.5), [0.0, 0.0])


class TestModifiedCholesky:
    """Gill, Murray & Wright (1981), section 4.4.2.2: P'LDL'P = A + E, E >= 0 diagonal, zero where none is needed."""

    factorize = staticmethod(jax.jit(modified_cholesky.factorize))

    def error(self, A, dtype):
        with precision(dtype):
            factors = self.factorize(jnp.asarray(A, dtype))
            L, d, order = (np.asarray(part) for part in (factors.lower, factors.diagonal, factors.order))
        product = np.empty_like(A)
        product[np.ix_(order, order)] = L.astype(float) @ np.diag(d.astype(float)) @ L.astype(float).T
        return product - np.float64(np.asarray(A, dtype)), d

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
    def test_leaves_a_positive_definite_matrix_alone(self, dtype, condition):
        for seed in range(5):
            A = with_spectrum(seed, np.geomspace(1.0, condition, N))
            E, _ = self.error(A, dtype)
            assert np.abs(E).max() <= 20 * np.finfo(dtype).eps * np.abs(A).max()

    @pytest.mark.parametrize("dtype", DTYPES)
    @drawn
    @given(numbers(-10, 10), st.integers(0, 20))
    def test_makes_any_matrix_positive_definite_by_a_bounded_nonnegative_diagonal(self, dtype, values, seed):
        A = with_spectrum(seed, values.astype(float))
        E, d = self.error(A, dtype)
        size, eps = np.abs(A).max(), np.finfo(dtype).eps
        rounding = 50 * eps * max(size, np.abs(np.diagonal(E)).max())
        assert np.all(d > 0)
        assert np.abs(E - np.diag(np.diagonal(E))).max() <= rounding
        assert np.diagonal(E).min() >= -rounding
        gamma, xi = np.abs(np.diagonal(A)).max(), np.abs(A - np.diag(np.diagonal(A))).max()
        beta2 = max(gamma, xi / (N * N - 1) ** 0.5, eps * (gamma + xi))
        if beta2 > 0:  # the bound of Gill, Murray & Wright (1981), (4.47)
            bound = (xi / beta2**0.5 + (N - 1) * beta2**0.5) ** 2 + 2 * (gamma + (N - 1) * beta2)
            assert np.abs(np.diagonal(E)).max() <= 1.01 * bound + 10 * eps * (gamma + xi)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_solves_the_modified_system(self, dtype):
        for seed in range(5):
            A, b = with_spectrum(seed, np.linspace(-3.0, 5.0, N)), np.random.default_rng(seed).normal(size=N)
            E, _ = self.error(A, dtype)
            with precision(dtype):
                x = modified_cholesky.solve(self.factorize(jnp.asarray(A, dtype)), jnp.asarray(b, dtype))
            residual = (A + np.diag(np.diagonal(E))) @ np.asarray(x, float) - b
            assert np.abs(residual).max() <= 1e3 * np.finfo(dtype).eps * (1 + np.abs(E).max() * np.abs(x).max())

    @pytest.mark.parametrize("dtype", DTYPES)
    @drawn
    @given(numbers(-10, 10), st.integers(0, 20))
    def test_tells_whether_it_had_to_lift_a_negative_eigenvalue(self, dtype, values, seed):
        """Between -1e-3 and 1e-3 either answer will do: E may be needed, or be rounding."""
        least, A = values.min(), with_spectrum(seed, values.astype(float))
        if abs(least) < 1e-3:
            return
        with precision(dtype):
            assert bool(self.factorize(jnp.asarray(A, dtype)).indefinite) == (least < 0)

    def test_of_a_zero_matrix_is_positive(self):
        E, d = self.error(np.zeros((3, 3)), "float32")
        assert np.all(d > 0)
        assert np.all(np.diagonal(E) > 0)

    def test_whatever_the_unit_of_the_matrix(self):
        A = with_spectrum(1, np.linspace(-3.0, 5.0, N))
        for power in (-40, 40):
            np.testing.assert_array_equal(
                self.error(A * 2.0**power, "float64")[0], self.error(A, "float64")[0] * 2.0**power
            )


def test_newton_takes_the_minimizer_in_the_ball_on_a_rotated_indefinite_quadratic():
    """The whole path: Hessian, eigenvectors, subproblem; the first trial is the answer in the original basis."""
    with precision("float64"):
        values = np.array([-3.0, -1.0, 0.5, 2.0, 4.0, 9.0])
        A, Q = with_spectrum(4, values), rotation(4, N)
        b = np.random.default_rng(4).normal(size=N)
        loss = lambda x: 0.5 * x @ jnp.asarray(A) @ x + jnp.asarray(b) @ x
        optimizer, x = so.newton(so.trust_region(radius=0.75)), jnp.zeros(N)
        move, _ = optimizer.update(
            jax.grad(loss)(x), optimizer.init(x), x, value=loss(x), hvp_fn=so.curvature.hvp(loss)
        )
        np.testing.assert_allclose(Q.T @ np.asarray(move), answer(values, Q.T @ b, 0.75, "float64"), atol=1e-12)


def test_levenberg_is_a_plain_value_that_compares_by_its_options():
    assert so.levenberg(tau=0.1) == Levenberg(0.1, 1e-4)
    assert so.trust_region(radius=1.0) != so.trust_region(radius=2.0)
