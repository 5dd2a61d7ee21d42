"""A thousand independent problems under `vmap`: does a lane wait for another lane's line search?

Rosenbrock's function with n = 10 from 1,000 seeded starts. A batched call of the loss serves all lanes at once, and
their number is what an accelerator pays for: it is counted inside the program, by a callback in the loss.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, timing
from benchmarks.report import Report, Table

LANES, N = 1000, 10
MAX_EVALS = 2000


def run(repeats: int, quick: bool, dtype: str = "float64") -> Iterator[Report]:
    """Yield one table: loss calls, turns of the slowest lane, time, share solved."""
    repeats = repeats or (3 if quick else 5)
    with jax.enable_x64(dtype == "float64"):
        yield _run(repeats, 100 if quick else LANES, dtype)


def rosenbrock(x: jax.Array) -> jax.Array:
    """Return the chained Rosenbrock function."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def counted(fun: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """Return `fun` with a host callback that adds one to `calls[0]` at every batched call of it."""

    def tick(x: Any) -> Any:
        calls[0] += 1
        return np.zeros(np.shape(x)[:-1], np.float32)

    def counting(x: jax.Array) -> jax.Array:
        # The zero that it returns keeps the callback in the program; it has no derivative.
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.pure_callback(tick, shape, jax.lax.stop_gradient(x), vmap_method="broadcast_all")
        return fun(x) + zero.astype(x.dtype)

    return counting


# ----------------------------------------------------------------------------------------------------------------------


def _run(repeats: int, lanes: int, dtype: str) -> Report:
    gtol = 1e-5 if dtype == "float64" else 1e-3
    starts = jnp.asarray(np.random.default_rng(0).standard_normal((lanes, N)), dtype)
    tasks, outcomes, calls, compile_s = {}, {}, {}, {}
    for name, solve in timing.tqdm(peers.jax_solvers().items(), desc="batched", leave=False):
        if name == "minimize":
            continue
        begin = time.perf_counter()
        program = jax.jit(jax.vmap(lambda x, solve=solve: solve(rosenbrock, x, gtol, MAX_EVALS)))
        program = program.lower(starts).compile()
        compile_s[name] = time.perf_counter() - begin
        outcomes[name] = jax.tree.map(np.asarray, program(starts))
        calls[name] = _calls(solve, starts, gtol)
        tasks[name] = timing.Task(lambda: starts, program)
    samples = timing.interleaved(tasks, repeats, "batched")
    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(rosenbrock)))
    rows = []
    for name, out in outcomes.items():
        value, grad = value_and_grad(jnp.asarray(out.x))
        solved = jnp.max(jnp.abs(grad), axis=1) <= gtol
        least = solved & (value < 1e-3)
        slowest, median = int(np.max(out.evaluations)), float(np.median(out.evaluations))
        ms = 1e3 * statistics.median(samples[name])
        share = [float(jnp.mean(solved)), float(jnp.mean(least))]
        rows.append([name, calls[name], slowest, median, ms, timing.ratio(samples, name, "bfgs"), *share])
    columns = ["solver", "loss calls", "slowest lane", "median lane", "ms", "x our bfgs", "converged", "at 0"]
    title = f"{lanes} Rosenbrock problems (n={N}) under vmap, {dtype}, gradient at most {gtol:g}"
    note = (
        "Target: 132 loss calls for lbfgs, 150 for bfgs; bfgs in half of optimistix BFGS's time.\n"
        "The function has a second local minimum (3.99), where a run may converge as well."
    )
    raw = {"run": samples, "compile": compile_s, "calls": calls}
    return Report("batched", Table(title, columns, rows, note), raw)


def _calls(solve: peers.Solve, starts: jax.Array, gtol: float) -> int:
    """Return how often the loss was called for the whole batch, the start included."""
    calls = [0]
    fun = counted(rosenbrock, calls)
    jax.block_until_ready(jax.jit(jax.vmap(lambda x: solve(fun, x, gtol, MAX_EVALS)))(starts))
    return calls[0]
