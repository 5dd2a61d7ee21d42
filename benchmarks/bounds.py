"""Bound-constrained problems of the CUTEst collection: who ends at the minimum in the box, in how many evaluations?

All solvers start from the collection's start, moved into the box, and stop when the largest entry of P(x - g) - x (P
projects to the box) is at most 1e-5 in float64; 5,000 evaluations and 20 seconds after compilation. As a worker,
`python -m benchmarks.bounds NAME N DTYPE SOLVER...`, it runs them on one problem.
"""

import argparse
import functools
import importlib.util
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import secondorder as so
from benchmarks import cutest, cutest_worker, peers, profiles, report, timing

GTOL = {"float64": 1e-5, "float32": 1e-3}
BUDGETS = (30, 100, 300, 1000, 5000)  # evaluations
OURS = {"minimize": None, "lbfgsb": so.lbfgsb()}  # minimize takes projected_newton up to 200 parameters
SCIPY = ("L-BFGS-B", "TNC")

Bounds = tuple[jax.Array, jax.Array]


def main(arguments: list[str]) -> int:
    """Run problems, or make the tables of finished runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks bounds", description=__doc__)
    parser.add_argument("--set", type=pathlib.Path, metavar="FILE", help="problems, one `NAME n` per line")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="solvers (default: all that are installed)")
    parser.add_argument("--dtype", choices=tuple(GTOL), default="float64")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append runs here; finished ones are kept")
    parser.add_argument("--report", type=pathlib.Path, nargs="+", metavar="FILE", help="tables of finished runs only")
    chosen = parser.parse_args(arguments)
    if chosen.report:
        runs = [run for file in chosen.report for run in cutest.read(file)]
    elif chosen.set:
        runs = _run(chosen)
    else:
        parser.error("give --set FILE to run problems, or --report FILE for the tables of finished runs")
    for table in tables(runs):
        report.show(table)
    return 0


def tables(runs: list[dict[str, Any]]) -> list[report.Table]:
    """Return the share solved within some budgets of evaluations, then what `profiles` makes of the runs."""
    solved = profiles.judge(runs)
    problems, solvers = ({run[key]: None for run in runs} for key in ("problem", "solver"))
    rows = []
    for solver in solvers:
        spent = [solved[name, solver]["evaluations"] for name in problems if (name, solver) in solved]
        rows.append([solver, *(sum(count <= budget for count in spent) for budget in BUDGETS)])
    title = f"Problems of {len(problems)} solved within a number of evaluations"
    return [report.Table(title, ["solver", *map(str, BUDGETS)], rows), *profiles.tables(runs)]


def solvers() -> list[str]:
    """Return the names of the solvers, ours first; absent libraries are left out."""
    installed = [f"scipy {method}" for method in SCIPY] if importlib.util.find_spec("scipy") else []
    return [*OURS, *installed, *(["jaxopt LBFGSB"] if importlib.util.find_spec("jaxopt") else [])]


def work(name: str, n: int, dtype: str, chosen: list[str]) -> None:
    """Run the solvers one after the other and print what each did."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    problem = cutest_worker.load(name, n)
    y0, restore = ravel_pytree(problem.y0)
    lower, upper = (ravel_pytree(bound)[0].astype(dtype) for bound in problem.bounds)
    bounds = (lower, upper)
    x0 = jnp.clip(y0.astype(dtype), lower, upper)
    gtol = GTOL[dtype]

    def fun(x: jax.Array) -> jax.Array:
        return problem.objective(restore(x.astype(y0.dtype)), problem.args).astype(dtype)

    value_and_grad = peers.compiled_functions(fun)["value_and_grad"]
    for solver in chosen:
        record: dict[str, Any] = {"problem": name, "n": n, "dtype": dtype, "solver": solver, "gtol": gtol}
        try:
            outcome, times = _timed(solver, fun, x0, bounds, gtol)
        except Exception as error:  # a solver that raises has failed; the others go on
            cutest_worker.say({"event": "run", **record, "value": math.nan, "error": f"{error}"[:300]})
            continue
        x = jnp.asarray(outcome.x, dtype)
        value, grad = value_and_grad(x)  # computed anew, whatever the solver says
        record |= {
            "value": float(value),
            "grad_norm": float(_residual(x, grad, bounds)),
            "outside": float(jnp.max(jnp.maximum(lower - x, x - upper))),
            "finite": bool(np.all(np.isfinite(np.asarray(x)))),
            "evaluations": int(outcome.evaluations),
            "hessian_products": 0,
            "hessians": int(outcome.hessians),
            "claimed": None if outcome.claimed is None else bool(outcome.claimed),
            "status": outcome.status if isinstance(outcome.status, str | None) else int(outcome.status),
        }
        cutest_worker.say({"event": "run", **record, **times})


# ----------------------------------------------------------------------------------------------------------------------


def _residual(x: jax.Array, grad: jax.Array, bounds: Bounds) -> jax.Array:
    """Return the max-norm of P(x - g) - x."""
    return jnp.max(jnp.abs(jnp.clip(x - grad, *bounds) - x))


