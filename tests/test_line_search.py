"""The line search alone, on functions of one variable.

The six test functions are those of Moré & Thuente (1994), section 5, equations (5.1) to (5.6), with the starting
steps, mu (our c1) and eta (our c2) of their Tables I to VI.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, precision
from hypothesis import given, settings
from hypothesis import strategies as st

import secondorder as so
from secondorder.globalization import line_search
from secondorder.globalization.line_search import FixedStep, first_step

LIMIT = 2000  # judgements after which a search is called endless


class Outcome(NamedTuple):
    """How a search ended."""

    step: Any  # alpha judged last
    phi: Any
    slope: Any
    phi0: Any
    slope0: Any
    accepted: Any
    failed: Any
    evaluations: Any
    furthest: Any  # the longest trial


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(phi, search, first, slope0, parameters):
    at = jax.value_and_grad(phi)

    def finite(alpha):
        value, slope = at(alpha, *parameters)
        return value, slope, jnp.isfinite(value) & jnp.isfinite(slope)

    phi0, own, _ = finite(jnp.zeros_like(first))
    slope0 = jnp.where(jnp.isnan(slope0), own, slope0)
    ray = search.begin(first, slope0, phi0)
    nothing = jnp.zeros_like(first)
    start = Outcome(nothing, phi0, slope0, phi0, slope0, jnp.array(False), jnp.array(False), jnp.int32(0), nothing)

    def turn(carry):
        ray, out = carry
        value, slope, ok = finite(ray.step)
        new, accepted, failed = search.judge(ray, phi0, slope0, value, slope, ok)
        furthest = jnp.maximum(out.furthest, ray.step)
        return new, Outcome(ray.step, value, slope, phi0, slope0, accepted, failed, out.evaluations + 1, furthest)

    over = lambda carry: ~(carry[1].accepted | carry[1].failed) & (carry[1].evaluations < LIMIT)
    return jax.lax.while_loop(over, turn, (ray, start))[1]


def run(phi, search, first, dtype="float64", slope0=np.nan, parameters=()):
    """Search along phi from the trial `first`; slope0 overrides the slope at the origin."""
    with precision(dtype):
        cast = functools.partial(jnp.asarray, dtype=dtype)
        out = _run(phi, search, cast(first), cast(slope0), tuple(cast(p) for p in parameters))
        return Outcome(*(part.item() for part in out))


def assert_strong_wolfe(out, search):
    """Assert (3.7a) and (3.7b) of Nocedal & Wright at an accepted point, up to the rounding of phi."""
    assert out.accepted, out
    assert not out.failed, out
    rounding = 10 * np.finfo(np.float64).eps * abs(out.phi0)
    assert out.phi <= out.phi0 + search.c1 * out.step * out.slope0 + rounding, out
    assert abs(out.slope) <= search.c2 * abs(out.slope0) * (1 + 1e-12), out


def mt1(a):
    return -a / (a * a + 2.0)


def mt2(a):
    b = 0.004
    return (a + b) ** 5 - 2.0 * (a + b) ** 4


def mt3(a):
    b, l = 0.01, 39.0
    middle = (a - 1.0) ** 2 / (2.0 * b) + b / 2.0
    phi0 = jnp.where(a <= 1.0 - b, 1.0 - a, jnp.where(a >= 1.0 + b, a - 1.0, middle))
    return phi0 + 2.0 * (1.0 - b) / (l * jnp.pi) * jnp.sin(l * jnp.pi / 2.0 * a)


def _yanai(a, b1, b2):
    gamma = lambda b: (1.0 + b * b) ** 0.5 - b
    return gamma(b1) * jnp.sqrt((1.0 - a) ** 2 + b2 * b2) + gamma(b2) * jnp.sqrt(a * a + b1 * b1)


def mt4(a):
    return _yanai(a, 0.001, 0.001)


def mt5(a):
    return _yanai(a, 0.01, 0.001)


def mt6(a):
    return _yanai(a, 0.001, 0.01)


ABOVE = 1 + 1e-9  # the tables use mu = eta; our c2 must exceed c1
TABLES = {
    "table 1": (mt1, 1e-3, 1e-1),
    "table 2": (mt2, 1e-1, 1e-1 * ABOVE),
    "table 3": (mt3, 1e-1, 1e-1 * ABOVE),
    "table 4": (mt4, 1e-3, 1e-3 * ABOVE),
    "table 5": (mt5, 1e-3, 1e-3 * ABOVE),
    "table 6": (mt6, 1e-3, 1e-3 * ABOVE),
}


class TestMoreThuente:
    @pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
    @pytest.mark.parametrize("table", TABLES)
    def test_the_tolerances_of_the_tables_are_met_from_every_first_step(self, table, first):
        phi, c1, c2 = TABLES[table]
        search = so.line_search(c1=c1, c2=c2, max_trials=60)
        out = run(phi, search, first)
        assert_strong_wolfe(out, search)
        assert out.evaluations <= 30

    @pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
    @pytest.mark.parametrize("phi", [mt1, mt2, mt3, mt4, mt5, mt6])
    def test_the_default_tolerances_are_met_from_every_first_step(self, phi, first):
        search = so.line_search()
        out = run(phi, search, first)
        assert_strong_wolfe(out, search)
        assert out.evaluations <= 20


def wavy(a, curvature, amplitude, frequency, phase):
    """Return a bounded-below function with slope -1 at 0, and several minimizers for a large amplitude."""
    wave = amplitude * (jnp.sin(frequency * a + phase) / frequency - jnp.cos(phase) * a)
    return -a + 0.5 * curvature * a * a + wave


class TestAcceptedPoints:
    drawn = settings(max_examples=150, deadline=None, derandomize=True)
    shape = st.tuples(st.floats(1e-3, 1e3), st.floats(0.0, 3.0), st.floats(0.1, 100.0), st.floats(0.0, 6.2))

    @pytest.mark.parametrize("c2", [0.9, 0.1, 1e-3])
    @drawn
    @given(shape, st.floats(-4, 4))
    def test_satisfy_the_strong_wolfe_conditions(self, c2, parameters, exponent):
        search = so.line_search(c2=c2, max_trials=100)
        assert_strong_wolfe(run(wavy, search, 10.0**exponent, parameters=parameters), search)

    def test_are_the_first_trial_if_it_is_good_enough(self):
        out = run(lambda a: (a - 1.0) ** 2, so.line_search(), 0.9)
        assert (out.evaluations, out.step) == (1, 0.9)

    @pytest.mark.parametrize("first", [0.5e-3, 3.0, 1e3])
    @pytest.mark.parametrize(("growth", "trials"), [(10.0, 5), (4.0, 8)])
    def test_are_the_minimizer_of_a_quadratic_after_one_interpolation_if_the_search_is_exact(
        self, growth, trials, first
    ):
        out = run(lambda a: 0.5 * a * a - a, so.line_search(c1=1e-9, c2=1e-8, growth=growth), first)
        assert out.step == pytest.approx(1.0, abs=1e-7)
        assert out.evaluations <= (2 if first > 1 else trials)

    @pytest.mark.parametrize("power", [-40, 40])
    def test_do_not_depend_on_the_unit_of_the_loss(self, power):
        scaled = lambda a, factor: factor * mt3(a)
        one = run(scaled, so.line_search(c2=0.1), 10.0, parameters=(1.0,))
        other = run(scaled, so.line_search(c2=0.1), 10.0, parameters=(2.0**power,))
        assert (one.step, one.evaluations) == (other.step, other.evaluations)

    @pytest.mark.parametrize("power", [-20, 20])
    def test_do_not_depend_on_the_unit_of_the_parameters(self, power):
        stretched = lambda a, factor: mt3(factor * a)
        one = run(stretched, so.line_search(c2=0.1), 10.0, parameters=(1.0,))
        other = run(stretched, so.line_search(c2=0.1), 10.0 * 2.0**-power, parameters=(2.0**power,))
        assert one.step == other.step * 2.0**power
        assert one.evaluations == other.evaluations


class TestWalls:
    """A non-finite value or slope is a wall; the minimizer of -log(1 - a) - 5a is 0.8, its domain ends at 1."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("first", [0.999, 1.5, 1e2, 1e6])
    def test_a_search_that_starts_beyond_the_domain_comes_back(self, dtype, first):
        out = run(lambda a: -jnp.log(1.0 - a) - 5.0 * a, so.line_search(c2=0.1), first, dtype)
        assert out.accepted
        assert abs(out.slope) <= 0.1 * 4.0
        assert out.step < 1.0

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_finite_value_with_a_nan_slope_is_a_wall(self, dtype):
        """The value is finite everywhere; the derivative is 0 * inf beyond a = 1."""
        phi = lambda a: (a - 0.7) ** 2 + 0.0 * jnp.sqrt(jnp.maximum(1.0 - a, 0.0))
        out = run(phi, so.line_search(c2=0.1), 1.2, dtype)
        assert out.accepted
        assert out.step < 1.0
        assert out.step == pytest.approx(0.7, abs=0.1)

    @pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
    def test_no_infinite_value_is_ever_accepted(self, value):
        phi = lambda a, wall: jnp.where(a > 1.0, wall, -a)
        out = run(phi, so.line_search(), 50.0, parameters=(value,))
        assert out.accepted
        assert out.step <= 1.0

    def test_a_domain_that_ends_at_the_origin_is_a_failure(self):
        out = run(lambda a: jnp.where(a > 0, jnp.nan, -a), so.line_search(max_trials=30), 1.0, slope0=-1.0)
        assert out.failed
        assert not out.accepted
        assert out.evaluations <= 31


