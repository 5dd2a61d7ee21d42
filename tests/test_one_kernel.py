"""Small programs as one kernel: the same numbers, and asked for only where XLA can do it."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision, rosenbrock
from jax import lax

import secondorder as so
from secondorder import jaxprs, one_kernel
from secondorder.linalg.branch import branch

MARK = "xla_cpu_small_call"
X = np.array([0.3, -0.7, 1.4, 0.0, -0.2, 0.9])

pytestmark = pytest.mark.skipif(
    not one_kernel.KNOWN, reason="kernels of a whole program are asked for where they were tested"
)

doubled = jax.custom_vjp(lambda x: 2 * x)
doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

UNARY = """
    abs asin asinh atan atanh cbrt ceil cos cosh erf erf_inv erfc exp exp2 expm1 floor is_finite log1p logistic neg
    round sign sin sinh square tan tanh
"""
ELEMENTWISE = {name: getattr(lax, name) for name in UNARY.split()} | {
    "acos": lax.acos,
    "acosh": lambda x: lax.acosh(x + 2.0),
    "log": lambda x: lax.log(x + 2.0),
    "rsqrt": lambda x: lax.rsqrt(x + 2.0),
    "sqrt": lax.sqrt,  # NaN where negative
    "integer_pow": lambda x: lax.integer_pow(x, -3),  # Inf at 0
    "copy": lambda x: (jnp.copy(x), jnp.array(x)),
    "stop_gradient": lax.stop_gradient,
    "convert_element_type": lambda x: x.astype(jnp.int32).astype(bool).astype(x.dtype),
    "add": lambda x: x + x[::-1],
    "atan2": lambda x: lax.atan2(x, x[::-1]),
    "clamp": lambda x: lax.clamp(-0.5, x, 0.5),
    "div": lambda x: x / x[::-1],
    "max": lambda x: lax.max(x / x, x),  # NaN stays
    "min": lambda x: lax.min(x, x / x),
    "mul": lambda x: x * x[::-1],
    "nextafter": lambda x: lax.nextafter(x, x[::-1]),
    "pow": lambda x: jnp.abs(x) ** x[::-1],
    "rem": lambda x: lax.rem(x, x[::-1]),
    "sub": lambda x: x - x[::-1],
    "compared": lambda x: ((x < 0.1) | (x >= 0.9)) & ~(x == 0.3) ^ (x != x[::-1]) | (x > 1) & (x <= 2),
    "whole": lambda x: jnp.arange(6) % 4 // 2 + lax.rem(jnp.arange(6), 4) - (x > 0).astype(jnp.int32),
    "bits": lambda x: (
        jnp.frexp(x),
        jnp.ldexp(x, jnp.arange(6)),
        jnp.arange(6) << 2 >> 1,
        lax.shift_right_logical(5, 1),
    ),
    "select_n": lambda x: jnp.where(x > 0, x, -x),
}
MOVING = {
    "broadcast_in_dim": lambda x: x[:, None] + jnp.zeros((6, 4)),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, x[1:3]]),
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (x > 0).sum()[None], (2,)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_index_in_dim(x, 7.0, (x > 0).sum(), 0),
    "gather": lambda x: x[(x > 0).astype(jnp.int32) * 3] + x[jnp.array([5, 4, 3, 9, 1, 0])],
    "pad": lambda x: lax.pad(x, 2.0, ((1, 2, 1),)),
    "reshape": lambda x: x.reshape(2, 3).T.reshape(3, 1, 2),
    "slice": lambda x: x[1:5:2],
    "split": lambda x: jnp.split(x, 3)[1],
    "stack": lambda x: jnp.stack([x, -x], axis=1),
    "transpose": lambda x: jnp.outer(x, x[:4]).T,
    "diagonal": lambda x: jnp.diagonal(jnp.outer(x, x)),
    "write": lambda x: x.at[2].set(5.0).at[(x > 0).sum()].add(2.0),
    "drop": lambda x: x.at[jnp.where(x[0] > 0, 9, 1)].set(5.0, mode="drop"),
    "no entries": lambda x: (x[:0], jnp.zeros((0, 3), x.dtype), x[:0].sum()),
}
REDUCING = {
    "sum": jnp.sum,
    "rows": lambda x: jnp.sum(jnp.outer(x, x), axis=0),
    "max": lambda x: (jnp.max(x), jnp.max(x / x)),
    "min": jnp.min,
    "prod": lambda x: jnp.prod(x + 2.0),
    "any": lambda x: (jnp.any(x > 1), jnp.all(x > -1)),
    "argmax": lambda x: (jnp.argmax(x), jnp.argmin(x.reshape(2, 3), axis=1)),
    "at the limit": lambda x: jnp.sum(jnp.arange(one_kernel.LARGEST_SUM, dtype=x.dtype) * x[0]),
    "matrix times vector": lambda x: (jnp.outer(x, x[::-1]) @ x, x @ jnp.outer(x, x), x @ x),
    "inner product at the limit": lambda x: jnp.dot(*(jnp.sin(jnp.arange(one_kernel.LARGEST_SUM) * x[:2, None]))),
    "a long product": lambda x: jnp.sin(jnp.arange(12000.0, dtype=x.dtype) + x[0]).reshape(4000, 3) @ x[:3],
    "reduce": lambda x: lax.reduce(x, x[0], lambda a, b: a + 2 * b, (0,)),
    "a wide product": lambda x: (jnp.ones((90, 90), x.dtype) * x[0]) @ jnp.ones(90, x.dtype),
}
CALLING = {
    "cond": lambda x: lax.cond(x[0] > 0, lambda x: x + 1.0, lambda x: jnp.zeros_like(x), x),
    "switch": lambda x: lax.switch((x > 0).sum(), [jnp.sin, jnp.cos, jnp.tan, jnp.exp, jnp.abs], x),
    "while": lambda x: lax.while_loop(lambda c: c[1] < 9, lambda c: (c[0] * 1.1 + 0.1, c[1] + 1), (x, 0)),
    "while within while": lambda x: lax.while_loop(
        lambda c: c[1] < 3, lambda c: (lax.fori_loop(0, c[1], lambda i, y: y + i, c[0]), c[1] + 1), (x, 0)
    ),
    "scan": lambda x: lax.scan(lambda c, y: (c + y, c * y), x[0], x),
    "jit": lambda x: jax.jit(jnp.tanh)(x) + jax.jit(lambda x: x)(x),
    "custom_jvp": lambda x: jax.nn.relu(x) + jax.nn.softplus(x),
    "custom_vjp": lambda x: doubled(x),
    "custom_vmap": lambda x: branch(x[0] > 0, jnp.sin, jnp.cos, x),
    "one kernel in another": lambda x: one_kernel.as_one(jnp.sin)(x),
    "gradient": jax.grad(lambda x: jnp.sum(jax.nn.logsumexp(x * x[0]) + jax.checkpoint(jnp.sin)(x) * x[2])),
}
OUTPUTS = {
    "an argument": lambda x: (x, 2 * x),
    "a constant": lambda x: (jnp.zeros(3), jnp.int32(4), x),
    "twice the same": lambda x: (x + 1, x + 1, x),
    "data": lambda x: jnp.asarray(np.arange(24.0).reshape(4, 6), x.dtype) @ x,
}


def both(function, *args):
    """Return what the function gives as one kernel and as it is, from one compiled program each."""
    program = jax.jit(one_kernel.as_one(function)).lower(*args)
    assert MARK in program.as_text()
    return program.compile()(*args), jax.jit(function)(*args)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "functions",
    [ELEMENTWISE, MOVING, REDUCING, CALLING, OUTPUTS],
    ids=["elementwise", "moving", "reducing", "calling", "outputs"],
)
def test_the_numbers_are_the_same(functions, dtype):
    with precision(dtype):
        x = jnp.asarray(X, dtype)
        together, apart = both(lambda x: {name: function(x) for name, function in functions.items()}, x)
        for name in functions:
            jax.tree.map(
                lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=30 * np.finfo(dtype).eps, err_msg=name),
                together[name],
                apart[name],
            )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x + 1,
        lambda x, y: (jnp.zeros(2), x),
        lambda x, y: jnp.where(jnp.zeros((), bool), y, x),
        lambda x, y: (x + y) - y * 0 + jnp.where(x.shape[0] > 9, y, 0.0),
        lambda x, y: lax.while_loop(lambda c: c[0][0] < 3, lambda c: (c[0] + 1, c[1]), (x, y))[0],
        lambda x, y: lax.cond(x[0] > 0, lambda y: jnp.ones(6), lambda y: jnp.zeros(6), y),
        lambda x, y: 3.0,
    ],
    ids=["unused", "constant", "never chosen", "cancels", "carried in vain", "branches that ignore it", "nothing used"],
)
def test_an_argument_that_nothing_reads_does_no_harm(function):
    """XLA's emitter ends the process at one."""
    together, apart = both(lambda x, y: jax.tree.map(jnp.asarray, function(x, y)), jnp.asarray(X), jnp.asarray(X[::-1]))
    jax.tree.map(np.testing.assert_allclose, together, apart)


