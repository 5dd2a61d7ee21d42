"""What a function closes over, made an argument.

A custom derivative rule is run when its own trace may be over. What its function closed over is gone by then, unless it
was handed in. `jax.closure_convert` hands over what can be perturbed; labels, masks, random keys and loop counters are
traced as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer, eval_jaxpr


def hoist(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """Return g, the traced values that `function` closes over, and the shapes of what it returns.

    g(values, *args) is function(*args). `function` is traced once, at arguments like these; g holds no tracer.
    """
    # A function of its own, since JAX hashes it: a callable with arrays in it cannot be. Messages name the one within.
    named = functools.update_wrapper(lambda *given: function(*given), function, assigned=(), updated=())
    program, shape = jax.make_jaxpr(named, return_shape=True)(*args)
    jaxpr, structure = program.jaxpr, jax.tree.structure(shape)
    values = tuple(const for const in program.consts if isinstance(const, Tracer))
    fixed = tuple(None if isinstance(const, Tracer) else const for const in program.consts)
    traced = tuple(isinstance(const, Tracer) for const in program.consts)

    def run(values: tuple[Any, ...], *given: Any) -> Any:
        moved = iter(values)
        consts = [next(moved) if hoisted else const for hoisted, const in zip(traced, fixed, strict=True)]
        return jax.tree.unflatten(structure, eval_jaxpr(jaxpr, consts, *jax.tree.leaves(given)))

    return run, values, shape
