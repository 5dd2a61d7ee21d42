"""Sharpness, slices of the loss, and the figures that `track` records."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import with_spectrum

import secondorder as so
from secondorder import curvature

A = jnp.asarray(with_spectrum(0, np.array([0.1, 0.3, 0.5, 1.0, 2.0, 8.0])), jnp.float32)


def bowl(x):
    return 0.5 * jnp.vdot(x, A @ x)


class TestSharpness:
    def test_the_highest_corner_of_the_box_is_found_for_quadratics(self):
        run = jax.jit(lambda x: curvature.sharpness(bowl, x, epsilon=0.05, starts=4))
        for seed in range(4):
            x = 0.3 * jax.random.normal(jax.random.key(seed), (6,))
            found = run(x)
            half = 0.05 * (np.abs(x) + 1)
            corners = [bowl(x + half * np.array(signs)) for signs in itertools.product((-1.0, 1.0), repeat=6)]
            exact = 100 * (max(corners) - bowl(x)) / (1 + bowl(x))
            np.testing.assert_allclose(found.epsilon_sharpness, exact, rtol=1e-3)
            np.testing.assert_allclose(found.eigenvalue, 8.0, rtol=1e-4)
            assert abs(float(found.trace.value) - 11.9) <= float(found.trace.margin) + 1e-3

    @pytest.mark.slow
    def test_with_filter_norms_a_rescaled_network_is_as_sharp_as_before(self):
        x = jax.random.normal(jax.random.key(0), (30, 4))
        target = jnp.sin(x[:, :1])
        loss = lambda p: jnp.mean((jax.nn.relu(x @ p["A"]) @ p["B"] - target) ** 2)
        one, two = jax.random.split(jax.random.key(1))
        params = {"A": jax.random.normal(one, (4, 5)), "B": jax.random.normal(two, (5, 1))}
        scaled = {"A": 10.0 * params["A"], "B": params["B"] / 10.0}
        np.testing.assert_allclose(loss(scaled), loss(params), rtol=1e-5)

        @jax.jit
        def run(p):
            return curvature.sharpness(loss, p, scale=curvature.filter_norms(p), products_per_figure=20)

        plain = jax.jit(lambda p: curvature.extreme_eigenpairs(curvature.hvp(loss), p).largest.values[0])
        one, two = run(params), run(scaled)
        for name in ("eigenvalue", "epsilon_sharpness"):
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-3)
        np.testing.assert_allclose(two.trace.value, one.trace.value, rtol=1e-3)
        assert float(plain(scaled)) > 5 * float(plain(params))


class TestSlices:
    def test_values_are_those_of_the_loss_on_the_grid(self):
        u, v = jnp.arange(6.0) / 6, jnp.ones(6)
        x = jnp.linspace(-1, 1, 6)
        line = curvature.loss_slice(bowl, x, [u], span=2.0, points=5)
        plane = curvature.loss_slice(bowl, x, [u, v], span=2.0, points=5)
        at = np.linspace(-2, 2, 5)
        np.testing.assert_allclose(line.coordinates, at)
        np.testing.assert_allclose(line.values, [bowl(x + a * u) for a in at], rtol=1e-5)
        np.testing.assert_allclose(plane.values, [[bowl(x + a * u + b * v) for b in at] for a in at], rtol=1e-5)

    def test_a_path_in_the_plane_is_projected_on_its_coordinates(self):
        u, v = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}, {"w": jnp.array([0.0, 1.0]), "b": jnp.array(1.0)}
        middle = {"w": jnp.ones(2), "b": jnp.array(5.0)}
        wanted = jnp.array([[0.5, -1.0], [2.0, 0.0], [0.0, 3.0]])
        path = jax.tree.map(
            lambda m, a, b: m + jnp.tensordot(wanted[:, 0], a, 0) + jnp.tensordot(wanted[:, 1], b, 0), middle, u, v
        )
        np.testing.assert_allclose(curvature.project(path, middle, [u, v]), wanted, atol=1e-4)

    def test_random_directions_have_the_filter_norms_of_the_parameters(self):
        params = {"W": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), "V": jnp.ones((2, 5)), "b": jnp.ones(4)}

        @jax.jit
        def both(params):
            direction = curvature.filter_normalized_direction(params, jax.random.key(1))
            return direction, curvature.filter_norms(params), curvature.filter_norms(direction)

        direction, norms, ours = both(params)
        for name in ("W", "V"):
            np.testing.assert_allclose(ours[name], norms[name], rtol=1e-5)
        np.testing.assert_allclose(norms["W"][0, 0, 0], np.linalg.norm(params["W"].reshape(-1, 4), axis=0), rtol=1e-5)
        np.testing.assert_array_equal(direction["b"], 0.0)


class TestTrack:
    def run(self, optimizer, steps=25):
        def step(carry, _):
            x, state = carry
            value, grad = jax.value_and_grad(bowl)(x)
            moves, state = optimizer.update(grad, state, x, value=value, value_fn=bowl)
            return (x + moves, state), x

        start = jnp.ones(6)
        (_, state), path = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=steps))(start)
        return path, state

    def test_updates_are_not_changed_and_figures_are_those_of_the_recorded_steps(self):
        plain, _ = self.run(optax.with_extra_args_support(optax.sgd(0.05)))
        names = ("value", "grad_norm", "update_norm", "top_eigenvalue", "trace", "gain_ratio")
        path, state = self.run(so.track(optax.sgd(0.05), names, every=4, capacity=5))
        # One program more or less in the step: an accelerator may sum in another order.
        np.testing.assert_allclose(path, plain, rtol=0 if jax.default_backend() == "cpu" else 1e-4)
        record = so.recorded(state)
        np.testing.assert_array_equal(record.step, [8, 12, 16, 20, 24])  # the last five of 0, 4, ..., 24
        points = path[record.step]
        grads = np.asarray(points @ A)
        np.testing.assert_allclose(record.figures["value"], jax.vmap(bowl)(points), rtol=1e-5)
        np.testing.assert_allclose(record.figures["grad_norm"], np.linalg.norm(grads, axis=1), rtol=1e-4)
        np.testing.assert_allclose(record.figures["update_norm"], 0.05 * np.linalg.norm(grads, axis=1), rtol=1e-4)
        np.testing.assert_allclose(record.figures["top_eigenvalue"], 8.0, rtol=1e-4)
        np.testing.assert_allclose(record.figures["trace"], 11.9, rtol=0.5)
        assert np.isnan(record.figures["gain_ratio"]).all()

    def test_figures_of_this_library_s_optimizers_are_read_out_of_their_states(self):
        optimizer = so.track(so.newton(), ("gain_ratio", "damping", "curvature"), every=1)
        _, state = self.run(optimizer, steps=4)
        record = so.recorded(optax.chain(optimizer).init(jnp.ones(6)))
        assert record.step.size == 0
        record = so.recorded(state)
        np.testing.assert_allclose(record.figures["gain_ratio"][0], 1.0, rtol=1e-2)
        np.testing.assert_allclose(record.figures["curvature"], 0.1, rtol=1e-3)
        assert so.accepted(state).params.shape == (6,)

    def test_own_figures_are_functions_of_what_was_seen(self):
        optimizer = so.track(optax.sgd(0.05), {"first": lambda seen: seen.params[0]}, every=5)
        path, state = self.run(optimizer, steps=11)
        np.testing.assert_array_equal(so.recorded(state).figures["first"], path[:11:5, 0])

    @pytest.mark.slow
    def test_minimize_takes_a_tracked_optimizer(self):
        result = so.minimize(bowl, jnp.ones(6), so.track(so.lbfgs(), ("top_eigenvalue",), every=3))
        assert result.success
        np.testing.assert_allclose(so.recorded(result.state).figures["top_eigenvalue"], 8.0, rtol=1e-4)


HVP = curvature.hvp(bowl)
X = jnp.ones(6)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: curvature.hvp(lambda x: x)(X, X), ValueError, ("hvp", "scalar", "(6,)", "sum or a mean")),
        (lambda: HVP(X, jnp.ones(5)), ValueError, ("hvp", "vector", "(5,)", "(6,)", "like params")),
        (lambda: HVP(X, {"a": X}), ValueError, ("hvp", "vector", "structure")),
        (lambda: HVP(jnp.arange(6), X), TypeError, ("hvp", "floating-point", "int")),
        (lambda: curvature.hvp(bowl, batches=X), TypeError, ("hvp", "batches", "tuple", "split_batches")),
        (lambda: curvature.hvp(bowl, batches=(X, X[:2])), ValueError, ("hvp", "batches", "same number")),
        (lambda: curvature.split_batches((X,), 4), ValueError, ("split_batches", "divide", "6", "4", "take 3")),
        (lambda: curvature.gnvp(3, bowl), TypeError, ("gnvp", "model", "function", "3")),
        (
            lambda: curvature.gnvp(lambda p: p, lambda out: out)(X, X),
            ValueError,
            ("gnvp", "scalar", "(6,)"),
        ),
        (
            lambda: curvature.empirical_fisher_vp(lambda p: p, jnp.sum)(X, X),
            ValueError,
            ("empirical_fisher_vp", "losses", "(samples,)", "()"),
        ),
        (
            lambda: curvature.extreme_eigenpairs(HVP, X, 7),
            ValueError,
            ("extreme_eigenpairs", "num", "at most n", "6", "7"),
        ),
        (
            lambda: curvature.extreme_eigenpairs(HVP, X, products=9),
            ValueError,
            ("extreme_eigenpairs", "products", "at most n", "6", "9"),
        ),
        (
            lambda: curvature.extreme_eigenpairs(bowl, X),
            TypeError,
            ("extreme_eigenpairs", "hvp_fn", "bowl", "curvature.hvp"),
        ),
        (lambda: curvature.extreme_eigenpairs(3, X), TypeError, ("extreme_eigenpairs", "hvp_fn", "function", "3")),
        (
            lambda: curvature.extreme_eigenpairs(lambda p, v: v[:3], X),
            ValueError,
            ("extreme_eigenpairs", "result of hvp_fn", "(3,)", "(6,)"),
        ),
        (lambda: curvature.lobpcg_eigenpairs(HVP, X, 2), ValueError, ("lobpcg_eigenpairs", "5 num", "6", "2")),
        (lambda: curvature.trace(HVP, X, probes=1), ValueError, ("trace", "probes", ">= 2", "1")),
        (lambda: curvature.spectral_density(HVP, X, steps=7), ValueError, ("spectral_density", "steps", "6", "7")),
        (lambda: curvature.log_determinant(HVP, X, shift=-1.0), ValueError, ("log_determinant", "shift", "-1.0")),
        (
            lambda: curvature.effective_dimension(HVP, X, 0.0),
            ValueError,
            ("effective_dimension", "regularization", "0.0"),
        ),
        (
            lambda: curvature.classify_critical_point(lambda x: x, X),
            ValueError,
            ("classify_critical_point", "scalar", "(6,)"),
        ),
        (lambda: curvature.hessian(lambda x: x, X), ValueError, ("hessian", "scalar", "(6,)")),
        (lambda: curvature.sharpness(lambda x: x, X), ValueError, ("sharpness", "scalar", "(6,)")),
        (
            lambda: curvature.classify_critical_point(bowl, X.at[2].set(jnp.nan)),
            ValueError,
            ("classify_critical_point", "params", "1 entries", "NaN"),
        ),
        (
            lambda: curvature.trace(HVP, X.at[2].set(jnp.inf)),
            ValueError,
            ("trace", "params", "infinite"),
        ),
        (lambda: curvature.trace(curvature.hvp(jnp.sum), {}), ValueError, ("trace", "params", "at least one entry")),
        (lambda: curvature.hessian(bowl, X, memory=-1), ValueError, ("hessian", "memory", "-1")),
        (lambda: curvature.unravel(jnp.ones(5), X), ValueError, ("unravel", "(6,)", "(5,)")),
        (lambda: curvature.loss_slice(bowl, X, X), ValueError, ("loss_slice", "directions", "list")),
        (lambda: curvature.loss_slice(bowl, X, [X[:2]]), ValueError, ("loss_slice", "directions[0]", "(2,)")),
        (lambda: curvature.sharpness(bowl, X, epsilon=0.0), ValueError, ("sharpness", "epsilon", "0.0")),
        (lambda: so.track(optax.sgd(0.1), ("sharp",)), ValueError, ("track", "figures", "'sharp'", "mapping")),
        (lambda: so.track(optax.sgd(0.1), every=0), ValueError, ("track", "every", "0")),
        (lambda: so.recorded(()), ValueError, ("recorded", "found 0")),
    ],
)
def test_bad_input_is_refused_by_name_with_the_value_and_a_remedy(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    at = 0
    for part in parts:
        at = str(caught.value).index(part, at)