def test_what_a_function_closes_over_does_no_harm():
    """Constants are not arguments; the tracers of another trace become arguments."""
    x, constant = jnp.asarray(X), jnp.arange(6.0)
    together, apart = both(lambda x: jnp.where(jnp.zeros((), bool), constant, x), x)
    np.testing.assert_array_equal(together, apart)
    for inner in (lambda x, y: jnp.where(jnp.zeros((), bool), y, x), lambda x, y: (x + y, jnp.zeros(2))):
        outer = lambda x, y, inner=inner: one_kernel.as_one(lambda x: inner(x, y))(x)
        program = jax.jit(outer).lower(x, constant)
        assert MARK in program.as_text()
        jax.tree.map(np.testing.assert_array_equal, program.compile()(x, constant), inner(x, constant))
        assert MARK not in jax.jit(jax.vmap(outer, (None, 0))).lower(x, constant[:, None]).as_text()


def test_all_that_is_allowed_is_compiled_here():
    seen = set()

    def visit(program):
        for equation in program.eqns:
            seen.add(equation.primitive.name)
            for inner in jaxprs.inner(equation):
                visit(inner)

    for functions in (ELEMENTWISE, MOVING, REDUCING, CALLING, OUTPUTS):
        for function in functions.values():
            visit(jax.make_jaxpr(function)(jnp.asarray(X)).jaxpr)
    assert seen <= one_kernel.PLAIN | one_kernel.REDUCTIONS | one_kernel.CALLS | {
        "dot_general",
        "scatter",
        "scatter-add",
    }
    print(sorted((one_kernel.PLAIN | one_kernel.REDUCTIONS | one_kernel.CALLS) - seen))


