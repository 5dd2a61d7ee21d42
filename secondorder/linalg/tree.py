"""Vectors that are pytrees: the inner products, norms and row histories that `optax.tree` lacks.

A leaf may be real or complex. Complex leaves count as pairs of real numbers: every inner product here is
Re <a, b>, so that an algorithm written for real vectors is right for complex ones as it stands.
A *history* of a tree is the same tree with one leading axis of rows on every leaf; it inherits the sharding of
the tree on the other axes, and nothing here reshapes or gathers a leaf that may lie on several devices,
but for `flatten`, `ravel` and `unravel`.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

ArrayTree: TypeAlias = Any  # any pytree of arrays (the union that chex offers does not survive indexing)
Numeric: TypeAlias = jax.Array | np.ndarray | float | int  # a number, or an array of them
HIGHEST = jax.lax.Precision.HIGHEST
FEW = 4  # terms of a sum that is written out
SHORT = 1024  # terms of sums that one loop makes side by side, one entry after the other; ours, see `products`


def size(tree: ArrayTree) -> int:
    """Return the number of entries of all leaves."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def scalar_dtype(tree: ArrayTree) -> Any:
    """Return the real dtype in which scalars that belong to `tree` are kept: its widest, at least float32."""
    leaves = jax.tree.leaves(tree)
    widest = jnp.result_type(*(leaf.dtype for leaf in leaves)) if leaves else jnp.float32
    return jnp.promote_types(jnp.finfo(widest).dtype, jnp.float32)


def dot(a: ArrayTree, b: ArrayTree) -> jax.Array:
    """Return Re <a, b>, shape (), in the scalar dtype of `a`; matrix units are asked for full precision."""
    dtype = scalar_dtype(a)
    terms = [_leaf_dot(x, y, jnp.ndim(x)).astype(dtype) for x, y in _pairs(a, b)]
    return sum(terms, jnp.zeros((), dtype))


