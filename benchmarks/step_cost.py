"""What does one step cost, beyond the memory traffic that it cannot do without?

An L-BFGS step with m pairs has to read its history of 2m vectors twice: once to project the gradient, once to
combine the direction. The floor is exactly that, two matrix-vector passes over a (2m, n) buffer, timed in the same run.
A BFGS step has to read H once for H g and to rewrite it once.

On small networks a dense step is timed whole, with the loss and its gradient, beside that of optimistix, on the same
run of a quasi-Newton method; the floor is the sum of value-and-gradient and of one product and one pass.

All steps run inside one jitted loop that owns the buffers, on the same separable quadratic; `net` leaves out the
time of gradient descent in the same loop (gradient, and x + update).
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import secondorder as so
from benchmarks import timing
from benchmarks.report import Report, Table

MEMORY = 10
RATE = 0.5  # fixed step length, for all
NETWORKS = (41, 66)  # widths of networks [3, w, w, 1] with 1,927 and 4,752 parameters
SIZES = ((100_000, 2.0), (1_000_000, 1.4))  # n, and the target as a multiple of the floor


def run(repeats: int, quick: bool, dtype: str = "float32") -> Iterator[Report]:
    """Yield tables of L-BFGS in a loop and over 20 leaves, as a donated call, and of BFGS."""
    del dtype  # float32 always: the floor scales alike
    repeats = repeats or (5 if quick else 15)
    for n, target in SIZES:
        samples = timing.interleaved(_in_a_loop(n, quick), repeats, f"L-BFGS in a loop, n={n}")
        yield Report(f"loop_{n}", _loop_table(samples, n, target), samples)
    for n, _ in SIZES:
        samples = timing.interleaved(_donated(n), repeats, f"donated update, n={n}")
        yield Report(f"donated_{n}", _donated_table(samples, n), samples)
    samples = timing.interleaved(_dense(1000, quick), repeats, "BFGS in a loop")
    yield Report("bfgs", _dense_table(samples), samples)
    for width in NETWORKS[:1] if quick else NETWORKS:
        samples = timing.interleaved(_network(width, quick), repeats, f"dense steps on a network of width {width}")
        yield Report(f"network_{width}", _network_table(samples, width), samples)


# ----------------------------------------------------------------------------------------------------------------------


def _problem(n: int, leaves: int = 1) -> tuple[Callable[[Any], jax.Array], Any]:
    """Return a cheap loss, 1/2 sum d x^2 with d from 1 to 1e3, and its start."""
    d = jnp.geomspace(1.0, 1e3, n, dtype=jnp.float32)
    x = jnp.cos(jnp.arange(n, dtype=jnp.float32))
    if leaves == 1:
        return lambda x: 0.5 * jnp.sum(d * x * x), x
    ds, xs = jnp.split(d, leaves), jnp.split(x, leaves)
    return lambda xs: sum(0.5 * jnp.sum(a * b * b) for a, b in zip(ds, xs, strict=True)), xs


def _turns(count: int) -> int:
    """Return the steps of one program: more on an accelerator, where starting it costs as much as some of them."""
    return count if jax.default_backend() == "cpu" else 5 * count


def _loop(step: Callable[[Any], Any], prepare: Callable[[], Any], turns: int) -> timing.Task:
    """Return the task of `turns` steps in one program that owns its buffers."""
    program = jax.jit(lambda carry: jax.lax.fori_loop(0, turns, lambda _, c: step(c), carry), donate_argnums=0)
    return timing.Task(jax.jit(prepare), program, turns)


def _optimizer_loop(
    optimizer: optax.GradientTransformation,
    n: int,
    turns: int,
    leaves: int = 1,
    value: bool = False,
    problem: Any = None,
) -> timing.Task:
    loss, start = problem or _problem(n, leaves)

    def step(carry: Any) -> Any:
        x, state = carry
        f, g = jax.value_and_grad(loss)(x)
        extra = {"value": f} if value else {}
        updates, state = optimizer.update(g, state, x, **extra)
        return optax.apply_updates(x, updates), state

    return _loop(step, lambda: (jax.tree.map(jnp.copy, start), optimizer.init(start)), turns)


def _floor(n: int, turns: int) -> timing.Task:
    """Two matrix-vector passes over a buffer of the history's size."""

    def prepare() -> Any:
        key = jax.random.key(0)
        # Rows of length about 1 are nearly orthogonal: repeated projection neither grows nor dies out.
        B = jax.random.normal(key, (2 * MEMORY, n), jnp.float32) / n**0.5
        return B, jnp.ones(2 * MEMORY, jnp.float32) @ B

    def step(carry: Any) -> Any:
        B, g = carry
        return B, (B @ g) @ B

    return _loop(step, prepare, turns)


