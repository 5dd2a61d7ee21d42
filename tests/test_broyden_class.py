"""The Broyden class: the textbook's formulas in plain loops, theorems, guards, and runs whose data change."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision, quadratic, rosenbrock, rosenbrock_start, spd

import secondorder as so
from secondorder.linalg import inverse_hessian
from secondorder.linalg.inverse_hessian import Pair
from secondorder.optimizers.broyden_class import _Member

EXACT = so.line_search(c1=1e-8, c2=1e-6, max_trials=60)
MEMBERS = {
    "bfgs": (0.0, False),
    "dfp": (1.0, False),
    "between": (0.4, False),
    "broyden": (None, False),
    "ssbfgs": (0.0, True),
    "ssdfp": (1.0, True),
    "ssbroyden": (None, True),
}
members = pytest.mark.parametrize("name", MEMBERS)


def textbook(H, s, y, theta, self_scaling):
    """Return H+ by the formulas of Urbán, Stefanou & Pons (2025), with B = H⁻¹ by a solve."""
    n = len(s)
    B = np.linalg.inv(H)
    sy, yHy, sBs = s @ y, y @ H @ y, s @ B @ s
    h, b = yHy / sy, sBs / sy
    a = b * h - 1.0
    if theta is None:
        c = np.sqrt(a / (a + 1.0))
        rho_minus = min(1.0, h * (1.0 - c))
        theta = max((rho_minus - 1.0) / a, min(1.0 / rho_minus, (1.0 - b) / b))
    phi = (1.0 - theta) / (1.0 + a * theta)
    tau = 1.0
    if self_scaling:
        rho, sigma = min(1.0, 1.0 / b), 1.0 + theta * a
        spread = abs(sigma) ** (1.0 / (1.0 - n))
        tau = min(rho * spread, sigma) if theta <= 0 else rho * min(spread, 1.0 / theta)
    v = s / sy - H @ y / yHy
    inner = H - np.outer(H @ y, H @ y) / yHy + phi * yHy * np.outer(v, v)
    return inner / tau + np.outer(s, s) / sy


@functools.cache
def kernel(name):
    """Return the update of a member, compiled, without scaling the first H."""
    member = _Member(*MEMBERS[name])
    return jax.jit(
        lambda inverse, p, pair, g: inverse_hessian.update(
            inverse, p, pair, g, jnp.array(True), jnp.array(False), False, member=member
        )
    )


def measured(s, y, g, weighted):
    """Return a pair with its products."""
    return Pair(*map(jnp.asarray, (s, y, s @ s, s @ y, y @ y, s @ g, weighted)))


def steps(n, count, seed):
    """Yield pairs (s, y) of positive curvature, as far from H⁻¹ as random ones are, and gradients."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        G = rng.normal(size=(n, n))
        A = G @ G.T / n + 0.3 * np.eye(n)
        s = rng.normal(size=n)
        yield s, A @ s * rng.choice([0.5, 2.0]), rng.normal(size=n)


@members
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_updates_are_those_of_the_textbook(name, n):
    """Over twelve pairs: the matrix, the direction, the secant equation, symmetry and positive definiteness."""
    if n == 1 and name in ("broyden", "ssbroyden", "between", "dfp", "ssdfp", "ssbfgs"):
        # a = 0: all members are one, H+ = s / y; the textbook divides by a.
        expected = lambda H, s, y: s[:, None] / y[:, None]
    else:
        expected = lambda H, s, y: textbook(H, s, y, *MEMBERS[name])
    with precision("float64"):
        inverse, H, g_old = inverse_hessian.identity(jnp.zeros(n)), np.eye(n), np.zeros(n)
        for s, y, g in steps(n, 12, seed=n):
            # The kernel is told H g and s'Bs only: p = -H g_old at some old gradient, and g_new = g_old + y.
            g_old = g - y
            pair = measured(s, y, g, s @ np.linalg.solve(H, s))
            inverse, p = kernel(name)(inverse, jnp.asarray(-H @ g_old), pair, jnp.asarray(g))
            scaled = np.abs(H).max() * float(inverse.keep)
            H = expected(H, s, y)
            ours, size = np.asarray(inverse_hessian.current(inverse)), np.abs(H).max()
            lost = max(1.0, scaled / size)  # H / tau cancels but for this share, and so does the rounding that it had
            np.testing.assert_allclose(ours, H, rtol=1e-7, atol=1e-9 * lost * size)
            np.testing.assert_allclose(p, -H @ g, rtol=1e-6, atol=1e-8 * lost * size * np.linalg.norm(g))
            np.testing.assert_allclose(
                inverse_hessian.apply(inverse, jnp.asarray(g)), H @ g, rtol=1e-6, atol=1e-8 * lost * size
            )
            np.testing.assert_allclose(ours @ y, s, rtol=1e-6, atol=1e-8 * lost * np.abs(s).max())
            np.testing.assert_allclose(ours, ours.T, rtol=0, atol=1e-10 * lost * size)
            assert np.linalg.eigvalsh(ours)[0] > 0
            H = (ours + ours.T) / 2  # rounding of one update, not of twelve
        assert int(inverse.pairs) == 12


