"""All optimizers, for the tests that every optimizer must pass: to cover a new one, add one line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import secondorder as so


class Entry(NamedTuple):
    """One optimizer with its options."""

    name: str
    make: Callable[[], optax.GradientTransformationExtraArgs]
    searches: bool = True  # picks its own step lengths from values of the loss
    curvature: bool = False  # needs hvp_fn or value_fn
    residual: bool = False  # needs residual_fn, the residuals of a loss ||r||²/2
    leaves_saddles: bool = False  # moves off a saddle although the gradient is zero there
    descends: bool = True  # else it goes to the nearest stationary point, also to a maximum
    variant: bool = False  # another setting of an optimizer above it: its less telling tests are marked slow
    own_lengths: bool = False  # steps do not grow: a loss without a lower bound takes more of them than there are
    draws: bool = False  # random vectors, leaf by leaf: a tree and the vector of its entries go different ways
    repeat: bool = False  # the program of an optimizer above it with other numbers: all its tests are marked slow


class Block(NamedTuple):
    """One direction-only block, which maps a gradient to a preconditioned gradient."""

    name: str
    make: Callable[[], optax.GradientTransformation]
    curvature: bool = False


def _leaves(params: Any) -> Any:
    """Return scores whose Fisher matrix is diag(1, 2, ...), near the Hessian of the contract's bowl."""
    leaves = [jnp.ravel(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in jax.tree.leaves(params)]
    x = jnp.concatenate(leaves) if leaves else jnp.zeros(0)
    return jnp.sqrt(jnp.arange(1, x.size + 1)) * x


def _capped() -> optax.GradientTransformationExtraArgs:
    return so.newton_cg(so.capped_cg())


def _with_pairs() -> optax.GradientTransformationExtraArgs:
    return so.newton_cg(preconditioner=so.lbfgs_preconditioner(4))


def _with_diagonal() -> optax.GradientTransformationExtraArgs:
    return so.newton_cg(preconditioner=so.diagonal_preconditioner(3))


RATE = 0.5  # of the entries with a fixed learning rate

REGISTRY: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("lbfgs", so.lbfgs),
        Entry("lbfgs, fixed rate", lambda: so.lbfgs(RATE), searches=False, descends=False, variant=True),
        Entry("bfgs", so.bfgs),
        Entry("bfgs, fixed rate", lambda: so.bfgs(RATE), searches=False, variant=True),
        Entry("ssbroyden", so.ssbroyden, variant=True),
        Entry("ssbfgs", so.ssbfgs, variant=True, repeat=True),
        Entry("dfp", so.dfp, variant=True, repeat=True),
        Entry("broyden_class", lambda: so.broyden_class(0.5, self_scaling=False), variant=True, repeat=True),
        Entry("sr1", so.sr1, variant=True),
        Entry("newton, trust region", so.newton, curvature=True, leaves_saddles=True),
        Entry(
            "newton, bent",
            lambda: so.newton(chebyshev=True),
            curvature=True,
            leaves_saddles=True,
            variant=True,
            repeat=True,
        ),
        Entry("newton, shift", lambda: so.newton(so.levenberg()), curvature=True, variant=True),
        Entry("newton, line search", lambda: so.newton(so.modified_cholesky()), curvature=True, variant=True),
        Entry("saddle_free_newton", so.saddle_free_newton, curvature=True, leaves_saddles=True, variant=True),
        Entry("newton_cg", so.newton_cg, curvature=True, leaves_saddles=True, variant=True),
        Entry("newton_cg, pairs", _with_pairs, curvature=True, leaves_saddles=True, variant=True, repeat=True),
        Entry(
            "newton_cg, diagonal",
            _with_diagonal,
            curvature=True,
            leaves_saddles=True,
            variant=True,
            repeat=True,
            draws=True,
        ),
        Entry(
            "newton_cg, line search",
            _capped,
            curvature=True,
            leaves_saddles=True,
            variant=True,
            repeat=True,
            own_lengths=True,
        ),
        Entry("cubic_newton", so.cubic_newton, curvature=True, leaves_saddles=True, variant=True),
        Entry("lbfgsb", so.lbfgsb, variant=True),
        Entry("projected_newton", so.projected_newton, curvature=True, leaves_saddles=True, variant=True),
        Entry("levenberg_marquardt", so.levenberg_marquardt, residual=True),
        Entry("gauss_newton", so.gauss_newton, residual=True, variant=True),
    )
}

BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        Block("scale_by_lbfgs", so.scale_by_lbfgs),
        Block("scale_by_bfgs", so.scale_by_bfgs),
        Block("scale_by_newton", so.scale_by_newton, curvature=True),
        Block("scale_by_natural_gradient", lambda: so.scale_by_natural_gradient(_leaves, 0.1)),
        Block("scale_by_saddle_free_newton", so.scale_by_saddle_free_newton, curvature=True),
    )
}


def extra_args(entry: Entry | Block, value: Any, hvp_fn: Any, residual_fn: Any = None) -> dict[str, Any]:
    """Return the extra arguments that `update` needs when the caller evaluates the loss."""
    extra = {}
    if getattr(entry, "searches", False):
        extra["value"] = value
    if entry.curvature:
        extra["hvp_fn"] = hvp_fn
    if getattr(entry, "residual", False):
        extra["residual_fn"] = residual_fn
    return extra
