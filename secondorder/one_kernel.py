"""A small program as one kernel, on a CPU.

XLA compiles a program for the CPU to one kernel for each of its fusions, and calls them one after the other. A call
costs some 20 nanoseconds, more than a small kernel computes, and compiling one some 10 milliseconds; one step of a
quasi-Newton method takes sixty. XLA can also make one kernel of a whole computation, with its loops and branches: it
does so with loops that touch less than a kilobyte. The same is asked for here, by the attribute with which XLA marks
these, for every program that leaves nothing to a library and holds no large array. Such runs take a half to a fifth of
the time, and a third to a half of the time to compile.

It needs a CPU and a program for one device, which are known when the program is lowered. Under `vmap` the arrays are no
longer small, and under `jvp` the call is another one: there nothing is asked for.

The attribute is XLA's own, without a promise. It is used where it was tested: on x86-64, with jax 0.8 to 0.11. The
environment variable SECONDORDER_ONE_KERNEL=0, set before the import, switches all of this off.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from secondorder import checks

KNOWN = (
    jax.__version_info__ < (0, 12)
    and platform.machine() in ("x86_64", "AMD64")
    and os.environ.get("SECONDORDER_ONE_KERNEL", "1") != "0"
)
LARGEST = 1 << 15  # numbers in an array; beyond, threads and libraries win
LARGEST_SUM = 4095  # numbers in a sum; XLA leaves longer ones to a library
DTYPES = frozenset(("bool", "int32", "int64", "uint32", "float32", "float64"))
ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
    convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite
    le log log1p logistic lt max min mul ne neg nextafter not or pow rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
MOVES = """
    broadcast_in_dim concatenate dynamic_slice dynamic_update_slice gather iota pad reshape rev slice split
    squeeze stack transpose unstack
"""
SUMS = "argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
CALLING = "cond custom_jvp_call custom_vjp_call custom_vmap_call jit remat2 scan while"
PLAIN = frozenset(f"{ELEMENTWISE} {MOVES} one_kernel platform_index".split())
REDUCTIONS, CALLS = frozenset(SUMS.split()), frozenset(CALLING.split())
KERNEL, ATTRIBUTES = "xla_cpu_small_call", "mhlo.frontend_attributes"


def as_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of arrays, which a program that calls it runs as one kernel where it is small.

    The outcome is the same to rounding: sums may be taken in another order. What is outside of a trace, or closes over
    its tracers, is called as it is.
    """
    inside = jax.jit(function)

    # XLA's emitter ends the process at an argument that nothing reads, as simplifications may leave one. So something
    # is read of each, and handed out, which XLA keeps; arrays without entries, which it replaces, are made inside.
    @partial(jax.jit, static_argnums=0)
    def call(form: tuple[Any, tuple[Any, ...]], *full: jax.Array) -> tuple[Any, list[jax.Array]]:
        structure, empty = form
        given = iter(full)
        leaves = [next(given) if kind is None else jnp.zeros(*kind) for kind in empty]
        return inside(*jax.tree.unflatten(structure, leaves)), [jnp.ravel(x)[:1] for x in full]

    def run(*args: Any) -> Any:
        if not KNOWN or not checks.traced(args):
            return function(*args)
        program = jax.make_jaxpr(inside)(*args)
        if checks.traced(program.consts) or not _small(program.jaxpr):
            return inside(*args)  # as it was traced just now
        leaves, structure = jax.tree.flatten(args)
        empty = tuple(None if jnp.size(x) else (jnp.shape(x), jnp.result_type(x)) for x in leaves)
        out, read = call((structure, empty), *(x for x in leaves if jnp.size(x)))
        return jax.tree.map(lambda x: _mark.bind(x, *read), out)

    return run


def _small(program: Any) -> bool:
    """Return whether a jaxpr is small, and all of it is something that XLA emits itself."""
    return all(map(_light, (*program.invars, *program.constvars))) and all(map(_own, program.eqns))


def _own(equation: Any) -> bool:
    """Return whether XLA emits an equation of a jaxpr itself, in a small program."""
    name = equation.primitive.name
    if equation.effects or not all(map(_light, (*equation.invars, *equation.outvars))):
        return False
    if name in CALLS:
        inner = list(_inner(equation.params))
        return bool(inner) and all(map(_small, inner))
    if name in REDUCTIONS:
        return equation.invars[0].aval.size <= LARGEST_SUM
    if name == "dot_general":
        return _is_matrix_vector(equation)
    if name.startswith("scatter"):  # to one place: a slice that is written; others are loops of XLA's runtime
        return math.prod(equation.invars[1].aval.shape[:-1]) == 1
    return name in PLAIN


def _is_matrix_vector(equation: Any) -> bool:
    """Return whether a product is one with a vector, of short sums; products of matrices are left to a library."""
    (left, right), (batch, _) = equation.params["dimension_numbers"]
    a, b = (variable.aval for variable in equation.invars)
    free = a.ndim - len(left), b.ndim - len(right)
    summed = math.prod(a.shape[axis] for axis in left)
    return not batch and min(free) == 0 and max(free) <= 1 and summed <= LARGEST_SUM


def _light(variable: Any) -> bool:
    """Return whether a variable, or a constant, of a jaxpr is a small array of a kind that was tested."""
    aval = variable.aval
    known = str(getattr(aval, "dtype", None)) in DTYPES and all(isinstance(size, int) for size in aval.shape)
    return known and aval.size <= LARGEST


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for leaf in jax.tree.leaves(list(params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)


# A mark is an identity that leaves attributes on the call whose result it is handed. What was read of the arguments is
# handed to it as well: it is dropped as soon as a transformation changes one of them.
_mark = type(jax.lax.add_p)("one_kernel")  # (`jax.extend.core`, which names the type, would load Pallas as well)
_mark.def_impl(lambda x, *_: x)
_mark.def_abstract_eval(lambda x, *_: x)
batching.primitive_batchers[_mark] = lambda args, axes: (args[0], axes[0])
ad.primitive_jvps[_mark] = lambda primals, tangents: (primals[0], tangents[0])


def _lowered(context: Any, x: Any, *_: Any) -> list[Any]:
    call: Any = getattr(x.owner, "operation", None)
    module = context.module_context
    alone = getattr(module.axis_context, "num_devices", None) == 1 and tuple(module.platforms) == ("cpu",)
    if alone and getattr(call, "name", "") == "func.call":
        _clear(module.symbol_table, call)
        words = {KERNEL: "true", "inlineable": "false"}
        attributes: Any = {key: mlir.ir.StringAttr.get(word) for key, word in words.items()}
        call.attributes[ATTRIBUTES] = mlir.ir.DictAttr.get(attributes)
    return [x]


def _clear(functions: Any, call: Any) -> None:
    """Take back what was asked for within the function that is called: a kernel in a kernel is only in the way."""

    def visit(operation: Any) -> Any:
        if operation.name == "func.call":
            if ATTRIBUTES in operation.attributes and KERNEL in mlir.ir.DictAttr(operation.attributes[ATTRIBUTES]):
                del operation.attributes[ATTRIBUTES]
            _clear(functions, operation)
        return mlir.ir.WalkResult.ADVANCE

    functions[mlir.ir.FlatSymbolRefAttr(call.attributes["callee"]).value].operation.walk(visit)


mlir.register_lowering(_mark, _lowered, cacheable=False)
