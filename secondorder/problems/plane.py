"""Functions of two variables, for pictures and quick checks."""

import jax
import numpy as np

from secondorder.problems.card import Problem


def himmelblau() -> Problem:
    """Return Himmelblau's function with four minima, all zero; Himmelblau (1972), "Applied Nonlinear Programming"."""
    return Problem("himmelblau", _himmelblau, np.ones(2), 0.0, np.array([3.0, 2.0]), "Himmelblau (1972)")


def booth() -> Problem:
    """Return Booth's convex quadratic; Jamil & Yang (2013), "A literature survey of benchmark functions", 17."""
    return Problem("booth", _booth, np.zeros(2), 0.0, np.array([1.0, 3.0]), "Jamil & Yang (2013), 17")


def _himmelblau(x: jax.Array) -> jax.Array:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def _booth(x: jax.Array) -> jax.Array:
    return (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2
