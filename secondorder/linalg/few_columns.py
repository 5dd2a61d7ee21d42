"""Orthogonal factorizations of matrices with very few columns, written out column by column.

A library call per matrix costs more than the arithmetic where there are two or three columns and thousands of
matrices. These kernels are made of scalars and vectors alone, so that `vmap` works on all matrices at once. Modified
Gram-Schmidt gives a triangle as good as Householder's (Björck & Paige 1992); one-sided Jacobi gives singular values and
vectors that are orthogonal to rounding (Golub & Van Loan, 4th edition, section 8.6.3; Demmel & Veselić 1992).
"""

from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

LIMIT = 3  # columns; four would still be twice as quick, but take 2.6 s more to compile (measured on a CPU)
SWEEPS = 30  # of Jacobi's method at most; 3 to 6 are the rule

Column = list[Any]  # a column, entry by entry; each entry has shape ()


def triangle(A: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the triangle R of [A b] as (its first n columns, the last one), n + 1 rows; A: (m, n), b: (m,), m >= n.

    Modified Gram-Schmidt; the orthogonal factor is not kept, and b is one more column: then no digits are lost where
    columns are nearly dependent (Björck 1967). Columns are taken in units of their own, powers of two, since squares of
    what is very large or small leave the range.
    """
    n = A.shape[1]
    originals = [*(A[:, j] for j in range(n)), b]  # (XLA takes slices of a stack for what was stacked)
    units = [tree.power_of_two(tree.max_norm(column)) for column in originals]
    zero = jnp.zeros((), A.dtype)

    # A loop, since XLA otherwise computes a column anew wherever it is read. Of a dependent column rounding is all
    # that is left: its norm would then be that of one rounding, and its direction that of another.
    def project(i: jax.Array, carry: tuple[list[jax.Array], list[Column]]) -> tuple[list[jax.Array], list[Column]]:
        columns, R = carry
        column = jax.lax.select_n(i, *columns)
        length = tree.norm(column)
        q = column * _inverse(length)
        row = [jnp.where(i == j, length, jnp.where(i < j, tree.dot(q, columns[j]), zero)) for j in range(n + 1)]
        columns = [jnp.where(i < j, columns[j] - row[j] * q, columns[j]) for j in range(n + 1)]
        return columns, [[jnp.where(i == k, row[j], R[k][j]) for j in range(n + 1)] for k in range(n + 1)]

    start = [column / unit for column, unit in zip(originals, units, strict=True)]
    _, R = jax.lax.fori_loop(0, n + 1, project, (start, [[zero] * (n + 1) for _ in range(n + 1)]))
    rows = jnp.stack([jnp.stack([x * unit for x, unit in zip(row, units, strict=True)]) for row in R])
    return rows[:, :n], rows[:, n]


def cholesky(AA: jax.Array, Ab: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the triangle R with RᵀR = AᵀA and R⁻ᵀAᵀb, shapes (n, n) and (n,); a pivot at rounding level is zero."""
    n, zero = AA.shape[0], jnp.zeros((), AA.dtype)
    R = [[zero] * (n + 1) for _ in range(n)]
    for i in range(n):
        pivot = AA[i, i] - sum((R[k][i] * R[k][i] for k in range(i)), zero)
        R[i][i] = jnp.where(pivot > n * jnp.finfo(AA.dtype).eps * AA[i, i], jnp.sqrt(jnp.maximum(pivot, 0.0)), 0.0)
        divisor = _inverse(R[i][i])
        for j, right in [*((j, AA[i, j]) for j in range(i + 1, n)), (n, Ab[i])]:
            R[i][j] = (right - sum((R[k][i] * R[k][j] for k in range(i)), zero)) * divisor
    rows = jnp.stack([jnp.stack(row) for row in R])
    return rows[:, :n], rows[:, n]


def factorize(R: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return singular values (ascending, (n,)), right singular vectors (as columns, (n, n)) and Uᵀb of a triangle R.

    One-sided Jacobi on the columns of [Rᵀ; bᵀ], which converges quickly for a triangle (Drmač & Veselić 2008): they
    end as sigma_j v_j over (Uᵀb)_j. Where sigma_j is zero, so is v_j. R: (n, n); b: (n,).
    """
    n = R.shape[0]
    peak = jnp.max(jnp.abs(R))
    shrink = _inverse(peak)
    columns = [[R[j, i] * shrink for i in range(n)] + [b[j]] for j in range(n)]

    def turn(carry: tuple[list[Column], jax.Array, jax.Array]) -> tuple[list[Column], jax.Array, jax.Array]:
        columns, _, sweeps = carry
        columns, coarse = _sweep([list(column) for column in columns])
        return columns, coarse & (sweeps < SWEEPS), sweeps + 1

    start = (columns, jnp.array(n > 1), jnp.int32(0))
    columns, _, _ = jax.lax.while_loop(lambda carry: carry[1], turn, start)
    norms = [jnp.sqrt(_dot(column, column)) for column in columns]
    for last in range(n - 1, 0, -1):  # bubble sort
        for j in range(last):
            swap = norms[j] > norms[j + 1]
            exchange = lambda x, y, swap=swap: (jnp.where(swap, y, x), jnp.where(swap, x, y))
            norms[j], norms[j + 1] = exchange(norms[j], norms[j + 1])
            pairs = [exchange(x, y) for x, y in zip(columns[j], columns[j + 1], strict=True)]
            columns[j], columns[j + 1] = [x for x, _ in pairs], [y for _, y in pairs]
    V = [[entry * _inverse(s) for entry in column[:n]] for column, s in zip(columns, norms, strict=True)]
    vectors = jnp.stack([jnp.stack(row) for row in zip(*V, strict=True)])
    return jnp.stack(norms) * peak, vectors, jnp.stack([column[n] for column in columns])


def _sweep(columns: list[Column]) -> tuple[list[Column], jax.Array]:
    """Return the columns after a rotation of every pair, and whether another sweep is needed."""
    n, eps = len(columns), jnp.finfo(columns[0][0].dtype).eps
    largest = cosine = jnp.zeros_like(columns[0][0])
    for p in range(n - 1):
        for q in range(p + 1, n):
            a, b = columns[p], columns[q]
            aa, bb, ab = _dot(a, a), _dot(b, b), _dot(a, b)
            size = jnp.sqrt(aa) * jnp.sqrt(bb)
            cos = jnp.where(size > 0, jnp.abs(ab) / jnp.where(size > 0, size, 1.0), 0.0)
            turned = cos > eps
            zeta = (bb - aa) / jnp.where(turned, 2.0 * ab, 1.0)
            t = jnp.copysign(1.0, zeta) / (jnp.abs(zeta) + jnp.sqrt(1.0 + zeta * zeta))
            t = jnp.where(turned, t, 0.0)
            c = 1.0 / jnp.sqrt(1.0 + t * t)
            s = c * t
            columns[p] = [c * x - s * y for x, y in zip(a, b, strict=True)]
            columns[q] = [s * x + c * y for x, y in zip(a, b, strict=True)]
            largest, cosine = jnp.maximum(largest, jnp.maximum(jnp.abs(t), cos)), jnp.maximum(cosine, cos)
    # What a later rotation brings back of an angle that was removed is at most this product.
    return columns, largest * cosine > eps


def _dot(a: Column, b: Column) -> jax.Array:
    """Return the inner product of the columns without their last entries, those of b."""
    return reduce(add, [x * y for x, y in zip(a[:-1], b[:-1], strict=True)])


def _inverse(x: jax.Array) -> jax.Array:
    """Return 1 / x, or 0 for x = 0."""
    return jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)
