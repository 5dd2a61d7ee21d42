"""Newton's method in a region that the gain ratio resizes: Nocedal & Wright (2006), Algorithm 4.1.

The state machine that `newton` (trust region, shift), `saddle_free_newton`, `cubic_newton` and `sr1` share. They differ
in the step that they take in the eigenbasis of the Hessian, and in how they resize it (see `Region`); `sr1` also in
where the matrix comes from, which is learned from gradients (see `Learn`). Steps may be bent by the third derivative,
as in Chebyshev's method.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from secondorder import jaxprs, one_kernel, transform
from secondorder.curvature import dense, products
from secondorder.globalization import stopping, trust_region
from secondorder.globalization.trust_region import Damping, Trial
from secondorder.linalg import tree

LONGEST_BEND = 0.45  # of the length of its step (ours): x^p asks for (p - 2) / (2 p - 2), an exponential for a half
THIRD_COST = 2  # Hessian-vector products that a product with the third derivative counts for


class Region(Protocol):
    """What holds the step back; values are eigenvalues of the Hessian, ascending, shape (n,)."""

    @property
    def accept_ratio(self) -> float:
        """Accept a trial whose gain ratio exceeds this."""
        ...

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first size, from eigenvalues and gradient in the eigenbasis."""
        ...

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the step in the eigenbasis, shape (n,)."""
        ...

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the model promises for the step p in the eigenbasis."""
        ...

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the size after a trial."""
        ...

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether steps of this size no longer move x."""
        ...


# (B, s, y) -> B after the pair, and whether it changed; B: (n, n), s = step and y = change of gradient: (n,).
Learn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class RegionState(NamedTuple):
    """State of `newton` with a trust region or a shift, `saddle_free_newton`, `cubic_newton`, `sr1`.

    Memory: n^2 + 4n; n^2 + 6n with bent steps; where the matrix is learned, 2n^2 + 4n.
    """

    count: jax.Array  # int32: calls of update
    params: tree.ArrayTree  # x, accepted last
    loss: jax.Array  # f(x); Inf if not known
    grad: tree.ArrayTree  # gradient at x
    value: jax.Array  # f(x) while the caller stands at x, else Inf
    fresh: jax.Array  # bool: no region is in flight
    matrix: jax.Array  # B, learned from gradients, shape (n, n); shape (0, 0) where the Hessian is computed
    spectrum: dense.Spectrum  # of the Hessian at x, computed once per accepted point; of B, once per evaluation
    rotated: jax.Array  # gradient in the eigenbasis, shape (n,)
    damping: Damping  # of size 0 until a region is started
    step: jax.Array  # of the trial in flight, before it is bent, in the eigenbasis; shape (n,), or (0,) without bends
    bend: jax.Array  # what was added to it, likewise
    info: stopping.Info


