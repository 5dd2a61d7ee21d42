"""Forty critical points whose kind is known by construction, for tests and for the benchmark.

All are one function with other coefficients, so that one compiled program classifies them. The point is c, which is not
a machine number, and the function sees Q x - Q c: neither the gradient nor a vanishing Hessian is exactly zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from secondorder.curvature import Kind

N = 4


class Case(NamedTuple):
    name: str
    kind: Kind
    negative: int
    zero: int
    positive: int
    quadratic: tuple = (0.0,) * N  # eigenvalues of the Hessian
    cubic: tuple = (0.0,) * N
    quartic: tuple = (0.0,) * N
    monkey: float = 0.0  # times z0³ - 3 z0 z1²


def loss(x, Q, shift, quadratic, cubic, quartic, monkey, scale):
    """Return the function with these coefficients; arrays throughout."""
    z = jnp.matmul(Q, x, precision="highest") - shift
    powers = 0.5 * quadratic * z**2 + cubic * z**3 + quartic * z**4
    return scale * (jnp.sum(powers) + monkey * (z[0] ** 3 - 3 * z[0] * z[1] ** 2))


def arguments(case, scale, seed, dtype):
    """Return the point and the further arguments of `loss`."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(N, N)))[0]
    c = rng.normal(size=N)
    shift = Q @ c
    coefficients = (case.quadratic, case.cubic, case.quartic, case.monkey, scale)
    return tuple(jnp.asarray(np.asarray(a), dtype) for a in (c, Q, shift, *coefficients))


def _by_signs(index):
    kind = {0: Kind.MINIMUM, N: Kind.MAXIMUM}.get(index, Kind.SADDLE)
    return kind, index, 0, N - index


BASE = (1.0, 2.5, 0.3, 7.0)


def _with_index(index):
    return tuple(-b if i < index else b for i, b in enumerate(BASE))


def _stretched(values):
    return tuple(np.multiply(values, (1.0, 1e-3, 1e-1, 1.0)).tolist())


ONES = (1.0,) * N
CASES = (
    *(Case(f"quadratic, index {i}", *_by_signs(i), _with_index(i)) for i in range(N + 1)),
    *(Case(f"with x⁴, index {i}", *_by_signs(i), _with_index(i), quartic=ONES) for i in range(N + 1)),
    *(Case(f"with -x⁴, index {i}", *_by_signs(i), _with_index(i), quartic=(-1.0,) * N) for i in range(N + 1)),
    *(Case(f"with x³, index {i}", *_by_signs(i), _with_index(i), cubic=ONES) for i in range(N + 1)),
    *(Case(f"condition 1e4, index {i}", *_by_signs(i), _stretched(_with_index(i))) for i in range(N + 1)),
    Case("x⁴", Kind.DEGENERATE, 0, 4, 0, quartic=ONES),
    Case("-x⁴", Kind.DEGENERATE, 0, 4, 0, quartic=(-1.0,) * N),
    Case("x³", Kind.DEGENERATE, 0, 4, 0, cubic=ONES),
    Case("monkey saddle", Kind.DEGENERATE, 0, 4, 0, monkey=1.0),
    Case("monkey saddle and x⁴", Kind.DEGENERATE, 0, 4, 0, quartic=ONES, monkey=1.0),
    Case("monkey saddle in a bowl", Kind.DEGENERATE, 0, 2, 2, (0.0, 0.0, 1.0, 2.0), monkey=1.0),
    Case("constant", Kind.DEGENERATE, 0, 4, 0),
    Case("valley", Kind.DEGENERATE, 0, 1, 3, (1.0, 2.0, 3.0, 0.0)),
    Case("ridge", Kind.DEGENERATE, 3, 1, 0, (-1.0, -2.0, -3.0, 0.0)),
    Case("x² + y⁴", Kind.DEGENERATE, 0, 2, 2, (1.0, 2.0, 0.0, 0.0), quartic=(0.0, 0.0, 1.0, 3.0)),
    Case("x² - y⁴", Kind.DEGENERATE, 0, 2, 2, (1.0, 2.0, 0.0, 0.0), quartic=(0.0, 0.0, -1.0, -3.0)),
    Case("x² + y³", Kind.DEGENERATE, 0, 1, 3, (1.0, 2.0, 3.0, 0.0), cubic=(0.0, 0.0, 0.0, 1.0)),
    Case("-x² + y³", Kind.DEGENERATE, 3, 1, 0, (-1.0, -2.0, -3.0, 0.0), cubic=(0.0, 0.0, 0.0, 1.0)),
    Case("saddle with x³", Kind.SADDLE, 1, 1, 2, (-1.0, 2.0, 3.0, 0.0), cubic=(0.0, 0.0, 0.0, 1.0)),
    Case("saddle with x⁴", Kind.SADDLE, 1, 2, 1, (-1.0, 2.0, 0.0, 0.0), quartic=(0.0, 0.0, 1.0, 1.0)),
)
SCALES = (1e-6, 1.0, 1e6)
