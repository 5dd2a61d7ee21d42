"""How the programs of small problems are compiled.

Compiling takes longer than running as long as a problem is small: half a second against a tenth of a millisecond. On a
CPU, XLA's emitters of fused kernels are more than half of that. Without them a loss runs between a tenth slower (large
tanh networks) and a tenth faster, and the numbers are the same to rounding. So programs of few parameters go without.

Only a program of our own can be told so: inside a `jit` of the caller's, the caller's options hold.
"""

from collections.abc import Callable
from typing import Any

import jax

from secondorder import checks
from secondorder.linalg import tree

SMALL = 200  # parameters
# Known from jax 0.8 to 0.10; a later compiler may lack the option, and would refuse it.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None


def jit(function: Callable[..., Any], *, static_argnums: int | None = None) -> Callable[..., Any]:
    """Return `run(quick, *args)`: `jax.jit(function)(*args)`, with the options of a small problem where `quick`."""
    plain = jax.jit(function, static_argnums=static_argnums)
    quickly = jax.jit(function, static_argnums=static_argnums, compiler_options=QUICK)

    def run(quick: bool, *args: Any) -> Any:
        if quick:
            try:
                return quickly(*args)
            except ValueError as error:  # a trace that no argument tells of: the function closes over its tracers
                if "`compiler_options` can only be passed to top-level" not in str(error):
                    raise
        return plain(*args)

    return run


def quick(params: tree.ArrayTree, *others: Any) -> bool:
    """Return whether a call with these parameters and other arguments is one of a small problem on a CPU."""
    small = QUICK is not None and 0 < tree.size(params) <= SMALL
    return small and jax.default_backend() == "cpu" and not checks.traced(params, others)