def optimizer(
    who: str, damping: Region, learn: Learn | None = None, chebyshev: bool | None = False
) -> transform.Optimizer:
    """Return the optimizer `who` that takes the steps of `damping` and resizes it by the gain ratio.

    Args:
      who: Public name.
      damping: Steps in the eigenbasis, and their size.
      learn: Update of a matrix that takes the place of the Hessian; default: the Hessian, from products.
      chebyshev: Bend the steps by the third derivative; None: where JAX can form it.
    """
    bends = chebyshev is not False

    def init(params: tree.ArrayTree) -> RegionState:
        n, dtype = tree.size(params), tree.scalar_dtype(params)
        infinite, zero = jnp.full((), jnp.inf, dtype), jnp.zeros((), dtype)
        return RegionState(
            count=jnp.int32(0),
            params=tree.copy(params),
            loss=infinite,
            grad=tree.zeros_like(params),
            value=infinite,
            fresh=jnp.array(True),
            matrix=jnp.zeros((0, 0) if learn is None else (n, n), dtype),
            spectrum=dense.Spectrum(jnp.zeros(n, dtype), jnp.eye(n, dtype=dtype)),
            rotated=jnp.zeros(n, dtype),
            damping=Damping(zero, zero),
            step=jnp.zeros(n if bends else 0, dtype),
            bend=jnp.zeros(n if bends else 0, dtype),
            info=stopping.initial(dtype),
        )

    def judge(state: RegionState, point: transform.Point) -> RegionState:
        # 1. Gain ratio (4.4) of the step that was really taken.
        dtype = state.loss.dtype
        g, g_old = tree.ravel(point.grad, dtype), tree.ravel(state.grad, dtype)
        p = tree.ravel(tree.sub(point.params, state.params), dtype)
        x_old = tree.ravel(state.params, dtype)
        slope, end_slope, pp, xx, grad_norm = tree.products((g_old, p), (g, p), (p, p), (x_old, x_old), peak=g)
        p_norm, x_norm = jnp.sqrt(pp), jnp.sqrt(xx)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(point.loss)
        values, vectors = state.spectrum
        rotated = tree.matmul(vectors.T, p)
        length = p_norm
        if bends:  # the model speaks of the straight step, also of the gradient at the end of the bent one
            rotated = rotated - state.bend
            length = trust_region.norm(rotated)
        predicted = damping.predict(values, state.rotated, rotated, state.damping)
        change = point.loss - state.loss
        ratio = trust_region.gain_ratio(state.loss, point.loss, slope, end_slope, predicted)
        ratio = jnp.where(finite, ratio, -jnp.inf)
        # 2. Accept or reject.
        first = state.fresh
        accepted = jnp.where(first, finite, ratio > damping.accept_ratio)
        x, loss, grad = tree.where(accepted, point, transform.Point(state.params, state.loss, state.grad))
        # 3. Resize the region.
        excess = change + trust_region.decrease(values, state.rotated, rotated)
        if learn is None:
            misfit = trust_region.misfit(values * rotated, tree.matmul(vectors.T, g) - state.rotated)
        else:  # that of a learned matrix says nothing of how far the loss is quadratic
            misfit = jnp.full_like(ratio, jnp.nan)
        trial = Trial(ratio, accepted, length, change, slope, end_slope, excess, misfit)
        resized = tree.where(first, state.damping, damping.resize(state.damping, trial))
        over = damping.exhausted(resized, values, state.rotated, x_norm) | (p_norm == 0)
        if learn is None:  # with the same size (a weight at its limit, say) the same trial would come again
            over = over | (resized.size == state.damping.size)
        stuck = ~first & ~accepted & over
        # A matrix that was learned may be wrong: it is forgotten before the run is called a stall.
        wrong = stuck & jnp.any(state.matrix != 0)
        info = stopping.record(
            state.info,
            accepted=accepted,
            first=first,
            stuck=stuck & ~wrong,
            before=state.loss,
            loss=point.loss,
            grad_norm=grad_norm,
            step_length=jnp.ones_like(loss),
            step_norm=p_norm,
        )
        if learn is not None:
            wrong = wrong | stopping.half_spent(state.info, info)
        # A region that has collapsed says nothing about the next one (another batch, say): begin starts it afresh.
        anew = stuck | wrong
        resized = resized._replace(size=jnp.where(anew, 0.0, resized.size))
        # 4. Learn from the trial, accepted or not (N&W Algorithm 6.2); a point that no step led to teaches no pair.
        if learn is not None:
            pair = finite & ~first
            matrix, changed = learn(state.matrix, jnp.where(pair, p, 0.0), jnp.where(pair, g - g_old, 0.0))
            matrix, known = jnp.where(wrong, 0.0, matrix), state.spectrum
            spectrum = jax.lax.cond(changed | wrong, lambda: dense.spectrum(matrix), lambda: known)
            rotated = tree.matmul(spectrum.vectors.T, tree.ravel(grad, dtype))
            state = state._replace(matrix=matrix, spectrum=spectrum, rotated=rotated)
        return state._replace(
            params=x,
            loss=loss,
            grad=grad,
            value=jnp.full_like(state.value, jnp.inf),
            fresh=accepted | first | anew,
            damping=resized,
            info=info._replace(gain_ratio=jnp.where(first, jnp.nan, ratio), damping=resized.size),
        )

    def begin(state: RegionState, hvp: transform.Hvp | None, when: jax.Array) -> RegionState:
        known = spectrum = state.spectrum
        if learn is None:
            assert hvp is not None
            spectrum = jax.lax.cond(when, lambda: dense.spectrum(dense.from_products(hvp, state.params)), lambda: known)
        rotated = tree.matmul(spectrum.vectors.T, tree.ravel(state.grad, state.loss.dtype))
        rotated = jnp.where(when, rotated, state.rotated)
        size = jax.lax.cond(
            when & (state.damping.size == 0),
            lambda: damping.start(spectrum.values, rotated, tree.norm(state.params), state.loss),
            lambda: state.damping,
        )
        info = state.info._replace(damping=size.size)
        if learn is None:  # an eigenvalue of B is no evidence of a saddle
            values = spectrum.values
            least = values[0] if values.size else jnp.zeros((), values.dtype)
            info = info._replace(
                hessians=info.hessians + when.astype(jnp.int32),
                curvature=jnp.where(when, least, info.curvature),
                indefinite=jnp.where(when, dense.indefinite(values), info.indefinite),
            )
        return state._replace(spectrum=spectrum, rotated=rotated, damping=size, fresh=state.fresh & ~when, info=info)

    def aim(state: RegionState, hvp: transform.Hvp) -> RegionState:
        # Chebyshev's correction: g(x + p + b) = g + H p + H b + T[p, p] / 2 + O(||p||³), whose last two terms cancel if
        # H b = -T[p, p] / 2. In a region b has the shift of p: (H + sigma I) p = -g, (H + sigma I) b = -T[p, p] / 2.
        values, vectors = state.spectrum
        p = damping.step(values, state.rotated, state.damping)
        v = tree.unravel(tree.matmul(vectors, p), state.params)
        third = one_kernel.apart(lambda x, v: products.along(lambda x: hvp(x, v), x, v))
        try:
            third = jaxprs.staged(third, state.params, v)
        except Exception:  # a derivative more than newton() asks for; rules of the user's may raise anything
            if chebyshev:
                raise
            return state._replace(step=p, bend=jnp.zeros_like(p))
        twist = tree.matmul(vectors.T, tree.ravel(third(state.params, v), p.dtype))
        length = trust_region.norm(p)
        unit = p / jnp.where(length > 0, length, 1.0)
        sigma = jnp.maximum(-tree.dot(state.rotated + values * p, unit) / jnp.where(length > 0, length, 1.0), 0.0)
        shifted = values + sigma
        steep = shifted > jnp.finfo(p.dtype).eps ** 0.5 * tree.max_norm(values)  # elsewhere the model knows no way back
        bend = jnp.where(steep, -0.5 * twist / jnp.where(steep, shifted, 1.0), 0.0)
        # Where the model bends down along p, p ends at the border, and not at a minimum that could be corrected.
        kept = (trust_region.norm(bend) <= LONGEST_BEND * length) & (tree.dot(p, values * p) >= 0)
        spent = state.info.hessian_products + jnp.where(state.fresh, 0, THIRD_COST)
        info = state.info._replace(hessian_products=spent)
        return state._replace(step=p, bend=jnp.where(kept & ~state.fresh, bend, 0.0), info=info)

    def rebase(state: RegionState, point: transform.Point) -> RegionState:
        grad_norm = tree.max_norm(point.grad).astype(state.loss.dtype)
        return state._replace(
            params=point.params, loss=point.loss, grad=point.grad, info=state.info._replace(grad_norm=grad_norm)
        )

    def trial(state: RegionState) -> tree.ArrayTree:
        p = state.step + state.bend if bends else damping.step(state.spectrum.values, state.rotated, state.damping)
        move = jnp.where(state.fresh, 0.0, tree.matmul(state.spectrum.vectors, p))
        return tree.axpy(1.0, tree.unravel(move, state.params), state.params)

    return transform.optimizer(
        transform.Algorithm(
            who, init, judge, begin, rebase, trial, needs_curvature=learn is None, aim=aim if bends else None
        )
    )
