"""The matrix of a linear function, built from blocks of directions that fit in a memory budget."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from secondorder import jaxprs

BLOCK = 16  # directions at once without a budget; 8 to 16 measured best on CPUs
CACHED = 16 << 20  # bytes that a CPU holds near: beyond, directions at once take two to three times as long as a few


def matrix(linear: Callable[[jax.Array], jax.Array], zero: jax.Array, memory: float | None = None) -> jax.Array:
    """Return the transposed matrix of `linear`, row i its value at the i-th unit vector; shape (n, m).

    Args:
      linear: Linear function of a vector, shape (n,) -> (m,).
      zero: The zero vector, shape (n,), n >= 1.
      memory: Bytes that a block of directions may take on its way, besides the result. Default: 16 directions, on a
        CPU no more than fit in its caches.
    """
    n = zero.size
    block = min(n, BLOCK) if memory is None else n
    budget = CACHED if memory is None and jax.default_backend() == "cpu" else memory
    if budget is not None:
        each = bytes_per_direction(linear, zero)
        if each is not None:
            block = min(block, max(1, int(budget // each)))
        elif memory is not None:
            block = 1  # the least that a budget allows
    blocks = -(-n // block)
    block = -(-n // blocks)  # even blocks: as little padding as possible
    # n is padded to whole blocks: a remainder would compile the body twice.

    def push(start: jax.Array) -> jax.Array:
        index = start + jnp.arange(block)
        directions = (index[:, None] == jnp.arange(n)[None, :]).astype(zero.dtype)
        return jax.vmap(linear)(directions)

    rows = jax.lax.map(push, block * jnp.arange(blocks))
    return rows.reshape(blocks * block, -1)[:n]


def bytes_per_direction(linear: Callable[[jax.Array], jax.Array], zero: jax.Array) -> int | None:
    """Return the most bytes that are alive at once on the way of one direction through `linear`, at least 1.

    A bound: the compiler may fuse operations, and then needs less. None if a size is a symbol (`jax.export`).
    """
    jaxpr = jax.make_jaxpr(linear)(jax.ShapeDtypeStruct(zero.shape, zero.dtype)).jaxpr
    try:
        return max(1, _peak(jaxpr, set(jaxpr.invars)))
    except _UnknownSizeError:
        return None


class _UnknownSizeError(Exception):
    pass


def _peak(jaxpr: Any, depends: set[Any]) -> int:
    """Return the peak of the bytes alive in a program, of the values that depend on its inputs `depends`."""
    last = {v: i for i, equation in enumerate(jaxpr.eqns) for v in _variables(equation.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    alive = {v for v in depends if v in last}
    peak = sum(map(_bytes, alive))
    for i, equation in enumerate(jaxpr.eqns):
        if not alive.intersection(_variables(equation.invars)):
            continue
        alive |= {v for v in equation.outvars if v in last}
        inside = max((_peak(inner, set(inner.invars)) for inner in jaxprs.inner(equation)), default=0)
        peak = max(peak, sum(map(_bytes, alive)) + inside)
        alive = {v for v in alive if last[v] > i}
    return peak


def _variables(atoms: Any) -> list[Any]:
    return [a for a in atoms if not hasattr(a, "val")]  # literals; `jax.extend.core`, which has the type, loads Pallas


def _bytes(variable: Any) -> int:
    aval = variable.aval
    if not all(isinstance(size, int) for size in getattr(aval, "shape", ())):
        raise _UnknownSizeError
    return getattr(aval, "size", 0) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
