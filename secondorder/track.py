"""Record figures of a training every few steps, inside `jit`, without changing the updates.

It stands beside `transform`: it wraps any optax transformation, reads the `Info` of this library's optimizers out of
their states, and calls the tools of the curvature room, which therefore cannot hold it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from secondorder import checks, transform
from secondorder.curvature.extreme import extreme_eigenpairs
from secondorder.curvature.traces import trace
from secondorder.globalization import stopping
from secondorder.linalg import tree

PRODUCTS = 20  # Hessian products for a top eigenvalue, and for a trace


class Seen(NamedTuple):
    """What a figure is computed from: one call of `update`."""

    params: tree.ArrayTree  # as shown to the optimizer
    updates: tree.ArrayTree  # the move that it returned
    grad: tree.ArrayTree
    value: jax.Array  # NaN if the caller gave none
    info: stopping.Info | None  # of this library's optimizers
    hvp_fn: transform.Hvp | None  # the curvature that the caller gave, or the Hessian of `value_fn`
    key: jax.Array


Figure = Callable[[Seen], jax.Array]


class TrackState(NamedTuple):
    """State of `track`."""

    inner: Any  # of the optimizer
    calls: jax.Array  # int32: calls of update
    step: jax.Array  # int32, shape (capacity,): at which call a record was made; -1 for none yet
    figures: dict[str, jax.Array]  # name -> shape (capacity,); the oldest are overwritten


class Record(NamedTuple):
    """The figures recorded so far, the oldest first."""

    step: np.ndarray  # calls of update before the record
    figures: dict[str, np.ndarray]


@transform.cached
def track(
    optimizer: optax.GradientTransformation,
    figures: Sequence[str] | Mapping[str, Figure] = ("grad_norm", "gain_ratio"),
    *,
    every: int = 10,
    capacity: int = 1000,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that chosen figures are recorded every `every` calls of `update`.

    Args:
      optimizer: Any optax transformation; its updates are passed on unchanged.
      figures: Names out of "value", "grad_norm", "update_norm", "top_eigenvalue", "trace", and of the fields of `Info`
        ("gain_ratio", "step_length", "damping", ...; NaN for other optimizers); or a mapping from names of your own to
        functions of `Seen` that return a scalar.
      every: Calls from one record to the next, >= 1. Default 10.
      capacity: Records kept, >= 1; the oldest are overwritten. Default 1000.

    Returns:
      A `GradientTransformationExtraArgs` that takes the arguments of `optimizer`; `recorded(state)` gives the figures.
      Meant for a jitted step: an eager call compiles the branch that records every time. The curvature figures need
      `hvp_fn` or `value_fn` in `update`, and 20 products each, spent only in the calls that record (under `vmap`, in
      all).

    Raises:
      ValueError, TypeError: here, for arguments that cannot be right; in `update`, if curvature is needed and missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax, secondorder as so
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 9.0]) * x**2) / 2
      >>> optimizer = so.track(optax.sgd(0.1), ("grad_norm", "top_eigenvalue"), every=2)
      >>> x = jnp.array([1.0, 1.0])
      >>> state = optimizer.init(x)
      >>> for _ in range(4):
      ...     updates, state = optimizer.update(jax.grad(loss)(x), state, x, value_fn=loss)
      ...     x = x + updates
      >>> so.recorded(state).step.tolist(), so.recorded(state).figures["top_eigenvalue"].round(3).tolist()
      ([0, 2], [9.0, 9.0])
    """
    who = "track"
    if not hasattr(optimizer, "update"):
        raise TypeError(f"{who}: optimizer must be an optax transformation, got {optimizer!r}.")
    checks.integer(who, "every", every, 1, hint="10 is the default.")
    checks.integer(who, "capacity", capacity, 1, hint="1000 is the default.")
    chosen = _figures(who, figures)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: tree.ArrayTree) -> TrackState:
        checks.params(who, params, allow_complex=True)
        empty = {name: jnp.full(capacity, jnp.nan, tree.scalar_dtype(params)) for name in chosen}
        return TrackState(inner.init(params), jnp.int32(0), jnp.full(capacity, -1, jnp.int32), empty)

    def update(
        updates: tree.ArrayTree,
        state: TrackState,
        params: tree.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, TrackState]:
        moves, inner_state = inner.update(updates, state.inner, params, **extra_args)
        value_fn, hvp_fn = extra_args.get("value_fn"), extra_args.get("hvp_fn")
        if hvp_fn is None and value_fn is not None:
            given = {k: v for k, v in extra_args.items() if k not in ("value", "grad", "value_fn", "hvp_fn")}
            hvp_fn = transform.curvature(who, updates, params, value_fn, None, given)
        seen = Seen(
            params=params,
            updates=moves,
            grad=updates,
            value=jnp.asarray(extra_args.get("value", jnp.nan)),
            info=transform.info(inner_state),
            hvp_fn=hvp_fn,
            key=jax.random.fold_in(jax.random.key(0), state.calls),
        )
        slot = (state.calls // every) % capacity

        def record() -> tuple[jax.Array, dict[str, jax.Array]]:
            step = state.step.at[slot].set(state.calls)
            rows = state.figures
            return step, {name: rows[name].at[slot].set(chosen[name](seen).astype(rows[name].dtype)) for name in chosen}

        due = state.calls % every == 0
        step, rows = jax.lax.cond(due, record, lambda: (state.step, state.figures))
        return moves, TrackState(inner_state, state.calls + 1, step, rows)

    return transform.pair(init, update)


def recorded(state: Any) -> Record:
    """Return the figures that `track` recorded, from its state or one that holds it.

    Args:
      state: What the `init` or `update` of a tracked optimizer returned, also inside `optax.chain` and other wrappers.

    Returns:
      `Record(step, figures)`, NumPy arrays, the oldest first.

    Raises:
      ValueError: if `state` holds none, or more than one, state of `track`.

    Example:
      >>> import jax.numpy as jnp, optax, secondorder as so
      >>> so.recorded(so.track(optax.sgd(0.1)).init(jnp.zeros(2))).step.tolist()
      []
    """
    own = lambda node: isinstance(node, TrackState)
    found = [node for node in jax.tree.leaves(state, is_leaf=own) if own(node)]
    if len(found) != 1:
        raise ValueError(f"recorded: state must hold one state of track, found {len(found)}.")
    step = np.asarray(found[0].step)
    order = np.argsort(step, kind="stable")
    order = order[step[order] >= 0]
    return Record(step[order], {name: np.asarray(rows)[order] for name, rows in found[0].figures.items()})


def _figures(who: str, figures: Any) -> dict[str, Figure]:
    """Return the functions of the chosen figures."""
    if isinstance(figures, Mapping):
        for name, figure in figures.items():
            checks.function(who, f"figures[{name!r}]", figure)
        return dict(figures)
    if isinstance(figures, str):
        figures = (figures,)
    known = {**_OWN, **{name: _of_info(name) for name in stopping.Info._fields if name not in _OWN}}
    for name in figures:
        if name not in known:
            raise ValueError(f"{who}: figures must be out of {', '.join(known)}, got {name!r}; or pass a mapping.")
    return {name: known[name] for name in figures}


def _of_info(name: str) -> Figure:
    def figure(seen: Seen) -> jax.Array:
        return jnp.asarray(jnp.nan) if seen.info is None else getattr(seen.info, name)

    return figure


def _curvature(name: str, seen: Seen) -> transform.Hvp:
    if seen.hvp_fn is None:
        raise checks.missing("track", f"curvature for {name!r}", "update(grads, state, params, value_fn=loss)")
    return seen.hvp_fn


def _top_eigenvalue(seen: Seen) -> jax.Array:
    products = min(PRODUCTS, tree.size(seen.params))
    hvp_fn = _curvature("top_eigenvalue", seen)
    return extreme_eigenpairs(hvp_fn, seen.params, products=products, key=seen.key).largest.values[0]


def _trace(seen: Seen) -> jax.Array:
    return trace(_curvature("trace", seen), seen.params, probes=PRODUCTS, key=seen.key).value


_OWN: dict[str, Figure] = {
    "value": lambda seen: seen.value,
    "grad_norm": lambda seen: tree.norm(seen.grad),
    "update_norm": lambda seen: tree.norm(seen.updates),
    "top_eigenvalue": _top_eigenvalue,
    "trace": _trace,
}
