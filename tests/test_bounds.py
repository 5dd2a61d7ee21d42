"""Bounds in `minimize`: `lbfgsb` and `projected_newton` in the box, against plain loops, dense algebra and SciPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from cases import GTOL, precision, rosenbrock, rosenbrock_start, spd

import secondorder as so
from secondorder import Status
from secondorder.linalg import box
from secondorder.optimizers import lbfgsb as module

BOXED = {"lbfgsb": so.lbfgsb(), "projected_newton": so.projected_newton()}
N, LANES = 6, 40
ONE = ["lbfgsb", pytest.param("projected_newton", marks=pytest.mark.slow)]  # where both walk through the same lines


def dense_model(memory, order):
    """Return B of the pairs in this order, oldest first, by the BFGS formula (N&W 6.19) from I/gamma, shape (n, n)."""
    B = np.eye(memory.S.shape[1]) / float(memory.gamma)
    for k in order:
        s, y = np.asarray(memory.S[k]), np.asarray(memory.Y[k])
        B = B - np.outer(B @ s, B @ s) / (s @ B @ s) + np.outer(y, y) / (y @ s)
    return B


def memory_of(seed, pairs, m=4):
    """Return the memory after some pairs of a convex quadratic, and the slots that are used, oldest first."""
    rng, A = np.random.default_rng(seed), spd(seed, N, 0.5, 8.0)
    zero, one = jnp.zeros((m, N)), jnp.ones(())
    memory = module.Memory(zero, zero, jnp.zeros((m, m)), jnp.zeros((m, m)), one, jnp.int32(0))
    for _ in range(pairs):
        s = rng.normal(size=N)
        memory = module._learn(memory, jnp.asarray(s), jnp.asarray(A @ s), jnp.array(True), jnp.array(0.0))
    return memory, [k % m for k in range(max(0, pairs - m), pairs)]


def first_minimizer_on_the_path(B, g, x, low, high):
    """Return t of the generalized Cauchy point, one segment after another (N&W Algorithm in section 16.7)."""
    t = np.where(
        g > 0, (x - low) / np.where(g == 0, 1, g), np.where(g < 0, (x - high) / np.where(g == 0, 1, g), np.inf)
    )
    at, z = 0.0, np.zeros_like(x)
    for end in [*sorted(set(t[t > 0])), np.inf]:
        d = np.where(t > at, -g, 0.0)
        if not np.any(d):
            return at
        slope, bend = g @ d + d @ B @ z, d @ B @ d
        if slope >= 0:
            return at
        if at - slope / bend < end:
            return at - slope / bend
        z, at = z + (end - at) * d, end
    return at


class TestModelOfLbfgsb:
    @pytest.mark.parametrize("pairs", [1, 3, 4, 7])
    def test_compact_form_is_the_dense_bfgs_matrix(self, pairs):
        with precision("float64"):
            memory, order = memory_of(pairs, pairs)
            A, K = (np.asarray(part) for part in module._compact(memory))
        B = (np.eye(N) - A.T @ np.linalg.solve(K, A)) / float(memory.gamma)
        np.testing.assert_allclose(B, dense_model(memory, order), rtol=1e-10, atol=1e-10)

    def test_a_pair_of_no_curvature_does_not_enter(self):
        with precision("float64"):
            memory, _ = memory_of(0, 2)
            s = jnp.arange(1.0, N + 1)
            after = module._learn(memory, s, -s, jnp.array(True), jnp.array(0.0))
        for old, new in zip(jax.tree.leaves(memory), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_cauchy_point_is_the_first_minimizer_on_the_projected_path(self):
        length = jax.jit(lambda A, M, x, h, limits: module._path_length(A, M, x, h, limits))
        hit = 0
        with precision("float64"):
            for seed in range(60):
                rng = np.random.default_rng(seed)
                memory, order = memory_of(seed, 1 + seed % 6)
                low, high = -rng.exponential(0.3, N), rng.exponential(0.3, N)
                low[rng.random(N) < 0.2], high[rng.random(N) < 0.2] = -np.inf, np.inf
                x = np.where(rng.random(N) < 0.2, np.maximum(low, -1.0), 0.0)
                g = rng.normal(size=N) * (rng.random(N) < 0.9)
                A, K = module._compact(memory)
                gamma = float(memory.gamma)
                t = gamma * float(length(A, jnp.linalg.inv(K), x, gamma * g, (low, high)))
                expected = first_minimizer_on_the_path(dense_model(memory, order), g, x, low, high)
                p, q = (np.clip(x - step * g, low, high) for step in (t, expected))
                np.testing.assert_allclose(p, q, rtol=1e-9, atol=1e-11)
                hit += int(np.sum((p == low) | (p == high)))
        assert hit > 50  # bounds are met on the way

    def test_without_bounds_the_model_is_minimized(self):
        with precision("float64"):
            memory, order = memory_of(3, 5)
            x, g = jnp.arange(N) * 0.1, jnp.cos(jnp.arange(N) * 1.0)
            nowhere = jnp.full(N, jnp.inf)
            found = module._minimizer(memory, x, g, (-nowhere, nowhere))
        np.testing.assert_allclose(found - x, -np.linalg.solve(dense_model(memory, order), g), rtol=1e-9)


def quartic(x, A, b):
    """Return a strictly convex loss; quadratic where the last factor is zero."""
    return 0.5 * jnp.vdot(x, A @ x) - jnp.vdot(b, x) + 0.05 * jnp.sum(x**4)


def lanes():
    """Return the data of random convex problems, with bounds on most parameters, some of them fixed."""
    rng = np.random.default_rng(0)
    A = np.stack([spd(seed, N, 1.0, 10.0 ** (seed % 4)) for seed in range(LANES)])
    b = rng.normal(size=(LANES, N)) * 10
    low, high = -rng.exponential(1.0, (LANES, N)), rng.exponential(1.0, (LANES, N))
    low[rng.random((LANES, N)) < 0.2] = -np.inf
    high[rng.random((LANES, N)) < 0.2] = np.inf
    fixed = rng.random((LANES, N)) < 0.05
    low[fixed], high[fixed] = 0.25, 0.25
    return A, b, low, high


@functools.cache
def solved(name, dtype):
    """Return the results of all lanes, in one program."""
    A, b, low, high = (a.astype(dtype) for a in lanes())
    with precision(dtype):
        x0 = jnp.clip(jnp.zeros((LANES, N)), low, high)
        run = lambda x, A, b, low, high: so.minimize(
            quartic, x, BOXED[name], args=(A, b), bounds=(low, high), gtol=10 * GTOL[dtype]
        )
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(x0, A, b, low, high))


class TestRandomConvexProblems:
    @pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("name", BOXED)
    def test_kkt_conditions_hold_at_the_result(self, name, dtype):
        A, b, low, high = lanes()
        r = solved(name, dtype)
        x = r.params.astype(float)
        assert np.all(r.status == Status.CONVERGED)
        assert np.all((r.params >= low.astype(dtype)) & (r.params <= high.astype(dtype)))
        g = np.einsum("kij,kj->ki", A, x) - b + 0.2 * x**3
        tolerance = 10 * GTOL[dtype] + 3e3 * np.finfo(dtype).eps * (np.abs(A).sum(axis=2) * np.abs(x) + np.abs(b))
        free = r.active == 0
        assert np.all(np.abs(g[free]) <= tolerance[free])
        fixed = low == high
        assert np.all((g >= -tolerance) | fixed | (r.active != -1))  # multipliers have the right sign
        assert np.all((g <= tolerance) | fixed | (r.active != 1))
        assert np.all((r.params == low.astype(dtype))[r.active == -1])
        assert np.all((r.params == high.astype(dtype))[r.active == 1])
        assert 20 < np.sum(r.active == -1) < 200
        assert 20 < np.sum(r.active == 1) < 200

    @pytest.mark.parametrize("name", BOXED)
    def test_minima_are_those_of_scipy(self, name):
        A, b, low, high = lanes()
        r = solved(name, "float64")
        for k in range(0, LANES, 4):
            fun = lambda x, k=k: 0.5 * x @ A[k] @ x - b[k] @ x + 0.05 * np.sum(x**4)
            jac = lambda x, k=k: A[k] @ x - b[k] + 0.2 * x**3
            limits = scipy.optimize.Bounds(low[k], high[k])
            s = scipy.optimize.minimize(
                fun, np.zeros(N), jac=jac, method="L-BFGS-B", bounds=limits, options={"ftol": 1e-15, "gtol": 1e-8}
            )
            np.testing.assert_allclose(r.value[k], s.fun, rtol=1e-7, atol=1e-7)


def fence(x, low, high):
    """Return Rosenbrock's function inside the box, NaN outside."""
    return jnp.where(jnp.all((x >= low) & (x <= high)), rosenbrock(x), jnp.nan)


