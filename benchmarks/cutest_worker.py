"""One CUTEst problem, all solvers, in one process: `python -m benchmarks.cutest_worker NAME N DTYPE SOLVER...`.

It prints one JSON line per event: `compiled` when a solver's clock starts, and the finished run. The parent process
(`benchmarks.cutest`) ends it when a clock runs out and starts another one for the solvers that remain. With `--watch`
before the solvers, which are then ours, they look at the clock after every step.
"""

import functools
import importlib
import importlib.machinery
import json
import math
import pathlib
import re
import statistics
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import peers

MAX_EVALS = 5000
SECONDS = 20.0  # of running, after compilation
WATCH = "--watch"


def load(name: str, n: int) -> Any:
    """Return the problem of that name and size from `sif2jax`, importing its module alone.

    The package's own `__init__` imports every problem, which takes over a minute.
    """
    spec = importlib.machinery.PathFinder.find_spec("sif2jax")  # it does not mind the empty packages of a first call
    if spec is None or spec.origin is None:
        raise ImportError("benchmarks: cutest needs sif2jax; install it with: pip install sif2jax")
    root = pathlib.Path(spec.origin).parent
    pattern = re.compile(rf"^class {re.escape(name)}\(", re.MULTILINE)
    # Drafts of some problems stand in a second file; the one that the package exports is named after its problem.
    files = sorted(root.rglob("*.py"), key=lambda f: (f.stem != name.lower(), f))
    file = next((f for f in files if pattern.search(f.read_text())), None)
    if file is None:
        raise ValueError(f"benchmarks: sif2jax has no problem {name!r}.")
    parts = file.relative_to(root.parent).with_suffix("").parts
    for depth in range(1, min(len(parts), 4)):  # empty packages in place of those that import everything
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(root.parent.joinpath(*parts[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    made = getattr(importlib.import_module(".".join(parts)), name)
    for options in ({}, {"n": n}, {"N": n}):
        try:
            problem = made(**options)
        except TypeError:
            continue
        if ravel_pytree(problem.y0)[0].size == n:
            return problem
    raise ValueError(f"benchmarks: {name} cannot be built with {n} parameters.")


def work(name: str, n: int, dtype: str, solvers: list[str], *, watch: bool = False) -> None:
    """Run the solvers one after the other and print what each did; `watch` makes ours look at the clock."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    problem = load(name, n)
    y0, restore = ravel_pytree(problem.y0)
    x0 = y0.astype(dtype)
    args = problem.args

    def fun(x: jax.Array) -> jax.Array:
        return problem.objective(restore(x.astype(y0.dtype)), args).astype(dtype)

    value_and_grad = peers.compiled_functions(fun)["value_and_grad"]
    g0 = float(jnp.max(jnp.abs(value_and_grad(x0)[1])))
    gtol = 1e-5 if dtype == "float64" else 1e-3 * max(1.0, g0 if math.isfinite(g0) else 1.0)
    in_jax, on_host = peers.jax_solvers(), peers.scipy_solvers()
    for solver in solvers:
        record: dict[str, Any] = {"problem": name, "n": n, "dtype": dtype, "solver": solver, "gtol": gtol}
        try:
            if solver in in_jax:
                outcome, times = _in_jax(in_jax[solver], fun, x0, gtol, watch=watch)
            else:
                outcome, times = _on_host(on_host[solver], fun, x0, gtol, dense=solver == "scipy trust-exact")
        except Exception as error:  # a solver that raises has failed; the others go on
            say({"event": "run", **record, "value": math.nan, "error": f"{type(error).__name__}: {error}"[:300]})
            continue
        value, grad = value_and_grad(jnp.asarray(outcome.x, dtype))  # computed anew, whatever the solver says
        record |= {
            "value": float(value),
            "grad_norm": float(jnp.max(jnp.abs(grad))),
            "finite": bool(np.all(np.isfinite(np.asarray(outcome.x)))),
            "evaluations": int(outcome.evaluations),
            "hessian_products": int(outcome.hessian_products),
            "hessians": int(outcome.hessians),
            "claimed": None if outcome.claimed is None else bool(outcome.claimed),
            "status": outcome.status
            if outcome.status is None or isinstance(outcome.status, str)
            else int(outcome.status),
        }
        say({"event": "run", **record, **times})


# ----------------------------------------------------------------------------------------------------------------------


def _in_jax(
    solve: peers.Solve, fun: Any, x0: jax.Array, gtol: float, *, watch: bool
) -> tuple[peers.Outcome, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    # (`wall` is the start of the run by the time that the callback reads it.)
    options = {"callback": lambda _: time.perf_counter() - wall > SECONDS} if watch else {}
    program = jax.jit(lambda x: solve(fun, x, gtol, MAX_EVALS, **options)).lower(x0).compile()
    times = {"compile_s": time.perf_counter() - wall, "compile_cpu_s": time.process_time() - cpu}
    say({"event": "compiled"})
    wall = time.perf_counter()
    outcome = jax.block_until_ready(program(x0))
    times["run_s"] = time.perf_counter() - wall
    if times["run_s"] < 1.0:  # later runs, where they are cheap
        runs = []
        for _ in range(9):
            wall = time.perf_counter()
            jax.block_until_ready(program(x0))
            runs.append(time.perf_counter() - wall)
        times["run_s"] = statistics.median(runs)
    return jax.tree.map(np.asarray, outcome), times


def _on_host(
    solve: Any, fun: Any, x0: jax.Array, gtol: float, *, dense: bool
) -> tuple[peers.Outcome, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    functions = peers.compiled_functions(fun)
    functions["value_and_grad"](x0), functions["product"](x0, x0)
    if dense:
        functions["hessian"](x0)
    times = {"compile_s": time.perf_counter() - wall, "compile_cpu_s": time.process_time() - cpu}
    say({"event": "compiled"})
    begin = time.perf_counter()
    outcome = solve(fun, x0, gtol, MAX_EVALS, check=functools.partial(_check, begin))
    times["run_s"] = time.perf_counter() - begin
    return outcome, times


def _check(begin: float) -> None:
    if time.perf_counter() - begin > SECONDS:
        raise peers.OutOfBudget("time")


def say(event: dict[str, Any]) -> None:
    """Print one event as a line for the parent process."""
    print("@" + json.dumps(event), flush=True)


if __name__ == "__main__":
    watched = sys.argv[4] == WATCH
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[5 if watched else 4 :], watch=watched)
