"""Saddle-free Newton, for non-convex losses of up to a few thousand parameters.

Dauphin, Pascanu, Gulcehre, Cho, Ganguli & Bengio (2014), Algorithm 1, with the exact trust region of Nocedal &
Wright (2006), Algorithm 4.1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, transform
from secondorder import region as newton_region
from secondorder.curvature import dense
from secondorder.globalization import trust_region
from secondorder.globalization.trust_region import Damping, Trial, TrustRegion
from secondorder.linalg import tree


class SaddleFreeRegion(NamedTuple):
    """A trust region whose model has |H| in place of H; see `region.Region`."""

    damping: float
    region: TrustRegion

    @property
    def accept_ratio(self) -> float:
        """Accept a trial whose gain ratio, against the true quadratic model, exceeds this."""
        return self.region.accept_ratio

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first radius."""
        return self.region.start(values, g, x_norm, loss)

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the step in the eigenbasis, shape (n,)."""
        if g.size == 0:
            return g
        # 1. Minimize g'p + p'|H|p / 2 in the ball.
        sizes, radius = _magnitudes(values, self.damping), damping.size
        order = jnp.argsort(sizes)
        p = jnp.zeros_like(g).at[order].set(trust_region.solve(sizes[order], g[order], radius))
        # 2. Leave a saddle on which the gradient vanishes.
        asleep = jnp.linalg.norm(p) <= jnp.finfo(g.dtype).eps ** 0.5 * radius
        escape = jnp.zeros_like(g).at[0].set(jnp.where(g[0] > 0, -radius, radius))
        return jnp.where(asleep & dense.indefinite(values), escape, p)

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the true quadratic model promises for the step p."""
        return self.region.predict(values, g, p, damping)

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the radius after a trial."""
        return self.region.resize(damping, trial)

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether steps of this size no longer move x."""
        return self.region.exhausted(damping, values, g, x_norm)


@transform.cached
def saddle_free_newton(
    damping: float = 0.0,
    region: TrustRegion = trust_region.trust_region(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    """Saddle-free Newton: every eigenvalue counts by its magnitude, so that saddles repel.

    The trial is x + p with p the minimizer of g'p + p'|H|p/2 over ||p|| <= radius, where |H| has the eigenvectors of
    H and the eigenvalues max(|lambda|, sqrt(eps) max|lambda|, damping). Where the gradient vanishes on a saddle (the
    step would be shorter than sqrt(eps) radius although an eigenvalue is negative), the trial is the step of length
    `radius` along the most negative curvature, downhill if the gradient says which way that is.

    Args:
      damping: Least curvature that a step divides by, >= 0, in the unit of the Hessian [f/x²]. Default 0.
      region: `trust_region(...)`, the options of the radius. Default: `trust_region()`.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and `hvp_fn(params, vector)` or `value_fn`.
      Cost: one dense Hessian (n products) and one O(n³) eigendecomposition per accepted point, O(n²) per rejection.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if an argument is missing.
      Never for NaN: the trial is rejected, and a non-finite Hessian counts as zero.

    Differs from the source: (1) the step is the exact solution in the ball, where the source divides by |H| and
    searches a damping; (2) the gain ratio compares with the true quadratic model; (3) the rule for zero gradients.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def saddle(x):
      ...     return x[0] ** 2 - x[1] ** 2 + x[1] ** 4
      >>> result = so.minimize(saddle, jnp.zeros(2), so.saddle_free_newton())
      >>> round(float(result.value), 3)
      -0.25

    References: Dauphin et al. (2014), "Identifying and attacking the saddle point problem in high-dimensional
    non-convex optimization", NeurIPS, Algorithm 1; Conn, Gould & Toint (2000), section 7.3.
    """
    who = "saddle_free_newton"
    checks.number(who, "damping", damping, strict=False)
    if not isinstance(region, TrustRegion):
        raise TypeError(f"{who}: region must be made by secondorder.trust_region(...), got {region!r}.")
    return newton_region.optimizer(who, SaddleFreeRegion(damping, region))


@transform.cached
def scale_by_saddle_free_newton(damping: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by |H|^-1, for use in `optax.chain`.

    Args:
      damping: Least curvature that a step divides by, >= 0, in the unit of the Hessian [f/x²]. Default 0.

    Returns:
      A `GradientTransformationExtraArgs` that maps g to |H|⁻¹ g (not negated), with the eigenvalues of |H| floored as
      in `saddle_free_newton`; `update` needs `params`, and `hvp_fn` or `value_fn`.
      Cost: one dense Hessian and one eigendecomposition per call.

    Raises:
      ValueError, TypeError: for a bad option, or if an argument is missing. Never for NaN: the update is then zero.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_saddle_free_newton(), optax.scale_by_learning_rate(1.0))

    References: as for `saddle_free_newton`.
    """
    who = "scale_by_saddle_free_newton"
    checks.number(who, "damping", damping, strict=False)

    def init(params: tree.ArrayTree) -> optax.EmptyState:
        checks.params(who, params)
        return optax.EmptyState()

    def update(
        updates: tree.ArrayTree,
        state: optax.EmptyState,
        params: tree.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        hvp_fn: transform.Hvp | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, optax.EmptyState]:
        hvp = transform.curvature(who, updates, params, value_fn, hvp_fn, extra_args)
        values, Q = dense.spectrum(dense.from_products(hvp, params))
        floored = _magnitudes(values, damping)
        rotated = tree.matmul(Q.T, tree.ravel(updates, values.dtype))
        step = tree.matmul(Q, jnp.where(floored > 0, rotated / jnp.where(floored > 0, floored, 1.0), 0.0))
        step = jnp.where(jnp.isfinite(tree.max_norm(step)), step, 0.0)
        return tree.unravel(step, updates), state

    return transform.pair(init, update)


def _magnitudes(values: jax.Array, damping: tree.Numeric) -> jax.Array:
    """Return the eigenvalues of |H|, floored; shape (n,)."""
    size = jnp.abs(values)
    floor = jnp.finfo(values.dtype).eps ** 0.5 * jnp.max(size, initial=0.0)
    return jnp.maximum(size, jnp.maximum(floor, damping))