@pytest.mark.parametrize("name", BOXED)
def test_no_trial_leaves_the_box(name):
    """Each trial of an ask-and-tell loop is looked at, in float32, where sums round."""
    low, high = jnp.full(4, -0.7), jnp.array([0.3, 0.1, 0.9, jnp.inf])
    optimizer, x = BOXED[name], jnp.clip(rosenbrock_start(4), low, high)
    hvp, evaluate = so.curvature.hvp(rosenbrock), jax.jit(jax.value_and_grad(rosenbrock))
    state = optimizer.init(x)
    step = jax.jit(lambda g, s, x, v: optimizer.update(g, s, x, value=v, bounds=(low, high), hvp_fn=hvp))
    for _ in range(30):
        value, grad = evaluate(x)
        move, state = step(grad, state, x, value)
        x = jnp.clip(x + move, low, high)
        assert bool(jnp.all((so.accepted(state).params >= low) & (so.accepted(state).params <= high)))
        np.testing.assert_allclose(x, jnp.clip(x, low, high))
    r = so.minimize(fence, jnp.clip(rosenbrock_start(4), low, high), optimizer, args=(low, high), bounds=(low, high))
    assert r.success
    assert int(jnp.sum(r.active != 0)) >= 1


@pytest.mark.parametrize("name", ONE)
def test_a_bound_that_holds_is_reported_and_counted(name):
    r = so.minimize(rosenbrock, jnp.zeros(2), BOXED[name], bounds=(-jnp.inf, 0.5))
    np.testing.assert_allclose(r.params, [0.5, 0.25], atol=1e-4)
    assert r.active.tolist() == [1, 0]
    assert r.message.endswith("; 1 active bound")
    assert float(jnp.abs(r.grad[0])) > 0.5  # the gradient itself does not vanish
    assert float(r.grad_norm) <= 1.2e-4


