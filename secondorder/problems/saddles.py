"""Saddles that a method walks into when it starts on their ridge, as these starts do."""

import jax
import numpy as np

from secondorder.problems.card import Problem


def saddle() -> Problem:
    """Return x0² - x1² + x1⁴: a saddle at 0, minima of -1/4 at (0, ±1/sqrt 2); it starts on the ridge x1 = 0."""
    best = np.array([0.0, 0.5**0.5])
    return Problem("saddle", _saddle, np.array([1.0, 0.0]), -0.25, best, "ours")


def monkey_saddle() -> Problem:
    """Return r³ cos(3 theta) + r⁴/4: the Hessian is zero at the saddle; three minima of -27/4 at r = 3."""
    best = np.array([-3.0, 0.0])
    return Problem("monkey_saddle", _monkey_saddle, np.array([1.0, 0.0]), -6.75, best, "ours, from x³ - 3xy²")


def _saddle(x: jax.Array) -> jax.Array:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def _monkey_saddle(x: jax.Array) -> jax.Array:
    return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + (x[0] ** 2 + x[1] ** 2) ** 2 / 4