class TestNoise:
    """phi = constant + (a - 1)^2 / 1000 in float32: every difference is below the spacing at the constant."""

    @pytest.mark.parametrize("first", [0.3, 1.0, 1.7, 4.0, 30.0])
    def test_slopes_decide_where_values_cannot(self, first):
        phi = lambda a: 1e4 + 1e-4 * (a - 1.0) ** 2
        out = run(phi, so.line_search(), first, "float32")
        assert out.accepted
        assert -0.9 <= out.slope / abs(out.slope0) <= 0.9

    @pytest.mark.parametrize("first", [0.03, 1.7, 30.0])
    def test_a_nearly_exact_search_finds_the_zero_of_the_slope(self, first):
        phi = lambda a: 1e4 + 1e-4 * (a - 1.0) ** 2
        out = run(phi, so.line_search(c2=0.1), first, "float32")
        assert out.accepted
        assert out.step == pytest.approx(1.0, abs=0.1)

    def test_an_increase_beyond_the_noise_is_not_accepted(self):
        """The slope at 2 is small, but the value there has risen by a hundred times the noise."""
        phi = lambda a: jnp.where(a > 1.5, 1e4 + 2.0, 1e4 - 1e-3 * a + 0.5e-3 * a * a)
        out = run(phi, so.line_search(), 2.0, "float32")
        assert out.accepted
        assert out.step <= 1.5


