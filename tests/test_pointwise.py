"""`pointwise`: the derivatives of a plain vmap, in every mode, and a Jacobian in one pass over the points."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision

import secondorder as so
from secondorder.curvature import residuals


def at_a_point(p, x, y):
    """Three outputs in two leaves, from parameters in two leaves and a point in two arrays."""
    return {"a": jnp.tanh(p["W"] @ x) * y, "b": p["c"] * y**2}


def given():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"W": jax.random.normal(keys[0], (2, 3)), "c": jnp.asarray(0.3)}
    return params, (jax.random.normal(keys[1], (7, 3)), jax.random.normal(keys[2], (7,)))


def sum_of_squares(r):
    return lambda *args: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(r(*args)))


DERIVATIVES = {
    "values": lambda r, p, points: r(p, *points),
    "forward, parameters and points": lambda r, p, points: jax.jacfwd(r, argnums=(0, 1))(p, *points),
    "reverse, parameters and points": lambda r, p, points: jax.jacrev(r, argnums=(0, 2))(p, *points),
    "gradient": lambda r, p, points: jax.grad(sum_of_squares(r))(p, *points),
    "Hessian": lambda r, p, points: jax.hessian(sum_of_squares(r))(p, *points),
    "vmap": lambda r, p, points: jax.vmap(r, (None, 0, 0))(p, *(x[None] for x in points)),
}


@pytest.mark.parametrize("batch_size", [None, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_vmap(name, batch_size):
    with precision("float64"):
        params, points = given()
        plain = jax.vmap(at_a_point, (None, 0, 0))
        ours = DERIVATIVES[name](so.pointwise(at_a_point, batch_size), params, points)
        theirs = DERIVATIVES[name](plain, params, points)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), ours, theirs)


def test_a_product_with_the_jacobian_no_longer_goes_through_the_network():
    """Once linearized, J v is one product with a matrix that was made once, and n such products make J."""
    fun = lambda p, x: p[2] @ jnp.tanh(p[1] @ jnp.tanh(p[0] @ x))
    params, points = [jnp.ones((4, 2)), jnp.ones((4, 4)), jnp.ones(4)], jnp.ones((6, 2))

    def products(r):
        linear = residuals.linearize(lambda p: r(p, points), params)
        return str(jax.make_jaxpr(linear.push)(jnp.ones(linear.n))).count("dot_general")

    assert products(so.pointwise(fun)) == 1
    assert products(jax.vmap(fun, (None, 0))) > 1


def largest(fun, *args):
    """Return the entries of the largest array in a program."""
    shapes = re.findall(r"f32\[([0-9,]+)\]", str(jax.make_jaxpr(fun)(*args)))
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def test_a_second_derivative_along_one_direction_makes_no_jacobian():
    """Nothing in it has an entry for each point and parameter, and the numbers are those of a plain vmap."""
    fun = lambda p, x: p[2] @ jnp.tanh(p[1] @ jnp.tanh(p[0] @ x))
    keys = jax.random.split(jax.random.key(0), 5)
    params = [jax.random.normal(key, shape) for key, shape in zip(keys[:3], [(4, 2), (4, 4), (4,)], strict=True)]
    points, v = jax.random.normal(keys[3], (11, 2)), jax.random.normal(keys[4], (28,))

    def bend(r, by_rows):
        return lambda p, v: residuals.second_derivative(lambda p: r(p, points), p, v, by_rows=by_rows)

    with_jacobian, without = (bend(so.pointwise(fun), by_rows) for by_rows in (True, False))
    assert largest(with_jacobian, params, v) == 11 * 28
    assert largest(without, params, v) < 11 * 28
    for a, b in zip(without(params, v), bend(jax.vmap(fun, (None, 0)), True)(params, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: so.pointwise(3.0), TypeError, "pointwise: fun"),
        (lambda: so.pointwise(jnp.sin, batch_size=0), ValueError, "pointwise: batch_size must be"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