def test_arrays_without_entries_and_donated_arrays_do_no_harm():
    """XLA makes constants of empty arrays, and an argument is then read by nothing."""

    def function(x, empty, state):
        return x[::-1] + 1, empty + 1, {"a": state["a"] * 2, "b": state["b"], "c": jnp.concatenate([empty, x])}

    args = lambda: (jnp.asarray(X), jnp.zeros((0,)), {"a": jnp.ones((3, 0)), "b": jnp.zeros((0, 2), bool)})
    program = jax.jit(one_kernel.as_one(function), donate_argnums=(0, 1, 2)).lower(*args())
    assert MARK in program.as_text()
    jax.tree.map(np.testing.assert_array_equal, program.compile()(*args()), function(*args()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.sort(x),
        lambda x: jnp.linalg.cholesky(jnp.outer(x, x) + jnp.eye(6)),
        lambda x: jnp.outer(x, x) @ jnp.outer(x, x),
        lambda x: jnp.sum(jnp.zeros(one_kernel.LARGEST_SUM + 1) + x[0]),
        lambda x: jnp.zeros(one_kernel.LARGEST + 1) + x[0],
        lambda x: x.at[jnp.array([1, 2])].set(0.0),
        lambda x: jnp.dot(*jnp.sin(jnp.arange(one_kernel.LARGEST_SUM + 1.0) * x[:2, None])),
        lambda x: jnp.asarray(np.ones((2, one_kernel.LARGEST)))[0, :6] + x,
        lambda x: jnp.fft.fft(x).real,
        lambda x: x.astype(jnp.bfloat16) + 1,
        lambda x: x + jax.random.normal(jax.random.key(0), (6,)),
        lambda x: jnp.convolve(x, x),
        lambda x: lax.cond(x[0] > 0, lambda x: jnp.sort(x), lambda x: x, x),
        lambda x: jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x),
        lambda x: (jax.debug.print("{}", x), x)[1],
    ],
)
def test_what_xla_leaves_to_a_library_is_not_asked_for(function):
    x = jnp.asarray(X)
    program = jax.jit(one_kernel.as_one(function)).lower(x)
    assert MARK not in program.as_text()
    program.compile()(x)


