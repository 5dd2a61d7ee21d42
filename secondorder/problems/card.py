"""The card of a test problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """A loss with a start, what is known of its minimum, and where it comes from.

    Arrays are NumPy's, in float64; JAX takes them in the precision that is in force.
    """

    name: str
    fun: Callable[..., Any]  # fun(x) is a scalar array
    start: Any  # the standard starting point, a pytree of arrays
    minimum: float  # lowest value; NaN if it is not known, -Inf if there is none
    minimizer: np.ndarray | None  # a point where it is attained; None if it is not known or there is none
    source: str
    local_minima: tuple[float, ...] = ()  # values of further local minimizers in which a run may end
