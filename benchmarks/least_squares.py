"""Curve fits: how many certified digits, in how many evaluations, and how fast are thousands of them at once?

The 27 nonlinear regressions of NIST's Statistical Reference Datasets, both starts, float64: ours with default settings,
the others with tolerances of 1e-15 and exact Jacobians. Then 10,000 independent fits of an exponential under `vmap`
beside SciPy's `curve_fit` in a loop, all lanes in one `vmap` and by batches (`jax.lax.map` with `batch_size`).
"""

import importlib.util
import pathlib
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so
from benchmarks import fitters, timing
from benchmarks.report import Report, Table

LANES, POINTS, SAMPLE = 10_000, 50, 1000
BATCH = 250  # lanes whose arrays fit in a cache
MAX_EVALS = 5000


def run(repeats: int, quick: bool, dtype: str = "float64") -> Iterator[Report]:
    """Yield the NIST table, its summary, and the batch."""
    if dtype != "float64":
        raise SystemExit("least_squares: the certified digits need float64")
    with jax.enable_x64(True):
        yield from _nist(quick)
        yield _batch(repeats or 5, 1000 if quick else LANES)


# ----------------------------------------------------------------------------------------------------------------------


def _nist(quick: bool) -> Iterator[Report]:
    nist = _loader()
    solvers = fitters.solvers()
    raw: list[dict[str, Any]] = []
    datasets = list(nist.load().values())[: 4 if quick else None]
    for data in timing.tqdm(datasets, desc="NIST", leave=False):
        residual = lambda b, data=data: data.model(b, jnp.asarray(data.x)) - jnp.asarray(data.y)
        for name, solve in solvers.items():
            program = solve if name.startswith("scipy") else _jitted(solve)
            for number, start in enumerate(data.starts, 1):
                raw.append(_one(nist, data, name, number, program, residual, jnp.asarray(start)))
    rows = []
    for data in datasets:
        for number in (1, 2):
            runs = {r["solver"]: r for r in raw if r["problem"] == data.name and r["start"] == number}
            cells = [cell for name in solvers for cell in (round(runs[name]["digits"], 1), runs[name]["cost"])]
            ours = runs["least_squares"]
            rows.append([data.name, number, *cells, round(ours["digits_rss"], 1), round(ours["digits_errors"], 1)])
    heads = [head for name in solvers for head in (name.replace("least_squares", "ours"), "cost")]
    columns = ["problem", "start", *heads, "our RSS", "our errors"]
    title = "NIST StRD nonlinear regression: correct digits of the worst parameter (at most 11), and cost"
    note = (
        "Cost: residuals, with a Jacobian counted as one per parameter. RSS and errors: digits of the residual sum of\n"
        "squares and of the worst standard error; the residual of Lanczos1 is zero to rounding (1e-25)."
    )
    yield Report("nist", Table(title, columns, rows, note), raw)
    summary = []
    for name in solvers:
        runs = [r for r in raw if r["solver"] == name]
        digits = [r["digits"] for r in runs]
        solved = [sum(d >= least for d in digits) for least in (4, 8)]
        claimed = sum(r["claimed"] for r in runs)
        summary.append(
            [name, len(runs), claimed, *solved, min(digits), statistics.median(digits), sum(r["cost"] for r in runs)]
        )
    columns = ["solver", "runs", "claims success", "4 digits", "8 digits", "least", "median", "cost"]
    yield Report("nist_summary", Table("The same, in total", columns, summary), None)


