"""Natural gradient in the space of samples, for fewer samples than parameters.

Amari (1998); with n parameters and m < n samples the damped Fisher matrix F + lambda I, F = J'J, is inverted through
the m by m matrix J J' + lambda I: (J'J + lambda I)^-1 J'u = J'(J J' + lambda I)^-1 u.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from secondorder import checks, transform
from secondorder.curvature import residuals as derivatives
from secondorder.linalg import thin_svd, tree

OUTSIDE = 0.5  # power of eps: a smaller share of the gradient outside of the rows of J is rounding (ours)


@transform.cached
def scale_by_natural_gradient(
    scores: Callable[..., Any], damping: float, jacobian: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the damped inverse Fisher matrix of a batch, in the smaller of two spaces.

    The update is (F + lambda I)⁻¹ g, F = J'J, J the Jacobian of `scores`. With J = U diag(s) V', V as many columns as
    there are samples at most, it is V (V'g / (s² + lambda)) + (g - V V'g) / lambda; the last term vanishes where g is
    made of the samples' scores.

    Args:
      scores: scores(params, **extra) -> a tree of m numbers whose Jacobian J makes the Fisher matrix J'J: losses of the
        samples over sqrt(m) for the empirical one, residuals for a sum of squares, centered log-amplitudes over sqrt(m)
        for quantum states. Extra arguments of `update` that it takes by name, such as `batch`, are handed to it.
      damping: lambda, >= 0, in the unit of the Fisher matrix [f/x²]. With 0, what of g lies outside of the rows of J is
        dropped: the step of least norm.
      jacobian: "forward", "reverse", or None for the cheaper one for the shape.

    Returns:
      A `GradientTransformationExtraArgs` that maps g to (F + lambda I)⁻¹ g (not negated); `update` needs `params`.
      Follow it with a learning rate. Without a matrix, and with a trust region: `natural_gradient`.
      Cost: m products with J' and O(n m²) flops for m < n. Memory: about 3 J. Sharded leaves are gathered.

    Raises:
      ValueError, TypeError: for a bad option, or if `params` is missing. Never for NaN: the update is then zero.

    Differs from the source: (1) singular values of J in place of a factor of J J' + lambda I, which has its condition
    squared.

    Example:
      >>> import jax.numpy as jnp, optax, secondorder as so
      >>> A, y = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), jnp.array([3.0, 2.0])
      >>> residual = lambda x: A @ x - y
      >>> optimizer = optax.chain(so.scale_by_natural_gradient(residual, 1e-4), optax.scale_by_learning_rate(1.0))
      >>> x = jnp.zeros(3)
      >>> move, _ = optimizer.update(A.T @ residual(x), optimizer.init(x), x)
      >>> bool(jnp.max(jnp.abs(residual(move))) < 1e-3)
      True

    References: Amari (1998), "Natural gradient works efficiently in learning", Neural Computation 10; Chen & Heyl
    (2024), "Empowering deep neural quantum states through efficient optimization", Nature Physics 20, Eq. (8).
    """
    who = "scale_by_natural_gradient"
    checks.function(who, "scores", scores)
    checks.number(who, "damping", damping, strict=False, hint="1e-3 of the largest eigenvalue is a common start.")
    derivatives.check_mode(who, jacobian)

    def init(params: tree.ArrayTree) -> optax.EmptyState:
        checks.params(who, params)
        return optax.EmptyState()

    def update(
        updates: tree.ArrayTree,
        state: optax.EmptyState,
        params: tree.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, optax.EmptyState]:
        if params is None:
            raise checks.missing(who, "the parameters", "update(grads, state, params)")
        checks.same_shapes(who, updates, params, "the gradient (first argument)")
        extra = transform.taken_by(scores, extra_args)
        # 1. J, and its singular values and right vectors in the smaller space.
        linear = derivatives.linearize(lambda x: scores(x, **extra), transform.as_arrays(params))
        J = derivatives.matrix(linear, jacobian)
        finite = jnp.all(jnp.isfinite(J))
        g = tree.ravel(updates, J.dtype)
        svd = thin_svd.factorize(jnp.where(finite, J, 0.0), jnp.zeros(J.shape[0], J.dtype))
        s = thin_svd.cut(svd.singular, *J.shape)
        # 2. Within the rows of J, and outside of them.
        V = jnp.where(s > 0, svd.vectors, 0.0)
        Vg = tree.matmul(V.T, g)
        rest = g - tree.matmul(V, Vg)
        visible = tree.norm(rest) > jnp.finfo(g.dtype).eps ** OUTSIDE * tree.norm(g)
        known = jnp.asarray(damping) > 0
        divide = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
        p = tree.matmul(V, divide(Vg, s * s + damping))
        p = p + jnp.where(known & visible, divide(rest, jnp.broadcast_to(damping, rest.shape)), 0.0)
        p = jnp.where(finite & jnp.all(jnp.isfinite(p)), p, 0.0)
        return tree.unravel(p, updates), state

    return transform.pair(init, update)
