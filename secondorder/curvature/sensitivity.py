"""How a minimum moves with what the loss takes besides the parameters: the implicit function theorem.

At a minimum x(θ) of f(x, θ) the gradient g(x, θ) vanishes. Differentiating g(x(θ), θ) = 0 gives

    H dx = -(∂g/∂θ) dθ,        df = (∂f/∂θ) dθ,        H = ∂g/∂x

(the second is the envelope theorem). Parameters that a bound holds move with the bound, and the system is that of the
others. Nothing here knows how the minimum was found. Source: Krantz & Parks (2013), section 3.3; Nocedal & Wright
(2006), section 12.8 for the envelope theorem.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from secondorder.curvature import dense
from secondorder.linalg import conjugate_gradients, tree

DENSE_LIMIT = 200  # parameters up to which the Hessian is made a matrix and decomposed


class Held(NamedTuple):
    """The parameters that stand at a bound, and how their bounds move."""

    free: tree.ArrayTree  # bool, like x: not held
    move: tree.ArrayTree  # like x: tangent of the bound where held, else 0


class Tangents(NamedTuple):
    """Directional derivatives of a minimum."""

    params: tree.ArrayTree  # of x(θ)
    value: jax.Array  # of f(x(θ), θ)
    aux: Any  # of the auxiliary output at x(θ)
    singular: jax.Array  # bool: H is singular to rounding; False where that is not known (more than DENSE_LIMIT)


def tangents(
    fun: Callable[..., Any],
    has_aux: bool,
    x: tree.ArrayTree,
    args: tuple[Any, ...],
    args_dot: tuple[Any, ...],
    held: Held | None = None,
) -> Tangents:
    """Return the derivatives of a minimum along a change of the other arguments.

    Args:
      fun: fun(x, *args) is the loss, or (loss, aux) with `has_aux`; twice differentiable.
      has_aux: Whether it returns auxiliary output.
      x: The minimum; any pytree of real or complex arrays with n real entries in all. At a point that is none, the
        derivatives are those that the formulas above give there: finite if the second derivatives are.
      args: Further arguments, a tuple of pytrees.
      args_dot: Their tangents, as `jax.jvp` takes them.
      held: Parameters at bounds; None if there are no bounds.

    Returns:
      `Tangents`, linear in `args_dot` and differentiable in x and args, in both modes, any number of times.
      Up to DENSE_LIMIT parameters H is decomposed, and each eigenvalue w is inverted as w / (w² + δ²) with δ at its
      rounding level, so that directions without curvature do not move. Above, conjugate gradients solve the
      system; they end where they meet no positive curvature.
      Cost: n Hessian products and an eigendecomposition, or as many products as conjugate gradients take; the same
      again for each tangent that is transposed in a program of its own.
    """
    pack, unpack = _as_reals(x)

    def loss(z: tree.ArrayTree, *args: Any) -> tuple[jax.Array, Any]:
        out = fun(unpack(z), *args)
        return out if has_aux else (out, None)

    def gradient(z: tree.ArrayTree, *args: Any) -> tree.ArrayTree:
        return jax.grad(loss, has_aux=True)(z, *args)[0]

    z = pack(x)
    free = None if held is None else pack(held.free)
    move = tree.zeros_like(z) if held is None else pack(held.move)
    # 1. How the gradient changes at fixed x, and with the parameters that move with their bounds.
    _, product = jax.linearize(lambda y: gradient(y, *args), z)
    _, rhs = jax.jvp(lambda *a: gradient(z, *a), args, args_dot)
    if held is not None:
        rhs = jax.tree.map(jnp.add, rhs, product(move))
    # 2. The system H dx = -rhs of the free parameters.
    keep = (lambda v: v) if free is None else (lambda v: jax.tree.map(_where, free, v))
    solve, singular = _solver(gradient, z, args, free)
    matrix = lambda v: keep(product(keep(v)))
    rhs = _linked(keep(tree.scale(-1.0, rhs)))
    dz = jax.lax.custom_linear_solve(matrix, rhs, solve, symmetric=True)
    dz = jax.tree.map(jnp.add, keep(dz), move)
    # 3. The envelope theorem: the value does not feel dx, but for the parameters that are held.
    _, value = jax.jvp(lambda y, *a: loss(y, *a)[0], (z, *args), (move, *args_dot))
    aux = jax.jvp(lambda y, *a: loss(y, *a)[1], (z, *args), (dz, *args_dot))[1] if has_aux else None
    return Tangents(unpack(dz), value, aux, singular)


def _solver(
    gradient: Callable[..., tree.ArrayTree], z: tree.ArrayTree, args: tuple[Any, ...], free: tree.ArrayTree | None
) -> tuple[Callable[[Any, tree.ArrayTree], tree.ArrayTree], jax.Array]:
    """Return (product, right-hand side) -> solution, and whether the matrix is singular to rounding."""
    n, dtype = tree.size(z), tree.scalar_dtype(z)
    eps = float(jnp.finfo(dtype).eps)
    if n > DENSE_LIMIT:
        turns = min(2 * n, 1000)
        return lambda apply, b: conjugate_gradients.solve(apply, b, eps**0.75, turns), jnp.array(False)
    if n == 0:
        return lambda _, b: b, jnp.array(False)
    # The decomposition is an aid of the solve: derivatives of the solution come from the product, not from here.
    z, args = jax.lax.stop_gradient((z, args))
    H = dense.from_products(lambda y, v: jax.jvp(lambda u: gradient(u, *args), (y,), (v,))[1], z)
    held = jnp.int32(0)
    if free is not None:
        flags = ravel_pytree(free)[0]
        H = jnp.where(flags[:, None] & flags[None, :], H, 0.0)
        held = jnp.sum(~flags, dtype=jnp.int32)
    w, V = jnp.linalg.eigh(H)
    top = jnp.max(jnp.abs(w))
    size = jnp.where(top > 0, top, 1.0)
    delta = 10 * n * eps
    ratio = w / size
    inverse = ratio / (ratio**2 + delta**2) / size
    singular = jnp.sum(jnp.abs(ratio) <= delta, dtype=jnp.int32) > held

    def solve(_: Any, b: tree.ArrayTree) -> tree.ArrayTree:
        flat, back = ravel_pytree(b)
        flat_dtype = flat.dtype
        x = tree.matmul(V, inverse * tree.matmul(flat.astype(dtype), V))
        return back(x.astype(flat_dtype))

    return solve, singular


def _linked(b: tree.ArrayTree) -> tree.ArrayTree:
    """Return b so that every leaf depends on every other one, by a sum over nothing.

    The transpose of `custom_linear_solve` asks that all leaves be linear in the tangents, or none.
    """
    nothing = sum(jnp.sum(jnp.atleast_1d(leaf)[:0]) for leaf in jax.tree.leaves(b))
    return jax.tree.map(lambda leaf: (leaf + nothing).astype(leaf.dtype), b)


def _where(flag: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.where(flag, v, 0.0).astype(v.dtype)


def _as_reals(x: tree.ArrayTree) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the maps from trees like x to real ones and back: a complex leaf becomes two stacked real ones."""
    is_complex = [jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x)]

    def leafwise(split: Callable[..., Any]) -> Callable[..., Any]:
        def convert(y: tree.ArrayTree) -> tree.ArrayTree:
            leaves, structure = jax.tree.flatten(y)
            out = [split(leaf) if flag else leaf for leaf, flag in zip(leaves, is_complex, strict=True)]
            return jax.tree.unflatten(structure, out)

        return convert

    return leafwise(lambda u: jnp.stack([u.real, u.imag])), leafwise(lambda u: jax.lax.complex(u[0], u[1]))