@pytest.mark.parametrize("name", ONE)
def test_bounds_that_hold_nothing_change_little(name):
    with precision("float64"):
        x0 = rosenbrock_start(2)
        free = so.minimize(rosenbrock, x0, so.newton() if "newton" in name else so.lbfgs())
        wide = so.minimize(rosenbrock, x0, BOXED[name], bounds=(-1e6, 1e6))
        assert wide.success
        np.testing.assert_allclose(wide.params, [1.0, 1.0], atol=1e-4)
        assert int(wide.evaluations) <= 1.3 * int(free.evaluations)
        assert not jnp.any(wide.active)


@pytest.mark.slow
def test_newton_without_active_bounds_takes_the_steps_of_newton():
    with precision("float64"):
        x0 = rosenbrock_start(4)
        kept = {"history": True, "max_steps": 30}
        region = so.trust_region(growth=2.0)  # by default `newton` grows it as its gradients allow
        free = so.minimize(rosenbrock, x0, so.newton(region), **kept)
        wide = so.minimize(rosenbrock, x0, so.projected_newton(region), bounds=(-1e3, 1e3), **kept)
        np.testing.assert_allclose(free.history.value, wide.history.value, rtol=1e-6, atol=1e-12)


def test_newton_leaves_a_saddle_within_the_face():
    saddle = lambda x: x[0] ** 2 - x[1] ** 2 + (x[2] - 2.0) ** 2
    r = so.minimize(saddle, jnp.array([0.5, 0.0, 0.0]), so.projected_newton(), bounds=(-1.0, 1.0))
    assert r.success
    np.testing.assert_allclose(jnp.abs(r.params), [0.0, 1.0, 1.0], atol=1e-6)
    assert int(jnp.abs(r.active[1])) == 1
    assert int(r.active[2]) == 1
    assert float(r.curvature) > 0  # of the parameter that is free


