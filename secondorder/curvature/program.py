"""One compiled program for a tool that is called outside of a trace.

Without it, an eager call of a tool that linearizes a loss would compile every operation by itself, for half a minute.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from secondorder import checks, compiler

KEPT = 64  # programs; functions and the data that they close over are let go with the oldest
F = TypeVar("F", bound=Callable[..., Any])


def compiled(tool: F) -> F:
    """Return `tool(function, params, ...)` so that an eager call runs one program, kept for the next equal call.

    Arrays, and trees of them, are traced; functions, numbers and None are part of the program. Inside a trace the tool
    is inlined. Parameters that are not finite are refused here, where they can be seen.
    """

    @functools.wraps(tool)
    def call(*args: Any, **kwargs: Any) -> Any:
        if checks.traced(args, kwargs):
            return tool(*args, **kwargs)
        # NumPy's scalars are numbers, not data: options among them can then be checked.
        args = (*args[:2], *map(_plain, args[2:]))
        kwargs = {name: value if name == "params" else _plain(value) for name, value in kwargs.items()}
        params = args[1] if len(args) > 1 else kwargs.get("params")
        checks.params(tool.__name__, params)
        checks.finite(tool.__name__, params)
        named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
        dynamic = {name: value for name, value in named.items() if not _static(value)}
        static = tuple((name, _types(value), value) for name, value in named.items() if name not in dynamic)
        return _program(tool, len(args), static)(compiler.quick(params), dynamic)

    return call  # type: ignore[return-value]


@functools.lru_cache(maxsize=KEPT)
def _program(tool: Callable[..., Any], positional: int, static: tuple) -> Callable[..., Any]:
    fixed = {name: value for name, _, value in static}

    def run(dynamic: dict[str, Any]) -> Any:
        named = {**fixed, **dynamic}
        args = [named.pop(str(i)) for i in range(positional)]
        return tool(*args, **named)

    return compiler.jit(run)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _types(value: Any) -> tuple[type, ...]:
    """Return the types in a tree: 1, 1.0 and True are equal in Python, but not to a loss."""
    return (type(value), *map(type, jax.tree.leaves(value)))


def _static(value: Any) -> bool:
    """Return whether an argument is part of the program: it is hashable, and no array."""
    try:
        hash(value)
    except TypeError:
        return False
    return not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))
