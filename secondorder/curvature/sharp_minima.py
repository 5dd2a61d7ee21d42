"""How sharp a minimum is: the top of the spectrum, its trace, and the rise of the loss in a box around it.

Keskar, Mudigere, Nocedal, Smelyanskiy & Tang (2017), "On large-batch training for deep learning", Metric 2.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.curvature import products
from secondorder.curvature.estimate import Estimate
from secondorder.curvature.extreme import extreme_eigenpairs
from secondorder.curvature.program import compiled
from secondorder.curvature.traces import trace
from secondorder.linalg import probes as random
from secondorder.linalg import tree


class Sharpness(NamedTuple):
    """Three measures of sharpness at a point."""

    eigenvalue: jax.Array  # largest eigenvalue of the Hessian, of D H D with `scale` [f/x^2]
    residual: jax.Array  # error bound of the eigenvalue
    trace: Estimate  # of the same matrix
    epsilon_sharpness: jax.Array  # 100 (max of f in the box - f) / (1 + f), in per cent; a lower bound of it


@compiled
def sharpness(
    fun: Callable[..., jax.Array],
    params: tree.ArrayTree,
    *args: Any,
    epsilon: tree.Numeric = 1e-3,
    scale: tree.ArrayTree | None = None,
    steps: int = 10,
    starts: int = 3,
    products_per_figure: int = 30,
    key: jax.Array | None = None,
) -> Sharpness:
    """Measure the sharpness of a minimum: largest eigenvalue, trace, and Keskar's ε-sharpness.

    The box is |z_i| <= ε (|x_i| + 1), or |z_i| <= ε scale_i. The maximum in it is sought by steps to the corner that
    the gradient points to (conditional gradients: where the loss is convex, none goes down), from the corner of the top
    eigenvector, its opposite, and random ones; the result is a lower bound of the maximum.

    Args:
      fun: Loss; fun(params, *args) is a scalar, above -1. For data that do not fit, see `over_batches`.
      params: The minimum; any pytree of real arrays, finite.
      *args: Further arguments of `fun`.
      epsilon: Size of the box, > 0, no unit. Default 1e-3; the source has 5e-4 and 1e-3.
      scale: A tree like `params`, >= 0, of lengths that count as equal: `filter_norms(params)` for measures that do not
        change when a filter is scaled up and the next layer down. Default: the plain measures.
      steps: Steps to a corner from each start, >= 1. Default 10.
      starts: Random starts besides the top eigenvector's two, >= 0. Default 3.
      products_per_figure: Hessian products for the eigenvalue (at most n), and for the trace; >= 2. Default 30.
      key: Random key. Default: `jax.random.key(0)`.

    Returns:
      `Sharpness`; with `scale` of D H D, D its diagonal matrix. Cost: 2 products_per_figure products and
      (starts + 2) (steps + 1) gradients.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> found = curvature.sharpness(lambda x: jnp.sum(jnp.array([1.0, 9.0]) * x**2) / 2, jnp.zeros(2), epsilon=0.1)
      >>> [round(float(x), 3) for x in (found.eigenvalue, found.trace.value, found.epsilon_sharpness)]
      [9.0, 10.0, 5.0]

    References: Keskar et al. (2017), ICLR, Metric 2.1, with A = I and another search in place of L-BFGS-B; Li et al.
    (2018), NeurIPS, section 4, for the scale.
    """
    who = "sharpness"
    checks.function(who, "fun", fun)
    checks.params(who, params)
    checks.number(who, "epsilon", epsilon)
    for name, number, low in (
        ("steps", steps, 1),
        ("starts", starts, 0),
        ("products_per_figure", products_per_figure, 2),
    ):
        checks.integer(who, name, number, low)
    params = jax.tree.map(jnp.asarray, params)
    checks.scalar_loss(who, fun, jax.eval_shape(lambda x: fun(x, *args), params), has_aux=False)
    if scale is not None:
        checks.same_shapes(who, scale, params, "scale", remedy="pass a tree like params, as filter_norms returns")
        scale = tree.cast_like(scale, params)
    ends_key, trace_key, starts_key = jax.random.split(jax.random.key(0) if key is None else key, 3)
    plain = products.hvp(fun, *args)
    times = lambda v: v if scale is None else jax.tree.map(jnp.multiply, scale, v)
    scaled = lambda x, v: times(plain(x, times(v)))

    # 1. Eigenvalue and trace.
    steps_of_lanczos = min(products_per_figure, tree.size(params))
    top = extreme_eigenpairs(scaled, params, products=steps_of_lanczos, key=ends_key).largest
    tr = trace(scaled, params, probes=products_per_figure, key=trace_key)

    # 2. The highest point of the box that conditional gradients find.
    half = jax.tree.map(lambda x: epsilon * (jnp.abs(x) + 1), params) if scale is None else tree.scale(epsilon, scale)
    value_and_grad = jax.value_and_grad(lambda x: fun(x, *args))
    corner = lambda d: jax.tree.map(lambda h, u: jnp.where(u < 0, -h, h).astype(h.dtype), half, d)

    def climb(direction: tree.ArrayTree) -> jax.Array:
        def step(carry: tuple[tree.ArrayTree, jax.Array], _: None) -> tuple[tuple[tree.ArrayTree, jax.Array], None]:
            z, best = carry
            value, grad = value_and_grad(tree.axpy(1.0, z, params))
            return (corner(grad), jnp.fmax(best, value)), None

        lowest = jnp.full((), -jnp.inf, jax.eval_shape(lambda x: fun(x, *args), params).dtype)
        return jax.lax.scan(step, (corner(direction), lowest), length=steps + 1)[0][1]

    first = jax.tree.map(lambda rows: rows[0], top.vectors)
    drawn = jax.vmap(lambda k: random.signs(k, params))(jax.random.split(starts_key, starts))
    directions = jax.tree.map(lambda a, b: jnp.concatenate([a[None], -a[None], b]), first, drawn)
    value = fun(params, *args)
    highest = jnp.max(jax.lax.map(climb, directions))
    peak = jnp.where(highest > -jnp.inf, jnp.maximum(highest, value), jnp.nan)  # NaN if no corner has a value
    return Sharpness(top.values[0], top.residuals[0], tr, 100 * (peak - value) / (1 + value))