def products(*pairs: tuple[ArrayTree, ArrayTree], peak: ArrayTree) -> tuple[jax.Array, ...]:
    """Return Re <a, b> for every pair, as `dot` does, and last `max_norm(peak)`; all trees of the dtypes of `peak`.

    Short vectors are passed over once, in one loop. XLA makes up to three kernels of an inner product alone, which take
    longer to compile, and to start, than to run. Long vectors, for which a reduction each is faster and rounds less,
    trees of several leaves, and leaves that may be sharded, get one each.
    """
    if not all(map(_short, [part for pair in (*pairs, (peak, peak)) for part in pair])):
        return (*(dot(a, b) for a, b in pairs), max_norm(peak))
    dtype = scalar_dtype(peak)
    flat = lambda x: jax.tree.leaves(x)[0].ravel().astype(dtype)
    terms = (*(flat(a) * flat(b) for a, b in pairs), jnp.abs(flat(peak)))

    def join(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (*(u + v for u, v in zip(x[:-1], y[:-1], strict=True)), jnp.maximum(x[-1], y[-1]))

    return tuple(jax.lax.reduce(terms, (np.zeros((), dtype),) * len(terms), join, (0,)))


def norm(a: ArrayTree) -> jax.Array:
    """Return the Euclidean norm of all entries, shape (), in the scalar dtype of `a`; squares may overflow."""
    return jnp.sqrt(dot(a, a))


def safe_norm(a: ArrayTree) -> jax.Array:
    """Return the Euclidean norm of all entries, shape (), whose squares may overflow or underflow."""
    unit = power_of_two(max_norm(a))
    return unit * norm(scale(1.0 / unit, a))


def power_of_two(a: jax.Array) -> jax.Array:
    """Return the largest powers of two that are at most |a|, 1 for what is zero or not finite; their inverses exist."""
    info = jnp.finfo(a.dtype)
    size = jnp.where((a != 0) & jnp.isfinite(a), jnp.maximum(jnp.abs(a), info.tiny), 1.0)
    _, exponent = jnp.frexp(size)
    return jnp.ldexp(jnp.ones_like(size), exponent - 1)


def max_norm(a: ArrayTree) -> jax.Array:
    """Return max |a_i|, shape (), 0 for an empty tree; NaN or Inf if and only if an entry is."""
    dtype = scalar_dtype(a)
    peaks = [largest(jnp.abs(x)).astype(dtype) for x in jax.tree.leaves(a) if x.size]
    if len(peaks) == 1:
        return peaks[0]
    return jnp.max(jnp.stack(peaks)) if peaks else jnp.zeros((), dtype)


def largest(a: jax.Array) -> jax.Array:
    """Return the largest entry of an array, NaN if one is NaN."""
    return reduce(jnp.maximum, [a[i] for i in range(a.size)]) if _few(a) else jnp.max(a)


def axpy(alpha: Numeric, x: ArrayTree, y: ArrayTree) -> ArrayTree:
    """Return y + alpha x, each leaf in the dtype of y's."""
    return jax.tree.map(lambda u, v: (v + alpha * u).astype(v.dtype), x, y)


def scale(alpha: Numeric, x: ArrayTree) -> ArrayTree:
    """Return alpha x, each leaf in its own dtype."""
    return jax.tree.map(lambda u: (alpha * u).astype(u.dtype), x)


def sub(x: ArrayTree, y: ArrayTree) -> ArrayTree:
    """Return x - y, each leaf in the dtype of x's."""
    return jax.tree.map(lambda u, v: (u - v).astype(u.dtype), x, y)


def where(flag: jax.Array, x: ArrayTree, y: ArrayTree) -> ArrayTree:
    """Return x if the scalar `flag` holds, else y; leaves keep the dtypes of y."""
    return jax.tree.map(lambda u, v: jnp.where(flag, u, v).astype(v.dtype), x, y)


def conj(x: ArrayTree) -> ArrayTree:
    """Return the complex conjugate; real leaves are returned as they are."""
    return jax.tree.map(lambda u: jnp.conj(u) if jnp.iscomplexobj(u) else u, x)


def cast_like(x: ArrayTree, like: ArrayTree) -> ArrayTree:
    """Return x with the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda u, v: jnp.asarray(u).astype(v.dtype), x, like)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b at full precision (accelerators otherwise round the factors to tf32 or bf16); a is a matrix.

    Sums of up to `FEW` terms are written out: under `vmap` that is arithmetic on lanes, not a call per lane.
    """
    if a.ndim == 2 and 0 < a.shape[1] <= FEW and a.shape[0] <= FEW and (b.ndim == 1 or b.shape[1] <= FEW):
        return sum((jnp.multiply.outer(a[:, k], b[k]) for k in range(1, a.shape[1])), jnp.multiply.outer(a[:, 0], b[0]))
    return jnp.matmul(a, b, precision=HIGHEST)


def ravel(x: ArrayTree, dtype: Any) -> jax.Array:
    """Return the entries of all leaves as one vector, shape (n,); only for methods that need a matrix."""
    return flatten(x)[0].astype(dtype)


def unravel(vector: jax.Array, like: ArrayTree) -> ArrayTree:
    """Return the vector, shape (n,), as a tree with the shapes and dtypes of `like`."""
    flat, back = flatten(like)
    return back(vector.astype(flat.dtype))


def flatten(x: ArrayTree) -> tuple[jax.Array, Callable[[jax.Array], ArrayTree]]:
    """Return what `ravel_pytree` does: all entries as one vector, and the function that makes such a tree of one.

    Where types say how leaves are spread over devices, the vector is whole on each, and its tree is spread again.
    """
    flat, back = ravel_pytree(jax.tree.map(_gathered, x))
    return flat, lambda vector: jax.tree.map(spread, back(vector), x)


def spread(x: jax.Array, like: Any) -> jax.Array:
    """Return x over devices as the type of `like` says, where it says so."""
    explicit = _explicit(like)
    return x if explicit is None else jax.sharding.reshard(x, explicit)


def equal(x: ArrayTree, y: ArrayTree) -> jax.Array:
    """Return whether all entries agree to the last bit, shape ()."""
    same = [jnp.all(u == v) for u, v in _pairs(x, y)]
    return jnp.all(jnp.stack(same)) if same else jnp.array(True)


def copy(x: ArrayTree) -> ArrayTree:
    """Return new buffers with the same entries and sharding (a donated state must not alias the parameters)."""

    def one(u: Any) -> jax.Array:
        if isinstance(u, jax.ShapeDtypeStruct):
            return _sharded_zeros(u, ())
        return jnp.array(u, dtype=u.dtype, copy=True)

    return jax.tree.map(one, x)


def zeros_like(x: ArrayTree) -> ArrayTree:
    """Return zeros with the shapes, dtypes and shardings of x."""
    return jax.tree.map(lambda u: _sharded_zeros(u, ()), x)


def zero_rows(x: ArrayTree, rows: int, dtype: Any = None) -> ArrayTree:
    """Return an empty history: zeros of shape (rows, *leaf.shape), sharded like the leaf on its own axes.

    `dtype` of the history, where it is not that of each leaf.
    """
    return jax.tree.map(lambda u: _sharded_zeros(u, (rows,), dtype), x)


def joinable(x: ArrayTree) -> bool:
    """Return whether the leaves may be joined into one vector: several leaves of one dtype, none of them sharded.

    A tracer does not tell its sharding; on a single device it has none.
    """
    leaves = jax.tree.leaves(x)
    if len(leaves) < 2 or len({leaf.dtype for leaf in leaves}) != 1:
        return False
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.device_count() == 1
    return all(map(_whole, leaves))


def join(x: ArrayTree) -> ArrayTree:
    """Return the leaves as one vector where that may be, else the tree as it is."""
    return ravel_pytree(zeros_like(x) if abstract(x) else x)[0] if joinable(x) else x


def join_like(x: ArrayTree, like: ArrayTree) -> ArrayTree:
    """Return x joined if `like`, made by `join` from a tree of the same kind, is joined."""
    return x if jax.tree.structure(x) == jax.tree.structure(like) else ravel_pytree(x)[0]


def split_like(x: ArrayTree, like: ArrayTree) -> ArrayTree:
    """Return x, joined or not, with the structure of `like`."""
    return x if jax.tree.structure(x) == jax.tree.structure(like) else ravel_pytree(like)[1](x)


def set_row(history: ArrayTree, index: jax.Array, row: ArrayTree, when: jax.Array | None = None) -> ArrayTree:
    """Write `row` at `index`, where the flag holds; one row is touched, so that the buffer is updated in place.

    Where the flag does not hold the index is out of range, and XLA drops the write: nothing is selected or copied.
    """

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(rows.dtype)
        if when is not None:
            return rows.at[jnp.where(when, index, rows.shape[0])].set(new, mode="drop")
        return jax.lax.dynamic_update_index_in_dim(rows, new, index, 0)

    return jax.tree.map(write, history, row)


def rows_dot(history: ArrayTree, x: ArrayTree, rows: int) -> jax.Array:
    """Return Re <row_i, x> for every row, shape (rows,): one pass over the history, in the precision of x."""
    dtype = scalar_dtype(x)

    def dots(h: jax.Array, u: jax.Array) -> jax.Array:
        if h.dtype == u.dtype:
            return _leaf_dot(h, u, jnp.ndim(u)).astype(dtype)
        # A product and a sum fuse with the conversion; a matrix product would first make a wider history.
        return jnp.sum(h.astype(dtype) * u.astype(dtype)[None], axis=tuple(range(1, h.ndim)))

    terms = [dots(h, u) for h, u in _pairs(history, x)]
    return sum(terms, jnp.zeros((rows,), dtype))


def add_rows(coefficients: jax.Array, history: ArrayTree, x: ArrayTree) -> ArrayTree:
    """Return x + sum_i coefficients_i row_i, each leaf in its own dtype: one pass over the history."""

    def add(rows: jax.Array, u: jax.Array) -> jax.Array:
        if rows.dtype == u.dtype:
            total = jnp.tensordot(coefficients.astype(rows.dtype), rows, 1, precision=HIGHEST)
        else:
            weights = coefficients.reshape((-1,) + (1,) * u.ndim)
            total = jnp.sum(weights * rows.astype(coefficients.dtype), axis=0)
        return (u + total).astype(u.dtype)

    return jax.tree.map(add, history, x)


def rows_gram(history: ArrayTree, rows: int) -> jax.Array:
    """Return Re <row_i, row_j>, shape (rows, rows): one pass over the history."""
    dtype = scalar_dtype(history)

    def gram(h: jax.Array) -> jax.Array:
        axes = tuple(range(1, h.ndim))
        wide, out = _wide(h, h), _replicated(h)
        product = jnp.tensordot(jnp.conj(h), h, (axes, axes), precision=HIGHEST, preferred_element_type=wide, **out)
        return jnp.real(product).astype(dtype)

    return sum((gram(h) for h in jax.tree.leaves(history)), jnp.zeros((rows, rows), dtype))


def _pairs(a: ArrayTree, b: ArrayTree) -> list[tuple[jax.Array, jax.Array]]:
    """Return corresponding leaves, after a check that the trees agree."""
    leaves, structure = jax.tree.flatten(a)
    return list(zip(leaves, structure.flatten_up_to(b), strict=True))


def _leaf_dot(a: jax.Array, b: jax.Array, axes: int) -> jax.Array:
    """Return Re <a, b> contracted over the last `axes` axes of a and all axes of b."""
    if jnp.iscomplexobj(a):
        a = jnp.conj(a)
    wide = _wide(a, b)
    if _few(a) and _few(b):
        return jnp.real(sum(a[i].astype(wide) * b[i].astype(wide) for i in range(a.size)))
    return jnp.real(jnp.tensordot(a, b, axes, precision=HIGHEST, preferred_element_type=wide, **_replicated(b)))


def _replicated(leaf: jax.Array) -> dict[str, Any]:
    """Return what a contraction over a sharded axis must say of its result where shardings are explicit."""
    explicit = _explicit(leaf)
    return {} if explicit is None else {"out_sharding": NamedSharding(explicit.mesh, PartitionSpec())}


def _wide(a: jax.Array, b: jax.Array) -> Any:
    """Return the dtype in which products of the two are summed: at least float32."""
    return jnp.promote_types(jnp.result_type(a, b), jnp.float32)


def _few(a: jax.Array) -> bool:
    """Return whether a reduction of `a` is written out, so that `vmap` makes it arithmetic on lanes; not if sharded."""
    return jnp.ndim(a) == 1 and 0 < a.size <= FEW and isinstance(a, Tracer) and _explicit(a) is None


def _short(x: ArrayTree) -> bool:
    """Return whether the tree is one short real leaf, neither sharded nor so small that sums of it are written out."""
    leaves = jax.tree.leaves(x)
    if len(leaves) != 1 or not FEW < leaves[0].size <= SHORT or jnp.iscomplexobj(leaves[0]):
        return False
    return _whole(leaves[0]) and _explicit(leaves[0]) is None


def _whole(leaf: jax.Array) -> bool:
    """Return whether the leaf lies on one device, as far as that can be known: a tracer does not tell."""
    if isinstance(leaf, Tracer):
        return jax.device_count() == 1
    return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


def abstract(x: ArrayTree) -> bool:
    """Return whether leaves are shapes without entries (`jax.ShapeDtypeStruct`)."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(x))


def _explicit(leaf: Any) -> Any:
    """Return the sharding in the type of the leaf (`jax.sharding.AxisType.Explicit`), None where there is none."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return None
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    return sharding if sharding is not None and not sharding.mesh.empty and sharding.mesh.explicit_axes else None


def _gathered(leaf: Any) -> Any:
    """Return the leaf, whole on every device if its type says how it is spread."""
    explicit = _explicit(leaf)
    return leaf if explicit is None else jax.sharding.reshard(leaf, NamedSharding(explicit.mesh, PartitionSpec()))


def _sharded_zeros(leaf: Any, leading: tuple[int, ...], dtype: Any = None) -> jax.Array:
    shape, dtype = leading + jnp.shape(leaf), leaf.dtype if dtype is None else dtype
    traced = isinstance(leaf, Tracer)
    sharding = _explicit(leaf) if traced else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return jnp.zeros(shape, dtype)
    spec = NamedSharding(sharding.mesh, PartitionSpec(*(None for _ in leading), *sharding.spec))
    where = {"out_sharding": spec} if traced else {"device": spec}
    return jnp.zeros(shape, dtype, **where)
