"""Checks of what a user hands in: who complains, what is wrong, the value received, what to do.

Concrete Python and NumPy numbers are checked; traced values pass, so that schedules and
`optax.inject_hyperparams` keep working.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def traced(*trees: Any) -> bool:
    """Return whether any leaf of `trees` is a JAX tracer."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def number(
    who: str, name: str, value: Any, low: float = 0.0, high: float = math.inf, *, strict: bool = True, hint: str = ""
) -> None:
    """Raise unless `value` is one finite real number in (low, high), or in [low, high) if not `strict`."""
    if traced(value) and jnp.ndim(value) == 0:
        return
    if isinstance(value, (bool, str)) or np.ndim(value) != 0 or not np.isrealobj(value):
        raise TypeError(f"{who}: {name} must be a real number, got {value!r}.{_tail(hint)}")
    try:
        x = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{who}: {name} must be a real number, got {value!r}.{_tail(hint)}") from None
    if not ((x > low if strict else x >= low) and x < high):
        opening = "(" if strict else "["
        raise ValueError(f"{who}: {name} must be in {opening}{low:g}, {high:g}), got {value!r}.{_tail(hint)}")


def integer(who: str, name: str, value: Any, low: int, hint: str = "") -> None:
    """Raise unless `value` is an integer that is at least `low`; it sets shapes, so a tracer will not do."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{who}: {name} must be known when the program is traced, got an array; "
            f"under optax.inject_hyperparams pass static_args=('{name}',)."
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{who}: {name} must be an integer, got {value!r}.{_tail(hint)}")
    if value < low:
        raise ValueError(f"{who}: {name} must be >= {low}, got {value!r}.{_tail(hint)}")


def flag(who: str, name: str, value: Any) -> None:
    """Raise unless `value` is a bool; it shapes the program, so a tracer will not do."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{who}: {name} must be True or False, got {value!r}.")


def params(who: str, tree: Any, *, allow_complex: bool = False, name: str = "params") -> None:
    """Raise unless every leaf of `tree` is a floating-point (or, where allowed, complex) array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype"):
            if isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool):
                leaf = jnp.asarray(leaf)
            else:
                raise TypeError(f"{who}: {where} must be a floating-point array, got {leaf!r} ({type(leaf).__name__}).")
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            if not allow_complex:
                raise TypeError(
                    f"{who}: {where} is complex ({leaf.dtype}), which this optimizer does not support; "
                    "use lbfgs, or optimize the real and imaginary parts as two real arrays."
                )
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{who}: {where} must be a floating-point array, got dtype {leaf.dtype}; "
                "convert it, for instance with x.astype(float), or keep it out of the parameters."
            )


def data(who: str, args: tuple[Any, ...]) -> None:
    """Raise unless every leaf of `args` is an array or a number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))):
            raise TypeError(
                f"{who}: args{jax.tree_util.keystr(path)} must be an array or a number, got {leaf!r} "
                f"({type(leaf).__name__}); let fun close over what is none, or use functools.partial."
            )


def same_shapes(
    who: str,
    tree: Any,
    reference: Any,
    name: str,
    reference_name: str = "params",
    remedy: str = "pass the gradient of the loss with respect to params",
) -> None:
    """Raise unless `tree` has the structure and the leaf shapes of `reference`."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if structure != expected:
        raise ValueError(f"{who}: {name} must have the structure of {reference_name}, {expected}, got {structure}.")
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{who}: {name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but {reference_name} has "
                f"{jnp.shape(other)} there; {remedy}."
            )


def same_shardings(who: str, x0: Any, kept: Any) -> None:
    """Raise if a leaf of x0 is laid out on several devices in another way than the state's parameters; traced pass."""
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(x0), jax.tree.leaves(kept), strict=True):
        if traced(leaf, other) or not (isinstance(leaf, jax.Array) and isinstance(other, jax.Array)):
            continue
        several = max(leaf.sharding.num_devices, other.sharding.num_devices) > 1
        if several and not leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim):
            raise ValueError(
                f"{who}: x0{jax.tree_util.keystr(path)} has the sharding {leaf.sharding}, but the state belongs to "
                f"parameters with {other.sharding}; put both on one layout with jax.device_put."
            )


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether an array of this shape broadcasts to the shape `to`."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def scalar_value(who: str, value: Any, name: str = "value") -> None:
    """Raise a TypeError or ValueError that names `who` and `name`, unless `value` is one real number, shape ()."""
    if isinstance(value, (tuple, list, dict)):
        raise TypeError(
            f"{who}: {name} must be a scalar, got a {type(value).__name__}; "
            "if the loss returns (value, aux), pass the value alone."
        )
    if not hasattr(value, "dtype") and not isinstance(value, (int, float, complex)):
        raise TypeError(f"{who}: {name} must be a real number, got {value!r}; pass the value of the loss.")
    dtype = getattr(value, "dtype", jnp.result_type(value))
    if jnp.shape(value) != ():
        raise ValueError(
            f"{who}: {name} must be a scalar (shape ()), got shape {jnp.shape(value)}; "
            "reduce the loss by a sum or a mean."
        )
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{who}: {name} must be real, got dtype {dtype}; a loss must be real and floating-point.")


def finite(who: str, tree: Any, name: str = "params") -> None:
    """Raise if an entry of `tree` is NaN or infinite; traced values pass."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) or not getattr(leaf, "is_fully_addressable", True):
            continue
        bad = ~np.isfinite(np.asarray(leaf))
        if bad.any():
            raise ValueError(
                f"{who}: {name}{jax.tree_util.keystr(path)} has {int(bad.sum())} entries that are NaN or infinite; "
                "look for the step of the training at which they appeared."
            )


def missing(who: str, what: str, call: str) -> ValueError:
    """Return the error for an argument that `update` needs and did not get."""
    return ValueError(f"{who}: update needs {what}; call {call}.")


def function(who: str, name: str, value: Any) -> None:
    """Raise a TypeError that names `who`, `name` and what it got, unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{who}: {name} must be a function, got {value!r} ({type(value).__name__}).")


