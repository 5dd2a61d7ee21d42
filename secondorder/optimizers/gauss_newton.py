"""The Gauss-Newton method for nonlinear least squares, with a line search.

Nocedal & Wright (2006), section 10.3: the direction minimizes || J p + r ||, and the step length satisfies the Wolfe
conditions. The loop stands in `ray.py`, which Newton's method with a line search shares.
"""

from typing import Any

import jax
import jax.numpy as jnp

from secondorder import ray, transform
from secondorder.curvature import linear_model
from secondorder.curvature.linear_model import Direct, Iterative, LinearModel
from secondorder.globalization import line_search, stopping


@transform.cached
def gauss_newton(
    linesearch: line_search.LineSearch | None = None, solver: Direct | Iterative | None = None
) -> transform.Optimizer:
    """Gauss-Newton with a line search, for losses ||r||²/2 with small residuals and a Jacobian of full rank.

    At the accepted point x the direction p minimizes || J p + r ||, with J the Jacobian of r, by a pseudo-inverse:
    singular values at rounding level count as zero. The loss is then searched along p, from the unit step on.

    Args:
      linesearch: Options of the search. Default: `line_search()`.
      solver: `direct(...)` or `iterative(...)`, as in `levenberg_marquardt`.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs the gradient, `value`, the loss ||r||²/2, and
      `residual_fn(params, **extra)`, which returns r, any pytree. Cost: one gradient per evaluation; one Jacobian and
      one factorization, O(m n min(m, n)), per accepted point.

    Raises:
      TypeError: here, for an unknown search or solver; in `update`, for complex parameters or residuals.
      ValueError: in `update`, if `params`, `value` or `residual_fn` is missing, or if bounds are given.
      Never for NaN or a singular Jacobian: a direction that does not descend gives way to steepest descent.

    `levenberg_marquardt` converges where this method does not: near a singular Jacobian the directions grow, and with
    large residuals the unit step overshoots.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def residual(x):
      ...     return jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
      >>> result = so.least_squares(residual, jnp.array([-1.2, 1.0]), so.gauss_newton())
      >>> result.params.round(4).tolist()
      [1.0, 1.0]

    References: Nocedal & Wright (2006), section 10.3; Björck (1996), section 9.2.
    """
    who = "gauss_newton"
    search = line_search.line_search() if linesearch is None else linesearch
    if not isinstance(search, line_search.LineSearch):
        raise TypeError(f"{who}: linesearch must be made by line_search(...), got {linesearch!r}.")
    linear_model.check(who, solver)

    def direction(state: ray.SearchState, residual_fn: Any) -> tuple[jax.Array, LinearModel]:
        n = state.direction.size
        everywhere = jnp.full(n, jnp.inf, state.direction.dtype)
        model = linear_model.chosen(solver, n).model(residual_fn, state.params, (-everywhere, everywhere), state.model)
        c = -model.rotated / jnp.where(model.values > 0, model.values, jnp.inf)  # (10.23), minimal norm
        return linear_model.to_params(model, c), model

    def report(info: stopping.Info, model: LinearModel, when: jax.Array) -> stopping.Info:
        return linear_model.report(info, model, when)

    return ray.optimizer(
        who,
        search,
        lambda n, dtype: linear_model.chosen(solver, n).initial(n, dtype),
        direction,
        report,
        needs_residual=True,
    )
