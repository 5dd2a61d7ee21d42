"""Physics-informed networks as residuals: viscous Burgers, and Poisson in two and three dimensions.

A network's value and the derivatives of it that an equation needs travel through the layers together, as a truncated
Taylor series (a jet) for all points at once: one matrix product per layer, and reverse mode goes through it once for
the gradient. On a CPU this is two to six times faster in parts of some hundred points that fit the caches, computed
again on the way back (`in_parts`). Residuals are scaled so that the loss ||r||²/2 is half the mean square over the
interior plus half that over the boundary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so

Layers = list[tuple[jax.Array, jax.Array]]
Points = tuple[jax.Array, ...]
PART = 250  # points


class Problem(NamedTuple):
    """An equation, a network, points and a reference."""

    name: str
    source: str
    init: Callable[[jax.Array], Layers]  # key -> layers
    points: Callable[[jax.Array], Points]  # key -> collocation points
    residual: Callable[[Layers, Points], jax.Array]  # r; the loss is ||r||²/2
    rows: Callable[[Layers, Points], jax.Array]  # the same, with a cheap Jacobian
    error: Callable[[Layers], jax.Array]  # relative L2 error against the reference
    resample: Callable[[Layers, jax.Array], Points] | None  # new points by the size of the residual; None: fixed points
    adam: int  # steps of Adam before the other optimizers start


def loss(problem: Problem) -> Callable[[Layers, Points], jax.Array]:
    """Return the loss ||r||²/2 of a problem."""

    def value(layers: Layers, points: Points) -> jax.Array:
        return 0.5 * jnp.sum(problem.residual(layers, points) ** 2)

    return value


def network(widths: tuple[int, ...], uniform: bool = False) -> Callable[[jax.Array], Layers]:
    """Return the initializer of a tanh network: Glorot's normal weights and zero biases.

    With `uniform`, weights and biases of a layer are uniform within 1/sqrt(fan in), as equinox and PyTorch draw them.
    """

    def init(key: jax.Array) -> Layers:
        layers = []
        for fan_in, fan_out, k in zip(widths[:-1], widths[1:], jax.random.split(key, len(widths) - 1), strict=True):
            if uniform:
                W = jax.random.uniform(k, (fan_in + 1, fan_out), minval=-1.0, maxval=1.0) / np.sqrt(fan_in)
                layers.append((W[:-1], W[-1]))
            else:
                scale = np.sqrt(2.0 / (fan_in + fan_out))
                layers.append((scale * jax.random.normal(k, (fan_in, fan_out)), jnp.zeros(fan_out)))
        return layers

    return init


def propagate(layers: Layers, jet: list[jax.Array], curved: slice) -> list[jax.Array]:
    """Return the network's value and derivatives, shapes (points,).

    Channels are kept apart: joined in one array, they cost half as much again in copies.

    Args:
      layers: The network.
      jet: Inputs, shapes (points, width): their values, first derivatives along some directions, and last the sum of
        the second derivatives along those directions that `curved` selects.
      curved: Channels of the first derivatives that enter the second.
    """
    for W, b in layers[:-1]:
        z = [channel @ W for channel in jet]
        y = jnp.tanh(z[0] + b)
        slope = 1.0 - y * y
        second = slope * (z[-1] - 2.0 * y * sum(first * first for first in z[curved]))
        jet = [y, *(slope * first for first in z[1:-1]), second]
    W, b = layers[-1]
    value, *derivatives = [(channel @ W)[:, 0] for channel in jet]
    return [value + b[0], *derivatives]


def in_parts(function: Callable[..., jax.Array], layers: Layers, points: Points) -> jax.Array:
    """Return function(layers, points), shape (points,), for `PART` points at a time, computed again for its gradient.

    That keeps the values between layers in a CPU's cache. An accelerator takes all points at once.

    Args:
      function: (layers, points) -> one number per point.
      layers: The network.
      points: Arrays with a leading axis of points.
    """
    count = points[0].shape[0]
    if count <= PART or count % PART or jax.default_backend() != "cpu":
        return function(layers, points)
    parts = jax.tree.map(lambda x: x.reshape(count // PART, PART, *x.shape[1:]), points)
    return jax.lax.map(jax.checkpoint(lambda part: function(layers, part)), parts).ravel()


def burgers(nu: float, name: str, points: int = 5000, candidates: int = 20_000, *, systematic: bool = False) -> Problem:
    """Return u_t + u u_x = nu u_xx on [0, 1] x [-1, 1], u = -sin(pi x) at t = 0, periodic.

    Urbán, Stefanou & Pons (2025): a network N of three layers of 20 on (t, cos pi x, sin pi x), 941 parameters, and
    u = -sin(pi x) + t N, so that the initial values and the period are built in. Points are drawn anew from
    candidates, with a density of 1 + |r| / mean |r|; their program takes 10,000 points of 50,000 candidates.

    Args:
      nu: Viscosity.
      name: The problem's name in tables.
      points: Collocation points.
      candidates: Points that they are drawn from.
      systematic: Draw them by systematic sampling from a lattice, instead of independently from independent ones: the
        same density, without the gaps and clusters of chance.
    """

    def fields(layers: Layers, t: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        c, s, zero, one = jnp.cos(jnp.pi * x), jnp.sin(jnp.pi * x), jnp.zeros_like(x), jnp.ones_like(x)
        jet = [
            jnp.stack([t, c, s], -1),
            jnp.stack([one, zero, zero], -1),
            jnp.stack([zero, -jnp.pi * s, jnp.pi * c], -1),
            jnp.stack([zero, -(jnp.pi**2) * c, -(jnp.pi**2) * s], -1),
        ]
        N, N_t, N_x, N_xx = propagate(layers, jet, slice(2, 3))
        return -s + t * N, N + t * N_t, -jnp.pi * c + t * N_x, jnp.pi**2 * s + t * N_xx

    def equation(layers: Layers, points: Points) -> jax.Array:
        u, u_t, u_x, u_xx = fields(layers, *points)
        return u_t + u * u_x - nu * u_xx

    def residual(layers: Layers, points: Points) -> jax.Array:
        return in_parts(equation, layers, points) / np.sqrt(points[0].size)

    each = so.pointwise(lambda layers, t, x: equation(layers, (t[None], x[None]))[0])

    def rows(layers: Layers, points: Points) -> jax.Array:
        return each(layers, *points) / np.sqrt(points[0].size)

    def draw(key: jax.Array, count: int = points) -> Points:
        t, x = lattice(key, count) if systematic else jax.random.uniform(key, (2, count))
        return t, 2.0 * x - 1.0

    def resample(layers: Layers, key: jax.Array) -> Points:
        first, second = jax.random.split(key)
        t, x = draw(first, candidates)
        size = jnp.abs(equation(layers, (t, x)))
        density = 1.0 + size / jnp.mean(size)
        if systematic:
            chosen = along(second, density, snake(t, x, round(np.sqrt(points / 2))), points)
        else:
            chosen = jax.random.choice(second, t.size, (points,), replace=False, p=density / jnp.sum(density))
        return t[chosen], x[chosen]

    t, x = (grid.ravel() for grid in np.meshgrid(np.linspace(0.0, 1.0, 101)[1:], np.linspace(-1.0, 1.0, 257)))
    truth = cole_hopf(t, x, nu)

    def error(layers: Layers) -> jax.Array:
        u = fields(layers, jnp.asarray(t), jnp.asarray(x))[0]
        return jnp.linalg.norm(u - truth) / jnp.linalg.norm(truth)

    source = "Urbán, Stefanou & Pons (2025), arXiv 2405.04230"
    return Problem(name, source, network((3, 20, 20, 20, 1)), draw, residual, rows, error, resample, 2000)


def lattice(key: jax.Array, count: int) -> jax.Array:
    """Return points that fill the unit square evenly, shifted at random, shape (2, count).

    A Kronecker sequence, i (1/g, 1/g²) modulo 1, by the real root g of g³ = g + 1 (Roberts 2018).
    """
    g = 1.324717957244746
    even = np.arange(count) * np.array([[1.0 / g], [1.0 / g**2]]) % 1.0  # in double precision, whatever JAX computes in
    return (even + jax.random.uniform(key, (2, 1))) % 1.0


def snake(t: jax.Array, x: jax.Array, strips: int) -> jax.Array:
    """Return the order of points, t in [0, 1], along strips of t, back and forth in x; shape (count,)."""
    strip = jnp.floor(t * strips).astype(jnp.int32)
    return jnp.lexsort((jnp.where(strip % 2 == 0, x, -x), strip))


def along(key: jax.Array, density: jax.Array, order: jax.Array, count: int) -> jax.Array:
    """Return indices of `count` candidates by systematic sampling (Madow & Madow 1944): equal shares of the density.

    Where a candidate's density is more than a share, it is taken more than once.
    """
    ends = jnp.cumsum(density[order])
    marks = (jnp.arange(count) + jax.random.uniform(key)) * (ends[-1] / count)
    return order[jnp.clip(jnp.searchsorted(ends, marks), max=order.size - 1)]


def cole_hopf(t: np.ndarray, x: np.ndarray, nu: float, nodes: int = 2001) -> np.ndarray:
    """Return the solution of Burgers' equation for u(0, x) = -sin(pi x), to rounding, in float64.

    Cole (1951) and Hopf (1950): u = -E[sin(pi (x - eta))] under the weight exp(-cos(pi (x - eta)) / (2 pi nu)) times
    a normal density of variance 2 nu t. The trapezoidal rule converges exponentially here.
    """
    z = np.linspace(-14.0, 14.0, nodes)
    u = np.empty(t.size)
    for part in np.array_split(np.arange(t.size), max(1, t.size // 2000)):
        y = x[part, None] - np.sqrt(4.0 * nu * t[part, None]) * z
        exponent = -np.cos(np.pi * y) / (2.0 * np.pi * nu) - z**2
        weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
        u[part] = -np.sum(weight * np.sin(np.pi * y), axis=1) / np.sum(weight, axis=1)
    return u


def poisson(dimension: int, *, uniform: bool = True) -> Problem:
    """Return -laplace u = f on the unit square or cube with u = prod sin(pi x_i), given on the boundary.

    Two dimensions: Müller & Zeinhofer (2023), one layer of 32, 129 parameters, grids of 30 x 30 and 30 per side. Three:
    Bioli & Mendibe (2026), two layers of 32, 1,217 parameters, 5,000 and 800 random points, and the uniform weights and
    biases of their program, or, without `uniform`, those of the other problems.
    """
    widths = (2, 32, 1) if dimension == 2 else (3, 32, 32, 1)

    def solution(x: jax.Array) -> jax.Array:
        return jnp.prod(jnp.sin(jnp.pi * x), axis=-1)

    def values(layers: Layers, x: jax.Array) -> jax.Array:
        for W, b in layers[:-1]:
            x = jnp.tanh(x @ W + b)
        W, b = layers[-1]
        return (x @ W + b)[:, 0]

    def laplacian(layers: Layers, points: Points) -> jax.Array:
        (x,) = points
        units = [jnp.broadcast_to(unit, x.shape) for unit in jnp.eye(dimension)]
        jet = [x, *units, jnp.zeros_like(x)]
        return propagate(layers, jet, slice(1, -1))[-1]

    def residual(layers: Layers, points: Points) -> jax.Array:
        inside, boundary = points
        interior = in_parts(laplacian, layers, (inside,)) + dimension * jnp.pi**2 * solution(inside)
        edge = values(layers, boundary) - solution(boundary)
        return jnp.concatenate([interior / np.sqrt(inside.shape[0]), edge / np.sqrt(boundary.shape[0])])

    interior = so.pointwise(lambda layers, x: laplacian(layers, (x[None],))[0] + dimension * jnp.pi**2 * solution(x))
    edge = so.pointwise(lambda layers, x: values(layers, x[None])[0] - solution(x))

    def rows(layers: Layers, points: Points) -> jax.Array:
        parts = interior(layers, points[0]), edge(layers, points[1])
        return jnp.concatenate([r / np.sqrt(r.size) for r in parts])

    def grid(key: jax.Array) -> Points:
        del key
        inner = np.linspace(0.0, 1.0, 32)[1:-1]
        side = np.linspace(0.0, 1.0, 30)
        inside = np.stack(np.meshgrid(inner, inner), -1).reshape(-1, 2)
        zero, one = np.zeros(30), np.ones(30)
        edges = [(side, zero), (side, one), (zero, side), (one, side)]
        return jnp.asarray(inside), jnp.asarray(np.concatenate([np.stack(edge, -1) for edge in edges]))

    def draw(key: jax.Array) -> Points:
        one, two, three = jax.random.split(key, 3)
        inside = jax.random.uniform(one, (5000, 3))
        boundary = jax.random.uniform(two, (800, 3))
        face = jax.random.randint(three, (800,), 0, 6)
        return inside, jnp.where(jnp.arange(3) == face[:, None] // 2, (face % 2)[:, None].astype(float), boundary)

    if dimension == 2:
        x = np.stack(np.meshgrid(*2 * [np.linspace(0.0, 1.0, 101)]), -1).reshape(-1, 2)
    else:
        x = np.random.default_rng(0).uniform(size=(50_000, 3))
    truth = np.prod(np.sin(np.pi * x), axis=-1)

    def error(layers: Layers) -> Any:
        return jnp.linalg.norm(values(layers, jnp.asarray(x)) - truth) / np.linalg.norm(truth)

    source = "Müller & Zeinhofer (2023), arXiv 2302.13163"
    if dimension == 3:
        source = "Bioli & Mendibe (2026), arXiv 2603.10599"
    points, init = (grid, network(widths)) if dimension == 2 else (draw, network(widths, uniform=uniform))
    return Problem(f"poisson {dimension}-d", source, init, points, residual, rows, error, None, 0)
