"""How long until a minimum: compilation, run, evaluations; and what the solver adds to compiling a loss.

Three problems (Rosenbrock's function, logistic regression and a small network on scikit-learn's digits), every solver
with the same start, gradient test and budget; then the compile time of a whole solve as a multiple of compiling the
loss's value and gradient, what the first call of a driver costs where the caller compiles nothing, and the overhead of
calling `minimize` again.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import secondorder as so
from benchmarks import peers, timing
from benchmarks.report import Report, Table

MAX_EVALS = 2000
CUBIC_LIMIT = 200  # parameters up to which solvers of n^3 a step take part
COMPILED = (
    *("bfgs", "lbfgs", "optimistix BFGS", "optimistix LBFGS"),
    *("optax.lbfgs", "jaxopt LBFGS", "jaxopt BFGS", "jax.scipy BFGS"),
)
CUBIC = ("newton", "jaxopt BFGS", "jax.scipy BFGS")
CALLED = ("minimize", "bfgs", "lbfgs", "optimistix BFGS", "optimistix LBFGS")


def run(repeats: int, quick: bool, dtype: str = "float64") -> Iterator[Report]:
    """Yield tables of compile times, of call overhead and of solves."""
    repeats = repeats or (3 if quick else 5)
    for depth, target in ((2, 3.0), (30, 1.4)):
        yield _compile_times(depth, target, 2 if quick else 3)
    yield _first_calls(dtype, quick)
    yield _overhead(20 * repeats)
    with jax.enable_x64(dtype == "float64"):
        for name, (fun, x0, gtol) in _problems(dtype, quick).items():
            yield _solves(name, fun, x0, gtol, repeats, dtype)


def network(depth: int, width: int = 32) -> tuple[Callable[[Any], jax.Array], Any]:
    """Return the loss of a tanh network of `depth` layers on 64 samples, written out layer by layer, and a start."""
    rng = np.random.default_rng(0)
    sizes = [8, *[width] * (depth - 1), 1]
    start = [
        {"W": jnp.asarray(rng.standard_normal((a, b)) / a**0.5, jnp.float32), "b": jnp.zeros(b, jnp.float32)}
        for a, b in itertools.pairwise(sizes)
    ]
    inputs = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)

    def loss(layers: Any) -> jax.Array:
        h = inputs
        for layer in layers[:-1]:
            h = jnp.tanh(h @ layer["W"] + layer["b"])
        return jnp.mean((h @ layers[-1]["W"] + layers[-1]["b"] - jnp.sin(inputs[:, :1])) ** 2)

    return loss, start


# ----------------------------------------------------------------------------------------------------------------------


def _problems(dtype: str, quick: bool) -> dict[str, tuple[Callable[..., Any], jax.Array, float]]:
    """Return losses of one flat vector (the peers' dense methods take nothing else), starts and gradient tests."""
    from secondorder import problems

    small = 1e-6 if dtype == "float64" else 1e-4
    out = {}
    for n in (2, 100):
        card = problems.rosenbrock(n)
        out[f"Rosenbrock, n={n}"] = (card.fun, jnp.asarray(card.start, dtype), 1e-5 if dtype == "float64" else 1e-3)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return out
    features, labels = load_digits(return_X_y=True)
    features = features / 16.0
    cards = {
        "logistic regression": problems.logistic_regression(features, labels >= 5),
        "network": problems.mlp(features, labels, hidden=8 if quick else 16),
    }
    for name, card in cards.items():
        start, restore = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(a, dtype), card.start))
        fun = lambda x, card=card, restore=restore: card.fun(restore(x))
        out[f"{name}, n={start.size}"] = (fun, start, small)
    return out


def _solves(name: str, fun: Callable[..., Any], x0: jax.Array, gtol: float, repeats: int, dtype: str) -> Report:
    tasks, compile_s, outcomes = {}, {}, {}
    for solver, solve in timing.tqdm(peers.jax_solvers().items(), desc=name, leave=False):
        if solver == "minimize" or (solver in CUBIC and x0.size > CUBIC_LIMIT):
            continue
        jax.clear_caches()
        begin = time.perf_counter()
        program = jax.jit(lambda x, solve=solve: solve(fun, x, gtol, MAX_EVALS)).lower(x0).compile()
        compile_s[solver] = time.perf_counter() - begin
        outcomes[solver] = jax.tree.map(np.asarray, program(x0))
        tasks[solver] = timing.Task(lambda: x0, program)
    samples = timing.interleaved(tasks, repeats, name)
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    rows = []
    for solver, out in outcomes.items():
        value, grad = value_and_grad(jnp.asarray(out.x))
        run_ms = 1e3 * statistics.median(samples[solver])
        figures = [compile_s[solver], run_ms, int(out.evaluations), int(out.hessians)]
        rows.append([solver, *figures, float(value), float(jnp.max(jnp.abs(grad)))])
    columns = ["solver", "compile s", "second run ms", "evaluations", "Hessians", "value", "gradient"]
    title = f"{name}, {dtype}: until the gradient's max-norm is at most {gtol:g} (at most {MAX_EVALS} evaluations)"
    return Report(name, Table(title, columns, rows), {"run": samples, "compile": compile_s})


