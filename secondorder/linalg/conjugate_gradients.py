"""Conjugate gradients for one symmetric system that may be too large for a matrix.

Source: Hestenes & Stiefel (1952); Nocedal & Wright (2006), Alg. 5.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import tree


class _Carry(NamedTuple):
    x: tree.ArrayTree  # the solution so far
    r: tree.ArrayTree  # residual A x - b
    p: tree.ArrayTree  # direction
    rr: jax.Array  # ||r||²
    steepest: jax.Array  # largest pᵀA p / pᵀp seen, the scale of A
    running: jax.Array  # bool
    turn: jax.Array  # int32


def solve(
    apply: Callable[[tree.ArrayTree], tree.ArrayTree], b: tree.ArrayTree, tolerance: float, max_turns: int
) -> tree.ArrayTree:
    """Return x with ||A x - b|| <= tolerance ||b||, or the best that conjugate gradients reach.

    Args:
      apply: v -> A v, A symmetric; trees like b.
      b: Right-hand side.
      tolerance: Relative, >= 0, no unit.
      max_turns: Products at most.

    Returns:
      A tree like b. Where A is singular and b in its range, the solution of least norm. A direction without positive
      curvature beyond rounding ends the iteration: the x before it is returned, which is finite if A and b are.
    """
    dtype = tree.scalar_dtype(b)
    bb = tree.dot(b, b)
    rounding = 10 * jnp.finfo(dtype).eps

    def turn(c: _Carry) -> _Carry:
        # 1. Curvature along p.
        Ap = apply(c.p)
        pp, pAp = tree.dot(c.p, c.p), tree.dot(c.p, Ap)
        steepest = jnp.maximum(c.steepest, jnp.abs(pAp) / jnp.where(pp > 0, pp, 1.0))
        positive = pAp > rounding * steepest * pp
        # 2. Step and new residual (5.24).
        alpha = jnp.where(positive, c.rr / jnp.where(positive, pAp, 1.0), 0.0)
        x, r = tree.axpy(alpha, c.p, c.x), tree.axpy(alpha, Ap, c.r)
        # 3. New direction.
        rr = tree.dot(r, r)
        beta = rr / jnp.where(c.rr > 0, c.rr, 1.0)
        p = tree.axpy(beta, c.p, tree.scale(-1.0, r))
        running = positive & (rr > tolerance**2 * bb) & (c.turn + 1 < max_turns)
        return _Carry(x, r, p, rr, steepest, running, c.turn + 1)

    start = _Carry(tree.zeros_like(b), tree.scale(-1.0, b), b, bb, jnp.zeros((), dtype), bb > 0, jnp.int32(0))
    end = jax.lax.while_loop(lambda c: c.running, turn, start)
    finite = jnp.isfinite(bb)
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan).astype(x.dtype), end.x)
