"""Physics-informed networks: error against evaluations, ours beside optimistix BFGS and optax.lbfgs.

Question: how accurate a solution does each optimizer reach, in how many evaluations of loss and gradient, from the
same network, points and seed? Points of Burgers' equation are drawn anew every 500 evaluations, from each method's own
residual with the same keys; every method keeps its curvature over that. Runs go on from a common phase of Adam where
the papers have one. The error is relative, in L2, against an exact solution, at the lowest loss so far.

One line of JSON per run; runs that the file holds already are not repeated.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import secondorder as so
from benchmarks import pinn_problems, report

CHUNK = 500  # evaluations between two looks at the error, and between two draws of points
LEAST_SQUARES_CHUNK = 25  # the same in steps, for methods that make a Jacobian per step
MARKS = (1000, 2500, 5000)  # evaluations at which the error is printed, beside the end


class Run(NamedTuple):
    """What to run."""

    problem: str
    optimizer: str
    seed: int
    dtype: str
    evaluations: int  # at most; steps, for methods that make a Jacobian per step


class Progress(NamedTuple):
    """Where a run stands; evaluations and steps since the last look."""

    params: Any
    loss: float
    evaluations: int
    steps: int
    over: bool  # there is nothing more to gain on these points


Advance = Callable[[Any, pinn_problems.Points, int], Progress]  # (params, points, evaluations) -> Progress

PROBLEMS: dict[str, Callable[[], pinn_problems.Problem]] = {
    "burgers": functools.partial(pinn_problems.burgers, 0.01 / np.pi, "burgers", candidates=50_000, systematic=True),
    "burgers independent points": functools.partial(pinn_problems.burgers, 0.01 / np.pi, "burgers independent points"),
    "burgers 10,000 points": functools.partial(
        pinn_problems.burgers, 0.01 / np.pi, "burgers 10,000 points", 10_000, 50_000
    ),
    "burgers nu=0.01": functools.partial(pinn_problems.burgers, 0.01, "burgers nu=0.01"),
    "poisson 2-d": functools.partial(pinn_problems.poisson, 2),
    "poisson 3-d": functools.partial(pinn_problems.poisson, 3),
    "poisson 3-d Glorot weights": functools.partial(pinn_problems.poisson, 3, uniform=False),
}
OURS: dict[str, Callable[[], Any]] = {
    "lbfgs": so.lbfgs,
    "bfgs": so.bfgs,
    "bfgs, initial_scale=100": lambda: so.bfgs(initial_scale=100.0),
    "broyden": lambda: so.broyden_class(self_scaling=False),
    "ssbfgs": so.ssbfgs,
    "ssbroyden": so.ssbroyden,
}
RESIDUAL: dict[str, Callable[[], Any]] = {
    "gauss_newton": so.gauss_newton,
    "levenberg_marquardt": so.levenberg_marquardt,
    "least_squares": lambda: None,  # its default
    "target_ratio": lambda: so.levenberg_marquardt(damping=so.target_ratio()),
    "truncated": lambda: so.levenberg_marquardt(damping=so.truncation()),
}
NATURAL = "natural_gradient"  # energy natural gradient (Müller & Zeinhofer 2023): the metric is JᵀJ of the residual
PEERS = ("optimistix BFGS", "optax.lbfgs")


def main(arguments: list[str]) -> int:
    """Run what the arguments ask for, and print the table of all runs in the file."""
    chosen = _parser().parse_args(arguments)
    jax.config.update("jax_enable_x64", chosen.dtype == "float64")
    jax.config.update("jax_default_matmul_precision", "highest")  # accelerators round the factors of float32 otherwise
    about = report.environment()
    print(", ".join(f"{key} {about[key]}" for key in ("date", "commit", "device", "python")))
    known = _read(chosen.json)
    for problem in chosen.problems:
        for seed in chosen.seeds:
            for optimizer in chosen.optimizers:
                run = Run(problem, optimizer, seed, chosen.dtype, chosen.evaluations)
                if any(_same(run, line) for line in known):
                    continue
                line = {**run._asdict(), **_measure(run), "environment": about}
                known.append(line)
                print(_one(line), flush=True)
                if chosen.json:
                    with chosen.json.open("a") as file:
                        file.write(json.dumps(line, default=float) + "\n")
    report.show(_table(known))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pinn", description=__doc__)
    every = [*OURS, *RESIDUAL, NATURAL, *PEERS]
    parser.add_argument("--problems", nargs="*", choices=list(PROBLEMS), default=["poisson 2-d"], metavar="NAME")
    parser.add_argument("--optimizers", nargs="*", choices=every, default=[*OURS, *PEERS], metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--evaluations",
        type=int,
        default=5000,
        help="of loss and gradient, after Adam; steps, for methods with a Jacobian",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append one line per run; read it first")
    return parser


def _measure(run: Run) -> dict[str, Any]:
    """Return the record of a run: a list of [evaluations, steps, loss, error, seconds], the start first."""
    problem = _problem(run.problem, run.dtype)
    keys = jax.random.split(jax.random.key(run.seed), 3)
    params, points = _start(run.problem, run.seed, run.dtype)
    error = _error(run.problem, run.dtype)
    by_steps = run.optimizer in RESIDUAL or run.optimizer == NATURAL
    chunk = LEAST_SQUARES_CHUNK if by_steps else CHUNK
    advance = _advance(run.optimizer, problem)
    loss = jax.jit(pinn_problems.loss(problem))(params, points)
    record: list[list[float]] = [[0, 0, float(loss), float(error(params)), 0.0]]
    compiled = False
    spent, steps, seconds, idle, draw = 0, 0, 0.0, 0, 0
    while (steps if by_steps else spent) < run.evaluations:
        if not compiled:  # the first call compiles: once more on the side, so that the clock sees runs alone
            _advance(run.optimizer, problem)(params, points, 2)
            compiled = True
        begin = time.perf_counter()
        out = advance(params, points, min(chunk, run.evaluations - (steps if by_steps else spent)))
        seconds += time.perf_counter() - begin
        params, spent, steps = out.params, spent + out.evaluations, steps + out.steps
        record.append([spent, steps, out.loss, float(error(params)), seconds])
        idle = idle + 1 if out.over else 0
        if idle == 3 or (out.over and problem.resample is None) or not np.isfinite(out.loss):
            break
        if problem.resample is not None:
            draw += 1
            points = jax.jit(problem.resample)(params, jax.random.fold_in(keys[2], draw))
    return {"record": record}


@functools.cache
def _problem(name: str, dtype: str) -> pinn_problems.Problem:
    del dtype  # part of the key: a problem holds constants
    return PROBLEMS[name]()


@functools.cache
def _error(name: str, dtype: str) -> Callable[[Any], jax.Array]:
    return jax.jit(_problem(name, dtype).error)


@functools.cache
def _start(name: str, seed: int, dtype: str) -> tuple[Any, pinn_problems.Points]:
    """Return parameters after Adam, if the problem asks for it, and the first points."""
    problem = _problem(name, dtype)
    keys = jax.random.split(jax.random.key(seed), 3)
    params, points = problem.init(keys[0]), problem.points(keys[1])
    if not problem.adam:
        return params, points
    schedule = optax.exponential_decay(5e-3, problem.adam, 0.1)
    optimizer, loss = optax.adam(schedule), pinn_problems.loss(problem)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        x, state = carry
        updates, state = optimizer.update(jax.grad(loss)(x, points), state, x)
        return (optax.apply_updates(x, updates), state), None

    scan = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), None, length=problem.adam)[0][0])
    params = scan(params)
    return params, jax.jit(problem.resample)(params, jax.random.fold_in(keys[2], 0)) if problem.resample else points


# ----------------------------------------------------------------------------------------------------------------------


def _advance(name: str, problem: pinn_problems.Problem) -> Advance:
    """Return the function that goes on for some evaluations, with a curvature that it keeps from call to call."""
    if name in PEERS:
        return {"optimistix BFGS": _optimistix, "optax.lbfgs": _optax_lbfgs}[name](problem)
    return _ours(name, problem)


@functools.cache
def _natural(problem: pinn_problems.Problem) -> Any:
    if problem.resample is not None:
        raise ValueError(f"pinn: {NATURAL} holds its points, which {problem.name} draws anew; take least_squares.")
    keys = jax.random.split(jax.random.key(0), 3)
    points = problem.points(keys[1])
    half_square = lambda r: 0.5 * jnp.sum(r**2)
    return so.natural_gradient(so.curvature.gnvp(lambda layers: problem.residual(layers, points), half_square))


def _ours(name: str, problem: pinn_problems.Problem) -> Advance:
    loss = _loss(problem)
    kept: list[Any] = [None]

    def advance(params: Any, points: Any, evaluations: int) -> Progress:
        options: dict[str, Any] = {"args": (points,), "state": kept[0], "gtol": 0.0}
        if name in RESIDUAL:
            options |= {"max_steps": evaluations}
            result = so.least_squares(problem.rows, params, RESIDUAL[name](), **options)
        else:
            options |= {"max_evaluations": evaluations, "max_steps": evaluations}
            if name == NATURAL:
                options["max_evaluations"] = None
            optimizer = _natural(problem) if name == NATURAL else OURS[name]()
            result = so.minimize(loss, params, optimizer, **options)
        kept[0] = jax.block_until_ready(result).state
        over = result.status not in (so.Status.MAX_EVALUATIONS, so.Status.MAX_STEPS)
        value = getattr(result, "value", None)
        return Progress(result.params, float(value), int(result.evaluations), int(result.steps), bool(over))

    return advance


@functools.cache
def _loss(problem: pinn_problems.Problem) -> Callable[..., jax.Array]:
    return pinn_problems.loss(problem)  # one object, so that programs compiled for it are found again


@functools.cache
def _optax_program(problem: pinn_problems.Problem) -> Any:
    loss, optimizer = _loss(problem), optax.lbfgs()

    def program(x: Any, state: Any, points: Any, evaluations: Any) -> Any:
        value_fn = lambda x: loss(x, points)
        from_state = optax.value_and_grad_from_state(value_fn)

        def turn(carry: Any) -> Any:
            x, state, value, grad, spent, steps = carry
            updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=value_fn)
            x = optax.apply_updates(x, updates)
            spent += jnp.asarray(optax.tree.get(state, "num_linesearch_steps"), jnp.int32)
            return x, state, *from_state(x, state=state), spent, steps + 1

        value, grad = jax.value_and_grad(value_fn)(x)  # of the new points
        carry = (x, state, value, grad, jnp.int32(1), jnp.int32(0))
        return jax.lax.while_loop(lambda c: c[4] < evaluations, turn, carry)

    return optimizer, jax.jit(program)


def _optax_lbfgs(problem: pinn_problems.Problem) -> Advance:
    optimizer, program = _optax_program(problem)
    kept: list[Any] = [None]

    def advance(params: Any, points: Any, evaluations: int) -> Progress:
        state = optimizer.init(params) if kept[0] is None else kept[0]
        params, kept[0], value, _, spent, steps = program(params, state, points, evaluations)
        return Progress(params, float(value), int(spent), int(steps), over=False)

    return advance


@functools.cache
def _optimistix_program(problem: pinn_problems.Problem) -> Any:
    import equinox
    import optimistix

    loss, solver = _loss(problem), optimistix.BFGS(rtol=0.0, atol=0.0)
    fun = lambda x, points: (loss(x, points), None)
    shape = jax.ShapeDtypeStruct((), jnp.result_type(float))

    def start(x: Any, points: Any) -> Any:
        return solver.init(fun, x, points, {}, shape, None, frozenset())

    def program(x: Any, arrays: Any, points: Any, steps: Any) -> Any:
        static = equinox.partition(equinox.filter_eval_shape(start, x, points), _is_shape)[1]

        def turn(_: Any, carry: Any) -> Any:
            x, arrays = carry
            x, state, _ = solver.step(fun, x, points, {}, equinox.combine(arrays, static), frozenset())
            return x, equinox.filter(state, equinox.is_array)

        x, arrays = jax.lax.fori_loop(0, steps, turn, (x, arrays))
        return x, arrays, loss(x, points)

    return lambda x, points: equinox.filter(start(x, points), equinox.is_array), jax.jit(program)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _optimistix(problem: pinn_problems.Problem) -> Advance:
    """The solver's own `init` and `step` in a loop; one step is one evaluation."""
    start, program = _optimistix_program(problem)
    kept: list[Any] = [None]

    def advance(params: Any, points: Any, evaluations: int) -> Progress:
        arrays = start(params, points) if kept[0] is None else kept[0]
        params, kept[0], value = program(params, arrays, points, evaluations)
        return Progress(params, float(value), evaluations, evaluations, over=False)

    return advance


