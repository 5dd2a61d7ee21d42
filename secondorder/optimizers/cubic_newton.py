"""Newton's method with adaptive cubic regularization (ARC), for up to a few thousand parameters.

Cartis, Gould & Toint (2011), Algorithm 2.1, with the exact minimizer of the cubic model. The loop stands in
`region.py`, which `newton` and `saddle_free_newton` share; the model in `globalization/cubic.py`.
"""

import optax

from secondorder import checks, region, transform
from secondorder.globalization import cubic


@transform.cached
def cubic_newton(sigma: float | None = None, accept_ratio: float = 1e-4) -> optax.GradientTransformationExtraArgs:
    """Newton's method with a cubic term in place of a trust region.

    With g and H at the accepted point x, the trial is x + p with p the global minimizer of
    g'p + p'Hp/2 + sigma ||p||³/3. The cubic bounds the error of the quadratic model where the Hessian is Lipschitz
    with constant 2 sigma, so that sigma is a property of the loss, found on the way. At a saddle the step leaves along
    the most negative curvature, also if the gradient is zero there.

    Args:
      sigma: First weight, > 0, in units of the third derivative [f/x³]. Default: such that the first step is about as
        long as `trust_region()` would make it.
      accept_ratio: Accept a trial whose gain ratio, against the cubic model, exceeds this; in [0, 1/4), no unit.
        Default 1e-4.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and `hvp_fn(params, vector)` or `value_fn`.
      Cost: one dense Hessian (n products) and one O(n³) eigendecomposition per accepted point, O(n²) per rejection.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if an argument is missing.
      Never for NaN: the trial is rejected, and a non-finite Hessian counts as zero.

    Differs from the source: (1) the model is minimized exactly, from one eigendecomposition; (2) sigma follows the
    value of the loss at the trial instead of fixed factors.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
      >>> so.minimize(loss, jnp.array([-1.2, 1.0]), so.cubic_newton()).params.round(3).tolist()
      [1.0, 1.0]

    References: Cartis, Gould & Toint (2011), "Adaptive cubic regularisation methods for unconstrained optimization,
    part I", Math. Programming 127; Nesterov & Polyak (2006); Gould, Porcelli & Toint (2012), "Updating the
    regularization parameter in the adaptive cubic regularization algorithm".
    """
    who = "cubic_newton"
    if sigma is not None:
        checks.number(who, "sigma", sigma, hint="leave it out for a rule.")
    checks.number(who, "accept_ratio", accept_ratio, 0.0, 0.25, strict=False, hint="1e-4 is usual.")
    return region.optimizer(who, cubic.Cubic(sigma, accept_ratio))
