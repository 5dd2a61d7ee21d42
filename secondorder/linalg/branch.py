"""A branch that stays one under a `vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from secondorder.linalg import tree

FEW = 4096  # numbers that an accelerator selects instead of branching


def interrupts() -> bool:
    """Return whether a branch interrupts the device: an accelerator runs kernels as one graph up to the next branch.

    Measured on an H100: 16 us, as much as a dozen small kernels. It is asked of the default device, when a program is
    traced; elsewhere the outcome is the same, and only slower.
    """
    return jax.default_backend() != "cpu"


def branch(
    pred: jax.Array, on_true: Callable[..., tree.ArrayTree], on_false: Callable[..., tree.ArrayTree], *operands: Any
) -> Any:
    """Return on_true(*operands) or on_false(*operands), as `jax.lax.cond` does; neither may close over tracers.

    Under `vmap` a `cond` turns into a select, and XLA inlines both sides into every loop over vectors that asks for the
    outcome, where they are computed anew for each entry: on 1,000 lanes that was half of a BFGS step. This one remains
    a branch: if any lane enters, both sides are computed for all lanes, once, else `on_false` alone. Two cases are left
    to the select: a `vmap` of a `vmap`, and several devices, where asking all lanes would be a collective. So are few
    numbers on an accelerator, which a branch interrupts. The derivative is that of a select, since a batching rule of
    one's own (`custom_vmap`) has no reverse mode.
    """
    selected = interrupts() and sum(map(jnp.size, jax.tree.leaves(operands))) <= FEW

    def one(pred: jax.Array, operands: Any) -> Any:
        if selected:
            return tree.where(pred, on_true(*operands), on_false(*operands))
        return jax.lax.cond(pred, on_true, on_false, *operands)

    lanes = jax.custom_batching.custom_vmap(one)

    @lanes.def_vmap
    def _(size: int, batched: Any, pred: jax.Array, operands: Any) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        every = lambda function: jax.vmap(function, in_axes=tuple(axes), axis_size=size)
        if selected or jax.device_count() > 1:
            out = every(one)(pred, operands)
            return out, jax.tree.map(lambda _: True, out)
        entered = every(one if batched[0] else lambda _, operands: on_true(*operands))
        out = jax.lax.cond(jnp.any(pred), entered, every(lambda _, operands: on_false(*operands)), pred, operands)
        return out, jax.tree.map(lambda _: True, out)

    smooth = jax.custom_jvp(lanes)

    @smooth.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        _, moves = jax.jvp(lambda pred, operands: _select(pred, on_true, on_false, operands), primals, tangents)
        return smooth(*primals), moves

    return smooth(pred, operands)


def _select(pred: jax.Array, on_true: Callable[..., Any], on_false: Callable[..., Any], operands: Any) -> Any:
    """Return the outcome by computing both sides; no tangent flows through the side that is not taken."""
    still = jax.lax.stop_gradient(operands)
    taken, other = on_true(*tree.where(pred, operands, still)), on_false(*tree.where(pred, still, operands))
    return tree.where(pred, taken, other)
