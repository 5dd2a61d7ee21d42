"""Truncated conjugate gradients in a ball: Steihaug (1983), Toint (1981); Nocedal & Wright (2006), Algorithm 7.2.

The iterates move away from the origin in the norm of the preconditioner M, ||p||_M² = p'Mp, so that the first one
beyond the radius, or the first direction d with d'Hd <= 0, tells all that this path has to say about the ball. What
`truncated` returns is the model on the three vectors that it holds at the end, so that other radii need no product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

Matvec = Callable[[tree.ArrayTree], tree.ArrayTree]
Note = Callable[[Any, tree.ArrayTree, tree.ArrayTree, jax.Array], Any]
ASYMMETRY = 0.25  # |s'Hd - d'Hs| beyond eps^ASYMMETRY of what the lengths allow is no rounding (ours)

# Why the iteration ended.
RUNNING = 0
RESIDUAL = 1  # ||r|| is small enough
BOUNDARY = 2  # the next iterate lies outside of the ball
CURVATURE = 3  # d'Hd <= 0
LIMIT = 4  # products are spent
NONFINITE = 5  # a product or the preconditioner returned NaN or Inf
PRECONDITIONER = 6  # r'M^-1 r <= 0 although r is not zero: M is not positive definite
ASYMMETRIC = 7  # s'Hd differs from d'Hs: the matrix is not symmetric


class Reduced(NamedTuple):
    """The quadratic model g'p + p'Hp/2 on p = c_0 d_0 + c_1 s + c_2 d; vectors that are zero have zero rows."""

    gram: jax.Array  # inner products of the three in M, shape (3, 3)
    hessian: jax.Array  # shape (3, 3)
    gradient: jax.Array  # shape (3,)


class Path(NamedTuple):
    """Where the iteration ended."""

    s: tree.ArrayTree  # last iterate inside the ball
    d: tree.ArrayTree  # direction that leaves it, or of negative curvature; zero after RESIDUAL and LIMIT
    reduced: Reduced  # the model on (d_0, s, d), d_0 = -M^-1 g
    last: jax.Array  # coefficients of the solution on this path, shape (3,)
    exit: jax.Array  # int32: one of the reasons above
    products: jax.Array  # int32
    least: jax.Array  # d'Hd / d'd of the direction that `exit` is about, else NaN [f/x^2]
    negative: jax.Array  # bool: `least` is negative beyond rounding
    notes: Any  # what `note` has written


class _Carry(NamedTuple):
    i: jax.Array
    s: tree.ArrayTree
    r: tree.ArrayTree  # g + H s
    z: tree.ArrayTree  # M^-1 r; () where it is r
    d: tree.ArrayTree  # the last direction
    Hd: tree.ArrayTree
    rz: jax.Array  # r'M^-1 r
    beta: jax.Array  # the next direction is beta d - z
    ss: jax.Array  # s'Ms, s'Md, d'Md by their recurrences (CGT 7.5.5 to 7.5.7)
    sd: jax.Array
    dd: jax.Array
    bend: jax.Array  # d'H d
    first: jax.Array  # d_0'H d_0
    steepest: jax.Array  # largest |d'Hd| / d'Md so far
    promise: jax.Array  # decrease of the model at s
    exit: jax.Array
    notes: Any


def truncated(
    matvec: Matvec,
    g: tree.ArrayTree,
    radius: jax.Array,
    tolerance: jax.Array,
    limit: jax.Array,
    promise: jax.Array,
    precondition: Matvec | None,
    notes: Any = (),
    note: Note | None = None,
    unit: tree.Numeric = 1.0,
) -> tuple[Path, tree.ArrayTree, jax.Array]:
    """Return the end of the path, d_0 / unit, and the radius, cut down to where the model promises `promise`.

    Args:
      matvec: v -> H v, linear and symmetric.
      g: Gradient, a tree in the working precision.
      radius: > 0, Inf for none.
      tolerance: The iteration ends at ||r|| <= tolerance ||g||, norms in M^-1.
      limit: Products at most; with 0 nothing is done.
      promise: Most decrease of the model that is trusted; Inf if any is.
      precondition: v -> M^-1 v, M symmetric positive definite; None for M = I.
      notes: What `note` has written so far.
      note: (notes, d, H d, whether d'Hd > 0) -> notes, called with each direction, d'Md = 1, and its product.
      unit: What the model is divided by while the path is made, shape () [f]; see `loss_scale`. The model returned is
        that of (d_0 / unit, s, d).
    """
    dtype, tiny = tree.scalar_dtype(g), jnp.finfo(tree.scalar_dtype(g)).tiny
    zero, nothing = jnp.zeros((), dtype), tree.zeros_like(g)
    unit = jnp.asarray(unit, dtype)
    g, promise = tree.scale(1 / unit, g), promise / unit
    apply = (lambda r: r) if precondition is None else precondition
    z = apply(g)
    gz, gg = tree.dot(g, z), tree.dot(g, g)
    bad = ~((gz > 0) & jnp.isfinite(gz)) & (gg > 0)
    z = tree.where(bad, g, z)  # a step is possible all the same: steepest descent
    rz0 = jnp.where(bad, gg, gz)
    reason = jnp.where(bad, jnp.where(jnp.isfinite(gz), PRECONDITIONER, NONFINITE), RUNNING)
    reason = jnp.where(rz0 > 0, reason, RESIDUAL).astype(jnp.int32)

    def step(c: _Carry) -> _Carry:
        # 1. The next conjugate direction, and the only product.
        z = c.r if precondition is None else c.z
        d = tree.axpy(-1.0, z, tree.scale(c.beta, c.d))
        sd, dd = c.beta * c.sd, c.rz + c.beta * c.beta * c.dd
        Hd = tree.scale(1 / unit, matvec(d))
        bend = tree.dot(d, Hd)
        bent = bend > 0
        alpha = c.rz / jnp.where(bent, bend, 1.0)
        # 2. Leave on negative curvature, at the boundary, or where the model promises too much.
        ss = c.ss + 2 * alpha * sd + alpha * alpha * dd
        gain = 0.5 * alpha * c.rz  # alpha r'z - alpha^2 d'Hd / 2
        outside = ~(ss < radius * radius) | (c.promise + gain > promise)
        reason = jnp.where(jnp.isfinite(bend), jnp.where(bent, BOUNDARY, CURVATURE), NONFINITE)
        left = ~bent | outside
        # 3. The next iterate and its residual.
        alpha = jnp.where(left, 0.0, alpha)
        s, r = tree.axpy(alpha, d, c.s), tree.where(left, c.r, tree.axpy(alpha, Hd, c.r))
        z = r if precondition is None else precondition(r)
        rz = jnp.where(left, c.rz, tree.dot(r, z))
        small = jnp.sqrt(jnp.maximum(rz, 0.0)) <= tolerance * jnp.sqrt(rz0)
        sick = ~jnp.isfinite(rz) | ((rz < 0) if precondition is not None else False)
        reason = jnp.where(left, reason, jnp.where(small, RESIDUAL, RUNNING))
        reason = jnp.where(left | ~sick, reason, jnp.where(jnp.isfinite(rz), PRECONDITIONER, NONFINITE))
        reason = jnp.where((reason == RUNNING) & (c.i + 1 >= limit), LIMIT, reason)
        return _Carry(
            i=c.i + 1,
            s=s,
            r=r,
            z=() if precondition is None else z,
            d=d,
            Hd=Hd,
            rz=rz,
            beta=rz / c.rz,
            ss=jnp.where(left, c.ss, ss),
            sd=sd + alpha * dd,
            dd=dd,
            bend=bend,
            first=jnp.where(c.i == 0, bend, c.first),
            steepest=jnp.maximum(c.steepest, jnp.where(jnp.isfinite(bend), jnp.abs(bend) / dd, 0.0)),
            promise=c.promise + jnp.where(left, 0.0, gain),
            exit=reason.astype(jnp.int32),
            notes=c.notes if note is None else _noted(note, c.notes, d, Hd, dd, unit, bent & jnp.isfinite(bend)),
        )

    d0 = tree.scale(-1.0, z)
    start = _Carry(
        i=jnp.int32(0),
        s=nothing,
        r=g,
        z=() if precondition is None else z,
        d=d0,
        Hd=nothing,
        rz=rz0,
        beta=zero,
        ss=zero,
        sd=zero,
        dd=rz0,
        bend=zero,
        first=zero,
        steepest=zero,
        promise=zero,
        exit=reason,
        notes=notes,
    )
    end = jax.lax.while_loop(lambda c: (c.exit == RUNNING) & (c.i < limit), step, start)
    # Without a finite product there is no curvature: a linear model, and the steepest descent to the boundary.
    linear = (end.i == 0) & (end.exit >= NONFINITE) | (end.i == 1) & ~jnp.isfinite(end.bend)
    leaves = (end.exit == BOUNDARY) | (end.exit == CURVATURE) | linear
    bend = jnp.where(leaves & ~linear, end.bend, 0.0)
    Hd = tree.where(leaves & ~linear, end.Hd, nothing)
    d = tree.where(leaves, end.d, nothing)
    flag = leaves.astype(dtype)
    gs, gd, rs, rd = tree.dot(g, end.s), tree.dot(g, d), tree.dot(end.r, end.s), tree.dot(end.r, d)
    first_s, first_d, s_d = tree.dot(end.r, d0) + rz0, tree.dot(d0, Hd), tree.dot(end.s, Hd)
    gram = _symmetric(rz0, -gs, -gd, end.ss, flag * end.sd, flag * end.dd)
    # d'Hs is known twice; where the two differ beyond rounding, the matrix is not symmetric.
    d_s = rd - gd
    lengths = tree.norm(end.s) * tree.norm(Hd) + tree.norm(d) * (tree.norm(end.r) + jnp.sqrt(gg))
    eps = max([float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(g)], default=0.0)
    skew = leaves & ~linear & (jnp.abs(s_d - d_s) > eps**ASYMMETRY * lengths)
    hessian = _symmetric(jnp.where(linear, 0.0, end.first), first_s, first_d, rs - gs, 0.5 * (s_d + d_s), bend)
    reduced = Reduced(gram, unit * hessian, unit * jnp.stack([-rz0, gs, gd]))
    # Along d up to the boundary, or to where the model promises enough.
    to_boundary = _root(flag * end.dd, flag * end.sd, end.ss - radius * radius)
    to_promise = _root(-0.5 * bend, -0.5 * (gd + d_s), -(promise - end.promise))
    fair = jnp.isfinite(promise) & (to_promise > 0) & jnp.isfinite(to_promise)
    tau = jnp.where(fair, jnp.minimum(to_boundary, to_promise), to_boundary)
    tau = jnp.where(leaves & jnp.isfinite(tau), tau, 0.0)
    cut = jnp.sqrt(jnp.maximum(end.ss + 2 * tau * end.sd + tau * tau * end.dd, tiny))
    radius = jnp.where(leaves & fair & (to_promise < to_boundary), cut, radius)
    d_norm = tree.dot(d, d)
    least = jnp.where(end.exit == CURVATURE, bend / jnp.where(d_norm > 0, d_norm, 1.0), jnp.nan)
    rounding = 10 * jnp.finfo(dtype).eps * end.steepest
    path = Path(
        s=end.s,
        d=d,
        reduced=reduced,
        last=jnp.stack([zero, jnp.ones((), dtype), tau]),
        exit=jnp.where(skew, ASYMMETRIC, end.exit).astype(jnp.int32),
        products=end.i,
        least=unit * least,
        negative=(end.exit == CURVATURE) & (bend < -rounding * end.dd),
        notes=end.notes,
    )
    return path, d0, radius


def loss_scale(norm: jax.Array) -> jax.Array:
    """Return the largest power of two that is at most `norm`, or 1 if that is less; shape ().

    g'Hg overflows long before g and H do: in float32 where both are 1e13. Dividing both by this rounds nothing. The
    max-norm of g is known before any sum is, so that devices which share g need not reduce once more.
    """
    return tree.power_of_two(jnp.maximum(norm, 1.0))


def _noted(
    note: Note, notes: Any, d: tree.ArrayTree, Hd: tree.ArrayTree, dd: jax.Array, unit: jax.Array, useful: jax.Array
) -> Any:
    scale = jax.lax.rsqrt(jnp.where(dd > 0, dd, 1.0))  # neither d nor its curvature may vanish in rounding
    return note(notes, tree.scale(scale, d), tree.scale(unit * scale, Hd), useful)


def _root(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return the larger root of a t^2 + 2 b t + c for a > 0 > c, or the smallest positive one there is; else NaN."""
    scale = jnp.maximum(jnp.maximum(jnp.abs(a), jnp.abs(b)), jnp.abs(c))
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1.0)
    a, b, c = a / scale, b / scale, c / scale
    root = jnp.sqrt(b * b - a * c)
    # Without cancellation: -c / (b + root) where b >= 0.
    stable = b + jnp.where(b >= 0, root, 0.0)
    return jnp.where(b >= 0, -c / jnp.where(stable != 0, stable, 1.0), (root - b) / jnp.where(a != 0, a, 1.0))


def _symmetric(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, e: jax.Array, f: jax.Array) -> jax.Array:
    """Return [[a, b, c], [b, d, e], [c, e, f]]."""
    return jnp.stack([jnp.stack([a, b, c]), jnp.stack([b, d, e]), jnp.stack([c, e, f])])
