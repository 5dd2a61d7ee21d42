"""Newton's method with a dense Hessian and a choice of damping, for up to a few thousand parameters.

Nocedal & Wright (2006): trust region, Algorithm 4.1 with the exact subproblem of section 4.3 (the loop of it stands in
`region.py`, which saddle-free Newton shares); line search with Hessian modification, Algorithm 3.2, here (its loop in
`ray.py`, which Gauss-Newton shares).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, ray, region, transform
from secondorder.curvature import dense
from secondorder.globalization import line_search, stopping, trust_region
from secondorder.globalization.damping import Levenberg, ModifiedCholesky
from secondorder.globalization.trust_region import TrustRegion
from secondorder.linalg import modified_cholesky, tree


@transform.cached
def newton(
    damping: TrustRegion | Levenberg | ModifiedCholesky = trust_region.trust_region(),  # noqa: B008
    chebyshev: bool | None = False,
) -> optax.GradientTransformationExtraArgs:
    """Newton's method with the dense Hessian, damped so that it converges from anywhere.

    With g and H at the accepted point x, the trial is x + p, where p solves
    - `trust_region()`: min g'p + p'Hp/2 over ||p|| <= radius, exactly, hard case included. At a saddle it leaves along
      the most negative curvature, also if the gradient is zero there.
    - `levenberg()`: (H + sigma I) p = -g, sigma adapted by the gain ratio.
    - `modified_cholesky()`: (H + E) p = -g, followed by a line search along p.

    With `chebyshev`, steps in a region are bent by the third derivative T of the loss, as in Chebyshev's method: the
    trial is x + p + b, where (H + sigma I) b = -T[p, p] / 2 with the shift sigma of p, unless b is longer than 0.45
    of p, or p'Hp < 0. The order of convergence is then three, and bent valleys are followed in fewer and longer steps.

    Args:
      damping: One of the three, with its options. Default: `trust_region()`.
      chebyshev: Bend the steps, with `trust_region()` or `levenberg()`; None: where JAX can differentiate the Hessian
        product once more, as `minimize` asks for by default. Default False.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and `hvp_fn(params, vector)` or `value_fn`.
      The curvature is an argument: with a Gauss-Newton or Fisher product as `hvp_fn` this is the damped Gauss-Newton
      or natural-gradient method. `hvp_fn` must be traceable and linear in `vector`.
      Cost: one dense Hessian (n products) and one O(n³) factorization per accepted point, O(n²) per rejected trial.
      A bend costs one product with T per trial, counted as two Hessian products, and one more copy of the loss in the
      program.

    Raises:
      TypeError: here, for an unknown damping; in `update`, for complex parameters.
      ValueError: here, for `chebyshev` with `modified_cholesky()`; in `update`, if `params`, `value` or curvature is
        missing.
      With `chebyshev=True`, JAX's own error for a product that it cannot differentiate.
      Never for NaN: the trial is rejected; a non-finite Hessian counts as zero, for a step of steepest descent; where
      T is not finite the step is straight.

    Differs from the source: (1) the gain ratio is taken from slopes where the loss drowns in rounding; (2) a radius
    is answered in the eigenbasis, without further factorizations; (3) Chebyshev's correction in a region, with the
    shift of the step, as Transtrum & Sethna (2012) have it for least squares; when it is left out is ours.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x):
      ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
      >>> result = so.minimize(loss, jnp.array([-1.2, 1.0]), so.newton())
      >>> result.params.round(3).tolist()
      [1.0, 1.0]

    References: Nocedal & Wright (2006), Algorithms 4.1 and 3.2; Moré & Sorensen (1983); Nielsen (1999); Gundersen &
    Steihaug (2006), "Sparsity in higher order methods in optimization", Reports in Informatics 327, Bergen.
    """
    if chebyshev is not None:
        checks.flag("newton", "chebyshev", chebyshev)
    if isinstance(damping, ModifiedCholesky):
        if chebyshev:
            raise ValueError(
                f"newton: chebyshev bends the steps in a region, got {chebyshev!r} with modified_cholesky(); leave it "
                "out, or take trust_region() or levenberg()."
            )
        return _search_newton(damping.linesearch)
    if isinstance(damping, (TrustRegion, Levenberg)):
        return region.optimizer("newton", damping, chebyshev=chebyshev)
    raise TypeError(
        f"newton: damping must be made by trust_region(...), levenberg(...) or modified_cholesky(...), got {damping!r}."
    )


@transform.cached
def scale_by_newton(damping: float = 0.0) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the inverse Hessian, (H + damping I)^-1 g, for use in `optax.chain`.

    This is the pure method of the textbook, without any safeguard: it goes to the nearest critical point, minimum,
    maximum or saddle alike. Eigenvalues below n eps of the largest |eigenvalue| count as zero, and their directions
    are left out (pseudo-inverse).

    Args:
      damping: Added to every eigenvalue, >= 0, in the unit of the Hessian [f/x²]. Default 0.

    Returns:
      A `GradientTransformationExtraArgs` that maps g to the Newton step (not negated); `update` needs `params`, and
      `hvp_fn` or `value_fn`. Cost: one dense Hessian and one eigendecomposition per call.

    Raises:
      ValueError, TypeError: for a bad option, or if an argument is missing. Never for NaN: the update is then zero.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_newton(), optax.scale_by_learning_rate(1.0))

    References: Nocedal & Wright (2006), section 3.3.
    """
    who = "scale_by_newton"
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
        values = values + damping
        cut = values.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), initial=0.0)
        keep = jnp.abs(values) > cut
        rotated = tree.matmul(Q.T, tree.ravel(updates, values.dtype))
        step = tree.matmul(Q, jnp.where(keep, rotated / jnp.where(keep, values, 1.0), 0.0))
        step = jnp.where(jnp.isfinite(tree.max_norm(step)), step, 0.0)
        return tree.unravel(step, updates), state

    return transform.pair(init, update)


def _search_newton(search: line_search.LineSearch) -> transform.Optimizer:
    """Return Newton's method with a modified Hessian and a line search (N&W Algorithm 3.2)."""

    def direction(state: ray.SearchState, hvp: transform.Hvp) -> tuple[jax.Array, jax.Array]:
        H = dense.from_products(hvp, state.params)
        H = jnp.where(jnp.all(jnp.isfinite(H)), H, jnp.eye(H.shape[0], dtype=H.dtype))
        factors = modified_cholesky.factorize(H)
        return -modified_cholesky.solve(factors, tree.ravel(state.grad, H.dtype)), factors.indefinite

    def report(info: stopping.Info, indefinite: jax.Array, when: jax.Array) -> stopping.Info:
        return info._replace(hessians=info.hessians + when.astype(jnp.int32), indefinite=indefinite)

    return ray.optimizer("newton", search, lambda *_: jnp.array(False), direction, report)
