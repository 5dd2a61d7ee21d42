"""BFGS with a dense inverse Hessian, for smooth functions of up to a few thousand parameters.

Nocedal & Wright (2006), Algorithm 6.1, update (6.17). The loop stands in `secant.py`, which the Broyden class shares,
the update in `linalg/inverse_hessian.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, secant, transform
from secondorder.globalization import line_search
from secondorder.linalg import inverse_hessian, tree
from secondorder.linalg.inverse_hessian import Inverse, Pair


class ScaleByBFGSState(NamedTuple):
    """State of `scale_by_bfgs`."""

    count: jax.Array  # int32: finite gradients seen
    params: tree.ArrayTree  # parameters of the last gradient
    updates: tree.ArrayTree  # the last gradient
    direction: jax.Array  # -H g, shape (n,)
    inverse: Inverse


@transform.cached
def bfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    scale_init_precond: bool = True,
    linesearch: line_search.LineSearch | None = line_search.line_search(),  # noqa: B008
    initial_scale: tree.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    """BFGS: quasi-Newton steps from a dense inverse Hessian.

    The step is p = -H g. After it, with s = x₊ - x, y = g₊ - g,
    H₊ = (I - s y'/s'y) H (I - y s'/s'y) + s s'/s'y, written as H + s w' + w s'. A pair enters if
    s'y >= sqrt(eps) ||s|| ||y||; the first one scales the start, H = gamma I with gamma = max(s'y / y'y, c u²/|f|),
    where u = max(1, ||x0||) and c is `initial_scale`: (6.20) with a lower limit. A direction that fails is replaced by
    steepest descent, with H reset.

    Args:
      learning_rate: Fixed step length or schedule; it switches the search off. Default: none, search.
      scale_init_precond: Scale H before the first update. Default True. Without a search, by (6.20) alone.
      linesearch: `line_search(...)` (the default), or None for unit steps (or `learning_rate`).
      initial_scale: c, >= 0, no unit. Default 1. Updates cut an H that is too large, and make a small one grow slowly
        (Byrd, Liu & Nocedal 1992): for thousands of steps on an ill-conditioned loss, 100 is better (a third of the
        error on Poisson networks); over short runs it costs a tenth more evaluations. 0: (6.20) alone.

    Returns:
      A `GradientTransformationExtraArgs`, called as `lbfgs` is; real parameters only.
      Cost: one matrix-vector product and one in-place pass over H per evaluation. Memory: n² + 7n numbers.

    Raises:
      ValueError, TypeError: here, for options out of range; in `update`, if `params` or `value` is missing, or for
        complex parameters. Never for NaN: the trial is rejected, `state.info.status` says how the run stands.

    Differs from the source: (1) H y = H g₊ + p needs no product of its own, and -H₊g₊ follows from H g₊ by vector
    algebra; (2) the update is written as one symmetric rank-two term, fused with the scaling and the reset; (3) a
    search begins at the step for which a quadratic would fall as much as the loss did last (N&W 3.60), between 0.01
    and 1.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> result = so.minimize(lambda x: jnp.sum((x - 3.0) ** 4 + x**2), jnp.zeros(2), so.bfgs())
      >>> bool(result.success)
      True

    References: Nocedal & Wright (2006), section 6.1; Byrd, Liu & Nocedal (1992), "On the behavior of Broyden's class of
    quasi-Newton methods".
    """
    return secant.optimizer("bfgs", learning_rate, scale_init_precond, linesearch, initial_scale=initial_scale)


@transform.cached
def scale_by_bfgs(scale_init_precond: bool = True) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by the dense BFGS inverse Hessian, for use in `optax.chain`.

    Args:
      scale_init_precond: As in `bfgs`. Default True; the first step is then -g min(1, 1/||g||).

    Returns:
      A `GradientTransformationExtraArgs` that maps g to H g (not negated); `update` needs `params`. Pairs are
      differences of successive gradients. Follow it with a learning rate or an optax line search.

    Raises:
      ValueError, TypeError: if `params` is missing or complex. A non-finite gradient gives a zero update.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_bfgs(), optax.scale_by_learning_rate(0.5))

    References: as for `bfgs`.
    """
    who = "scale_by_bfgs"
    checks.flag(who, "scale_init_precond", scale_init_precond)

    def init(params: tree.ArrayTree) -> ScaleByBFGSState:
        checks.params(who, params)
        params = transform.as_arrays(params)
        inverse = inverse_hessian.identity(params, whole_class=False)
        direction = jnp.zeros(inverse.H.shape[0], inverse.H.dtype)
        return ScaleByBFGSState(jnp.int32(0), tree.copy(params), tree.zeros_like(params), direction, inverse)

    def update(
        updates: tree.ArrayTree,
        state: ScaleByBFGSState,
        params: tree.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, ScaleByBFGSState]:
        del extra_args
        if params is None:
            raise checks.missing(who, "the parameters", "update(grads, state, params)")
        checks.same_shapes(who, updates, params, "the gradient (first argument)")
        dtype = state.direction.dtype
        new = tree.cast_like(updates, state.updates)
        s, y = tree.ravel(tree.sub(params, state.params), dtype), tree.ravel(tree.sub(new, state.updates), dtype)
        g = tree.ravel(new, dtype)
        ss, sy, yy, sg, grad_norm = tree.products((s, s), (s, y), (y, y), (s, g), peak=g)
        finite, first = jnp.isfinite(grad_norm), state.count == 0
        pair = Pair(s, y, ss, sy, yy, sg, jnp.full((), jnp.nan, dtype))  # BFGS asks for no s'H⁻¹s
        x, grad = tree.where(finite, (params, new), (state.params, state.updates))
        no = jnp.array(False)
        g = tree.ravel(grad, dtype)
        inverse, p = inverse_hessian.update(
            state.inverse, state.direction, pair, g, finite & ~first, no, scale_init_precond
        )
        length = tree.norm(p)
        capped = jnp.where((inverse.pairs == 0) & scale_init_precond & (length > 1), 1 / length, 1.0)
        Hg = tree.unravel(jnp.where(finite, -capped, 0.0) * p, state.params)
        return Hg, ScaleByBFGSState(state.count + finite.astype(jnp.int32), x, grad, p, inverse)

    return transform.pair(init, update)