def _timed(solver: str, fun: Any, x0: jax.Array, bounds: Bounds, gtol: float) -> tuple[peers.Outcome, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    run: Callable[..., Any]
    if solver.startswith("scipy"):
        peers.compiled_functions(fun)["value_and_grad"](x0)
        run = functools.partial(_scipy, solver.removeprefix("scipy "), fun, gtol=gtol)
    else:
        solve = _jaxopt if solver.startswith("jaxopt") else functools.partial(_ours, OURS[solver])
        program = jax.jit(lambda x, box: solve(fun, x, box, gtol)).lower(x0, bounds).compile()
        run = lambda x, box: jax.tree.map(np.asarray, jax.block_until_ready(program(x, box)))
    times = {"compile_s": time.perf_counter() - wall, "compile_cpu_s": time.process_time() - cpu}
    cutest_worker.say({"event": "compiled"})
    wall = time.perf_counter()
    outcome = run(x0, bounds)
    return outcome, times | {"run_s": time.perf_counter() - wall}


def _ours(optimizer: Any, fun: peers.Fun, x0: jax.Array, bounds: Bounds, gtol: float) -> peers.Outcome:
    budget = {"max_steps": cutest_worker.MAX_EVALS, "max_evaluations": cutest_worker.MAX_EVALS}
    r = so.minimize(fun, x0, optimizer, bounds=bounds, gtol=gtol, **budget)
    return peers.Outcome(r.params, r.evaluations, 0, r.hessians, r.status == so.Status.CONVERGED, r.status)


def _jaxopt(fun: peers.Fun, x0: jax.Array, bounds: Bounds, gtol: float) -> peers.Outcome:
    import jaxopt

    made = jaxopt.LBFGSB(fun, tol=0.0)

    def running(carry: Any) -> jax.Array:
        x, state, last = carry
        stuck = last & (state.iter_num > 0)
        return (_residual(x, state.grad, bounds) > gtol) & (state.num_fun_eval < cutest_worker.MAX_EVALS) & ~stuck

    def turn(carry: Any) -> Any:
        x, state, _ = carry
        new, state = made.update(x, state, bounds)
        return new, state, jnp.all(new == x)  # a search that fails leaves x where it is, for good

    start = (x0, made.init_state(x0, bounds), jnp.array(False))
    x, state, _ = jax.lax.while_loop(running, turn, start)
    return peers.Outcome(x, state.num_fun_eval, claimed=_residual(x, state.grad, bounds) <= gtol)


def _scipy(method: str, fun: peers.Fun, x0: jax.Array, bounds: Bounds, *, gtol: float) -> peers.Outcome:
    """Run SciPy from the host, with its own tests of the loss and of the step switched off."""
    import scipy.optimize

    value_and_grad, dtype = peers.compiled_functions(fun)["value_and_grad"], x0.dtype
    begin, spent, best = time.perf_counter(), 0, (math.inf, np.asarray(x0, np.float64))

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal spent, best
        if spent >= cutest_worker.MAX_EVALS:
            raise peers.OutOfBudget("evaluations")
        if time.perf_counter() - begin > cutest_worker.SECONDS:
            raise peers.OutOfBudget("time")
        spent += 1
        f, g = value_and_grad(jnp.asarray(x, dtype))
        if float(f) < best[0]:
            best = (float(f), x.copy())
        return float(f), np.asarray(g, np.float64)

    options = {"ftol": 0.0, "gtol": gtol, "maxfun": cutest_worker.MAX_EVALS}
    options |= {"maxiter": cutest_worker.MAX_EVALS} if method == "L-BFGS-B" else {"xtol": 0.0}
    box = scipy.optimize.Bounds(*(np.asarray(bound, np.float64) for bound in bounds))
    try:
        r = scipy.optimize.minimize(
            evaluate, np.asarray(x0, np.float64), jac=True, method=method, bounds=box, options=options
        )
        x, status = r.x, str(r.message)
    except peers.OutOfBudget as reason:
        x, status = best[1], f"out of {reason}"
    grad = value_and_grad(jnp.asarray(x, dtype))[1]
    claimed = bool(_residual(jnp.asarray(x, dtype), grad, bounds) <= gtol)
    return peers.Outcome(x, spent, claimed=claimed, status=status)


def _run(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    names = chosen.solvers or solvers()
    path = chosen.json or pathlib.Path(f"bounds_{chosen.dtype}.jsonl")
    runs = [run for run in cutest.read(path) if run["dtype"] == chosen.dtype] if path.exists() else []
    done = {(run["problem"], run["solver"]) for run in runs}
    problems = [line.split() for line in chosen.set.read_text().splitlines() if line.strip()]
    with path.open("a") as file:
        file.write(json.dumps({"environment": report.environment()}) + "\n")
        for name, n in timing.tqdm(problems, desc="problems"):
            left = [solver for solver in names if (name, solver) not in done]
            while left:
                for run in cutest.worker("benchmarks.bounds", name, int(n), list(left), chosen.dtype):
                    runs.append(run)
                    left.remove(run["solver"])
                    file.write(json.dumps(run) + "\n")
                    file.flush()
    return [run for run in runs if run["solver"] in names]


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