def test_it_is_asked_for_on_one_cpu_alone():
    smooth = one_kernel.as_one(lambda x: (jnp.sum(jnp.sin(x)), jnp.zeros(2)))
    x = jnp.asarray(X)
    lowered = lambda function, **options: jax.jit(function).trace(x).lower(**options).as_text()
    assert MARK in lowered(smooth)
    assert MARK not in lowered(smooth, lowering_platforms=("tpu",))
    assert MARK not in lowered(smooth, lowering_platforms=("cuda",))
    assert MARK not in lowered(smooth, lowering_platforms=("cpu", "tpu"))
    assert MARK not in lowered(lambda x: jax.vmap(smooth)(x[:, None]))
    assert MARK not in lowered(lambda x: jax.jvp(smooth, (x,), (x,)))
    assert MARK not in lowered(jax.grad(lambda x: smooth(x)[0]))
    np.testing.assert_allclose(jax.grad(lambda x: smooth(x)[0])(x), jnp.cos(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(smooth)(x[:, None])[0], jnp.sin(x), rtol=1e-6)


def test_a_run_step_by_step_in_python_is_the_same():
    result = lambda: so.minimize(rosenbrock, jnp.zeros(2), so.bfgs(), max_steps=3)
    with jax.disable_jit():
        slowly = result()
    np.testing.assert_allclose(slowly.params, result().params, rtol=1e-4)


def test_an_environment_variable_switches_it_off():
    command = [sys.executable, "-c", "from secondorder import one_kernel; print(one_kernel.KNOWN)"]
    environment = os.environ | {"SECONDORDER_ONE_KERNEL": "0", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("wrap", [one_kernel.as_one, one_kernel.in_parts])
def test_a_constant_that_a_loop_carries_does_no_harm(wrap):
    """XLA puts it in the place of the argument, which nothing reads then."""
    function = wrap(lambda x, k: (x * 1.1, k * 2))

    def body(carry):
        x, _, i = carry
        new = jnp.float32(1e-6)
        x, twice = function(jnp.sort(x), new)
        return jnp.sort(x) + twice, new, i + 1

    loop = jax.jit(lambda x: lax.while_loop(lambda c: c[2] < 3, body, (x, jnp.float32(0.0), 0))[0])
    assert MARK in loop.lower(jnp.ones(3)).as_text()
    np.testing.assert_allclose(loop(jnp.ones(3)), np.full(3, 1.1**3), rtol=1e-5)


def mixed(x, y):
    """Two sorts one after the other, the same function on both sides, and outputs of every kind."""
    twice = jax.jit(lambda x: (jnp.sin(x) * 2, jnp.sort(x)[::-1]))
    a, sorted_a = twice(x * y + 1.0 - x / 2.0)
    b, sorted_b = twice(sorted_a * a - y + jnp.cumsum(jnp.ones(6)))
    c = lax.while_loop(lambda c: c[0] < 3, lambda c: c + 1.0, b * jnp.abs(sorted_b))
    return {"c": c, "b": b, "argument": x, "constant": jnp.float32(3.0), "empty": x[:0], "one": jnp.int32(1) + 0}


def test_the_parts_between_large_operations_are_kernels():
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(X[::-1], jnp.float32)
    program = jax.jit(one_kernel.in_parts(mixed)).lower(x, y)
    calls = [line for line in program.as_text().splitlines() if MARK in line]
    assert len(calls) == 3  # before, between and after the sorts
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(compare, program.compile()(x, y), mixed(x, y))
    within = jax.jit(lambda x, y: one_kernel.in_parts(lambda x: one_kernel.in_parts(mixed)(x, y))(x))
    jax.tree.map(compare, within(x, y), mixed(x, y))
    assert within.lower(x, y).as_text().count(MARK) == 3  # what is within, and what is closed over, is no part apart
    many = jax.jit(jax.vmap(one_kernel.in_parts(mixed), (0, None)))
    assert MARK not in many.lower(jnp.stack([x, -x]), y).as_text()
    jax.tree.map(lambda a, b: compare(a[1], b), many(jnp.stack([x, -x]), y), mixed(-x, y))
    total = lambda f: lambda x: jnp.sum(f(x, y)["b"])
    compare(jax.grad(total(one_kernel.in_parts(mixed)))(x), jax.grad(total(mixed))(x))


def test_large_arrays_are_cut_out():
    """A product with a large matrix stays one of the library, and its vectors are those of kernels."""

    def function(H, g, s):
        d = H @ (g * jnp.where(jnp.sum(g) > 0, 1.0, -1.0) + s)
        t = jnp.sum(d * g) / jnp.sqrt(jnp.sum(s * s) + jnp.sum(d * d))
        return H + jnp.outer(d, s) * t, d * t

    n = 200
    H, g, s = jnp.eye(n), jnp.linspace(-1.0, 2.0, n), jnp.ones(n)
    program = jax.jit(one_kernel.in_parts(function)).lower(H, g, s)
    assert program.as_text().count(MARK) == 2
    together, apart = program.compile()(H, g, s), function(H, g, s)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), together, apart)


