"""What does an update cost beside the loss, on eight devices: reductions, memory, and the same iterates?

Everything is counted in compiled programs on eight forced CPU devices, in a process of its own (`scaling_worker.py`).
"""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.report import Report, Table


def run(repeats: int, quick: bool, dtype: str = "float64") -> list[Report]:
    """Return the tables of communication, state, peak memory and agreement."""
    del repeats
    counted, state = rows("communication", dtype), rows("state", dtype)
    reports = [
        Report(
            "communication",
            Table(
                "All-reduces of one update on 8 devices, without those of the loss",
                ["optimizer", "per update", "per turn of inner loops", "numbers in the largest", "largest gather"],
                [[r["optimizer"], r["per_step"], r["in_loops"], r["largest"], r["gathered"]] for r in counted],
                "newton_cg and saddle_free_newton(rank): an inner turn is a Hessian-vector product; where they solve. "
                "optax turns two loops of m: they are counted in `per update`.",
            ),
            counted,
        ),
        Report(
            "state",
            Table(
                "Size of the state, float32",
                ["optimizer", "copies of the parameters (n = 1,000)", "bytes per parameter"],
                [[r["optimizer"], r["copies"], r["bytes_per_parameter"]] for r in state],
            ),
            state,
        ),
    ]
    if quick:
        return reports
    memory, agreement = rows("memory", dtype), rows("agreement", dtype)
    return [
        *reports,
        Report(
            "memory",
            Table(
                "Peak of a compiled step, n = 1e6 float32, state and parameters donated",
                ["optimizer", "copies besides those of the loss", "with parameters and gradient"],
                [[r["optimizer"], r["copies"], r["with_loss"]] for r in memory],
            ),
            memory,
        ),
        Report(
            "agreement",
            Table(
                f"20 updates on 1 and on 8 devices, {dtype}",
                ["optimizer", "largest difference, relative", "iterations"],
                [[r["optimizer"], r["difference"], r["iterations"]] for r in agreement],
            ),
            agreement,
        ),
    ]


def rows(kind: str, dtype: str = "float64", *options: str) -> list[dict[str, Any]]:
    """Return what a worker process prints."""
    command = [sys.executable, "-m", "benchmarks.scaling_worker", kind, "--dtype", dtype, *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"benchmarks: {' '.join(command)} failed: {done.stderr[-1000:]}")
    return [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
