"""The Broyden class of quasi-Newton methods with self-scaling, for accurate minima of ill-conditioned losses.

Nocedal & Wright (2006), section 6.3; Al-Baali & Khalfan (2005); Urbán, Stefanou & Pons (2025). The loop stands in
`secant.py`, which `bfgs` shares, the update in `linalg/inverse_hessian.py`; here, the choice of its two weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, secant, transform
from secondorder.globalization import line_search
from secondorder.linalg import tree
from secondorder.linalg.inverse_hessian import Weights

LARGE = 100.0  # `initial_scale` of the switching method (ours): on Poisson networks a third of the error (docs/pinn.md)


@transform.cached
def broyden_class(
    theta: float | None = None,
    self_scaling: bool = True,
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | None = line_search.WIDE,
    initial_scale: tree.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Quasi-Newton steps from a dense inverse Hessian, updated by any member of the Broyden class.

    The step is p = -H g. After it, with s = x₊ - x, y = g₊ - g, u = H y, v = s / s'y - u / y'u,
    H₊ = [H - u u' / y'u + phi y'u v v'] / tau + s s' / s'y, where, with h = y'u / s'y, b = s'H⁻¹s / s'y, a = b h - 1,
    - phi = (1 - theta) / (1 + a theta): theta = 0 is BFGS, theta = 1 DFP. By default theta is (1 - b) / b,
      confined to the interval of Al-Baali & Khalfan, which may be negative: more than BFGS where b > 1;
    - tau = 1, or with self-scaling the factor that takes the size of the update out of H: min(1, 1/b) for theta = 0.

    | theta | self_scaling | |
    | --- | --- | --- |
    | None | True | SSBroyden, the default; `ssbroyden` |
    | 0 | True | SSBFGS; `ssbfgs` |
    | 0 | False | BFGS; `bfgs` |
    | 1 | False | DFP; `dfp` |
    | None | False | the switching Broyden method |

    Pairs, the first scaling and a direction that fails are treated as in `bfgs`. H, and with it all that was learned,
    is kept by `minimize(..., state=result.state)`: pass the new collocation points, or the new data, as `args`.

    Args:
      theta: Member of the class, >= 0, no unit; H stays positive definite. Default: by the rule above.
      self_scaling: Divide H by tau. Default True.
      learning_rate: Fixed step length or schedule; it switches the search off. Default: none, search.
      scale_init_precond: Scale H before the first update, as `bfgs` does; tau is then 1 for that update. Default True.
      linesearch: `line_search(...)`, or None for unit steps (or `learning_rate`). Default:
        `line_search(growth=10.0, falling=0.9)`.
      initial_scale: As in `bfgs`. Default: 0 with self-scaling, since H grows by itself then; 100 for the switching
        Broyden method; else 1.

    Returns:
      A `GradientTransformationExtraArgs`, called as `bfgs` is; real parameters only.
      Cost: one matrix-vector product and one in-place pass over H per evaluation. Memory: n² + 8n numbers.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if `params` or `value` is missing, or for
        complex parameters. Never for NaN: the trial is rejected; a pair whose weights are not finite is left out.

    Differs from the sources: (1) u = H g₊ + p needs no product of its own; (2) s'H⁻¹s = -alpha s'g; (3) 1 - c, of which
    theta's lower limit is made, is computed as 1 / ((1 + a) (1 + c)), which loses no digits for large a; (4) the
    first pair scales H as in `bfgs`, by other limits (`initial_scale`). A search begins as in `bfgs`, below 1: 1.1
    evaluations per step on a Poisson network, instead of 1.8; at 1 for theta >= 1 without self-scaling.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> result = so.minimize(lambda x: jnp.sum((x - 3.0) ** 4 + x**2), jnp.zeros(2), so.broyden_class(theta=0.5))
      >>> bool(result.success)
      True

    References: Nocedal & Wright (2006), section 6.3; Al-Baali & Khalfan (2005), "Wide interval for efficient
    self-scaling quasi-Newton algorithms"; Al-Baali (1998), "Numerical experience with a class of self-scaling
    quasi-Newton algorithms"; Urbán, Stefanou & Pons (2025), "Unveiling the optimization process of physics informed
    neural networks", eqs. (11) to (23).
    """
    who = "broyden_class"
    if theta is not None:
        checks.number(who, "theta", theta, strict=False, hint="0 is BFGS, 1 is DFP; leave it out for a rule.")
    checks.flag(who, "self_scaling", self_scaling)
    # DFP cuts an H that is too large slowly (N&W 6.1), and by long steps only.
    slow = not self_scaling and isinstance(theta, (int, float)) and theta >= 1
    scale = 0.0 if self_scaling else LARGE if theta is None else 1.0
    member = _Member(theta, self_scaling)
    return secant.optimizer(
        who, learning_rate, scale_init_precond, linesearch, member, initial_scale, scale, cautious=not slow
    )


