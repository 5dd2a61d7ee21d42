"""Small programs, and what lies between large operations, as single kernels, on a CPU.

XLA compiles a program for the CPU to one kernel for each of its fusions, and calls them one after the other. A call
costs some 20 nanoseconds, more than a small kernel computes, and compiling one some 10 milliseconds; one step of a
quasi-Newton method takes sixty. XLA can also make one kernel of a whole computation, with its loops and branches: it
does so with loops that touch less than a kilobyte. The same is asked for here, by the attribute with which XLA marks
these. A program that leaves nothing to a library and holds no large array is one kernel. Of any other, what lies
between two operations that are left to a library or touch a large array is one. Small runs take a half to a fifth of
the time, and a third to a half of the time to compile; larger ones compile in half of the time (quasi-Newton methods)
to nine tenths (Newton's, where the Hessian and its eigendecomposition stay as they are).

It needs a CPU and a program for one device, which are known when the program is lowered. Under `vmap` the arrays are no
longer small, and under `jvp` the call is another one: there nothing is asked for.

The attribute is XLA's own, without a promise. It is used where it was tested: on x86-64, with jax 0.8 to 0.11. The
environment variable SECONDORDER_ONE_KERNEL=0, set before the import, switches all of this off.
"""

import contextvars
import math
import os
import platform
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.interpreters import ad, batching, mlir

from secondorder import jaxprs

KNOWN = (
    jax.__version_info__ < (0, 12)
    and platform.machine() in ("x86_64", "AMD64")
    and os.environ.get("SECONDORDER_ONE_KERNEL", "1") != "0"
)
LARGEST = 1 << 15  # numbers in an array of a program that is one kernel; beyond, threads and libraries win
LARGEST_SUM = 4095  # numbers in a sum; XLA leaves longer ones to a library. Also those in an array of a part
FEWEST = 5  # equations that are worth a kernel of their own
MOST_LEAVES = 8  # of the parameters, of which one step in parts compiles faster than as it is
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

    The outcome is the same to rounding: sums may be taken in another order. What is not small, or outside of a trace,
    is called as it is.
    """
    return _cut(function, whole=True)


def in_parts(function: Callable[..., Any], params: Any = None, most: int = MOST_LEAVES) -> Callable[..., Any]:
    """Return the function of arrays, which a program that calls it runs in as few kernels as large operations allow.

    As `as_one`, but what is not small is cut where it has to be, branches included. What has effects is called as it
    is, and so are functions within that are handed to `in_parts` themselves, and functions of `params` that are more
    than `most` leaves: each leaf is a loop of its own in many places, which LLVM writes out.
    """
    return function if len(jax.tree.leaves(params)) > most else _cut(function, whole=False)


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of arrays, which is not cut where `in_parts` cuts what calls it; derivatives neither.

    For the caller's own functions. XLA compiles equal kernels once, those of equal layers of a network, say; and it
    runs them on all cores. Where such a function is small, it is in one kernel with what surrounds it.
    """

    def run(*args: Any) -> Any:
        def secondorder_apart(*args: Any) -> Any:
            return function(*args)

        return jax.jit(secondorder_apart)(*args) if _cutting.get() else function(*args)

    return run


_cutting = contextvars.ContextVar("cutting", default=False)


