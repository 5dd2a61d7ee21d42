"""From runs to solve rates and performance profiles (Dolan & Moré 2002).

A run *solved* its problem if its value is within 1e-6 (relative, floor 1; 1e-3 in float32) of the best that any solver
found, or if the gradient, recomputed from outside, passes the test and the value is within 1e-3 of the best.
The profile of a solver at ratio r is the share of problems that it solved at no more than r times the least cost.
"""

import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks.report import Table

RATIOS = (1, 2, 4, 10)
Run = dict[str, Any]

COSTS: dict[str, Callable[[Run], float]] = {
    "evaluations": lambda run: run["evaluations"],
    # a Hessian-vector product counts as one evaluation, a dense Hessian as n
    "work": lambda run: run["evaluations"] + run["hessian_products"] + run["n"] * run["hessians"],
    "products": lambda run: run["hessian_products"],  # of the solvers that make any
    "run time": lambda run: run["run_s"],
}


def tables(runs: list[Run]) -> list[Table]:
    """Return the solve rates with the honesty of the status, one profile per cost, and what was not solved."""
    problems, solvers = _names(runs)
    solved = judge(runs)
    out = [_rates(runs, problems, solvers, solved)]
    for cost in COSTS:
        rows = [[s, *(_share(shares, r) for r in RATIOS)] for s, shares in profile(runs, cost).items()]
        if not rows:
            continue
        columns = ["solver", *(f"x {r}" for r in RATIOS)]
        out.append(Table(f"Profile of {cost}: share solved within a multiple of the least", columns, rows))
    rows = [[s, " ".join(p for p in problems if (p, s) not in solved) or "-"] for s in solvers]
    out.append(Table("Not solved", ["solver", "problems"], rows))
    return out


def judge(runs: list[Run]) -> dict[tuple[str, str], Run]:
    """Return the runs that solved their problem, by (problem, solver)."""
    best: dict[str, float] = {}
    for run in runs:
        if math.isfinite(run.get("value", math.nan)):
            best[run["problem"]] = min(run["value"], best.get(run["problem"], math.inf))
    return {(r["problem"], r["solver"]): r for r in runs if _is_solved(r, best.get(r["problem"], math.nan))}


def profile(runs: list[Run], cost: str) -> dict[str, list[float]]:
    """Return for each solver that has this cost the ratios to the least, one per problem; Inf where not solved."""
    problems, solvers = _names(runs)
    if cost == "products":
        solvers = _with_products(runs)
    costs = {key: max(COSTS[cost](run), 1e-12) for key, run in judge(runs).items()}
    out: dict[str, list[float]] = {s: [] for s in solvers}
    for problem in problems:
        least = min((costs[problem, s] for s in solvers if (problem, s) in costs), default=math.inf)
        for s in solvers:
            out[s].append(costs[problem, s] / least if (problem, s) in costs else math.inf)
    return out


def picture(runs: list[Run], path: pathlib.Path) -> None:
    """Draw the profiles side by side and save them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks import peers

    profiles = {cost: profile(runs, cost) for cost in COSTS}
    profiles = {cost: shares for cost, shares in profiles.items() if any(map(peers.is_ours, shares))}
    solvers = _names(runs)[1]
    colors = dict(zip(solvers, itertools.cycle(f"C{k}" for k in range(10)), strict=False))
    size = (3.75 * len(profiles) + 1, 5)
    figure, row = pyplot.subplots(1, len(profiles), figsize=size, sharey=True, layout="constrained", squeeze=False)
    axes = row[0]
    ratios = [10 ** (k / 50) for k in range(101)]
    for axis, (cost, shares) in zip(axes, profiles.items(), strict=True):
        for solver, ratio in shares.items():
            ours, dashes = peers.is_ours(solver), ("--", ":", "-.")[solvers.index(solver) % 3]
            style = {"linewidth": 2.2 if ours else 1.0, "linestyle": "-" if ours else dashes, "color": colors[solver]}
            axis.step(ratios, [_share(ratio, r) for r in ratios], where="post", label=solver, **style)
        axis.set(xscale="log", xlim=(1, 100), ylim=(0, 1), xlabel=f"{cost}, multiple of the least")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of problems solved")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------------


def _names(runs: list[Run]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(r["problem"] for r in runs)), list(dict.fromkeys(r["solver"] for r in runs))


def _with_products(runs: list[Run]) -> list[str]:
    """Return the solvers that make Hessian-vector products and no dense Hessians."""
    dense = {r["solver"] for r in runs if r.get("hessians")}
    making = {r["solver"] for r in runs if r.get("hessian_products")} - dense
    return [s for s in _names(runs)[1] if s in making]


def _is_solved(run: Run, best: float) -> bool:
    value = run.get("value", math.nan)
    if not (math.isfinite(value) and math.isfinite(best)) or run.get("error"):
        return False
    gap = (value - best) / max(1.0, abs(best))
    close = 1e-6 if run["dtype"] == "float64" else 1e-3
    return gap <= close or (run["grad_norm"] <= run["gtol"] and gap <= 1e-3)


def _rates(runs: list[Run], problems: list[str], solvers: list[str], solved: dict[tuple[str, str], Run]) -> Table:
    rows = []
    for s in solvers:
        mine = [r for r in runs if r["solver"] == s]
        # A claim is false if the gradient computed from outside fails the test (by more than its own rounding).
        false = sum(bool(r.get("claimed")) and not r["grad_norm"] <= 1.0001 * r["gtol"] for r in mine)
        over = sum(r.get("evaluations", 0) > 5001 for r in mine)
        wild = sum(r.get("finite") is False for r in mine)
        late = sum("error" in r for r in mine)
        compile_s = sorted(r["compile_cpu_s"] for r in mine if "compile_cpu_s" in r)
        middle = compile_s[len(compile_s) // 2] if compile_s else None
        share = sum((p, s) in solved for p in problems) / len(problems)
        rows.append([s, f"{100 * share:.1f} %", false, wild, over, late, middle])
    columns = ["solver", "solved", "false claims", "non-finite x", "over budget", "errors, time-outs", "compile CPU s"]
    return Table(f"{len(problems)} CUTEst problems, {runs[0]['dtype']}: solve rates", columns, rows)


def _share(ratios: list[float], limit: float) -> float:
    return sum(r <= limit * (1 + 1e-12) for r in ratios) / len(ratios)