def _compile_times(depth: int, target: float, repeats: int) -> Report:
    """Return the seconds to compile one solve, beside those of the value and gradient alone, in interleaved rounds."""
    tree_loss, start = network(depth)
    flat, restore = ravel_pytree(start)

    def loss(x: jax.Array) -> jax.Array:
        return tree_loss(restore(x))

    # Everyone gets one flat vector, since dense methods make one in any case; the last rows are for a tree of leaves.
    programs: dict[str, tuple[Callable[..., Any], Any]] = {"value and gradient": (jax.value_and_grad(loss), flat)}
    solvers = peers.jax_solvers()
    for name in COMPILED:
        if name in solvers:
            programs[name] = (lambda x, solve=solvers[name]: solve(loss, x, 1e-5, 1000), flat)
    programs["value and gradient, leaves"] = (jax.value_and_grad(tree_loss), start)
    for name in ("bfgs", "lbfgs", "newton_cg"):
        programs[name + ", leaves"] = (lambda x, solve=solvers[name]: solve(tree_loss, x, 1e-5, 1000), start)
    for name, optimizer in (("lbfgs", so.lbfgs()), ("optax.lbfgs", optax.lbfgs())):
        programs[f"update of {name} with value_fn, leaves"] = (_iteration(tree_loss, optimizer), start)
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in timing.tqdm(range(repeats), desc=f"compile, {depth} layers", leave=False):
        for name, (program, x) in programs.items():
            samples[name].append(timing.compile_seconds(program, x))
    reference = "value and gradient"
    rows = []
    for name, seconds in samples.items():
        own = reference + ", leaves" if name.endswith(", leaves") else reference
        rows.append([name, statistics.median(seconds), timing.ratio(samples, name, own)])
    note = f"Target: bfgs and lbfgs at most {target}."
    columns = ["program", "compile CPU s", "x value and gradient"]
    table = Table(f"Compile time of a whole solve, loss of {depth} layers", columns, rows, note)
    return Report(f"compile_{depth}", table, samples)


def _iteration(
    loss: Callable[[Any], jax.Array], optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[Any], Any]:
    """Return the program of one whole iteration in optax's idiom."""
    value_and_grad = optax.value_and_grad_from_state(loss)

    def run(x: Any) -> Any:
        state = optimizer.init(x)
        value, grad = value_and_grad(x, state=state)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(x, updates), state

    return run


def _first_calls(dtype: str, quick: bool) -> Report:
    """Return the CPU seconds of a first call outside of any `jit`, over the analytic problems, and of their losses."""
    from secondorder import problems

    cards = problems.PROBLEMS[: 2 if quick else None]
    solvers = peers.jax_solvers()
    calls: dict[str, Callable[..., Any]] = {"value and gradient": lambda fun, x: jax.jit(jax.value_and_grad(fun))(x)}
    for name in CALLED:
        if name in solvers:
            calls[name] = lambda fun, x, solve=solvers[name]: solve(fun, x, 1e-5, 1000)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with jax.enable_x64(dtype == "float64"):
        for card in timing.tqdm(cards, desc="first calls", leave=False):
            x0 = jnp.asarray(card.start, dtype)
            for name, call in calls.items():
                jax.clear_caches()
                begin = time.process_time()
                jax.block_until_ready(call(card.fun, x0))
                samples[name].append(time.process_time() - begin)
    rows = [[name, statistics.median(s), min(s), max(s)] for name, s in samples.items()]
    columns = ["call", "median CPU s", "least", "most"]
    title = f"First call outside of jit, compilation included, {len(cards)} problems of 2 to 100 parameters, {dtype}"
    return Report("first_call", Table(title, columns, rows, "Target: bfgs and lbfgs at most 0.8."), samples)


def _overhead(repeats: int) -> Report:
    """Return the time of a second `minimize` call with a newly built, equal optimizer, on two parameters."""

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum((x - 1.0) ** 2)

    x = jnp.zeros(2)
    samples: dict[str, list[float]] = {"lbfgs(memory_size=5)": [], "bfgs()": []}
    builders = {"lbfgs(memory_size=5)": lambda: so.lbfgs(memory_size=5), "bfgs()": so.bfgs}
    for number in range(repeats + 1):
        for name, build in builders.items():
            begin = time.perf_counter()
            jax.block_until_ready(so.minimize(loss, x, build()))
            if number:  # the first call compiles
                samples[name].append(time.perf_counter() - begin)
    rows = [[name, 1e3 * statistics.median(s), 1e3 * min(s)] for name, s in samples.items()]
    columns = ["optimizer", "median ms", "least ms"]
    table = Table("minimize called again, 2 parameters", columns, rows, "Target: below 1 ms.")
    return Report("overhead", table, samples)
