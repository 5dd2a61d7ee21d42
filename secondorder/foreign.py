"""Optimizers that are not ours, and ours inside optax's wrappers, as `minimize` runs them.

The driver needs to know of any optimizer where it stands, and why it might end. `tracked` keeps that beside a state
that does not tell it: the best point of a foreign optimizer, and the figures of a wrapped one as they are outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import transform
from secondorder.globalization import stopping
from secondorder.globalization.stopping import Status
from secondorder.linalg import tree


class Tracked(NamedTuple):
    """State of an optimizer that is not ours, with the point that a run would return."""

    params: tree.ArrayTree  # the point with the lowest loss, or the one accepted last
    loss: jax.Array
    grad: tree.ArrayTree
    fresh: jax.Array
    info: stopping.Info
    inner: Any  # its own state


def tracked(
    optimizer: optax.GradientTransformation, value_fn: Callable[..., jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer whose state is one of ours: itself, or a foreign or wrapped one with its point tracked."""
    if isinstance(optimizer, transform.Optimizer):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def init(params: tree.ArrayTree) -> Tracked:
        dtype = tree.scalar_dtype(params)
        infinite = jnp.full((), jnp.inf, dtype)
        zeros = tree.zeros_like(params)
        info = stopping.initial(dtype)
        return Tracked(tree.copy(params), infinite, zeros, jnp.array(True), info, inner.init(params))

    def update(
        updates: tree.ArrayTree, state: Tracked, params: tree.ArrayTree, *, value: jax.Array, **curvature: Any
    ) -> tuple[tree.ArrayTree, Tracked]:
        own = transform.info(state.inner) is not None
        extra: dict[str, Any] = {} if own else {"value_fn": value_fn, "grad": updates}
        move, inner_state = inner.update(updates, state.inner, params, value=value, **curvature, **extra)
        loss, start = value.astype(state.loss.dtype), state.fresh
        grad_norm = tree.max_norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if own:
            info = _unwrapped(state, inner_state, updates, finite)
            better = info.accepted
        else:
            tie = (loss <= state.loss + stopping.noise(state.loss)) & (grad_norm < state.info.grad_norm)
            better = finite & (start | (loss < state.loss) | tie)
            distance = tree.norm(tree.sub(params, state.params))
            info = stopping.record(
                state.info,
                accepted=better,
                first=start,
                stuck=jnp.array(False),
                before=state.loss,
                loss=loss,
                grad_norm=grad_norm,
                step_length=jnp.ones_like(loss),
                step_norm=distance,
                patient=True,
            )
            status = jnp.where(finite | start, info.status, Status.DIVERGED).astype(jnp.int32)
            # An optax line search evaluates on its own account and says how often.
            hidden = [n for _, n in optax.tree.get_all_with_path(inner_state, "num_linesearch_steps")]
            info = info._replace(
                status=status,
                iterations=state.info.iterations + (~start).astype(jnp.int32),
                evaluations=info.evaluations + sum(jnp.asarray(n, jnp.int32) for n in hidden),
            )
        point = (params, loss, tree.conj(updates))
        x, loss, grad = tree.where(better, point, (state.params, state.loss, state.grad))
        move = tree.cast_like(move, params)
        return move, Tracked(x, loss, grad, jnp.array(False), info, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _unwrapped(state: Tracked, inner_state: Any, grad: tree.ArrayTree, finite: jax.Array) -> stopping.Info:
    """Return the figures of an optimizer of ours inside a wrapper, as they are outside of it.

    A wrapper may show it another gradient, hide leaves from it, or skip its updates: the gradient of the test is that
    of the loss on the leaves that it moves, and every evaluation counts. Where a point that is not finite is kept from
    it, it can do nothing about it, and the run would stay there.
    """
    before, info = transform.info(state.inner), transform.info(inner_state)
    assert before is not None
    assert info is not None
    hidden = lambda node: isinstance(node, optax.MaskedNode)
    mine = transform.accepted(inner_state).grad
    if jax.tree.structure(mine, is_leaf=hidden) == jax.tree.structure(grad):
        grad = jax.tree.map(lambda own, g: jnp.zeros_like(g) if hidden(own) else g, mine, grad, is_leaf=hidden)
    norm = tree.max_norm(grad).astype(info.grad_norm.dtype)
    skipped = info.evaluations == before.evaluations
    accepted = info.accepted & ~skipped
    grad_norm = jnp.where(accepted, norm, state.info.grad_norm)
    plain = info.optimality == info.grad_norm  # no cosine
    status = jnp.where(skipped & ~finite, Status.DIVERGED, info.status).astype(jnp.int32)
    return info._replace(
        status=status,
        accepted=accepted,
        grad_norm=grad_norm,
        optimality=jnp.where(plain, grad_norm, info.optimality),
        evaluations=state.info.evaluations + 1,
    )