@transform.cached
def ssbroyden(
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | None = line_search.WIDE,
) -> optax.GradientTransformationExtraArgs:
    """Self-scaled Broyden: `broyden_class()`, for physics-informed networks and other ill-conditioned losses.

    Args:
      learning_rate: As in `bfgs`.
      scale_init_precond: As in `bfgs`.
      linesearch: As in `broyden_class`.

    Returns:
      What `broyden_class` returns, at its cost.

    Raises:
      ValueError, TypeError: as `broyden_class`.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> result = so.minimize(lambda x: jnp.sum((x - 3.0) ** 4 + x**2), jnp.zeros(2), so.ssbroyden())
      >>> bool(result.success)
      True

    References: as for `broyden_class`.
    """
    return secant.optimizer(
        "ssbroyden", learning_rate, scale_init_precond, linesearch, _Member(None, True), default_scale=0.0
    )


@transform.cached
def ssbfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | None = line_search.WIDE,
) -> optax.GradientTransformationExtraArgs:
    """Self-scaled BFGS: `broyden_class(theta=0)`, BFGS after H is divided by tau = min(1, s'y / s'H⁻¹s).

    Args:
      learning_rate: As in `bfgs`.
      scale_init_precond: As in `bfgs`.
      linesearch: As in `broyden_class`.

    Returns:
      What `broyden_class` returns, at its cost.

    Raises:
      ValueError, TypeError: as `broyden_class`.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> result = so.minimize(lambda x: jnp.sum((x - 3.0) ** 4 + x**2), jnp.zeros(2), so.ssbfgs())
      >>> bool(result.success)
      True

    References: Al-Baali (1998); Urbán, Stefanou & Pons (2025), eq. (11).
    """
    return secant.optimizer(
        "ssbfgs", learning_rate, scale_init_precond, linesearch, _Member(0.0, True), default_scale=0.0
    )


@transform.cached
def dfp(
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | None = line_search.WIDE,
) -> optax.GradientTransformationExtraArgs:
    """DFP: `broyden_class(theta=1, self_scaling=False)`, the first quasi-Newton method, for comparison.

    It needs a nearly exact search (`line_search(c2=0.1)`): with a loose one it corrects too small a curvature slowly.

    Args:
      learning_rate: As in `bfgs`.
      scale_init_precond: As in `bfgs`.
      linesearch: As in `broyden_class`.

    Returns:
      What `broyden_class` returns, at its cost.

    Raises:
      ValueError, TypeError: as `broyden_class`.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> result = so.minimize(lambda x: jnp.sum((x - 3.0) ** 4 + x**2), jnp.zeros(2), so.dfp())
      >>> bool(result.success)
      True

    References: Nocedal & Wright (2006), (6.15) and section 6.3.
    """
    return secant.optimizer("dfp", learning_rate, scale_init_precond, linesearch, _Member(1.0, False), cautious=False)


class _Member(NamedTuple):
    """The weights of a member; numbers of equations are those of Urbán, Stefanou & Pons (2025)."""

    theta: Any  # None for the rule of self-scaled Broyden
    self_scaling: bool

    def __call__(self, h: jax.Array, b: jax.Array, first: jax.Array, n: int) -> Weights:
        """Return phi and tau; see `inverse_hessian.Member`."""
        a = jnp.maximum(b * h - 1.0, 0.0)  # >= 0 by Cauchy and Schwarz
        th, least = _theta(h, b, a) if self.theta is None else (jnp.full_like(h, self.theta), jnp.ones_like(h))
        sigma = jnp.maximum(1.0 + a * th, least)
        phi = (1.0 - th) / sigma
        if not self.self_scaling:
            return Weights(phi, jnp.ones_like(h))
        size = jnp.minimum(1.0, 1.0 / b)
        spread = sigma ** (1.0 / (1.0 - max(n, 2)))
        below = jnp.minimum(size * spread, sigma)
        above = size * jnp.minimum(spread, 1.0 / jnp.where(th > 0, th, 1.0))
        return Weights(phi, jnp.where(first, 1.0, jnp.where(th > 0, above, below)))


def _theta(h: jax.Array, b: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (1 - b) / b, confined to the interval of Al-Baali & Khalfan, and a lower limit of 1 + a theta."""
    c = jnp.sqrt(a / (1.0 + a))
    rho = jnp.minimum(1.0, h / ((1.0 + a) * (1.0 + c)))  # h (1 - c)
    lower = jnp.where(a > 0, (rho - 1.0) / jnp.where(a > 0, a, 1.0), 0.0)
    return jnp.maximum(lower, jnp.minimum(1.0 / rho, (1.0 - b) / b)), rho
