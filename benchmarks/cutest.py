"""Which solver ends at the minimum, in how many evaluations, whatever the function looks like?

Problems of the CUTEst collection (PyPI package `sif2jax`), each from the package's own start, all solvers with their
default options, the same gradient test (max-norm at most 1e-5 in float64), 5,000 evaluations and 20 seconds after
compilation. Every run is one JSON line; the tables and the picture are made from those lines (`profiles.py`).
"""

import argparse
import concurrent.futures
import json
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from benchmarks import cutest_worker, profiles, report, timing

COMPILE_SECONDS = 180.0
GRACE = 5.0  # on top of a solver's time, for the process around it
LATE = "time is over"


def main(arguments: list[str]) -> int:
    """Run problems, or make the report of finished runs."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.report:
        runs = [run for file in chosen.report for run in read(file)]
    elif chosen.set:
        runs = _run(chosen)
    else:
        parser.error("give --set FILE to run problems, or --report FILE for the tables of finished runs")
    if chosen.solvers:
        runs = [run for run in runs if run["solver"] in chosen.solvers]
    if not runs:
        parser.error("there are no runs of these solvers")
    for table in profiles.tables(runs):
        report.show(table)
    if chosen.picture:
        profiles.picture(runs, chosen.picture)
    return 0


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the runs in a file of JSON lines; other lines (the environment) are left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [line for line in lines if "problem" in line]


# ----------------------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cutest", description=__doc__)
    parser.add_argument("--set", type=pathlib.Path, metavar="FILE", help="problems, one `NAME n` per line")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="solvers (default: all that are installed)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="problems at a time (default 1)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="append runs here; finished ones are kept")
    parser.add_argument("--report", type=pathlib.Path, nargs="+", metavar="FILE", help="tables of finished runs only")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE", help="draw the performance profiles")
    return parser


def _run(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks import peers

    known = [*peers.jax_solvers(), *peers.scipy_solvers()]
    solvers = chosen.solvers or known
    unknown = [name for name in solvers if name not in known]
    if unknown:
        raise SystemExit(f"unknown solvers {unknown}; installed are: {', '.join(map(repr, known))}")
    path = chosen.json or pathlib.Path(f"cutest_{chosen.dtype}.jsonl")
    runs = [run for run in read(path) if run["dtype"] == chosen.dtype] if path.exists() else []
    done = {(run["problem"], run["solver"]) for run in runs}
    problems = [line.split() for line in chosen.set.read_text().splitlines() if line.strip()]
    tasks = [(name, int(n), [s for s in solvers if (name, s) not in done]) for name, n in problems]
    tasks = [task for task in tasks if task[2]]
    lock = threading.Lock()
    with path.open("a") as file, concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
        file.write(json.dumps({"environment": report.environment()}) + "\n")
        waiting = [pool.submit(_problem, *task, chosen.dtype, file, lock) for task in tasks]
        bar = timing.tqdm(concurrent.futures.as_completed(waiting), total=len(waiting), desc="problems")
        for finished in bar:
            runs += finished.result()
    wanted = {name for name, _ in problems}
    return [run for run in runs if run["problem"] in wanted]


def _problem(
    name: str, n: int, solvers: list[str], dtype: str, file: TextIO, lock: threading.Lock
) -> list[dict[str, Any]]:
    """Return the runs of one problem; a worker whose clock runs out is ended, and the next one goes on.

    SciPy's solvers look at the clock themselves and say how far they came. Ours can be asked to, at the price of a call
    to the host per step: those whose time is over run once more that way.
    """
    from benchmarks import peers

    module = "benchmarks.cutest_worker"
    runs: list[dict[str, Any]] = []
    left = list(solvers)
    while left:
        for run in worker(module, name, n, list(left), dtype):
            left.remove(run["solver"])
            if run.get("error") == LATE and peers.is_ours(run["solver"]):
                run = next(worker(module, name, n, [run["solver"]], dtype, cutest_worker.WATCH))
            runs.append(run)
            with lock:
                file.write(json.dumps(run) + "\n")
                file.flush()
    return runs


def worker(module: str, name: str, n: int, solvers: list[str], dtype: str, *options: str) -> Iterator[dict[str, Any]]:
    """Yield the runs as one process of `module` finishes them, the last of them perhaps an error."""
    command = [sys.executable, "-m", module, name, str(n), dtype, *options, *solvers]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()
    errors: list[str] = []
    assert worker.stdout is not None
    assert worker.stderr is not None
    threading.Thread(target=_listen, args=(worker.stdout, events), daemon=True).start()
    threading.Thread(target=lambda pipe: errors.extend(pipe), args=(worker.stderr,), daemon=True).start()
    finished, error, deadline = 0, "", time.monotonic() + COMPILE_SECONDS
    while finished < len(solvers) and not error:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            error = LATE
            break
        if event is None:
            error = "the process ended: " + "".join(errors)[-300:]
        elif event.pop("event") == "compiled":
            # Twice: a run of under a second is repeated, and a host solver looks at the clock between evaluations.
            deadline = time.monotonic() + cutest_worker.SECONDS + GRACE
        else:
            yield event
            finished += 1
            deadline = time.monotonic() + COMPILE_SECONDS
    worker.kill()
    worker.wait()
    if error:
        failed = {"problem": name, "n": n, "dtype": dtype, "solver": solvers[finished]}
        yield {**failed, "value": float("nan"), "error": error}


def _listen(pipe: TextIO, events: queue.Queue[dict[str, Any] | None]) -> None:
    for line in pipe:
        if line.startswith("@"):
            events.put(json.loads(line[1:]))
    events.put(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