def _cut(function: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
    inside = jax.jit(function)

    def run(*args: Any) -> Any:
        if not KNOWN or _cutting.get() or not jaxprs.in_program(args):
            return function(*args)
        token = _cutting.set(not whole)
        try:
            program, shape = jax.make_jaxpr(inside, return_shape=True)(*args)
        finally:
            _cutting.reset(token)
        small = _small(program.jaxpr, LARGEST)
        if not small and (whole or program.effects):
            return inside(*args) if whole else function(*args)  # (where `inside` was traced, nothing within was cut)
        limits = (LARGEST, 1) if small else (LARGEST_SUM, FEWEST)
        leaves = _run(program, jax.tree.leaves(args), *limits)
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return run


class _Step(NamedTuple):
    """An equation of a jaxpr; variables are numbers, so that calls can be written out."""

    alone: Any  # a jaxpr of this equation alone, whose literals are no inputs
    branches: tuple[Any, ...]  # of a condition that is cut as well; its literals are inputs
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    own: bool  # whether XLA emits it itself
    weight: int  # equations, those within included


def _run(program: Any, leaves: list[Any], limit: int, fewest: int) -> list[Any]:
    """Return the outputs of a closed jaxpr, run in parts of at least so many equations, with arrays up to a limit.

    A part holds what has the same number of large operations behind it, on the longest way from the arguments.
    """
    values: dict[int, Any] = {}
    steps: list[_Step] = []
    outputs = _write_out(program, [_new(values, x) for x in leaves], limit, values, steps)
    stages: list[tuple[list[_Step], list[_Step]]] = []
    behind: dict[int, int] = {}
    for step in steps:
        stage = max((behind.get(x, 0) for x in step.inputs), default=0)
        stages.extend(([], []) for _ in range(len(stages), stage + 1))
        stages[stage][0 if step.own else 1].append(step)
        behind.update(dict.fromkeys(step.outputs, stage if step.own else stage + 1))
    reads = Counter(outputs) + _reads(steps)
    for part, large in stages:
        if sum(step.weight for step in part) < fewest:
            _follow(part, values)
        else:
            _as_kernel(part, reads, values)
        _follow(large, values)
    return [values[x] for x in outputs]


def _write_out(program: Any, given: list[int], limit: int, values: dict[int, Any], steps: list[_Step]) -> list[int]:
    """Append the equations of a closed jaxpr to the steps, and return the numbers of its outputs."""
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.invars, given, strict=True))
    known |= {variable: _new(values, const) for variable, const in zip(jaxpr.constvars, program.consts, strict=True)}
    number = lambda x: _new(values, x.val) if _literal(x) else known[x]
    for equation in jaxpr.eqns:
        name, own = equation.primitive.name, _own(equation, limit)
        read = [x for x in equation.invars if not _literal(x)]
        if name == "jit" and not own and _may_be_cut(equation):
            inner = equation.params["jaxpr"]
            made = _write_out(inner, list(map(number, equation.invars)), limit, values, steps)
        else:
            made = [_new(values) for _ in equation.outvars]
            branches = equation.params["branches"] if name == "cond" and not own else ()
            inputs = tuple(map(number, equation.invars if branches else read))
            alone = jaxpr.replace(constvars=[], invars=read, outvars=equation.outvars, eqns=[equation])
            steps.append(_Step(alone, branches, inputs, tuple(made), own, _weight(equation)))
        known |= dict(zip(equation.outvars, made, strict=True))
    return list(map(number, jaxpr.outvars))


def _new(values: dict[int, Any], value: Any = None) -> int:
    """Return a number for another variable."""
    number = len(values)
    values[number] = value
    return number


def _may_be_cut(call: Any) -> bool:
    """Return whether a call is not to stay apart, and says nothing of where its arguments and results are to lie."""
    places = (*call.params["in_shardings"], *call.params["out_shardings"])
    plain = all(type(place).__name__ == "UnspecifiedValue" for place in places)
    return plain and "secondorder_apart" not in call.params["name"]


def _literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _weight(equation: Any) -> int:
    return 1 + sum(_weight(within) for inner in jaxprs.inner(equation) for within in inner.eqns)


def _reads(steps: list[_Step]) -> Counter[int]:
    """Return how often each variable is read."""
    return Counter(x for step in steps for x in step.inputs)


def _follow(steps: list[_Step], values: dict[int, Any]) -> None:
    """Carry out the steps, and add what they make to the values."""
    for step in steps:
        given = [values[x] for x in step.inputs]
        if step.branches:
            cut = [partial(_branch, program) for program in step.branches]
            out = jax.lax.switch(given[0], cut, *given[1:])
        else:
            out = eval_jaxpr(step.alone, (), *given)
        values.update(zip(step.outputs, out, strict=True))


def _branch(program: Any, *leaves: Any) -> list[Any]:
    return _run(program, list(leaves), LARGEST_SUM, FEWEST)


