"""The loss along one or two directions through a point, and directions that mean the same in every layer.

Li, Xu, Taylor, Studer & Goldstein (2018), "Visualizing the loss landscape of neural nets": random directions are
normalized filter by filter, since a network's loss does not change when a filter is scaled up and the next layer down.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from secondorder import checks
from secondorder.curvature.program import compiled
from secondorder.linalg import probes, tree

POINTS = 41  # default: points along a direction


class LossSlice(NamedTuple):
    """Values of a loss on a line or on a plane."""

    values: jax.Array  # shape (points,), or (points, points): first direction along the first axis
    coordinates: jax.Array  # steps along each direction, shape (points,) [x]


def filter_norms(params: tree.ArrayTree, *, axis: int = -1) -> tree.ArrayTree:
    """Return in place of every entry the Euclidean norm of its filter, the weights that lead to one output.

    Args:
      params: Any pytree of real arrays.
      axis: The axis of outputs of matrices and kernels. Default: the last, as in `x @ W`; 0 for `W @ x`.

    Returns:
      A tree like `params`. Leaves with fewer than two axes (biases, scales) get zeros: they are left as they are, as
      in the source.

    Raises:
      TypeError: if `params` has leaves that are not real floating-point arrays.
      ValueError: for an axis that a matrix does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> norms = curvature.filter_norms({"W": jnp.array([[3.0, 1.0], [4.0, 0.0]]), "b": jnp.ones(2)})
      >>> norms["W"].tolist(), norms["b"].tolist()
      ([[5.0, 1.0], [5.0, 1.0]], [0.0, 0.0])

    References: Li et al. (2018), NeurIPS, section 4.
    """
    checks.params("filter_norms", params)
    least = min((jnp.ndim(leaf) for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) > 1), default=2)
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)) or not -least <= axis < least:
        raise ValueError(
            f"filter_norms: axis must be an integer from {-least} to {least - 1}, an axis of every matrix, "
            f"got {axis!r}; -1 is the default."
        )

    def norms(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim < 2:
            return jnp.zeros_like(leaf)
        others = tuple(i for i in range(leaf.ndim) if i != axis % leaf.ndim)
        wide = leaf.astype(tree.scalar_dtype(leaf))  # squares of half precision under- and overflow
        lengths = jnp.sqrt(jnp.sum(wide**2, axis=others, keepdims=True)).astype(leaf.dtype)
        return jnp.broadcast_to(lengths, leaf.shape)

    return jax.tree.map(norms, params)


def filter_normalized_direction(params: tree.ArrayTree, key: jax.Array, *, axis: int = -1) -> tree.ArrayTree:
    """Return a random direction whose filters are as long as those of `params`.

    Args:
      params: Any pytree of real arrays.
      key: Random key.
      axis: As in `filter_norms`.

    Returns:
      A tree like `params`; zero in leaves with fewer than two axes.

    Raises:
      TypeError: if `params` has leaves that are not real floating-point arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from secondorder import curvature
      >>> d = curvature.filter_normalized_direction({"W": jnp.array([[3.0], [4.0]])}, jax.random.key(0))
      >>> round(float(jnp.linalg.norm(d["W"])), 5)
      5.0

    References: Li et al. (2018), NeurIPS, section 4.
    """
    wanted = filter_norms(params, axis=axis)
    drawn = probes.normal(key, jax.tree.map(jnp.asarray, params))
    has = filter_norms(drawn, axis=axis)
    return jax.tree.map(lambda d, w, h: jnp.where(h > 0, d * w / jnp.where(h > 0, h, 1.0), 0.0), drawn, wanted, has)


@compiled
def loss_slice(
    fun: Callable[..., jax.Array],
    params: tree.ArrayTree,
    directions: Sequence[tree.ArrayTree],
    *args: Any,
    span: float = 1.0,
    points: int = POINTS,
) -> LossSlice:
    """Return the loss on a line or a plane through a point: fun(params + a d1 + b d2).

    Args:
      fun: Loss; fun(params, *args) is a scalar. For data that do not fit, see `over_batches`.
      params: The middle; any pytree of real arrays, finite.
      directions: One or two trees like `params`, in a list: eigenvectors, filter-normalized directions.
      *args: Further arguments of `fun`.
      span: Coordinates run from -span to span, > 0, in units of the directions. Default 1.
      points: Points along each direction, >= 2. Default 41.

    Returns:
      `LossSlice`. Cost: points, or points² evaluations of the loss, one after the other.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; for parameters that are not finite, unless traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> found = curvature.loss_slice(lambda x: jnp.sum(x**2), jnp.zeros(2), [jnp.array([3.0, 4.0])], points=3)
      >>> found.coordinates.tolist(), found.values.tolist()
      ([-1.0, 0.0, 1.0], [25.0, 0.0, 25.0])

    References: Goodfellow, Vinyals & Saxe (2015), "Qualitatively characterizing neural network optimization problems",
    ICLR; Li et al. (2018), NeurIPS.
    """
    who = "loss_slice"
    checks.function(who, "fun", fun)
    checks.params(who, params)
    checks.number(who, "span", span)
    checks.integer(who, "points", points, 2)
    directions = _directions(who, directions, params)
    params = jax.tree.map(jnp.asarray, params)
    steps = jnp.linspace(-span, span, points, dtype=tree.scalar_dtype(params))
    grid = jnp.stack(jnp.meshgrid(*[steps] * len(directions), indexing="ij"), axis=-1)

    def value(at: jax.Array) -> jax.Array:
        x = params
        for a, d in zip(at, directions, strict=True):
            x = tree.axpy(a, d, x)
        out = jnp.asarray(fun(x, *args))
        checks.scalar_loss(who, fun, out, has_aux=False)
        return out

    values = jax.lax.map(value, grid.reshape(-1, len(directions)))
    return LossSlice(values.reshape(grid.shape[:-1]), steps)


def project(path: tree.ArrayTree, params: tree.ArrayTree, directions: Sequence[tree.ArrayTree]) -> jax.Array:
    """Return the coordinates of points in the line or plane of a slice, by least squares.

    Args:
      path: Points, trees like `params` with a leading axis, as `lax.scan` stacks them.
      params: The middle of the slice.
      directions: The directions of the slice, in a list.

    Returns:
      Shape (points, number of directions); what a point differs in besides is lost.

    Raises:
      ValueError: if the trees do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> path = jnp.array([[1.0, 5.0], [2.0, 6.0]])
      >>> curvature.project(path, jnp.zeros(2), [jnp.array([2.0, 0.0])]).tolist()
      [[0.5], [1.0]]
    """
    directions = _directions("project", directions, params)
    dtype = tree.scalar_dtype(params)
    D = jnp.stack([tree.ravel(d, dtype) for d in directions])
    first = jax.tree.map(lambda x: x[0], path)
    checks.same_shapes("project", first, params, "a point of path", remedy="path holds trees like params, stacked")
    moves = jax.vmap(lambda x: tree.ravel(tree.sub(x, params), dtype))(path)
    gram = tree.matmul(D, D.T)
    return jnp.linalg.solve(gram, tree.matmul(D, moves.T)).T


def _directions(who: str, directions: Sequence[tree.ArrayTree], params: tree.ArrayTree) -> list[tree.ArrayTree]:
    """Return one or two trees like params."""
    if not isinstance(directions, (list, tuple)) or len(directions) not in (1, 2):
        raise ValueError(f"{who}: directions must be a list of one or two trees like params, got {type(directions)}.")
    for i, direction in enumerate(directions):
        checks.same_shapes(who, direction, params, f"directions[{i}]", remedy="a direction must be a tree like params")
    return [jax.tree.map(jnp.asarray, d) for d in directions]
