"""The inverse Hessian of L-BFGS in compact form: Byrd, Nocedal & Schnabel (1994), Theorem 2.2.

`lbfgs` learns one pair per step, with products that it has anyway (`learn`); a preconditioner writes many pairs at once
and then measures them (`measured`). Both apply the matrix by two passes over the rows (`direction`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from secondorder.linalg import tree
from secondorder.linalg.branch import branch, interrupts

SMALL_CHANGE = 0.1  # ||y|| / ||g|| below which B y is computed, not B g (ours; see tests/test_known_answers.py)


class Memory(NamedTuple):
    """The last m pairs (s, y) and what the compact form needs of them; m rows in ring order, not in order of time.

    The rows belong to the parameters joined into one vector where `tree.joinable` says that they may be, else to the
    tree of the parameters, leaf by leaf, with its sharding.
    """

    rows: tree.ArrayTree  # S and Y, (2m, n); s = x+ - x [x], y = g+ - g [f/x]
    products: jax.Array  # [S; Y] g at the gradient g of the current direction, shape (2m,)
    gg: jax.Array  # g'g there
    sy: jax.Array  # D, s_i'y_i, shape (m,); zero marks a slot that is not in use
    inv_r: jax.Array  # R^-1, R_ij = s_i'y_j for i not newer than j, shape (m, m); rows of unused slots mean nothing
    yy: jax.Array  # Y Y', shape (m, m)
    gamma: jax.Array  # initial inverse Hessian gamma I (N&W 7.20) [x^2/f], shape ()
    pairs: jax.Array  # int32: pairs stored since the last reset; the next one goes to slot pairs % m


def empty(params: tree.ArrayTree, m: int, row_dtype: Any = None) -> Memory:
    """Return a memory for m pairs, with gamma = 1; `row_dtype` of the histories, default that of the parameters."""
    dtype = tree.scalar_dtype(params)
    square = jnp.zeros((m, m), dtype)
    rows = tree.zero_rows(tree.join(params), 2 * m, row_dtype)
    return Memory(
        rows=rows,
        products=jnp.zeros(2 * m, dtype),
        gg=jnp.zeros((), dtype),
        sy=jnp.zeros(m, dtype),
        inv_r=square,
        yy=square,
        gamma=jnp.ones((), dtype),
        pairs=jnp.int32(0),
    )


def forget(memory: Memory, when: jax.Array) -> Memory:
    """Return the memory without pairs, where the flag holds; its matrices stay as they are."""
    return memory._replace(sy=jnp.where(when, 0.0, memory.sy), pairs=jnp.where(when, 0, memory.pairs))


def learn(
    memory: Memory,
    s: tree.ArrayTree,
    y: tree.ArrayTree,
    s_norm: jax.Array,
    g: tree.ArrayTree,
    gg: jax.Array,
    when: jax.Array,
    scale: bool,
    least: tree.Numeric,
    positive: bool,
) -> Memory:
    """Return the memory with the pair (s, y) in place of the oldest, and its products at the new gradient g.

    One pass over the history: with B = [S; Y], B y = B g - B g_old follows from B g, or B g from a small B y. On
    sharded parameters that is two reductions, one of scalars and one of 2m numbers.

    Args:
      memory: The memory.
      s: Step, like the rows.
      y: Change of the gradient, like the rows.
      s_norm: ||s||.
      g: New gradient, like the rows.
      gg: g'g.
      when: Whether the pair may enter, if its cosine is above sqrt(eps), whatever the scale of the loss.
      scale: Take gamma from the pair (7.20).
      least: Lower limit of gamma.
      positive: A search needs H positive definite. Without one a cosine below -sqrt(eps) enters too, as in optax.
    """
    # 1. Gate the pair. Rows of lower precision hold a rounded pair, and H is the matrix of that one.
    m = memory.sy.size
    i = memory.pairs % m
    narrow = _dtypes(memory.rows) != _dtypes(s)
    if narrow:
        s, y = (tree.cast_like(tree.cast_like(v, memory.rows), v) for v in (s, y))
    sy, yy, _ = tree.products((s, y), (y, y), peak=y)
    limit = s_norm * jnp.sqrt(yy) * jnp.finfo(sy.dtype).eps ** 0.5
    size = sy if positive else jnp.abs(sy)
    good = when & (size > limit) & (size > jnp.finfo(sy.dtype).tiny) & jnp.isfinite(limit)

    # 2. Store it: two rows are touched, and the buffer is updated in place.
    rows = tree.set_row(tree.set_row(memory.rows, i, s, good), m + i, y, good)

    # 3. B g, and B y as the change of it. The difference keeps few digits of a small y; then B y is computed, and B g
    # is the sum. A row takes part in at most m sums before it is replaced.
    if narrow:  # B y, y the rounded one, is no change of B g: both are computed
        q, by = tree.rows_dot(rows, g, 2 * m), tree.rows_dot(rows, y, 2 * m)
    else:
        small = when & (yy < SMALL_CHANGE**2 * gg)
        facts = (rows, s, y, g, memory.products, i, good)
        q, by = _of_either(small, *facts) if interrupts() else branch(small, _of_change, _of_gradient, *facts)

    # 4. The small matrices, in a branch: outside of it each of their entries would decide anew whether the pair enters.
    facts = (by, sy, yy, i, memory.sy, memory.inv_r, memory.yy)
    d, inv_r, gram = branch(good, _with_pair, lambda *facts: facts[-3:], *facts)
    gamma = memory.gamma
    if scale:
        gamma = jnp.where(good, jnp.maximum(sy / jnp.where(good, yy, 1.0), least), gamma)
    return Memory(rows, q, gg, d, inv_r, gram, gamma, memory.pairs + good.astype(jnp.int32))


def _of_gradient(
    rows: tree.ArrayTree, _: Any, __: Any, g: tree.ArrayTree, products: jax.Array, *___: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return B g, and B y but for the two entries of the new pair, which are known."""
    q = tree.rows_dot(rows, g, products.size)
    return q, q - products