def product(who: str, hvp_fn: Any) -> None:
    """Raise unless `hvp_fn` can be called with parameters and a vector; a loss, handed in by mistake, cannot."""
    function(who, "hvp_fn", hvp_fn)
    try:
        signature = inspect.signature(hvp_fn)
    except (TypeError, ValueError):  # it has none to look at
        return
    try:
        signature.bind("params", "vector")
    except TypeError:
        name = getattr(hvp_fn, "__name__", repr(hvp_fn))
        raise TypeError(
            f"{who}: hvp_fn must take (params, vector), got {name}{signature}; for a loss pass "
            "secondorder.curvature.hvp(loss)."
        ) from None


def scalar_loss(who: str, fun: Callable[..., Any], shape: Any, *, has_aux: bool) -> None:
    """Raise unless `shape`, the abstract value of `fun`, is a real scalar, or (scalar, aux) with `has_aux`."""
    name = getattr(fun, "__name__", repr(fun))
    if has_aux:
        if not (isinstance(shape, tuple) and len(shape) == 2):
            raise TypeError(f"{who}: with has_aux=True, fun ({name}) must return (value, aux), got {shape}.")
        shape = shape[0]
    if isinstance(shape, tuple) and len(shape) == 2:
        raise TypeError(f"{who}: fun ({name}) returned a pair; pass has_aux=True if it is (value, aux).")
    got: Any = shape
    if getattr(got, "shape", None) != ():
        got = f"shape {got.shape}" if hasattr(got, "shape") else got
        raise ValueError(
            f"{who}: fun ({name}) must return a scalar (shape ()), got {got}; reduce it by a sum or a mean, "
            "or use least_squares for a vector of residuals."
        )
    if not jnp.issubdtype(got.dtype, jnp.floating):
        raise TypeError(f"{who}: fun ({name}) must return a real floating-point number, got dtype {got.dtype}.")


def residual(who: str, fun: Callable[..., Any], shape: Any) -> None:
    """Raise unless `shape`, the abstract value of a residual function, is a tree of real floating-point arrays."""
    name = getattr(fun, "__name__", repr(fun))
    leaves = jax.tree.leaves(shape)
    if not leaves:
        raise ValueError(
            f"{who}: the residual ({name}) has no entries, got {shape}; return an array, or a tree of them."
        )
    for leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{who}: the residual ({name}) must be real and floating-point, got {leaf}; "
                "stack the real and imaginary parts of a complex one, and convert integers with astype(float)."
            )


def box(who: str, bounds: Any, x0: Any, name: str = "x0") -> tuple[Any, Any]:
    """Return (lower, upper) as trees like x0, the argument called `name`, after checks of what is concrete."""
    if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise TypeError(f"{who}: bounds must be (lower, upper), each a number or a tree like {name}, got {bounds!r}.")
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x0)):
        raise TypeError(
            f"{who}: bounds need real parameters, got a complex {name}; bound its real and imaginary parts."
        )
    lower, upper = (_side(who, side, bound, x0, name) for side, bound in zip(("lower", "upper"), bounds, strict=True))
    leaves = zip(jax.tree_util.tree_leaves_with_path(x0), jax.tree.leaves(lower), jax.tree.leaves(upper), strict=True)
    for (path, x), low, high in leaves:
        where = jax.tree_util.keystr(path)
        if traced(low, high):
            continue
        if bool(jnp.any(low > high)):
            raise ValueError(
                f"{who}: the lower bound exceeds the upper one in {name}{where}: lower {low}, upper {high}; swap them."
            )
        if bool(jnp.any(jnp.isnan(low) | jnp.isnan(high))):
            raise ValueError(f"{who}: a bound of {name}{where} is NaN; use -inf or inf where there is none.")
        if not traced(x) and bool(jnp.any((x < low) | (x > high))):
            raise ValueError(
                f"{who}: {name}{where} = {x} is outside of its bounds [{low}, {high}]; start inside, for instance at "
                f"jnp.clip({name}, lower, upper)."
            )
    return lower, upper


def _side(who: str, side: str, bound: Any, x0: Any, name: str) -> Any:
    """Return one bound as a tree with the shapes and dtypes of x0."""
    if jax.tree.structure(bound) != jax.tree.structure(x0):
        if np.ndim(bound) != 0 or isinstance(bound, (dict, str, type(None))):
            raise ValueError(
                f"{who}: the {side} bound must be a number, or have the structure of {name}, {jax.tree.structure(x0)}, "
                f"got {bound!r}."
            )
        bound = jax.tree.map(lambda _: bound, x0)

    def leaf(path: Any, b: Any, x: jax.Array) -> jax.Array:
        if not traced(b) and np.asarray(b).dtype.kind not in "fiu" and not isinstance(b, jax.Array):
            raise TypeError(f"{who}: the {side} bound of {name}{jax.tree_util.keystr(path)} must be real, got {b!r}.")
        if not broadcasts(jnp.shape(b), x.shape):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"{who}: the {side} bound of {where} has shape {jnp.shape(b)}, which does not "
                f"broadcast to {x.shape}; use -inf or inf where there is no bound."
            )
        return jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, bound, x0)


def _tail(hint: str) -> str:
    return f" {hint}" if hint else ""
