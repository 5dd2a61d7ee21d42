"""Command line of the benchmarks: `python -m benchmarks step_cost solve batched --json results.json`."""

import argparse
import importlib
import pathlib
import sys

BENCHMARKS = {
    "step_cost": "one L-BFGS or BFGS step against its memory floor, and against peers",
    "solve": "compile time, run time and evaluations of whole solves; compile time of the solver; call overhead",
    "batched": "1,000 independent problems under vmap: batched loss calls, time, share solved",
    "least_squares": "NIST's 54 certified fits, and 10,000 small fits under vmap, beside SciPy and optimistix",
    "equations": "a list of systems of equations as least squares (`equations --help` for its options)",
    "curvature": "products, Lanczos, estimates, dense Hessians, a large network: accuracy, cost, memory",
    "scaling": "eight devices: all-reduces per update, memory, the same points as on one",
    "saddle": "ends of trainings beside SGD and damped Newton: error, most negative eigenvalue (Dauphin et al. 2014)",
    "bounds": "a list of bound-constrained CUTEst problems beside L-BFGS-B (`bounds --help` for its options)",
    "pinn": "physics-informed networks: error against evaluations (`pinn --help` for its options)",
    "cutest": "a list of CUTEst problems: solve rates and performance profiles (`cutest --help` for its options)",
    "compare": "what changed between two saved runs: `compare OLD.json NEW.json` (`compare --help` for its options)",
}
ALONE = ("equations", "bounds", "pinn", "cutest", "compare")  # with options of their own


def main(arguments: list[str]) -> int:
    """Run the benchmarks that the arguments name."""
    if arguments and arguments[0] in ALONE:
        return importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if not chosen.names:
        parser.print_help()
        return 0
    for name in chosen.names:
        if name not in BENCHMARKS or name in ALONE:
            together = ", ".join(key for key in BENCHMARKS if key not in ALONE)
            parser.error(f"unknown benchmark {name!r}; {together} run together, {', '.join(ALONE)} each on its own")
    if chosen.device:
        import jax

        jax.config.update("jax_platforms", chosen.device)
    from benchmarks import report

    about = report.environment()
    print(", ".join(f"{key} {about[key]}" for key in ("date", "commit", "device", "python")))
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items() if version))
    reports = []
    for name in chosen.names:
        module = importlib.import_module(f"benchmarks.{name}")
        dtype = {"dtype": chosen.dtype} if chosen.dtype else {}
        for part in module.run(chosen.repeats, chosen.quick, **dtype):
            report.show(part.table)
            reports.append(part)
            if chosen.json:  # after each, so that an interrupted run leaves what it has
                report.save(chosen.json, reports)
    return 0


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:13} {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks of secondorder beside the peers that are installed.\n\n" + listing,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run, in this order")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="save tables, raw samples and versions")
    parser.add_argument("--device", metavar="NAME", help="JAX platform: cpu, gpu, tpu (default: what JAX takes)")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision (default: the benchmark's own)")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="timed rounds (default: the benchmark's)")
    parser.add_argument("--quick", action="store_true", help="smaller problems and fewer rounds")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