def test_a_result_that_is_an_argument_marks_no_other_call():
    sort = jax.jit(lambda x: jnp.sort(x))
    function = one_kernel.as_one(lambda x: (x, jax.jit(lambda x: (x, x + 1.0))(x)))
    program = jax.jit(lambda x: function(sort(x))).lower(jnp.asarray(X))
    calls = [line for line in program.as_text().splitlines() if MARK in line]
    assert len(calls) == 1
    assert "call @secondorder_kernel" in calls[0]
    np.testing.assert_array_equal(program.compile()(jnp.asarray(X))[1][0], np.sort(X).astype(np.float32))


def test_effects_keep_their_order(capfd):
    def function(x):
        jax.debug.print("first", ordered=True)
        y = jnp.sort(x * 2 + 1)
        jax.debug.print("second {}", jnp.sort(y)[0], ordered=True)
        return jnp.sum(y) * y - x

    out = jax.jit(one_kernel.in_parts(function))(jnp.asarray(X))
    jax.effects_barrier()
    np.testing.assert_allclose(out, function(jnp.asarray(X)), rtol=1e-6)
    assert capfd.readouterr().out.split()[:2] == ["first", "second"]


@pytest.mark.parametrize(
    ("optimizer", "n", "kernels"),
    [(so.bfgs(), 4, 2), (so.lbfgs(), 4, 2), (so.bfgs(), 200, 3), (so.ssbroyden(), 200, 3), (so.newton(), 4, 4)],
    ids=["bfgs", "lbfgs", "bfgs, large", "ssbroyden, large", "newton"],
)
def test_what_follows_an_evaluation_is_few_kernels_where_the_loss_cannot_be(optimizer, n, kernels):
    """And the first state is one."""
    loss = lambda x: jnp.sum(jnp.sort(x) ** 2)
    lowered = jax.jit(lambda x: so.minimize(loss, x, optimizer)).lower(jnp.ones(n)).as_text()
    assert lowered.count(MARK) == kernels


def test_a_run_on_a_small_loss_is_one_kernel():
    minimized = lambda loss, optimizer: jax.jit(lambda x: so.minimize(loss, x, optimizer)).lower(jnp.zeros(4)).as_text()
    for optimizer in (so.bfgs(), so.lbfgs(), so.ssbroyden()):
        assert minimized(rosenbrock, optimizer).count(MARK) == 1, optimizer


@pytest.mark.parametrize("optimizer", [so.newton_cg(), so.newton()], ids=["newton_cg", "newton"])
def test_the_layers_of_a_loss_are_not_cut(optimizer):
    """XLA compiles equal layers once, and runs them on all cores; as kernels of ours each would be one of its own."""

    def loss(layers):
        h = jnp.ones((5, 3))
        for W in layers:
            h = jnp.tanh(h @ W)
        return jnp.sum((h - 0.5) ** 2)

    def kernels(depth):
        layers = [jnp.eye(3) + k / 10.0 for k in range(depth)]
        return jax.jit(lambda x: so.minimize(loss, x, optimizer)).lower(layers).as_text().count(MARK)

    assert kernels(2) == kernels(5) > 0


def test_the_trials_of_an_iteration_are_parts_and_trees_of_many_leaves_are_not():
    """Each leaf is a loop of its own in a kernel, which takes longer to compile than it saves."""
    loss = lambda x: sum(jnp.sum(jnp.sort(u) ** 2) for u in jax.tree.leaves(x))
    optimizer = so.lbfgs()

    def marks(number, whole_iteration):
        x = [jnp.ones(2)] * number
        idiom = {"value_fn": loss} if whole_iteration else {}
        step = lambda x, state: optimizer.update(jax.grad(loss)(x), state, x, value=loss(x), **idiom)
        return jax.jit(step).lower(x, optimizer.init(x)).as_text().count(MARK)

    assert marks(8, False) == 1
    assert marks(9, False) == 0
    assert marks(4, True) == 3  # the beginning; the next trial, and what follows its evaluation
    assert marks(5, True) == 0