def test_the_rule_visits_both_sides_of_bfgs_and_every_branch_of_tau():
    """Otherwise the comparison with the textbook would not be one of the whole formula."""
    rule, seen = _Member(None, True), set()
    for h, b in itertools.product([0.1, 0.5, 0.9, 1.5, 4.0, 50.0], repeat=2):
        if b * h <= 1.0:
            continue
        phi, tau = (float(x) for x in rule(jnp.float32(h), jnp.float32(b), jnp.array(False), 7))
        a = b * h - 1.0
        theta = (1.0 - phi) / (1.0 + a * phi)
        seen.add((theta > 1e-6, b > 1, tau < 0.99 * min(1.0, 1.0 / b)))
    assert {entry[0] for entry in seen} == {True, False}
    assert {entry[1] for entry in seen} == {True, False}
    assert {entry[2] for entry in seen} == {True, False}


@pytest.mark.parametrize("theta", [None, 0.0, 1.0])
@pytest.mark.parametrize(("h", "b"), [(2.0, 0.5), (1.0, 1.0), (1e-30, 1e30), (1e25, 1e10), (1e-20, 1e-10), (3.0, 1.0)])
def test_weights_are_finite_and_positive_at_the_edges_of_the_formula(theta, h, b):
    """a = 0 (also by rounding), b = 1, and ratios that leave float32 once squared."""
    phi, tau = _Member(theta, True)(jnp.float32(h), jnp.float32(b), jnp.array(False), 100)
    assert np.isfinite(phi)
    assert np.isfinite(tau)
    assert float(tau) > 0


def test_a_pair_whose_weights_are_not_finite_is_left_out():
    inverse = inverse_hessian.identity(jnp.zeros(3))
    s, y = np.array([1.0, 0.0, 0.0]), np.array([2.0, 0.1, 0.0])
    new, p = kernel("ssbroyden")(inverse, jnp.zeros(3), measured(s, y, y, np.nan), jnp.asarray(y))
    assert int(new.pairs) == 0
    np.testing.assert_array_equal(inverse_hessian.current(new), np.eye(3))
    np.testing.assert_allclose(p, [-2.0, -0.1, 0.0], rtol=1e-6)


def test_a_pair_whose_update_would_overflow_is_left_out():
    """(1 + h) / s'y is beyond float32, although s'y and h are within it."""
    inverse = inverse_hessian.identity(jnp.zeros(3), whole_class=False)
    s, y = np.float32([1e-21, 0.0, 0.0]), np.float32([1e-16, 1e-14, 0.0])
    pair = Pair(*map(jnp.float32, (s, y, 1e-42, 1e-37, 1e-28, 1e-37, np.nan)))
    learn, no = jnp.array(True), jnp.array(False)
    new, direction = jax.jit(
        lambda: inverse_hessian.update(inverse, jnp.zeros(3), pair, jnp.asarray(y), learn, no, False)
    )()
    assert int(new.pairs) == 0
    np.testing.assert_array_equal(inverse_hessian.current(new), np.eye(3))
    assert np.all(np.isfinite(direction))


def test_the_weight_of_a_member_may_be_traced():
    def end(theta):
        optimizer = so.broyden_class(theta, self_scaling=False)
        return so.minimize(rosenbrock, rosenbrock_start(4), optimizer, max_steps=8, gtol=0.0).value

    thetas = jnp.array([0.0, 0.5])
    np.testing.assert_allclose(jax.vmap(end)(thetas), [end(0.0), end(0.5)], rtol=1e-4)


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=pytest.mark.slow)])
@members
def test_with_an_exact_search_a_quadratic_ends_in_n_steps(name, scaled):
    """Dixon (1972), Nocedal & Wright (2006), Theorem 6.4: all members find the same points, if none is scaled."""
    n = 6
    theta, self_scaling = MEMBERS[name]
    with precision("float64"):
        A, b = spd(n, n), np.random.default_rng(n).normal(size=n)
        optimizer = so.broyden_class(theta, self_scaling, scale_init_precond=scaled, linesearch=EXACT)
        result = so.minimize(quadratic, jnp.ones(n), optimizer, args=(jnp.asarray(A), jnp.asarray(b)), gtol=1e-8)
        assert result.success
        assert int(result.steps) == n


def test_unscaled_members_take_the_same_exact_steps():
    with precision("float64"):
        points = []
        for theta in (0.0, 0.4, 1.0):
            optimizer = so.broyden_class(theta, False, linesearch=EXACT)
            args = (rosenbrock_start(4), optimizer)
            points.append([so.minimize(rosenbrock, *args, max_steps=k, gtol=1e-9).params for k in (1, 4, 8)])
        for other in points[1:]:
            np.testing.assert_allclose(other, points[0], atol=1e-4)