class TestTheEndOfTheBudget:
    @pytest.mark.parametrize("trials", [1, 2, 5])
    def test_of_a_descent_without_end_is_the_longest_trial(self, trials):
        out = run(lambda a: -a, so.line_search(max_trials=trials), 1.0)
        assert out.accepted
        assert out.evaluations <= trials + 1
        assert out.step == out.furthest >= 2.0 ** (trials - 1)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("trials", [60, 200, 400])
    def test_of_a_descent_without_end_never_overflows(self, dtype, trials):
        out = run(lambda a: -a, so.line_search(max_trials=trials), 1.0, dtype)
        assert out.accepted
        assert np.isfinite(out.furthest)
        assert np.isfinite(out.step)

    @pytest.mark.parametrize("trials", [2, 3, 4])
    def test_falls_back_to_the_best_trial(self, trials):
        """The minimizer hides behind a kink, so that no trial has a small slope."""
        phi = lambda a: jnp.where(a < np.pi, -a, 100.0 * (a - np.pi) - np.pi)
        out = run(phi, so.line_search(c2=0.5, max_trials=trials), 1.0)
        assert out.accepted
        assert out.phi < out.phi0
        assert out.evaluations <= trials + 1

    def test_is_a_failure_if_no_trial_was_better_than_the_origin(self):
        out = run(lambda a: a, so.line_search(max_trials=8), 1.0, slope0=-1.0)
        assert out.failed
        assert not out.accepted
        assert out.evaluations <= 9

    def test_of_an_ascent_direction_is_a_failure_however_large_it_is(self):
        """Trials shrink until they underflow; the origin itself is no acceptable step."""
        out = run(lambda a: 1.0 + a, so.line_search(max_trials=10_000), 1.0, slope0=-1.0)
        assert out.failed
        assert not out.accepted
        assert out.evaluations < LIMIT


