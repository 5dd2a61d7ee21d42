"""Systems of equations of the CUTEst collection as least squares: who solves them, in how many Jacobians?

All solvers start from the collection's start, with tolerance 1e-8, 5,000 evaluations and 20 seconds after compilation.
A run has solved its problem if its loss is that of the best run up to 1e-6 of it, or 1e-14 of the loss at the start.
The stopping tests of the solvers differ, so Jacobians are counted until the problem is solved, from outside and for all
in the same way: the residual reports every loss that it computes, and a Jacobian was needed at each point that improved
on all before it. As a worker, `python -m benchmarks.equations NAME N DTYPE SOLVER...`, it runs them on one problem.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import cutest, cutest_worker, fitters, report

TOLERANCE = 1e-8
MAX_EVALS = 5000


def main(arguments: list[str]) -> int:
    """Run problems, or make the table of finished runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks equations", description=__doc__)
    parser.add_argument("--set", type=pathlib.Path, metavar="FILE", help="problems, one `NAME n` per line")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="solvers (default: all that are installed)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append runs here; finished ones are kept")
    parser.add_argument("--report", type=pathlib.Path, nargs="+", metavar="FILE", help="table of finished runs only")
    chosen = parser.parse_args(arguments)
    if chosen.report:
        runs = [run for file in chosen.report for run in cutest.read(file)]
    elif chosen.set:
        runs = _run(chosen)
    else:
        parser.error("give --set FILE to run problems, or --report FILE for the table of finished runs")
    for table in tables(runs):
        report.show(table)
    return 0


def tables(runs: list[dict[str, Any]]) -> list[report.Table]:
    """Return the solve rates, and the Jacobians on the problems that a solver and ours both solved."""
    problems = sorted({run["problem"] for run in runs})
    solved: dict[str, dict[str, int]] = {}
    for name in problems:
        here = [run for run in runs if run["problem"] == name]
        best = min((run["value"] for run in here if math.isfinite(run["value"])), default=math.nan)
        for run in here:
            goal = best * (1 + 1e-6) + 1e-14 * run.get("start", math.nan)
            solved.setdefault(run["solver"], {})
            if run["value"] <= goal:
                solved[run["solver"]][name] = sum(value > goal for value in run["descent"])
    rows = []
    ours = solved.get("least_squares", {})
    for solver, done in solved.items():
        both = [name for name in done if name in ours]
        theirs, mine = ([counts[name] for name in both] for counts in (done, ours))
        mean = [
            math.exp(sum(math.log(max(count, 1)) for count in counts) / max(1, len(both))) for counts in (theirs, mine)
        ]
        rows.append([solver, len(done), len(problems), len(both), sum(theirs), sum(mine), *mean])
    columns = ["solver", "solved", "of", "both", "its Jacobians", "ours", "its geometric mean", "ours"]
    title = f"{len(problems)} systems of equations as least squares, float64, tolerance {TOLERANCE:g}"
    note = (
        "Jacobians until solved, in total and in the geometric mean, on the problems that it and least_squares solved."
    )
    return [report.Table(title, columns, rows, note)]


def work(name: str, n: int, dtype: str, solvers: list[str]) -> None:
    """Run the solvers one after the other and print what each did."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    problem = cutest_worker.load(name, n)
    x0, restore = ravel_pytree(problem.y0)
    x0 = x0.astype(dtype)

    descent: list[float] = []

    def note(value: Any) -> None:
        if math.isfinite(value) and (not descent or value < descent[-1]):
            descent.append(float(value))

    def quiet(x: jax.Array) -> jax.Array:
        return ravel_pytree(problem.constraint(restore(x))[0])[0].astype(dtype)

    def residual(x: jax.Array) -> jax.Array:
        r = quiet(x)
        jax.debug.callback(note, jax.lax.stop_gradient(0.5 * jnp.sum(r * r)), ordered=True)
        return r

    loss = jax.jit(lambda x: 0.5 * jnp.sum(quiet(x) ** 2))
    m, start = jax.eval_shape(residual, x0).size, float(loss(x0))
    for solver in solvers:
        record: dict[str, Any] = {"problem": name, "n": n, "m": m, "dtype": dtype, "solver": solver, "start": start}
        try:
            fitters.check_size(m, n, solver)
            on_host = solver.startswith("scipy")
            descent.clear()
            fit, seconds = _timed(fitters.solvers()[solver], on_host, residual, x0)
            jax.effects_barrier()
        except Exception as error:  # a solver that raises has failed; the others go on
            cutest_worker.say({"event": "run", **record, "value": math.nan, "error": f"{error}"[:300]})
            continue
        value = float(loss(jnp.asarray(fit.x, dtype)))
        record |= {
            "value": value if math.isfinite(value) else math.nan,
            "evaluations": int(fit.evaluations),
            "jacobians": int(fit.jacobians),
            "products": int(fit.products),
            "claimed": bool(fit.claimed),
            "descent": list(descent),
            "run_s": seconds,
        }
        cutest_worker.say({"event": "run", **record})


def _timed(solve: Any, on_host: bool, residual: Any, x0: jax.Array) -> tuple[fitters.Fit, float]:
    if on_host:
        functions = fitters.compiled(residual)
        functions["residual"](x0)  # (reports the start, which the run reports again)
        if jax.eval_shape(residual, x0).size * x0.size <= fitters.DENSE_ENTRIES:
            functions["jacobian"](x0)
        cutest_worker.say({"event": "compiled"})
        begin = time.perf_counter()
        return solve(residual, x0, TOLERANCE, MAX_EVALS), time.perf_counter() - begin
    program = jax.jit(lambda x: solve(residual, x, TOLERANCE, MAX_EVALS)).lower(x0).compile()
    cutest_worker.say({"event": "compiled"})
    begin = time.perf_counter()
    fit = jax.tree.map(np.asarray, jax.block_until_ready(program(x0)))
    return fit, time.perf_counter() - begin


def _run(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    solvers = chosen.solvers or list(fitters.solvers())
    path = chosen.json or pathlib.Path("equations.jsonl")
    runs = cutest.read(path) if path.exists() else []
    done = {(run["problem"], run["solver"]) for run in runs}
    problems = [line.split() for line in chosen.set.read_text().splitlines() if line.strip()]
    with path.open("a") as file:
        file.write(json.dumps({"environment": report.environment()}) + "\n")
        for number, (name, n) in enumerate(problems):
            left = [solver for solver in solvers if (name, solver) not in done]
            while left:
                for run in cutest.worker("benchmarks.equations", name, int(n), list(left), "float64"):
                    runs.append(run)
                    left.remove(run["solver"])
                    file.write(json.dumps(run) + "\n")
                    file.flush()
            print(f"{number + 1}/{len(problems)} {name}", file=sys.stderr, flush=True)
    return runs


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