@pytest.mark.parametrize("box", [(-1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("n", [1, 2])
def test_newton_leaves_a_saddle_on_a_bound_to_the_open_side(n, box):
    loss = lambda x: jnp.sum(x[:-1] ** 2) - x[-1] ** 2
    r = so.minimize(loss, jnp.zeros(n), so.projected_newton(), bounds=box)
    assert r.success
    np.testing.assert_allclose(r.value, -1.0, rtol=1e-6)


def test_negative_curvature_that_a_bound_holds_is_no_objection():
    r = so.minimize(lambda x: -(x[0] ** 2) + x[1] ** 2, jnp.array([0.5, 0.5]), bounds=(0.0, 1.0))
    assert r.success
    np.testing.assert_allclose(r.params, [1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ONE)
def test_vertices_fixed_parameters_and_kkt_points_are_answers(name):
    ones = jnp.ones(3)
    loss = lambda x: jnp.sum((x - 5.0) ** 2)
    at_vertex = so.minimize(loss, ones, BOXED[name], bounds=(0.0, 1.0))
    assert at_vertex.success
    assert int(at_vertex.evaluations) == 1
    fixed = so.minimize(loss, ones, BOXED[name], bounds=(ones, ones))
    assert fixed.success
    assert int(fixed.evaluations) == 1
    np.testing.assert_array_equal(fixed.params, ones)
    away = so.minimize(lambda x: jnp.sum((x + 5.0) ** 2), ones, BOXED[name], bounds=(0.0, 1.0))  # leaves the vertex
    np.testing.assert_array_equal(away.params, jnp.zeros(3))
    assert away.active.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("name", ONE)
def test_trees_and_traced_bounds(name):
    def loss(p):
        return jnp.sum((p["w"] - 1.0) ** 2) + (p["b"] + p["w"][0] - 3.0) ** 2

    bounds = ({"w": jnp.zeros(2), "b": -jnp.inf}, {"w": jnp.array([0.5, jnp.inf]), "b": jnp.inf})
    x0 = {"w": jnp.zeros(2), "b": jnp.array(0.0)}
    eager = so.minimize(loss, x0, BOXED[name], bounds=bounds)
    np.testing.assert_allclose(eager.params["w"], [0.5, 1.0], atol=1e-4)
    np.testing.assert_allclose(eager.params["b"], 2.5, atol=1e-4)
    assert eager.active["w"].tolist() == [1, 0]
    traced = jax.jit(lambda high: so.minimize(loss, x0, BOXED[name], bounds=(-jnp.inf, {"w": high, "b": jnp.inf})))
    np.testing.assert_allclose(traced(jnp.array([0.5, 9.0])).params["w"], [0.5, 1.0], atol=1e-4)
    np.testing.assert_allclose(traced(jnp.array([-1.0, 0.2])).params["w"], [-1.0, 0.2], atol=1e-4)  # x0 moved inside


@pytest.mark.parametrize("name", ONE)
def test_a_wall_inside_the_box_is_walked_around(name):
    r = so.minimize(lambda x: jnp.sum(x - jnp.log(x)), jnp.full(3, 4.0), BOXED[name], bounds=(-5.0, 5.0))
    assert r.success
    np.testing.assert_allclose(r.params, jnp.ones(3), atol=1e-3)


@pytest.mark.parametrize("name", ONE)
def test_a_run_resumes_where_it_stopped(name):
    keep = {"bounds": (-2.0, 0.8)}
    x0 = jnp.clip(rosenbrock_start(4), -2.0, 0.8)
    whole = so.minimize(rosenbrock, x0, BOXED[name], **keep)
    part = so.minimize(rosenbrock, x0, BOXED[name], max_steps=4, **keep)
    assert int(part.status) == Status.MAX_STEPS
    rest = so.minimize(rosenbrock, part.params, BOXED[name], state=part.state, **keep)
    np.testing.assert_allclose(rest.value, whole.value, rtol=1e-4)


@pytest.mark.parametrize("name", ONE)
def test_one_iteration_of_the_optax_idiom_stays_in_the_box_and_descends(name):
    optimizer, bounds = BOXED[name], (jnp.full(2, -jnp.inf), jnp.full(2, 0.5))

    @jax.jit
    def iterate(x, state):
        value, grad = optax.value_and_grad_from_state(rosenbrock)(x, state=state)
        move, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=rosenbrock, bounds=bounds)
        return jnp.minimum(x + move, 0.5), state, value

    x, state, values = jnp.array([-1.2, 0.5]), optimizer.init(jnp.zeros(2)), []
    for _ in range(40):
        x, state, value = iterate(x, state)
        values.append(float(value))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(values))
    np.testing.assert_allclose(x, [0.5, 0.25], atol=2e-3)


def test_many_parameters_take_the_quasi_newton_method():
    loss = lambda x: jnp.sum((x - jnp.linspace(-1.0, 2.0, x.size)) ** 2)
    r = so.minimize(loss, jnp.full(1000, 0.5), bounds=(0.0, 1.0))
    assert isinstance(r.state, module.LBFGSBState)
    assert r.success
    np.testing.assert_allclose(r.params, jnp.clip(jnp.linspace(-1.0, 2.0, 1000), 0.0, 1.0), atol=1e-3)


def test_longest_step_ends_at_the_nearest_bound():
    limits = (jnp.array([0.0, -jnp.inf, 0.0]), jnp.array([1.0, 2.0, 1.0]))
    step = lambda d: float(box.longest_step(jnp.array([0.5, 0.0, 1.0]), jnp.array(d), limits))
    assert step([-1.0, 1.0, 0.0]) == 0.5
    assert step([0.0, -1.0, 0.0]) == np.inf
    assert step([0.0, 0.0, 1.0]) == 0.0


BAD = {
    "an optimizer without bounds": ({"optimizer": so.lbfgs()}, ValueError, "lbfgsb"),
    "a wrapped one": ({"optimizer": optax.chain(so.lbfgsb())}, ValueError, "unwrapped"),
    "a foreign one": ({"optimizer": optax.adam(0.1)}, ValueError, "projected_newton"),
    "crossing bounds": ({"bounds": (1.0, 0.0)}, ValueError, "swap"),
    "a start outside": ({"bounds": (1.0, 2.0)}, ValueError, "clip"),
    "a NaN": ({"bounds": (jnp.nan, 2.0)}, ValueError, "NaN"),
    "other shapes": ({"bounds": (jnp.zeros(3), 2.0)}, ValueError, "broadcast"),
    "no pair": ({"bounds": 0.0}, TypeError, "lower, upper"),
}


@pytest.mark.parametrize("case", BAD)
def test_bounds_that_cannot_be_kept_are_refused(case):
    options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        so.minimize(rosenbrock, jnp.zeros(2), **{"bounds": (-1.0, 1.0), **options})


@pytest.mark.parametrize("make", [lambda: so.lbfgsb(memory_size=0), lambda: so.lbfgsb(linesearch=None)])
def test_options_out_of_range_are_refused(make):
    with pytest.raises((ValueError, TypeError), match="lbfgsb"):
        make()


def test_damping_without_a_region_is_refused():
    with pytest.raises(TypeError, match="trust_region"):
        so.projected_newton(so.levenberg())