@pytest.mark.parametrize(
    ("build", "scale"),
    [
        (so.bfgs, 1.0),
        (lambda **given: so.broyden_class(None, False, **given), 100.0),
        (lambda **given: so.broyden_class(0.5, False, **given), 1.0),
        (lambda **given: so.broyden_class(0.0, True, **given), 0.0),
    ],
    ids=["bfgs", "switching", "convex", "self-scaled"],
)
def test_the_first_scaling_has_a_lower_limit(build, scale):
    """H after the first pair is gamma I on what is orthogonal to it, gamma = max(s'y / y'y, c u^2 / |f|)."""
    with precision("float64"):
        curvatures = jnp.array([300.0, 1.0, 1e-2, 1e-4])
        loss, x = lambda x: 0.5 * jnp.sum(curvatures * x**2), jnp.ones(4)
        value, grad = jax.value_and_grad(loss)(x)
        for given, c in (({}, scale), ({"initial_scale": 7.0}, 7.0), ({"initial_scale": 0.0}, 0.0)):
            optimizer = build(**given)
            state, point = optimizer.init(x), x
            while int(state.inverse.pairs) == 0:
                f, g = jax.value_and_grad(loss)(point)
                move, state = optimizer.update(g, state, point, value=f)
                point = point + move
            s, y = state.params - x, state.grad - grad
            expected = max(s @ y / (y @ y), c * 4.0 / max(abs(value), abs(value - state.loss)))
            across = np.linalg.svd(np.stack([s, y]))[2][2:]
            H = inverse_hessian.current(state.inverse)
            np.testing.assert_allclose(across @ H @ across.T, expected * np.eye(2), rtol=1e-8, atol=1e-8 * expected)


@pytest.mark.parametrize("build", [so.bfgs, so.broyden_class])
def test_an_initial_scale_that_cannot_count_is_named(build):
    for given in ({"linesearch": None}, {"learning_rate": 0.1}, {"scale_init_precond": False}):
        with pytest.raises(ValueError, match=r"initial_scale limits .* got 2\.0 without one; leave it out"):
            build(initial_scale=2.0, **given)
    with pytest.raises(ValueError, match="initial_scale must be in"):
        build(initial_scale=-1.0)
    with pytest.raises(TypeError, match="initial_scale must be a real number"):
        build(initial_scale="large")


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (so.ssbroyden, so.broyden_class()),
        pytest.param(so.ssbfgs, so.broyden_class(0.0), marks=pytest.mark.slow),
        pytest.param(so.dfp, so.broyden_class(1.0, False), marks=pytest.mark.slow),
        (so.bfgs, so.broyden_class(0.0, False, linesearch=so.line_search())),
    ],
    ids=["ssbroyden", "ssbfgs", "dfp", "bfgs"],
)
def test_the_names_are_members(special, general):
    with precision("float64"):
        ends = [so.minimize(rosenbrock, rosenbrock_start(4), o, max_steps=15, gtol=0.0) for o in (special(), general)]
        np.testing.assert_allclose(ends[0].params, ends[1].params, rtol=1e-6)
        assert int(ends[0].evaluations) == int(ends[1].evaluations)


def shifted(x, shift):
    """A Rosenbrock valley moved by `shift`: another loss, with nearly the same curvature."""
    return rosenbrock(x - shift)


@pytest.mark.parametrize("name", [pytest.param("bfgs", marks=pytest.mark.slow), "ssbroyden"])
class TestNewDataInARun:
    def test_keep_the_inverse_and_make_no_pair(self, name):
        """After new data, the first evaluation learns no pair: it takes a new direction from the H that was there."""
        with precision("float64"):
            optimizer = getattr(so, name)()
            first = so.minimize(shifted, rosenbrock_start(6), optimizer, args=(jnp.zeros(6),), max_steps=12)
            before = np.asarray(inverse_hessian.current(first.state.inverse))
            assert np.abs(before - before[0, 0] * np.eye(6)).max() > 1e-3
            shift = jnp.full(6, 1e-2)
            options = {"args": (shift,), "state": first.state}
            # Not even if the parameters moved in between, so that s and y are both non-zero.
            for x in (first.params, first.params + 1e-3):
                second = so.minimize(shifted, x, optimizer, max_steps=0, **options)
                after = np.asarray(inverse_hessian.current(second.state.inverse))
                np.testing.assert_allclose(after, before, atol=1e-14)  # a pair would change it by far more
                g = jax.grad(shifted)(x, shift)
                np.testing.assert_allclose(second.grad, g, rtol=1e-12)
                np.testing.assert_allclose(second.state.direction, -before @ g, rtol=1e-8)

    def test_are_fitted_in_fewer_evaluations_than_from_scratch(self, name):
        with precision("float64"):
            optimizer, x0 = getattr(so, name)(), rosenbrock_start(20)
            first = so.minimize(shifted, x0, optimizer, args=(jnp.zeros(20),), gtol=1e-8)
            shift = 1e-2 * jnp.sin(jnp.arange(20.0))
            warm = so.minimize(shifted, first.params, optimizer, args=(shift,), state=first.state, gtol=1e-8)
            cold = so.minimize(shifted, first.params, optimizer, args=(shift,), gtol=1e-8)
            assert warm.success
            assert cold.success
            assert int(warm.evaluations) < int(cold.evaluations) / 2