def _in_a_loop(n: int, quick: bool) -> dict[str, timing.Task]:
    turns = _turns(10 if quick else max(20, 4_000_000 // n))

    def chained(block: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(block, optax.scale(-RATE))

    ours, theirs = so.scale_by_lbfgs(MEMORY), optax.scale_by_lbfgs(MEMORY)
    tasks = {
        "two passes (floor)": _floor(n, turns),
        "gradient descent": _optimizer_loop(optax.sgd(1e-4), n, turns),
        "gradient descent, 20 leaves": _optimizer_loop(optax.sgd(1e-4), n, turns, 20),
        "secondorder scale_by_lbfgs": _optimizer_loop(chained(ours), n, turns),
        "secondorder lbfgs(rate)": _optimizer_loop(so.lbfgs(RATE, MEMORY), n, turns),
        "secondorder lbfgs with search": _optimizer_loop(so.lbfgs(memory_size=MEMORY), n, turns, value=True),
        "optax scale_by_lbfgs": _optimizer_loop(chained(theirs), n, turns),
        "jaxopt LBFGS(stepsize)": _jaxopt_loop("LBFGS", n, turns, history_size=MEMORY),
        "optimistix LBFGS": _optimistix_loop("LBFGS", n, turns, history_length=MEMORY),
        "secondorder scale_by_lbfgs, 20 leaves": _optimizer_loop(chained(ours), n, turns, 20),
        "secondorder lbfgs with search, 20 leaves": _optimizer_loop(
            so.lbfgs(memory_size=MEMORY), n, turns, 20, value=True
        ),
        "optax scale_by_lbfgs, 20 leaves": _optimizer_loop(chained(theirs), n, turns, 20),
    }
    return {name: task for name, task in tasks.items() if task is not None}


def _jaxopt_loop(solver: str, n: int, turns: int, **options: Any) -> timing.Task | None:
    """A step of jaxopt's solver with its search switched off; None without jaxopt."""
    try:
        import jaxopt
    except ImportError:
        return None
    loss, start = _problem(n)
    made = getattr(jaxopt, solver)(loss, stepsize=RATE, tol=0.0, **options)
    return _loop(lambda c: tuple(made.update(*c)), lambda: (jnp.copy(start), made.init_state(start)), turns)


def _optimistix_loop(solver: str, n: int, turns: int, problem: Any = None, **options: Any) -> timing.Task | None:
    """`optimistix.minimise` for `turns` steps (its search runs inside the steps); None without optimistix."""
    try:
        import optimistix
    except ImportError:
        return None
    loss, start = problem or _problem(n)
    made = getattr(optimistix, solver)(rtol=0.0, atol=0.0, **options)

    def program(x: jax.Array) -> Any:
        out = optimistix.minimise(lambda x, _: loss(x), made, x, max_steps=turns, throw=False)
        return out.value, out.stats["num_steps"]

    compiled = jax.jit(program, donate_argnums=0)
    taken = int(compiled(jnp.copy(start))[1])
    return timing.Task(lambda: jnp.copy(start), compiled, taken)


def _donated(n: int) -> dict[str, timing.Task]:
    """`jax.jit(update, donate_argnums=state)`, called from Python with changing gradients."""
    loss, start = _problem(n)
    calls = 12
    points = [start * 0.9**k + 0.01 * jnp.sin(k * jnp.arange(n, dtype=jnp.float32)) for k in range(calls)]
    grads = [jax.grad(loss)(x) for x in points]

    def task(optimizer: optax.GradientTransformation) -> timing.Task:
        update = jax.jit(lambda g, state, x: optimizer.update(g, state, x), donate_argnums=1)

        def run(state: Any) -> Any:
            for g, x in zip(grads, points, strict=True):
                updates, state = update(g, state, x)
            return updates, state

        return timing.Task(jax.jit(lambda: optimizer.init(start)), run, calls)

    return {
        "secondorder scale_by_lbfgs": task(so.scale_by_lbfgs(MEMORY)),
        "secondorder lbfgs(rate)": task(so.lbfgs(RATE, MEMORY)),
        "optax scale_by_lbfgs": task(optax.scale_by_lbfgs(MEMORY)),
        "optax lbfgs(linesearch=None)": task(optax.lbfgs(RATE, MEMORY, linesearch=None)),
    }


def _dense(n: int, quick: bool) -> dict[str, timing.Task]:
    turns = _turns(20 if quick else 100)
    tasks = {
        "matvec and one in-place pass (floor)": _dense_floor(n, turns),
        "gradient descent": _optimizer_loop(optax.sgd(1e-4), n, turns),
        "secondorder scale_by_bfgs": _optimizer_loop(optax.chain(so.scale_by_bfgs(), optax.scale(-RATE)), n, turns),
        "secondorder bfgs(rate)": _optimizer_loop(so.bfgs(RATE), n, turns),
        "secondorder bfgs with search": _optimizer_loop(so.bfgs(), n, turns, value=True),
        "secondorder ssbroyden with search": _optimizer_loop(so.ssbroyden(), n, turns, value=True),
        "jaxopt BFGS(stepsize)": _jaxopt_loop("BFGS", n, min(turns, _turns(20))),
        "optimistix BFGS": _optimistix_loop("BFGS", n, min(turns, _turns(20))),
        "jax.scipy BFGS": _jax_scipy_loop(n, min(turns, _turns(20))),
    }
    return {name: task for name, task in tasks.items() if task is not None}


def _dense_floor(n: int, turns: int) -> timing.Task:
    """One product with a matrix and one pass over it, in place."""

    def step(carry: Any) -> Any:
        H, g = carry
        q = H @ g
        s, w = 1e-6 * g, 1e-6 * q
        return H + (s[:, None] * w + w[:, None] * s), q

    return _loop(step, lambda: (jnp.eye(n, dtype=jnp.float32), jnp.ones(n, jnp.float32) / n), turns)


def _regression(width: int) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Return the loss of a tanh network [3, width, width, 1] on 256 points, of one flat vector, and a start."""
    shapes = ((3, width), (width,), (width, width), (width,), (width, 1))
    sizes = [int(np.prod(shape)) for shape in shapes]
    keys = jax.random.split(jax.random.key(0), 2)
    points = jax.random.uniform(keys[0], (256, 3), jnp.float32)
    target = jnp.prod(jnp.sin(jnp.pi * points), axis=1)

    def loss(x: jax.Array) -> jax.Array:
        W, b, V, c, w = (
            part.reshape(shape) for part, shape in zip(jnp.split(x, np.cumsum(sizes)[:-1]), shapes, strict=True)
        )
        return jnp.mean(((jnp.tanh(jnp.tanh(points @ W + b) @ V + c) @ w)[:, 0] - target) ** 2)

    return loss, 0.3 * jax.random.normal(keys[1], (sum(sizes),), jnp.float32)


def _network(width: int, quick: bool) -> dict[str, timing.Task]:
    problem = _regression(width)
    n, turns = problem[1].size, _turns(10 if quick else 60)
    tasks = {
        "matvec and one in-place pass": _dense_floor(n, turns),
        "value and gradient": _optimizer_loop(optax.sgd(1e-4), n, turns, value=True, problem=problem),
        "secondorder bfgs": _optimizer_loop(so.bfgs(), n, turns, value=True, problem=problem),
        "secondorder ssbroyden": _optimizer_loop(so.ssbroyden(), n, turns, value=True, problem=problem),
        "optimistix BFGS": _optimistix_loop("BFGS", n, turns, problem=problem),
    }
    return {name: task for name, task in tasks.items() if task is not None}


def _jax_scipy_loop(n: int, turns: int) -> timing.Task:
    """`jax.scipy.optimize.minimize` for `turns` iterations (its search runs inside them)."""
    from jax.scipy.optimize import minimize

    loss, start = _problem(n)
    compiled = jax.jit(lambda x: minimize(loss, x, method="BFGS", options={"maxiter": turns, "gtol": 0.0}))
    taken = max(1, int(compiled(start).nit))
    return timing.Task(lambda: start, compiled, taken)


def _loop_table(samples: dict[str, list[float]], n: int, target: float) -> Table:
    floor, descent = "two passes (floor)", "gradient descent"
    rows = []
    for name in samples:
        minus = descent + ", 20 leaves" if name.endswith("20 leaves") else descent
        net = None if name in (floor, descent, descent + ", 20 leaves") else timing.ratio(samples, name, floor, minus)
        rows.append([name, _ms(samples[name]), timing.ratio(samples, name, floor), net, _leaves(samples, name)])
    columns = ["step", "ms", "x floor", "net x floor", "x one leaf"]
    note = f"Target: ours net at most {target} times the floor; 20 leaves at most 1.5 times one leaf."
    return Table(f"L-BFGS step in a loop, n={n}, m={MEMORY}, float32", columns, rows, note)


def _leaves(samples: dict[str, list[float]], name: str) -> float | None:
    one = name.removesuffix(", 20 leaves")
    return None if one == name else timing.ratio(samples, name, one)


def _donated_table(samples: dict[str, list[float]], n: int) -> Table:
    reference = "optax lbfgs(linesearch=None)"
    rows = [[name, _ms(samples[name]), timing.ratio(samples, name, reference)] for name in samples]
    note = "Target: ours at most 0.5."
    return Table(f"Stand-alone jitted update, state donated, n={n}", ["update", "ms", "x optax"], rows, note)


def _dense_table(samples: dict[str, list[float]]) -> Table:
    floor, descent = "matvec and one in-place pass (floor)", "gradient descent"
    rows = []
    for name in samples:
        net = None if name in (floor, descent) else timing.ratio(samples, name, floor, descent)
        rows.append([name, _ms(samples[name]), timing.ratio(samples, name, floor), net])
    note = "Target: ours at most 1.0 times the floor."
    return Table("BFGS step in a loop, n=1000, float32", ["step", "ms", "x floor", "net x floor"], rows, note)


def _network_table(samples: dict[str, list[float]], width: int) -> Table:
    passes, gradient = "matvec and one in-place pass", "value and gradient"
    floor = [a + b for a, b in zip(samples[passes], samples[gradient], strict=True)]
    together = {**samples, "floor": floor}
    n = _regression(width)[1].size
    rows = []
    for name in samples:
        ours = None if "optimistix BFGS" not in samples else timing.ratio(together, name, "optimistix BFGS")
        rows.append([name, _ms(samples[name]), timing.ratio(together, name, "floor"), ours])
    note = "Target: ours at most 1.2 times the floor, the sum of the first two rows, and below optimistix."
    return Table(
        f"Dense quasi-Newton step on a network, n={n}, float32", ["step", "ms", "x floor", "x optimistix"], rows, note
    )


def _ms(seconds: list[float]) -> float:
    return 1e3 * sorted(seconds)[len(seconds) // 2]
