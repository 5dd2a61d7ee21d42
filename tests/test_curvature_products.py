"""Products, their accumulation over batches, and dense matrices, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import precision
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree

import secondorder as so
from secondorder import curvature, one_kernel
from secondorder.linalg import blocks

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def network(params, x):
    return jnp.tanh(x @ params["W"] + params["b"][None]) @ params["V"]


def mean_loss(params, x, y):
    return jnp.mean(cross_entropy(network(params, x), y))


def start(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"W": (4, 5), "b": (5,), "V": (5, 3)}
    return {name: jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}


def data(samples=24, seed=1):
    x_key, y_key = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x_key, (samples, 4)), jax.random.randint(y_key, (samples,), 0, 3)


def flat(tree):
    return ravel_pytree(tree)[0]


def dense(product, params):
    """Return the matrix of a product, one column at a time."""
    zero, unravel = ravel_pytree(params)
    columns = lambda p: jax.lax.map(lambda v: flat(product(p, unravel(v))), jnp.eye(zero.size, dtype=zero.dtype)).T
    return jax.jit(columns)(params)


def close(actual, expected, factor=200):
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=factor * float(jnp.finfo(expected.dtype).eps) * scale)


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def dtype(request):
    with precision(request.param):
        yield request.param


class TestProducts:
    def test_a_loss_with_reverse_rules_alone_has_products(self, dtype):
        @jax.custom_vjp
        def quartic(x):
            return jnp.sum(x**4)

        quartic.defvjp(lambda x: (jnp.sum(x**4), x), lambda x, seed: (4 * seed * x**3,))
        x, v = jnp.array([1.0, 2.0], dtype), jnp.array([1.0, -1.0], dtype)
        product = curvature.hvp(quartic)
        for found in (product(x, v), jax.jit(product)(x, v), jax.linearize(lambda v: product(x, v), v)[1](v)):
            np.testing.assert_allclose(found, [12.0, -48.0], rtol=1e-6)
        for optimizer in (None, so.newton_cg()):
            assert so.minimize(lambda x: quartic(x - 1.0), x, optimizer).success

    @pytest.mark.parametrize("kernels", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_reverse_rules_may_call_others(self, dtype, kernels, monkeypatch):
        monkeypatch.setattr(one_kernel, "KNOWN", kernels and one_kernel.KNOWN)

        @jax.custom_vjp
        def slope(seed, x):
            return 4 * seed * x**3

        slope.defvjp(
            lambda seed, x: (slope(seed, x), (seed, x)),
            lambda kept, ct: (4 * jnp.sum(ct * kept[1] ** 3), 12 * ct * kept[0] * kept[1] ** 2),
        )

        @jax.custom_vjp
        def quartic(x):
            return jnp.sum(x**4)

        quartic.defvjp(lambda x: (quartic(x), x), lambda x, seed: (slope(seed, x),))
        decayed = lambda k: odeint(lambda y, t, k: -k * y, jnp.ones(2, dtype), jnp.array([0.0, 1.0], dtype), k)[-1]
        x, v = jnp.array([1.0, 2.0], dtype), jnp.array([1.0, -1.0], dtype)
        ode = lambda k: jnp.sum((decayed(k) - 0.3) ** 2)
        for loss, plain, near, optimizers in (
            (quartic, lambda x: jnp.sum(x**4), 1e-5, (None, so.newton_cg())),
            (ode, lambda k: jnp.sum((jnp.exp(-k) - 0.3) ** 2), 1e-3, (None,)),
        ):
            H = jax.hessian(plain)(x)
            np.testing.assert_allclose(jax.jit(curvature.hvp(loss))(x, v), H @ v, rtol=near, atol=near)
            np.testing.assert_allclose(curvature.hessian(loss, x), H, rtol=near, atol=near)
            shifted = lambda z, loss=loss: loss(z) + jnp.sum((z - 1.0) ** 2)
            for optimizer in optimizers:
                assert so.minimize(shifted, x, optimizer).success

    def test_hessian_products_are_those_of_jax_and_batches_change_nothing(self, dtype):
        params, vector, (x, y) = start(), start(5), data()
        unravel = ravel_pytree(params)[1]
        H = jax.jit(jax.hessian(lambda z: mean_loss(unravel(z), x, y)))(flat(params))
        batches = curvature.split_batches((x, y), 6)
        over = curvature.over_batches(mean_loss, batches)

        @jax.jit
        def products(params, vector):
            ways = curvature.hvp(mean_loss, x, y), curvature.hvp(mean_loss, batches=batches), curvature.hvp(over)
            return [flat(product(params, vector)) for product in ways], over(params), mean_loss(params, x, y)

        found, mean, expected_mean = products(params, vector)
        for ours in found:
            close(ours, H @ flat(vector))
        close(mean, expected_mean)

    def test_auxiliary_output_and_keyword_arguments_are_passed_on(self):
        product = curvature.hvp(lambda z, a, power=1: (a * jnp.sum(z**power), "aux"), 2.0, has_aux=True, power=3)
        np.testing.assert_allclose(product(jnp.array([1.0, 2.0]), jnp.ones(2)), [12.0, 24.0])

    def test_gauss_newton_is_the_formula_and_equals_the_hessian_of_a_linear_model(self, dtype):
        params, (x, y) = start(), data()
        unravel = ravel_pytree(params)[1]
        outputs = lambda z: network(unravel(z), x)
        J = jax.jit(jax.jacfwd(outputs))(flat(params))  # (samples, classes, n)
        p = jax.nn.softmax(outputs(flat(params)))
        S = (jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]) / len(x)
        G = jnp.einsum("scn,scd,sdm->nm", J, S, J, precision="highest")
        loss = lambda out, y: jnp.mean(cross_entropy(out, y))
        close(dense(curvature.gnvp(network, loss, x, y), params), G)
        batches = curvature.split_batches((x, y), 8)
        close(dense(curvature.gnvp(network, loss, batches=batches), params), G)
        linear = {"V": params["V"]}
        hidden = jnp.tanh(x @ params["W"])
        model = lambda p, h: h @ p["V"]
        H = dense(curvature.hvp(lambda p: loss(model(p, hidden), y)), linear)
        close(dense(curvature.gnvp(model, loss, hidden, y), linear), H)

    def test_empirical_fisher_is_the_mean_outer_product_of_gradients(self):
        params, (x, y) = start(), data()
        one = lambda p, x, y: cross_entropy(network(p, x[None]), y[None])[0]
        g = jax.jit(jax.vmap(lambda x, y: flat(jax.grad(one)(params, x, y))))(x, y)
        expected = g.T @ g / len(x)
        batches = curvature.split_batches((x, y), 12)
        for product in (
            curvature.empirical_fisher_vp(network, cross_entropy, x, y),
            curvature.empirical_fisher_vp(network, cross_entropy, batches=batches),
        ):
            close(dense(product, params), expected)

    def test_sampled_fisher_is_a_fixed_matrix_that_tends_to_gauss_newton(self):
        params, (x, y) = start(), data()
        loss = lambda out, y: jnp.mean(cross_entropy(out, y))
        G = dense(curvature.gnvp(network, loss, x, y), params)
        fisher = lambda draws, key: curvature.fisher_vp(
            network, cross_entropy, jax.random.categorical, jax.random.key(key), x, draws=draws
        )
        few, many = (dense(fisher(draws, 0), params) for draws in (10, 1000))
        np.testing.assert_array_equal(few, dense(fisher(10, 0), params))
        error = lambda F: float(jnp.linalg.norm(F - G) / jnp.linalg.norm(G))
        assert 0.03 < error(few) < 0.6
        assert error(many) < error(few) / 4  # ten times less, up to chance
        assert float(jnp.linalg.eigvalsh(many)[0]) > -1e-6
        batched = curvature.fisher_vp(
            network,
            cross_entropy,
            jax.random.categorical,
            jax.random.key(0),
            draws=500,
            batches=curvature.split_batches((x,), 6),
        )
        assert error(dense(batched, params)) < error(few)

    def test_gauss_newton_of_half_a_sum_of_squares_is_jacobian_transposed_jacobian(self):
        params, (x, _) = start(), data()
        J = curvature.jacobian(network, params, x)
        halves = lambda out: 0.5 * jnp.sum(out**2)
        close(dense(curvature.gnvp(network, halves, x), params), J.T @ J)

    def test_a_product_in_a_loop_stores_one_batch_only(self):
        params = {"W": jnp.ones((50, 64)), "b": jnp.zeros(64), "V": jnp.ones((64, 3))}
        x, y = jnp.ones((40, 100, 50)), jnp.zeros((40, 100), jnp.int32)
        activations = 4 * x.shape[0] * x.shape[1] * 64  # bytes of the hidden layer over all batches

        def loop(params, x, y):
            product = curvature.hvp(mean_loss, batches=(x, y))
            _, linear = jax.linearize(lambda v: product(params, v), params)
            return jax.lax.fori_loop(0, 3, lambda i, v: linear(v), params)

        memory = jax.jit(loop).lower(params, x, y).compile().memory_analysis()
        assert memory.temp_size_in_bytes < activations / 3

    def test_other_products_serve_an_optimizer_as_its_curvature(self):
        params, (x, y) = start(), data()
        optimizer = so.scale_by_newton(damping=1e-2)

        @jax.jit
        def losses(params):
            g = jax.grad(mean_loss)(params, x, y)
            fisher = curvature.fisher_vp(network, cross_entropy, jax.random.categorical, jax.random.key(0), x, draws=4)
            step, _ = optimizer.update(g, optimizer.init(params), params, hvp_fn=fisher)
            lower = jax.tree.map(lambda p, s: p - 0.1 * s, params, step)
            return mean_loss(lower, x, y), mean_loss(params, x, y)

        after, before = losses(params)
        assert after < before


class TestDense:
    def test_matrices_agree_with_jax_whatever_the_budget(self):
        params, (x, y) = start(), data()
        unravel = ravel_pytree(params)[1]
        few = lambda p: {"a": network(p, x[:2])[0], "b": p["b"][1]}  # fewer outputs than parameters: backward

        @jax.jit
        def reference(z):
            H = jax.hessian(lambda z: mean_loss(unravel(z), x, y))(z)
            J = jax.jacfwd(lambda z: network(unravel(z), x).ravel())(z)
            return H, J, jax.jacrev(lambda z: flat(few(unravel(z))))(z)

        @jax.jit
        def ours(params):
            H = [curvature.hessian(mean_loss, params, x, y, memory=memory) for memory in (None, 1.0, 1e5)]
            J = [curvature.jacobian(network, params, x, memory=memory) for memory in (None, 1.0, 1e5)]
            return H, J, curvature.jacobian(few, params)

        (all_H, all_J, backward), (H, J, expected) = ours(params), reference(flat(params))
        for matrix in all_H:
            close(matrix, H)
            np.testing.assert_array_equal(matrix, matrix.T)
        for matrix in all_J:
            close(matrix, J)
        close(backward, expected)

    def test_blocks_are_those_on_the_diagonal(self):
        params, (x, y) = start(), data()
        H, at = curvature.hessian(mean_loss, params, x, y), 0
        found = curvature.hessian_blocks(mean_loss, params, x, y)
        for leaf, block in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
            close(block, H[at : at + leaf.size, at : at + leaf.size])
            at += leaf.size
        assert jax.tree.structure(found) == jax.tree.structure(params)

    def test_unravel_gives_rows_and_eigenvectors_back_as_trees(self):
        params = start()
        rows = jnp.arange(2 * flat(params).size, dtype=jnp.float32).reshape(2, -1)
        trees = curvature.unravel(rows, params)
        for i in range(2):
            np.testing.assert_array_equal(flat(jax.tree.map(lambda leaf, i=i: leaf[i], trees)), rows[i])
            np.testing.assert_array_equal(flat(curvature.unravel(rows[i], params)), rows[i])

    def test_the_budget_bounds_the_temporary_memory(self):
        W = jnp.ones((32, 16))
        x = jnp.ones((500, 32))
        loss = lambda W: jnp.mean(jnp.tanh(x @ W) ** 2)
        temp = lambda memory: (
            (
                jax.jit(lambda W: curvature.hessian(loss, W, memory=memory)).lower(W).compile().memory_analysis()
            ).temp_size_in_bytes
        )
        _, linear = jax.linearize(lambda v: jax.jvp(jax.grad(loss), (W,), (v.reshape(W.shape),))[1].ravel(), W.ravel())
        one = blocks.bytes_per_direction(linear, jnp.zeros(W.size))
        assert one >= 4 * x.shape[0] * W.shape[1]  # at least the tangent of the hidden layer
        base = temp(1.0)
        assert temp(40 * one) <= base + 40 * one
        assert temp(40 * one) > base + 10 * 4 * x.shape[0] * W.shape[1]  # and the budget is used

    def test_without_a_budget_a_block_fits_in_the_caches_of_a_cpu(self, monkeypatch):
        def turns(width):
            linear = lambda v: v + jnp.sum(jnp.sin(jnp.arange(width, dtype=v.dtype)) * v[0])
            program = jax.make_jaxpr(lambda: blocks.matrix(linear, jnp.zeros(16)))()
            (loop,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
            return loop.params["length"], 16 // max(
                1, blocks.CACHED // blocks.bytes_per_direction(linear, jnp.zeros(16))
            )

        assert turns(10)[0] == 1
        length, expected = turns(500_000)
        assert length == expected > 1
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert turns(500_000)[0] == 1

    def test_temporary_memory_of_the_hessian_of_a_network_is_an_eighth_of_jax_hessian(self):
        rng = np.random.default_rng(0)
        params = {"W": jnp.asarray(rng.normal(size=(64, 16)), jnp.float32), "V": jnp.zeros((16, 10))}
        x = jnp.asarray(rng.normal(size=(600, 64)), jnp.float32)
        point, unravel = ravel_pytree(params)
        loss = lambda p: jnp.mean(jax.nn.logsumexp(jnp.tanh(x @ p["W"]) @ p["V"], axis=1))
        temp = lambda program, at: jax.jit(program).lower(at).compile().memory_analysis().temp_size_in_bytes
        ours = temp(lambda p: curvature.hessian(loss, p), params)
        assert 8 * ours <= temp(jax.hessian(lambda z: loss(unravel(z))), point)
