"""Capped conjugate gradients: Royer, O'Neill & Wright (2020), Algorithm 1.

Conjugate gradients on the damped system (H + 2 eps I) d = -g. Either they solve it, or they end with a direction of
which d'Hd <= -eps ||d||² is certain: a direction or an iterate of curvature below eps in the damped matrix, or, where
the residual falls more slowly than it must on a matrix whose curvatures lie between eps and M + 2 eps, the difference
of two iterates. The latter bounds the number of products: the cap.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

Matvec = Callable[[tree.ArrayTree], tree.ArrayTree]
CAP = 4.0  # factor of T in Algorithm 1

# What d is.
RUNNING = 0
SOLUTION = 1  # the residual is small enough
CURVATURE = 2  # d'Hd <= -eps ||d||²
LIMIT = 3  # products are spent; d is the last iterate, a direction of descent
NONFINITE = 4  # a product is NaN or Inf; d is the last iterate, -g if there is none
CAPPED = 5  # the residual falls too slowly; only inside


class Capped(NamedTuple):
    """The end of the iteration."""

    d: tree.ArrayTree
    kind: jax.Array  # int32: one of the above
    curvature: jax.Array  # d'Hd / d'd after CURVATURE, else NaN [f/x^2]
    products: jax.Array  # int32
    bound: jax.Array  # M: the largest ||Hv|| / ||v|| that was seen [f/x^2]
    damping: jax.Array  # eps [f/x^2]


class _Carry(NamedTuple):
    j: jax.Array
    y: tree.ArrayTree
    r: tree.ArrayTree  # residual of the damped system at y
    p: tree.ArrayTree  # direction
    Hp: tree.ArrayTree  # product with the direction before
    beta: jax.Array  # r = beta p_before - p
    rr: jax.Array
    eps: jax.Array
    bound: jax.Array
    least: jax.Array  # curvature of the direction or iterate that ended it
    pick: jax.Array  # bool: d is p, not y
    kind: jax.Array


class _Again(NamedTuple):
    i: jax.Array
    y: tree.ArrayTree
    r: tree.ArrayTree
    p: tree.ArrayTree
    rr: jax.Array
    least: jax.Array
    found: jax.Array  # bool


def capped(
    matvec: Matvec,
    g: tree.ArrayTree,
    damping: tree.Numeric,
    share: tree.Numeric,
    tolerance: tree.Numeric,
    accuracy: float | None,
    limit: tree.Numeric,
    floor: tree.Numeric = 0.0,
    unit: tree.Numeric = 1.0,
) -> Capped:
    """Return the end of capped conjugate gradients.

    Args:
      matvec: v -> H v, linear and symmetric.
      g: Gradient, a tree in the working precision; not zero.
      damping: eps, > 0 [f/x²]; or 0 to take `share`.
      share: eps over ||H g|| / ||g||, no unit, where `damping` is 0.
      tolerance: The iteration ends at ||r|| <= tolerance ||g||, unless `accuracy` is given.
      accuracy: zeta: it ends at ||r|| <= zeta / (3 kappa) ||g||, kappa = (M + 2 eps) / eps, as in the source.
      limit: Products at most; with 0 nothing is done.
      floor: Least eps where `damping` is 0 [f/x²].
      unit: What g and H are divided by on the way, shape () [f]; see `steihaug.loss_scale`.
    """
    dtype, zero = tree.scalar_dtype(g), jnp.zeros((), tree.scalar_dtype(g))
    unit, unscaled = jnp.asarray(unit, dtype), matvec
    matvec = lambda v: tree.scale(1 / unit, unscaled(v))
    g, damping, floor = tree.scale(1 / unit, g), jnp.asarray(damping, dtype) / unit, floor / unit
    nothing, gg = tree.zeros_like(g), tree.dot(g, g)

    def step(c: _Carry) -> _Carry:
        # 1. The only product; eps is known after the first. Hy and Hr follow from it (section 3.1).
        Hp = matvec(c.p)
        pp, pHp, hh, yy = tree.dot(c.p, c.p), tree.dot(c.p, Hp), tree.dot(Hp, Hp), tree.dot(c.y, c.y)
        size = jnp.sqrt(hh / jnp.where(pp > 0, pp, 1.0))
        eps = jnp.where(jnp.asarray(damping) > 0, damping, jnp.maximum(share * size, floor))
        eps = jnp.where(c.j > 0, c.eps, eps).astype(dtype)
        Hy = jax.tree.map(lambda r, g, y: r - g - 2 * eps * y, c.r, g, c.y)
        Hr = tree.axpy(c.beta, c.Hp, tree.scale(-1.0, Hp))
        # 2. The largest curvature seen, and what follows from it.
        ratio = lambda a, b: jnp.where(b > 0, jnp.sqrt(a / jnp.where(b > 0, b, 1.0)), 0.0)
        bound = jnp.maximum(c.bound, jnp.maximum(size, ratio(tree.dot(Hr, Hr), c.rr)))
        bound = jnp.maximum(bound, ratio(tree.dot(Hy, Hy), yy))
        small, slow = _limits(bound, eps, accuracy, tolerance, c.j)
        # 3. Is it over? Curvatures are those of H + 2 eps I.
        bend, yHy = pHp + 2 * eps * pp, tree.dot(c.y, c.r) - tree.dot(c.y, g)
        at_y = (c.j > 0) & (yHy < eps * yy)
        at_p = bend < eps * pp
        norm = jnp.sqrt(c.rr / gg)
        kind = jnp.where(norm > slow, CAPPED, RUNNING)
        kind = jnp.where(at_p, CURVATURE, kind)
        kind = jnp.where(norm <= small, SOLUTION, kind) if accuracy is not None else kind
        kind = jnp.where(at_y, CURVATURE, kind)
        kind = jnp.where(jnp.isfinite(pHp) & jnp.isfinite(hh), kind, NONFINITE)
        least = jnp.where(at_y, yHy / jnp.where(yy > 0, yy, 1.0), bend / pp) - 2 * eps
        # 4. The next iterate; after CAPPED it is wanted, too.
        ends = (kind != RUNNING) & (kind != CAPPED)
        alpha = jnp.where(ends, 0.0, c.rr / jnp.where(bend > 0, bend, 1.0))
        damped = tree.axpy(2 * eps, c.p, Hp)
        y, r = tree.axpy(alpha, c.p, c.y), tree.where(ends, c.r, tree.axpy(alpha, damped, c.r))
        rr = jnp.where(ends, c.rr, tree.dot(r, r))
        if accuracy is None:  # known without another product
            kind = jnp.where((kind == RUNNING) & (jnp.sqrt(rr / gg) <= tolerance), SOLUTION, kind)
        kind = jnp.where((kind == RUNNING) & (c.j + 1 >= limit), LIMIT, kind)
        beta = rr / c.rr
        p = tree.where(ends, c.p, tree.axpy(-1.0, r, tree.scale(beta, c.p)))
        return _Carry(c.j + 1, y, r, p, Hp, beta, rr, eps, bound, least, at_p & ~at_y, kind.astype(jnp.int32))

    start = _Carry(
        j=jnp.int32(0),
        y=nothing,
        r=g,
        p=tree.scale(-1.0, g),
        Hp=nothing,
        beta=zero,
        rr=gg,
        eps=jnp.ones((), dtype),
        bound=zero,
        least=zero,
        pick=jnp.array(False),
        kind=jnp.int32(RUNNING),
    )
    end = jax.lax.while_loop(lambda c: (c.kind == RUNNING) & (c.j < limit) & (gg > 0), step, start)
    again = _difference(matvec, g, end)
    found, gone = again.found, (end.kind == NONFINITE) & (end.j == 1)
    bent = (end.kind == CURVATURE) | found
    # Without the difference that theory promises, which is rounding, y solves as well as may be.
    kind = jnp.where(end.kind == CAPPED, jnp.where(found, CURVATURE, LIMIT), end.kind)
    d = tree.where(end.pick & (end.kind == CURVATURE), end.p, end.y)
    d = tree.where(found, tree.sub(end.y, again.y), d)
    d = tree.where(gone, tree.scale(-unit, g), d)
    least = jnp.where(found, again.least, end.least)
    return Capped(
        d=d,
        kind=kind.astype(jnp.int32),
        curvature=jnp.where(bent, unit * least, jnp.nan),
        products=end.j + again.i,
        bound=unit * end.bound,
        damping=unit * end.eps,
    )


def most_products(bound: float, damping: float, accuracy: float) -> int:
    """Return J(M, eps, zeta), the products after which Algorithm 1 has ended in exact arithmetic (its Lemma 1)."""
    j = 0
    while True:
        small, slow = _limits(jnp.asarray(bound), jnp.asarray(damping), accuracy, 0.0, jnp.asarray(j))
        if slow <= small:
            return j
        j += 1


def _limits(
    bound: jax.Array, eps: jax.Array, accuracy: float | None, tolerance: tree.Numeric, j: jax.Array
) -> tuple[tree.Numeric, jax.Array]:
    """Return the residuals, over ||g||, at which the system counts as solved, and above which it falls too slowly."""
    kappa = (bound + 2 * eps) / eps
    root = jnp.sqrt(kappa)
    tau = root / (root + 1)
    # 1 - sqrt(tau) without cancellation.
    slack = 1.0 / ((root + 1) * (1 + jnp.sqrt(tau)))
    slow = CAP**0.5 * kappa**2 / slack * tau ** (0.5 * j.astype(tau.dtype))
    return tolerance if accuracy is None else accuracy / (3 * kappa), slow


def _difference(matvec: Matvec, g: tree.ArrayTree, end: _Carry) -> _Again:
    """Return the first iterate y_i with (y - y_i)'(H + 2 eps I)(y - y_i) < eps ||y - y_i||², y the last; runs it again.

    Nothing is done unless `end` is CAPPED. The products with the damped matrix are differences of residuals.
    """

    def step(c: _Again) -> _Again:
        apart, bend = tree.sub(end.y, c.y), tree.sub(end.r, c.r)
        square, curved = tree.dot(apart, apart), tree.dot(apart, bend)
        found = (curved < end.eps * square) & (square > 0)
        Hp = tree.axpy(2 * end.eps, c.p, matvec(c.p))
        alpha = jnp.where(found, 0.0, c.rr / tree.dot(c.p, Hp))
        r = tree.where(found, c.r, tree.axpy(alpha, Hp, c.r))
        rr = tree.dot(r, r)
        p = tree.axpy(-1.0, r, tree.scale(rr / c.rr, c.p))
        least = curved / jnp.where(square > 0, square, 1.0) - 2 * end.eps
        return _Again(c.i + 1, tree.axpy(alpha, c.p, c.y), r, p, rr, least, found)

    zero = jnp.zeros((), end.rr.dtype)
    start = _Again(jnp.int32(0), tree.zeros_like(g), g, tree.scale(-1.0, g), tree.dot(g, g), zero, jnp.array(False))
    more = lambda c: (end.kind == CAPPED) & ~c.found & (c.i < end.j)
    return jax.lax.while_loop(more, step, start)