class TestFixedStep:
    def test_accepts_whatever_is_finite(self):
        out = run(lambda a: a, FixedStep(0.5), 0.5)
        assert out.accepted
        assert out.evaluations == 1

    def test_halves_the_step_back_into_the_domain(self):
        out = run(lambda a: jnp.where(a > 1.0, jnp.nan, -a), FixedStep(6.0), 6.0)
        assert out.accepted
        assert out.step == 0.75

    def test_gives_up_where_nothing_is_finite(self):
        out = run(lambda a: jnp.where(a > 0.0, jnp.nan, -a), FixedStep(1.0, max_trials=10), 1.0)
        assert out.failed
        assert out.evaluations == 10

    def test_reads_a_schedule(self):
        assert float(FixedStep(lambda k: 1.0 / (1 + k)).length(jnp.int32(3))) == 0.25


class TestFirstStep:
    """Along -g, with the length `unit` of the parameters, the loss f and ||g||."""

    @staticmethod
    def move(unit, loss, g_norm, last=0.0):
        unit, loss, g_norm, last = (jnp.float32(a) for a in (unit, loss, g_norm, last))
        return float(first_step(unit, loss, g_norm, -g_norm * g_norm, last) * g_norm)

    def test_is_as_long_as_the_last_move_once_there_was_one(self):
        assert self.move(1.0, 3.0, 5.0, last=1e-5) == pytest.approx(1e-5)

    @pytest.mark.parametrize("power", [-20, 20])
    def test_moves_as_far_whatever_the_unit_of_the_loss(self, power):
        one, other = self.move(2.0, 3.0, 5.0), self.move(2.0, 3.0 * 2.0**power, 5.0 * 2.0**power)
        assert other == pytest.approx(one, rel=1e-6)

    def test_brings_a_quadratic_with_minimum_zero_to_it(self):
        """f = x^2/2 at x = 0.8: alpha = 1 is the exact step."""
        assert self.move(1.0, 0.32, 0.8) == pytest.approx(0.8)

    @pytest.mark.parametrize("loss", [0.0, 1e30, np.inf, np.nan])
    def test_moves_between_a_thousandth_and_the_whole_size_of_the_parameters(self, loss):
        assert 0.999 * 7e-3 <= self.move(7.0, loss, 1e-3) <= 1.001 * 7.0

    def test_is_finite_at_a_zero_gradient(self):
        one, zero = jnp.float32(1.0), jnp.float32(0.0)
        for last in (zero, one):
            assert float(first_step(one, one, zero, zero, last)) == 1.0


class TestTheCurvatureScale:
    scale = staticmethod(lambda *args: float(line_search.curvature_scale(*(jnp.float32(a) for a in args))))

    def test_is_the_square_of_the_unit_over_the_size_of_the_loss(self):
        assert self.scale(4.0, 8.0, 7.0) == 2.0
        assert self.scale(4.0, -8.0, -9.0) == 2.0

    @pytest.mark.parametrize("power", [-20, 20])
    def test_scales_with_the_loss_as_an_inverse_curvature_does(self, power):
        assert self.scale(4.0, 8.0 * 2.0**power, 7.0 * 2.0**power) == 2.0 * 2.0**-power

    def test_takes_the_change_where_the_loss_happens_to_be_zero(self):
        assert self.scale(4.0, 0.0, -8.0) == 2.0

    @pytest.mark.parametrize("losses", [(0.0, 0.0), (np.inf, 1.0), (np.nan, 1.0), (1.0, np.nan)])
    def test_is_no_limit_where_the_loss_says_nothing(self, losses):
        assert self.scale(4.0, *losses) == 0.0


def test_equal_options_compare_equal_and_hash_alike():
    assert so.line_search(c2=0.5) == so.line_search(c2=0.5)
    assert hash(so.line_search(c2=0.5)) == hash(so.line_search(c2=0.5))
    assert so.line_search(c2=0.5) != so.line_search(c2=0.6)


@pytest.mark.parametrize("first", [1e-5, 1e5, 1e10])
def test_a_first_trial_decades_too_long_is_brought_back_within_twenty_evaluations(first):
    """Along a quartic every cubic keeps a third of the way: fifteen decades would take more trials than there are."""
    out = run(lambda a: (1e10 * a - 1.0) ** 4, so.line_search(), first)
    assert out.accepted, out
    assert out.phi < out.phi0
