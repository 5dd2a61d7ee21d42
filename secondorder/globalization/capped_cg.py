"""Backtracking on a direction of capped conjugate gradients: Royer, O'Neill & Wright (2020), Algorithm 2.

The search x + alpha d, alpha = 1, theta, theta², ..., ends at the first f(x + alpha d) < f(x) - eta alpha³ ||d||³ / 6.
The directions come from `linalg/capped_cg.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.globalization.trust_region import Damping, Trial

SHARE = 1e-6  # eps over ||H g|| / ||g||, where the user gives no eps (ours)


class CappedCG(NamedTuple):
    """Options of the line search; build one with `capped_cg`."""

    damping: float | None
    accuracy: float | None
    decrease: float
    backtrack: float

    @property
    def accept_ratio(self) -> float:
        """Accept when the decrease exceeds this share of `promised`."""
        return 1.0

    def promised(self, step: jax.Array, d_norm: jax.Array) -> jax.Array:
        """Return eta alpha³ ||d||³ / 6, the decrease that the search asks for [f]; shapes ()."""
        return self.decrease / 6.0 * (step * d_norm) ** 3

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the step length after a trial: theta times as long if it was rejected."""
        return damping._replace(size=jnp.where(trial.accepted, damping.size, self.backtrack * damping.size))


def capped_cg(
    damping: float | None = None, accuracy: float | None = None, decrease: float = 1e-4, backtrack: float = 0.5
) -> CappedCG:
    """Options of Newton-CG with a line search and worst-case guarantees, for `newton_cg(capped_cg())`.

    The direction solves (H + 2 eps I) d = -g, or has curvature d'Hd <= -eps ||d||²; it is then as long as that
    curvature is large, and points downhill. A step of length alpha = 1, theta, theta², ... is accepted when the loss
    falls by more than eta alpha³ ||d||³ / 6. Steps never grow beyond these: on a loss without a lower bound they are
    spent before `Status.UNBOUNDED` is seen.

    Args:
      damping: eps, > 0, in the unit of the Hessian [f/x²]: negative curvature above -eps is not followed, and the steps
        are damped by 2 eps. Default: 1e-6 ||H g|| / ||g|| at each point, and no less than sqrt(machine epsilon)
        ||g|| / max(1, ||x||).
      accuracy: zeta, in (0, 1), no unit: systems are solved to ||r|| <= zeta / (3 kappa) ||g||, kappa = (M + 2 eps) /
        eps, as the source's complexity bound asks, M the largest ||H v|| / ||v|| seen. Default: the forcing terms.
      decrease: eta, in (0, 1), [f/x³]. Default 1e-4.
      backtrack: theta, in (0, 1), no unit. Default 1/2.

    Returns:
      An immutable value to pass as `newton_cg(region=...)`.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def saddle(x):
      ...     return x[0] ** 2 - x[1] ** 2 + x[1] ** 4
      >>> result = so.minimize(saddle, jnp.array([1.0, 0.1]), so.newton_cg(so.capped_cg()))
      >>> round(float(result.value), 3)
      -0.25

    References: Royer, O'Neill & Wright (2020), "A Newton-CG algorithm with complexity guarantees for smooth
    unconstrained optimization", Math. Programming 180, Algorithms 1 and 2.
    """
    who = "capped_cg"
    if damping is not None:
        checks.number(who, "damping", damping, hint="leave it out for a share of the curvature.")
    if accuracy is not None:
        checks.number(who, "accuracy", accuracy, 0.0, 1.0, hint="0.5 is usual; leave it out for forcing terms.")
    checks.number(who, "decrease", decrease, 0.0, 1.0, hint="1e-4 is usual.")
    checks.number(who, "backtrack", backtrack, 0.0, 1.0, hint="1/2 is usual.")
    return CappedCG(damping, accuracy, decrease, backtrack)