def _one(nist: Any, data: Any, name: str, number: int, program: Any, residual: Any, start: jax.Array) -> dict[str, Any]:
    """Return the figures of one run."""
    record: dict[str, Any] = {"problem": data.name, "start": number, "solver": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of overflows in trials
        fit = program(residual, start, None, MAX_EVALS)
    n = start.size
    record |= {
        "digits": nist.digits(fit.x, data.parameters),
        "residuals": int(fit.evaluations),
        "jacobians": int(fit.jacobians),
        "cost": int(fit.evaluations) + n * int(fit.jacobians),
        "claimed": bool(fit.claimed),
    }
    if fit.standard_errors is not None:
        record["digits_rss"] = nist.digits(2 * fit.value, data.residual_sum_of_squares)
        record["digits_errors"] = nist.digits(fit.standard_errors, data.deviations)
    return record


def _jitted(solve: Any) -> Any:
    """Return the solver with one compiled program for the starts of a problem."""
    programs: dict[Any, Any] = {}

    def call(residual: Any, start: jax.Array, tolerance: Any, max_evals: int) -> Any:
        program = programs.setdefault(residual, jax.jit(lambda x: solve(residual, x, tolerance, max_evals)))
        return jax.tree.map(np.asarray, program(start))

    return call


def _loader() -> Any:
    """Return the module that reads the data, which the tests share."""
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "nist.py"
    spec = importlib.util.spec_from_file_location("nist", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------------------


def _decay(p: Any, x: Any) -> Any:
    return p[0] * jnp.exp(-p[1] * x) + p[2]


def _batch(repeats: int, lanes: int) -> Report:
    rng = np.random.default_rng(0)
    x = np.linspace(0.0, 4.0, POINTS)
    a, k, c = rng.uniform(1, 5, lanes), rng.uniform(0.3, 2, lanes), rng.uniform(-1, 1, lanes)
    data = a[:, None] * np.exp(-k[:, None] * x) + c[:, None] + 0.05 * rng.standard_normal((lanes, POINTS))
    p0 = np.array([2.0, 1.0, 0.0])
    fast = so.levenberg_marquardt(solver=so.direct(normal_equations=True))
    programs, times, fits, compile_s = {}, {}, {}, {}
    for name, (options, batch) in {
        "curve_fit, vmap": ({}, None),
        f"the same, {BATCH} at a time": ({}, BATCH),
        f"the same, gtol=1e-8, {BATCH} at a time": ({"gtol": 1e-8}, BATCH),
        "the same, normal equations": ({"gtol": 1e-8, "optimizer": fast}, BATCH),
    }.items():
        one = lambda y, options=options: so.curve_fit(_decay, x, y, jnp.asarray(p0), **options)._replace(state=None)
        many = jax.vmap(one) if batch is None else lambda data, one=one: jax.lax.map(one, data, batch_size=BATCH)
        begin = time.perf_counter()
        programs[name] = jax.jit(many).lower(data).compile()
        compile_s[name] = time.perf_counter() - begin
        fits[name] = jax.block_until_ready(programs[name](data))
        times[name] = []
    sample = min(SAMPLE, lanes)
    answers, scipy_times = None, []
    for _ in range(repeats):  # in turns, so that the load of the machine is shared
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(data))
            times[name].append((time.perf_counter() - begin) / lanes)
        if importlib.util.find_spec("scipy"):
            seconds, answers = _scipy_loop(x, data[:sample], p0)
            scipy_times.append(seconds / sample)
    rows: list[list[Any]] = []
    scipy_us = 1e6 * statistics.median(scipy_times) if scipy_times else None
    if scipy_us is not None:
        rows.append([f"SciPy curve_fit in a loop ({sample})", scipy_us, 1.0, None, None, None])
    for name, samples in times.items():
        us = 1e6 * statistics.median(samples)
        fit = fits[name]
        apart = None if answers is None else float(np.max(np.abs(answers / np.asarray(fit.params)[:sample] - 1)))
        turns = int(np.max(fit.evaluations))
        rows.append([name, us, None if scipy_us is None else scipy_us / us, float(np.mean(fit.success)), turns, apart])
    columns = ["solver", "us per fit", "times faster", "converged", "slowest lane", "largest relative difference"]
    title = f"{lanes} exponential fits (3 parameters, {POINTS} points, float64)"
    note = "The difference is to SciPy's answers, which carry the error of its forward differences and of 1e-8 in ftol."
    return Report(
        "batch", Table(title, columns, rows, note), {"run": times, "scipy": scipy_times, "compile": compile_s}
    )


def _scipy_loop(x: np.ndarray, data: np.ndarray, p0: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the seconds that SciPy takes, and its answers."""
    import scipy.optimize

    model = lambda x, a, k, c: a * np.exp(-k * x) + c
    begin = time.perf_counter()
    answers = [scipy.optimize.curve_fit(model, x, y, p0)[0] for y in data]
    return time.perf_counter() - begin, np.array(answers)
