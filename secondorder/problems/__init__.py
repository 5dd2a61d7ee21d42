"""Test problems as cards, for tests, examples and benchmarks: a loss, its start, its minimum, its source.

`PROBLEMS` lists one card of every analytic family; the functions build others (`rosenbrock(100)`).
`critical_points` is a table of points of known kind.
"""

from secondorder.problems import critical_points
from secondorder.problems.card import Problem
from secondorder.problems.learning import logistic_regression, mlp, softmax_regression
from secondorder.problems.more_garbow_hillstrom import (
    beale,
    brown_badly_scaled,
    brown_dennis,
    freudenstein_roth,
    helical_valley,
    powell_badly_scaled,
    powell_singular,
    rosenbrock,
    trigonometric,
    wood,
)
from secondorder.problems.plane import booth, himmelblau
from secondorder.problems.quadratics import quadratic
from secondorder.problems.saddles import monkey_saddle, saddle

PROBLEMS: tuple[Problem, ...] = (
    rosenbrock(),
    rosenbrock(100),
    freudenstein_roth(),
    powell_badly_scaled(),
    brown_badly_scaled(),
    beale(),
    helical_valley(),
    powell_singular(),
    wood(),
    brown_dennis(),
    trigonometric(),
    himmelblau(),
    booth(),
    saddle(),
    monkey_saddle(),
    quadratic([1.0, 10.0, 100.0, 1e3]),
)

__all__ = [
    "PROBLEMS",
    "Problem",
    "beale",
    "booth",
    "brown_badly_scaled",
    "brown_dennis",
    "critical_points",
    "freudenstein_roth",
    "helical_valley",
    "himmelblau",
    "logistic_regression",
    "mlp",
    "monkey_saddle",
    "powell_badly_scaled",
    "powell_singular",
    "quadratic",
    "rosenbrock",
    "saddle",
    "softmax_regression",
    "trigonometric",
    "wood",
]
