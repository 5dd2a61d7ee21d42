"""Forty critical points whose kind is known by construction: every index, degenerate ones, at any scale of the loss.

All are one function with other coefficients, so that one compiled program serves them. The point is c, which is not a
machine number, and the function sees Q x - Q c: neither the gradient nor a vanishing Hessian is exactly zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

N = 4  # variables
SCALES = (1e-6, 1.0, 1e6)  # factors of the loss that a test must not mind


class Case(NamedTuple):
    """One point; the coefficients are those of `fun` in the coordinates z = Q x - Q c."""

    name: str
    kind: str  # name of a `curvature.Kind`
    negative: int  # eigenvalues of each sign
    zero: int
    positive: int
    quadratic: tuple[float, ...] = (0.0,) * N  # eigenvalues of the Hessian
    cubic: tuple[float, ...] = (0.0,) * N
    quartic: tuple[float, ...] = (0.0,) * N
    monkey: float = 0.0  # times z0³ - 3 z0 z1²


def fun(
    x: jax.Array,
    Q: jax.Array,
    shift: jax.Array,
    quadratic: jax.Array,
    cubic: jax.Array,
    quartic: jax.Array,
    monkey: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """Return the function with these coefficients, at x of shape (4,)."""
    z = jnp.matmul(Q, x, precision="highest") - shift
    powers = 0.5 * quadratic * z**2 + cubic * z**3 + quartic * z**4
    return scale * (jnp.sum(powers) + monkey * (z[0] ** 3 - 3 * z[0] * z[1] ** 2))


def arguments(case: Case, scale: float, seed: int, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, ...]:
    """Return the point, and the further arguments of `fun`, with Q and c drawn from the seed."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    c = rng.normal(size=N)
    drawn = (c, Q, Q @ c, case.quadratic, case.cubic, case.quartic, case.monkey, scale)
    return tuple(jnp.asarray(np.asarray(a), dtype) for a in drawn)


BASE, ONES = (1.0, 2.5, 0.3, 7.0), (1.0,) * N


def _indices() -> list[Case]:
    """Return points of every index, alone and with terms of higher order, well and ill conditioned."""
    variants = {
        "quadratic": (ONES, (0.0,) * N, (0.0,) * N),
        "with x⁴": (ONES, (0.0,) * N, ONES),
        "with -x⁴": (ONES, (0.0,) * N, (-1.0,) * N),
        "with x³": (ONES, ONES, (0.0,) * N),
        "condition 1e4": ((1.0, 1e-3, 1e-1, 1.0), (0.0,) * N, (0.0,) * N),
    }
    cases = []
    for name, (stretch, cubic, quartic) in variants.items():
        for index in range(N + 1):
            kind = {0: "MINIMUM", N: "MAXIMUM"}.get(index, "SADDLE")
            values = tuple((-b if i < index else b) * s for i, (b, s) in enumerate(zip(BASE, stretch, strict=True)))
            cases.append(Case(f"{name}, index {index}", kind, index, 0, N - index, values, cubic, quartic))
    return cases


CASES: tuple[Case, ...] = (
    *_indices(),
    Case("x⁴", "DEGENERATE", 0, 4, 0, quartic=ONES),
    Case("-x⁴", "DEGENERATE", 0, 4, 0, quartic=(-1.0,) * N),
    Case("x³", "DEGENERATE", 0, 4, 0, cubic=ONES),
    Case("monkey saddle", "DEGENERATE", 0, 4, 0, monkey=1.0),
    Case("monkey saddle and x⁴", "DEGENERATE", 0, 4, 0, quartic=ONES, monkey=1.0),
    Case("monkey saddle in a bowl", "DEGENERATE", 0, 2, 2, (0.0, 0.0, 1.0, 2.0), monkey=1.0),
    Case("constant", "DEGENERATE", 0, 4, 0),
    Case("valley", "DEGENERATE", 0, 1, 3, (1.0, 2.0, 3.0, 0.0)),
    Case("ridge", "DEGENERATE", 3, 1, 0, (-1.0, -2.0, -3.0, 0.0)),
    Case("x² + y⁴", "DEGENERATE", 0, 2, 2, (1.0, 2.0, 0.0, 0.0), quartic=(0.0, 0.0, 1.0, 3.0)),
    Case("x² - y⁴", "DEGENERATE", 0, 2, 2, (1.0, 2.0, 0.0, 0.0), quartic=(0.0, 0.0, -1.0, -3.0)),
    Case("x² + y³", "DEGENERATE", 0, 1, 3, (1.0, 2.0, 3.0, 0.0), cubic=(0.0, 0.0, 0.0, 1.0)),
    Case("-x² + y³", "DEGENERATE", 3, 1, 0, (-1.0, -2.0, -3.0, 0.0), cubic=(0.0, 0.0, 0.0, 1.0)),
    Case("saddle with x³", "SADDLE", 1, 1, 2, (-1.0, 2.0, 3.0, 0.0), cubic=(0.0, 0.0, 0.0, 1.0)),
    Case("saddle with x⁴", "SADDLE", 1, 2, 1, (-1.0, 2.0, 0.0, 0.0), quartic=(0.0, 0.0, 1.0, 1.0)),
)
