"""A dense inverse Hessian under secant updates: one matrix-vector product and one pass in place per update.

The Broyden class with self-scaling (Nocedal & Wright 2006, section 6.3; Al-Baali & Khalfan 2005), in the inverse form:
with u = H y, h = y'u / s'y and v = s / s'y - u / y'u,

    H+ = [H - u u' / y'u + phi y'u v v'] / tau + s s' / s'y.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from secondorder.linalg import tree
from secondorder.linalg.branch import branch


class Inverse(NamedTuple):
    """The matrix keep H + start I + s w' + w s' + bend u u'; the terms beside H wait for the next pass over H.

    They wait because XLA otherwise fuses the whole line search into that pass and repeats it for every entry of H.
    """

    H: jax.Array  # symmetric [x^2/f], shape (n, n)
    s: jax.Array  # shape (n,)
    w: jax.Array  # shape (n,)
    u: jax.Array  # H y, shape (n,); shape (0,) where no member of the class but BFGS is asked for
    bend: jax.Array  # (phi - 1) / (tau y'u), shape ()
    keep: jax.Array  # factor of H: 1 / tau, the first scaling (N&W 6.20), or 0 at a reset; shape ()
    start: jax.Array  # multiple of the identity that is added: 1 at a reset, else 0; shape ()
    pairs: jax.Array  # int32: updates since H was last the identity


class Pair(NamedTuple):
    """What one step taught."""

    s: jax.Array  # step, shape (n,)
    y: jax.Array  # change of the gradient, shape (n,)
    ss: jax.Array  # s's, shape ()
    sy: jax.Array  # s'y
    yy: jax.Array  # y'y
    sg: jax.Array  # s'g at the new gradient
    weighted: jax.Array  # s'H⁻¹s [f], known from the direction: -alpha s'g at the old gradient; shape ()


class Weights(NamedTuple):
    """Which member of the class makes the next matrix; each field has shape ()."""

    phi: jax.Array  # 1 for BFGS, 0 for DFP
    tau: jax.Array  # H is divided by it


class _Update(NamedTuple):
    """What a pair makes: the terms that wait (see `Inverse`), the new direction, and 1 if the pair entered."""

    s: jax.Array
    w: jax.Array
    u: jax.Array
    bend: jax.Array
    keep: jax.Array
    direction: jax.Array
    pairs: jax.Array


Member = Callable[[jax.Array, jax.Array, jax.Array, int], Weights]  # (h, b = s'H⁻¹s / s'y, first pair, n) -> Weights


def identity(params: tree.ArrayTree, *, whole_class: bool = True) -> Inverse:
    """Return the identity for parameters like these; only the BFGS update applies to it without `whole_class`."""
    n, dtype = tree.size(params), tree.scalar_dtype(params)
    zero = jnp.zeros((), dtype)
    nothing = jnp.zeros(n, dtype)
    u = jnp.zeros(n if whole_class else 0, dtype)
    return Inverse(jnp.eye(n, dtype=dtype), nothing, nothing, u, zero, jnp.ones((), dtype), zero, jnp.int32(0))


def current(inverse: Inverse) -> jax.Array:
    """Return the matrix, shape (n, n): one pass over H, in place in a loop."""
    H, s, w, u, bend, keep, start, _ = inverse
    n = s.size
    # The identity depends on `start`, so that it stays inside the pass instead of becoming a second matrix.
    diagonal = jnp.arange(n)[:, None] + jnp.where(start > 0, 0, n) == jnp.arange(n)[None, :]
    terms = s[:, None] * w[None, :] + w[:, None] * s[None, :]
    if u.size:
        terms = terms + bend * (u[:, None] * u[None, :])
    return jnp.where(diagonal, start, keep * H + terms)


def apply(inverse: Inverse, g: jax.Array) -> jax.Array:
    """Return the matrix times g, shape (n,), without forming it."""
    H, s, w, u, bend, keep, start, _ = inverse
    Hg = keep * tree.matmul(H, g) + start * g + s * tree.dot(w, g) + w * tree.dot(s, g)
    return Hg + bend * tree.dot(u, g) * u if u.size else Hg


def update(
    inverse: Inverse,
    p: jax.Array,
    pair: Pair,
    g: jax.Array,
    learn: jax.Array,
    reset: jax.Array,
    scale: bool,
    least: tree.Numeric = 0.0,
    member: Member | None = None,
) -> tuple[Inverse, jax.Array]:
    """Return the inverse after a pair, and -H g at the new gradient g.

    A pair enters if s'y >= sqrt(eps) ||s|| ||y|| and the weights are finite.

    Args:
      inverse: H.
      p: -H g at the old gradient, shape (n,).
      pair: s, y and what is known of them.
      g: Gradient at the point that is kept, shape (n,).
      learn: Take the pair in, if it may enter; its s'g must then be that of this g.
      reset: Start again from the identity; never together with `learn`.
      scale: Scale the first H by (N&W 6.20).
      least: Lower limit of the first scaling.
      member: Weights of the update; default: BFGS, phi = tau = 1.
    """
    H = current(inverse)  # the only pass
    q = tree.matmul(H, g)  # the only product
    sy, yy = pair.sy, pair.yy
    limit = jnp.finfo(sy.dtype).eps ** 0.5 * jnp.sqrt(pair.ss) * jnp.sqrt(yy)
    good = learn & (sy > limit) & (sy > jnp.finfo(sy.dtype).tiny) & jnp.isfinite(limit)
    scaling = good & (inverse.pairs == 0) & scale
    c = jnp.where(scaling, jnp.maximum(sy / jnp.where(good, yy, 1.0), least), 1.0)  # (6.20)

    nothing, zero, keep = jnp.zeros_like(g), jnp.zeros_like(sy), jnp.where(reset, 0.0, jnp.ones_like(sy))
    as_before = _Update(nothing, nothing, jnp.zeros_like(inverse.u), zero, keep, -jnp.where(reset, g, q), jnp.int32(0))
    # The branch keeps the terms in one place of the compiled program: XLA otherwise repeats them in every vector.
    operands = as_before, pair, q, q + p, g, c, scaling
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(member))  # over which a branch may not close
    decide = jax.lax.cond if traced else branch
    s, w, u, bend, keep, direction, pairs = decide(
        good, partial(_learned, member), lambda as_before, *_: as_before, *operands
    )
    start = jnp.where(reset, 1.0, 0.0).astype(keep.dtype)
    pairs = jnp.where(reset, 0, inverse.pairs + pairs)
    return Inverse(H, s, w, u, bend, keep, start, pairs), direction


def _learned(
    member: Member | None,
    as_before: _Update,
    pair: Pair,
    q: jax.Array,
    change: jax.Array,
    g: jax.Array,
    c: jax.Array,
    scaling: jax.Array,
) -> _Update:
    """Return what the pair makes of c H, with q = H g and change = H y; as before, if the weights are not finite."""
    s, y, _, sy, _, sg, weighted = pair
    u = c * change
    yu, ug, _ = tree.products((y, u), (u, g), peak=u)
    h = yu / sy
    if member is None:
        phi, tau, usable, bend = jnp.ones_like(h), jnp.ones_like(h), jnp.array(True), jnp.zeros_like(h)
    else:
        phi, tau = member(h, weighted / (c * sy), scaling, s.size)
        usable = jnp.isfinite(phi) & (tau > 0) & (yu > jnp.finfo(sy.dtype).tiny)
        bend = (phi - 1.0) / (tau * yu)
    keep, along, across = c / tau, 0.5 * (1.0 + phi * h / tau) / sy, phi / (tau * sy)
    usable = usable & jnp.isfinite(keep) & jnp.isfinite(along) & jnp.isfinite(across) & jnp.isfinite(bend)
    w = along * s - across * u  # (6.17) as H + s w' + w s'
    Hg = keep * q + s * (along * sg - across * ug) + w * sg
    if as_before.u.size:
        Hg = Hg + bend * ug * u
    else:
        u = as_before.u
    return tree.where(usable, _Update(s, w, u, bend, keep, -Hg, jnp.int32(1)), as_before)
