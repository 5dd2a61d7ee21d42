"""Programs as JAX writes them down: made apart from the one that is being traced, and looked through."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.interpreters import partial_eval as pe

from secondorder import checks


def in_program(args: Any) -> bool:
    """Return whether these are arguments in a program that is being traced, and not those of a transformation of it."""
    kinds = [isinstance(x, pe.DynamicJaxprTracer) for x in jax.tree.leaves(args) if checks.traced(x)]
    return bool(kinds) and all(kinds)


def staged(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return the function of arrays like these, traced once and apart: where that fails, no equation of it is left.

    Raises:
      TypeError: for a forward derivative of a `jax.custom_vjp` rule, which JAX may notice no earlier than it compiles.
      Exception: what the function raises.
    """
    program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    if uses(program.jaxpr, "custom_lin"):
        raise TypeError("custom_vjp: a reverse rule has no forward derivative.")

    def run(*args: Any) -> Any:
        leaves = eval_jaxpr(program.jaxpr, program.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return run


def uses(jaxpr: Any, name: str) -> bool:
    """Return whether a primitive of this name is in a program, or in one within."""
    return any(e.primitive.name == name or any(uses(within, name) for within in inner(e)) for e in jaxpr.eqns)


def inner(equation: Any) -> Iterator[Any]:
    """Yield the programs inside an equation: bodies of loops, branches, jitted calls."""
    for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)