def _of_either(
    small: jax.Array, rows: tree.ArrayTree, s: tree.ArrayTree, y: tree.ArrayTree, g: tree.ArrayTree, *rest: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what one of the two gives, without a branch, by one pass for the vector that it would have taken."""
    products, i, good = rest
    once = tree.rows_dot(rows, tree.where(small, y, g), products.size)
    of_change = _sum(s, y, g, products, i, good, once), once
    return tree.where(small, of_change, (once, once - products))


def _of_change(
    rows: tree.ArrayTree,
    s: tree.ArrayTree,
    y: tree.ArrayTree,
    g: tree.ArrayTree,
    products: jax.Array,
    i: jax.Array,
    good: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the same from B y; `products` still hold the old gradient's with the pair that the new one replaced."""
    by = tree.rows_dot(rows, y, products.size)
    return _sum(s, y, g, products, i, good, by), by


def _sum(
    s: tree.ArrayTree,
    y: tree.ArrayTree,
    g: tree.ArrayTree,
    products: jax.Array,
    i: jax.Array,
    good: jax.Array,
    by: jax.Array,
) -> jax.Array:
    """Return B g as the sum of B g_old and B y, but for the entries of the new pair."""
    sg, yg, _ = tree.products((s, g), (y, g), peak=g)
    at = jnp.arange(products.size)
    return jnp.where(good & (at == i), sg, jnp.where(good & (at == products.size // 2 + i), yg, products + by))


def _with_pair(
    by: jax.Array, sy: jax.Array, yy: jax.Array, i: jax.Array, d: jax.Array, inv_r: jax.Array, gram: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return D, R^-1 and Y Y' with a pair in slot i, by = [S; Y] y.

    Dropping the oldest pair zeroes its row and column of R^-1; the new column is [-R^-1 S y; 1] / s'y.
    """
    m = d.size
    new = jnp.arange(m) == i
    row, column = new[:, None], new[None, :]
    s_y, y_y = jnp.where(new, 0.0, by[:m]), jnp.where(new, yy, by[m:])
    used = (d != 0) & ~new
    last = jnp.where(new, 1.0, jnp.where(used, -tree.matmul(inv_r, s_y), 0.0)) / sy
    inv_r = jnp.where(column, last[:, None], jnp.where(used[:, None], inv_r, 0.0))
    return jnp.where(new, sy, d), inv_r, jnp.where(row, y_y[None, :], jnp.where(column, y_y[:, None], gram))


def direction(memory: Memory, g: tree.ArrayTree, gg: jax.Array) -> tuple[tree.ArrayTree, jax.Array]:
    """Return p = -H g and g'p; needs memory.products = B g. One pass over the history.

    H = gamma I + [S' gamma Y'] [[R^-T (D + gamma Y Y') R^-1, -R^-T], [-R^-1, 0]] [S; gamma Y]  (Byrd et al., 3.1)
    """
    m, gamma, d = memory.sy.size, memory.gamma, memory.sy
    q_s, q_y = memory.products[:m], memory.products[m:]
    w = jnp.where(d != 0, tree.matmul(memory.inv_r, q_s), 0.0)
    r = jnp.where(d != 0, tree.matmul(memory.yy, w) - q_y, 0.0)
    u = tree.matmul(memory.inv_r.T, w * d + gamma * r)
    coefficients = jnp.concatenate([-u, gamma * w])
    p = tree.add_rows(coefficients, memory.rows, tree.scale(-gamma, g))
    # g'Hg = w'Dw + gamma ||g - Y'w||^2, a sum of nonnegative parts if D is positive.
    return p, -jnp.sum(w * w * d) - gamma * jnp.maximum(gg + jnp.sum(w * (r - q_y)), 0.0)


def write(
    rows: tree.ArrayTree, pairs: jax.Array, s: tree.ArrayTree, y: tree.ArrayTree, when: jax.Array, m: int
) -> tuple[tree.ArrayTree, jax.Array]:
    """Return the rows with the pair (s, y) in place of the oldest of m, where the flag holds, and the new count."""
    i = pairs % m
    return tree.set_row(tree.set_row(rows, i, s, when), m + i, y, when), pairs + when.astype(jnp.int32)


def measured(memory: Memory, rows: tree.ArrayTree, pairs: jax.Array) -> Memory:
    """Return the memory that holds the rows that `write` left; one pass over them, one reduction.

    A pair whose cosine is not above sqrt(eps) is switched off. gamma is that of the newest pair (N&W 7.20).
    """
    # 1. [S; Y] [S; Y]', slots from the oldest pair to the newest.
    m, eps = memory.sy.size, jnp.finfo(memory.yy.dtype).eps
    gram = tree.rows_gram(rows, 2 * m)
    age = (pairs - 1 - jnp.arange(m)) % m
    order = jnp.argsort(-age)
    at = lambda a: a[order][:, order]
    ss, sy, yy = at(gram[:m, :m]), at(gram[:m, m:]), at(gram[m:, m:])
    d = jnp.diagonal(sy)
    limit = jnp.sqrt(jnp.diagonal(ss)) * jnp.sqrt(jnp.diagonal(yy)) * eps**0.5
    good = (age[order] < pairs) & (d > limit) & jnp.isfinite(limit)
    # 2. R^-1 in that order, and back to the ring.
    both = good[:, None] & good[None, :]
    identity = jnp.eye(m, dtype=sy.dtype)
    R = jnp.where(both, jnp.triu(sy), identity)
    inverse = jnp.where(both, jax.scipy.linalg.solve_triangular(R, identity), 0.0)
    back = jnp.argsort(order)
    inv_r, yy = inverse[back][:, back], jnp.where(both, yy, 0.0)[back][:, back]
    gamma = d[-1] / jnp.where(good[-1], jnp.diagonal(yy)[order][-1], 1.0)
    return memory._replace(
        rows=rows,
        sy=jnp.where(good, d, 0.0)[back],
        inv_r=inv_r,
        yy=yy,
        gamma=jnp.where(good[-1], gamma, memory.gamma),
        pairs=pairs,
    )


def applied(memory: Memory, v: tree.ArrayTree) -> tree.ArrayTree:
    """Return H v, v and the result like the rows of one pair: two passes over the history, no pair is learned."""
    m = memory.sy.size
    at_v = memory._replace(products=tree.rows_dot(memory.rows, v, 2 * m))
    return tree.scale(-1.0, direction(at_v, v, tree.dot(v, v))[0])


def _dtypes(x: tree.ArrayTree) -> list[Any]:
    return [leaf.dtype for leaf in jax.tree.leaves(x)]
