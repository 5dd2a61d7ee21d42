"""Problems of Moré, Garbow & Hillstrom (1981), "Testing unconstrained optimization software", ACM TOMS 7(1), 17-41.

Numbers in the docstrings are the paper's (section 3). Each is a sum of squares, sum_i f_i(x)², with the standard start.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from secondorder.problems.card import Problem

PAPER = "Moré, Garbow & Hillstrom (1981)"


def rosenbrock(n: int = 2) -> Problem:
    """Return Rosenbrock's banana valley, extended to even n (1) and (21); Rosenbrock (1960)."""
    _even("rosenbrock", n, 2)
    start = np.tile([-1.2, 1.0], n // 2)
    return Problem(f"rosenbrock_{n}", _rosenbrock, start, 0.0, np.ones(n), f"{PAPER}, (1) and (21)")


def freudenstein_roth() -> Problem:
    """Return the function (2) of Freudenstein & Roth (1963), with a local minimum 48.9842 at (11.41, -0.8968)."""
    start, best = np.array([0.5, -2.0]), np.array([5.0, 4.0])
    return Problem("freudenstein_roth", _freudenstein_roth, start, 0.0, best, f"{PAPER}, (2)", (48.98425367924,))


def powell_badly_scaled() -> Problem:
    """Return the function (3) of Powell (1970); its minimizer is (1.098e-5, 9.106)."""
    start, best = np.array([0.0, 1.0]), np.array([1.0981593296999e-5, 9.1061467398665])
    return Problem("powell_badly_scaled", _powell_badly_scaled, start, 0.0, best, f"{PAPER}, (3)")


def brown_badly_scaled() -> Problem:
    """Return Brown's function (4), whose variables differ by a factor of 5e11."""
    return Problem("brown_badly_scaled", _brown_badly_scaled, np.ones(2), 0.0, np.array([1e6, 2e-6]), f"{PAPER}, (4)")


def beale() -> Problem:
    """Return the function (5) of Beale (1958), which is flat far from its minimizer."""
    return Problem("beale", _beale, np.ones(2), 0.0, np.array([3.0, 0.5]), f"{PAPER}, (5)")


def helical_valley() -> Problem:
    """Return the helical valley (7) of Fletcher & Powell (1963)."""
    start, best = np.array([-1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0])
    return Problem("helical_valley", _helical_valley, start, 0.0, best, f"{PAPER}, (7)")


def powell_singular(n: int = 4) -> Problem:
    """Return Powell's function (13), (22), whose Hessian at the minimizer is singular; n is a multiple of 4."""
    _even("powell_singular", n, 4)
    start = np.tile([3.0, -1.0, 0.0, 1.0], n // 4)
    return Problem(f"powell_singular_{n}", _powell_singular, start, 0.0, np.zeros(n), f"{PAPER}, (13) and (22)")


def wood() -> Problem:
    """Return Wood's function (14), Colville (1968)."""
    start = np.array([-3.0, -1.0, -3.0, -1.0])
    return Problem("wood", _wood, start, 0.0, np.ones(4), f"{PAPER}, (14)")


def brown_dennis() -> Problem:
    """Return the function (16) of Brown & Dennis (1971), with m = 20 and a minimum of 85822.2, far from zero."""
    start = np.array([25.0, 5.0, -5.0, -1.0])
    best = np.array(
        [-11.594439904762, 13.203630051207, -0.403439488177, 0.236778774456]
    )  # ours: the paper states the minimum alone
    return Problem("brown_dennis", _brown_dennis, start, 85822.2016263563, best, f"{PAPER}, (16)")


def trigonometric(n: int = 10) -> Problem:
    """Return the trigonometric function (26) of Spedicato (1975); for n = 10 it has a local minimum of 2.79506e-5."""
    if n < 1:
        raise ValueError(f"trigonometric: n must be >= 1, got {n}; 10 is usual.")
    start = np.full(n, 1.0 / n)
    local = (2.7950561219e-5,) if n == 10 else ()
    return Problem(f"trigonometric_{n}", _trigonometric, start, 0.0, np.zeros(n), f"{PAPER}, (26)", local)


def _even(who: str, n: int, multiple: int) -> None:
    if n < multiple or n % multiple:
        raise ValueError(f"{who}: n must be a positive multiple of {multiple}, got {n}; take {multiple} or 100.")


def _rosenbrock(x: jax.Array) -> jax.Array:
    odd, even = x[0::2], x[1::2]
    return jnp.sum((10 * (even - odd**2)) ** 2 + (1 - odd) ** 2)


def _freudenstein_roth(x: jax.Array) -> jax.Array:
    f1 = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
    f2 = -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]
    return f1**2 + f2**2


def _powell_badly_scaled(x: jax.Array) -> jax.Array:
    return (1e4 * x[0] * x[1] - 1) ** 2 + (jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001) ** 2


def _brown_badly_scaled(x: jax.Array) -> jax.Array:
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def _beale(x: jax.Array) -> jax.Array:
    return sum(
        ((y - x[0] * (1 - x[1] ** i)) ** 2 for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))), jnp.zeros((), x.dtype)
    )


def _helical_valley(x: jax.Array) -> jax.Array:
    angle = jnp.arctan2(x[1], x[0]) / (2 * math.pi)
    theta = jnp.where(angle < -0.25, angle + 1, angle)  # the paper's branch: in (-1/4, 3/4]
    return (10 * (x[2] - 10 * theta)) ** 2 + (10 * (jnp.hypot(x[0], x[1]) - 1)) ** 2 + x[2] ** 2


def _powell_singular(x: jax.Array) -> jax.Array:
    a, b, c, d = x[0::4], x[1::4], x[2::4], x[3::4]
    return jnp.sum((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4)


def _wood(x: jax.Array) -> jax.Array:
    left = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    right = 90 * (x[3] - x[2] ** 2) ** 2 + (1 - x[2]) ** 2
    return left + right + 10 * (x[1] + x[3] - 2) ** 2 + 0.1 * (x[1] - x[3]) ** 2


def _brown_dennis(x: jax.Array) -> jax.Array:
    t = jnp.arange(1, 21).astype(x.dtype) / 5
    return jnp.sum(((x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2) ** 2)


def _trigonometric(x: jax.Array) -> jax.Array:
    i = jnp.arange(1, x.size + 1).astype(x.dtype)
    return jnp.sum((x.size - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)) ** 2)