def _as_kernel(part: list[_Step], reads: Counter[int], values: dict[int, Any]) -> None:
    """Carry out the steps of a part in a call that is marked to be one kernel."""
    within = _reads(part)
    made = dict.fromkeys(x for step in part for x in step.outputs)
    kept = [x for x in made if reads[x] > within[x]]
    given = [x for x in within if x not in made]

    # XLA's emitter ends the process at an argument that nothing reads, as simplifications may leave one. So something
    # is read of each, and handed out, which XLA keeps; arrays without entries, which it replaces, are made inside, and
    # constants are hidden from it (see `_hide`).
    empty = {x: (jnp.shape(values[x]), jnp.result_type(values[x])) for x in given if not jnp.size(values[x])}
    full = [x for x in given if x not in empty]

    @jax.jit
    def secondorder_kernel(*leaves: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        inner = dict(zip(full, leaves, strict=True)) | {x: jnp.zeros(*kind) for x, kind in empty.items()}
        _follow(part, inner)
        return [inner[x] for x in kept], [jnp.ravel(x)[:1] for x in leaves]

    out, read = secondorder_kernel(*(values[x] for x in full))
    values.update((x, _mark.bind(leaf, *read)) for x, leaf in zip(kept, out, strict=True))


def _small(program: Any, limit: int) -> bool:
    """Return whether a jaxpr is small, and all of it is something that XLA emits itself."""
    light = all(_light(x, limit) for x in (*program.invars, *program.constvars))
    return light and all(_own(equation, limit) for equation in program.eqns)


def _own(equation: Any, limit: int) -> bool:
    """Return whether XLA emits an equation of a jaxpr itself, in a small program."""
    name = equation.primitive.name
    if equation.effects or not all(_light(x, limit) for x in (*equation.invars, *equation.outvars)):
        return False
    if name in CALLS:
        inner = list(jaxprs.inner(equation))
        return bool(inner) and all(_small(program, limit) for program in inner)
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


def _light(variable: Any, limit: int) -> bool:
    """Return whether a variable, or a constant, of a jaxpr is a small array of a kind that was tested."""
    aval = variable.aval
    known = str(getattr(aval, "dtype", None)) in DTYPES and all(isinstance(size, int) for size in aval.shape)
    spread = any(getattr(getattr(aval, "sharding", None), "spec", ()))  # over devices, by its type
    return known and not spread and aval.size <= limit


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
    # A result that is an argument is that of another call, or of none.
    ours = getattr(call, "name", "") == "func.call" and _callee(call).startswith("secondorder_kernel")
    if alone and ours and ATTRIBUTES not in call.attributes:
        _clear(module.symbol_table, call)
        words = {KERNEL: "true", "inlineable": "false"}
        attributes: Any = {key: mlir.ir.StringAttr.get(word) for key, word in words.items()}
        call.attributes[ATTRIBUTES] = mlir.ir.DictAttr.get(attributes)
        _hide(call)
    return [x]


def _hide(call: Any) -> None:
    """Keep XLA from seeing that an argument is a constant: it would take its place inside, and nothing read it then."""
    given = list(call.operands)
    with mlir.ir.InsertionPoint(call), call.location:
        barrier = mlir.ir.Operation.create("stablehlo.optimization_barrier", [x.type for x in given], given)
    for i, value in enumerate(barrier.results):
        call.operands[i] = value


def _clear(functions: Any, call: Any) -> None:
    """Take back what was asked for within the function that is called: a kernel in a kernel is only in the way."""

    def visit(operation: Any) -> Any:
        if operation.name == "func.call":
            if ATTRIBUTES in operation.attributes and KERNEL in mlir.ir.DictAttr(operation.attributes[ATTRIBUTES]):
                del operation.attributes[ATTRIBUTES]
            _clear(functions, operation)
        return mlir.ir.WalkResult.ADVANCE

    functions[_callee(call)].operation.walk(visit)


def _callee(call: Any) -> str:
    return mlir.ir.FlatSymbolRefAttr(call.attributes["callee"]).value


mlir.register_lowering(_mark, _lowered, cacheable=False)