# ----------------------------------------------------------------------------------------------------------------------


def _table(lines: list[dict[str, Any]]) -> report.Table:
    """Return medians and ranges over seeds, one row per equation and optimizer."""
    rows = []
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["problem"], line["dtype"], line["optimizer"]), []).append(line)
    for (problem, dtype, optimizer), runs in sorted(groups.items()):
        ends = [run["record"][-1] for run in runs]
        errors = [_spread([_error_at(run["record"], mark) for run in runs]) for mark in MARKS]
        errors.append(_spread([_error_at(run["record"], np.inf) for run in runs]))
        evaluations = int(statistics.median(end[0] for end in ends))
        ratio = statistics.median(end[0] / max(end[1], 1) for end in ends)
        seconds = statistics.median(end[4] for end in ends)
        rows.append([f"{problem}, {dtype}", optimizer, len(runs), evaluations, round(ratio, 3), *errors, seconds])
    marks = [f"error at {mark}" for mark in MARKS]
    columns = ["equation", "optimizer", "seeds", "evaluations", "per step", *marks, "at the end", "seconds"]
    note = "Relative L2 error at the lowest loss so far: median (least to largest) over seeds. Adam is not counted."
    return report.Table("Physics-informed networks: error against evaluations", columns, rows, note)


def _error_at(record: list[list[float]], mark: float) -> float | None:
    """Return the error at the lowest loss within so many evaluations; None if the run ended before."""
    seen = [entry for entry in record if entry[0] <= mark]
    if np.isfinite(mark) and record[-1][0] < mark:
        return None
    finite = [entry for entry in seen if np.isfinite(entry[2])]
    return min(finite, key=lambda entry: entry[2])[3]


def _spread(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.1e} ({min(known):.1e} to {max(known):.1e})"


def _one(line: dict[str, Any]) -> str:
    end = line["record"][-1]
    return (
        f"{line['problem']}, {line['optimizer']}, seed {line['seed']}: {end[0]} evaluations, {end[1]} steps, loss "
        f"{end[2]:.2e}, error {_error_at(line['record'], np.inf):.2e}, {end[4]:.0f} s"
    )


def _same(run: Run, line: dict[str, Any]) -> bool:
    return all(line[key] == value for key, value in run._asdict().items())


def _read(path: pathlib.Path | None) -> Any:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
