"""What an update costs on eight devices: `python -m benchmarks.scaling_worker KIND`, one JSON line per row.

`communication` counts collectives in compiled updates, `state` copies of the parameters in optimizer states, `memory`
the peak of a compiled step; `agreement` runs 20 steps on one and on all devices; `run` prints the end of such a run, in
one process or, with `--process I --of P --port N`, as one of several that `jax.distributed` joins. `benchmarks.scaling`
and the tests start it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

DEVICES, STEPS = 8, 20
AGREEMENT = ("lbfgs, m = 5", "newton_cg", "saddle_free_newton, rank = 8")
SHAPES = {"w": (64,), "b": (16, 8)}  # sharded on the first axis


class Counts(NamedTuple):
    """Collectives of a compiled program, on the most expensive branches."""

    reductions: int  # all-reduces outside of loops
    in_loops: int  # all-reduces per turn of the loops (of all loops together)
    largest: int  # numbers in the largest of them
    gathered: int  # entries of the largest array that a collective of another kind makes


def main(arguments: list[str]) -> None:
    """Print the rows of one kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("communication", "state", "agreement", "run", "memory"))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--optimizer", default="lbfgs")
    parser.add_argument("--only", nargs="+", help="`communication` of these alone")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--checkpoint", help="folder: save after every step, and go on from the last one that is there")
    parser.add_argument("--die-after", type=int, default=-1, help="end without notice after this many steps")
    chosen = parser.parse_args(arguments)
    count = f"--xla_force_host_platform_device_count={DEVICES // chosen.of}"
    os.environ["XLA_FLAGS"] = f"{count} {os.environ.get('XLA_FLAGS', '')}"  # first: XLA ignores what follows a non-flag
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", chosen.dtype == "float64")
    if chosen.of > 1:
        jax.distributed.initialize(f"127.0.0.1:{chosen.port}", chosen.of, chosen.process)
    if jax.device_count() != DEVICES:
        raise RuntimeError(
            f"benchmarks.scaling_worker: XLA made {jax.device_count()} devices, not {DEVICES}; unset XLA_FLAGS, now "
            f"{os.environ['XLA_FLAGS']!r}."
        )
    if chosen.kind == "run":
        rows: Iterator[dict[str, Any]] = _run(chosen)
    else:
        kinds = {"communication": _communication, "state": _state, "agreement": _agreement, "memory": _memory}
        rows = _communication(chosen.only) if chosen.only else kinds[chosen.kind]()
    for row in rows:
        print("@" + json.dumps(row), flush=True)


def counts(program: str) -> Counts:
    """Count the collectives in the text of a compiled program."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in program.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head.group(2)
            entry = name if head.group(1) else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def called(line: str, word: str) -> list[str]:
        found = re.search(word + r"=\{?([^}\s]*[^},\s])", line.replace(", %", ",%"))
        return [n.strip().lstrip("%") for n in found.group(1).split(",")] if found else []

    def visit(name: str) -> Counts:
        total = Counts(0, 0, 0, 0)
        for line in bodies[name]:
            rest = line.partition(" = ")[2]
            shapes = rest.split("(", 1)[0] if not rest.startswith("(") else rest[: rest.index(")")]
            sizes = [_entries(s) for s in re.findall(r"\[([\d,]*)\]", shapes)]
            part = Counts(0, 0, 0, 0)
            if re.search(r" all-reduce(-start)?\(", line):
                part = Counts(1, 0, sum(sizes) // (2 if "all-reduce-start" in line else 1), 0)
            elif re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line):
                part = Counts(0, 0, 0, max(sizes))
            elif " while(" in line:
                inner = visit(called(line, "body")[0])
                part = Counts(0, inner.reductions + inner.in_loops, inner.largest, inner.gathered)
            elif " conditional(" in line:
                names = called(line, "branch_computations") or [
                    *called(line, "true_computation"),
                    *called(line, "false_computation"),
                ]
                part = Counts(*(max(field) for field in zip(*(visit(n) for n in names), strict=True)))
            elif " call(" in line:
                part = visit(called(line, "to_apply")[0])
            total = Counts(
                total.reductions + part.reductions,
                total.in_loops + part.in_loops,
                max(total.largest, part.largest),
                max(total.gathered, part.gathered),
            )
        return total

    return visit(entry)


# ----------------------------------------------------------------------------------------------------------------------


def _entries(shape: str) -> int:
    size = 1
    for axis in filter(None, shape.split(",")):
        size *= int(axis)
    return size


def _optimizers() -> dict[str, Any]:
    import secondorder as so

    return {
        "lbfgs, m = 5": so.lbfgs(memory_size=5),
        "lbfgs, m = 10": so.lbfgs(),
        "lbfgs, m = 40": so.lbfgs(memory_size=40),
        "lbfgs, m = 10, bfloat16": so.lbfgs(history_dtype="bfloat16"),
        "newton_cg": so.newton_cg(),
        "newton_cg, a preconditioner of yours": so.newton_cg(preconditioner=_halved),
        "newton_cg, lbfgs_preconditioner, m = 20": so.newton_cg(preconditioner=so.lbfgs_preconditioner(20)),
        "newton_cg, diagonal_preconditioner": so.newton_cg(preconditioner=so.diagonal_preconditioner()),
        "newton_cg, capped_cg": so.newton_cg(so.capped_cg()),
        "saddle_free_newton, rank = 8": so.saddle_free_newton(rank=8),
        "saddle_free_newton, rank = 16": so.saddle_free_newton(rank=16),
    }


def _halved(params: Any, vector: Any) -> Any:
    """Return a product without memory or communication of its own."""
    import jax

    del params
    return jax.tree.map(lambda v: 0.5 * v, vector)


def _dense() -> dict[str, Any]:
    import secondorder as so

    return {
        "bfgs": so.bfgs(),
        "newton": so.newton(),
        "newton, line search": so.newton(so.modified_cholesky()),
        "saddle_free_newton": so.saddle_free_newton(),
        "cubic_newton": so.cubic_newton(),
    }


def _shardings() -> Any:
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    return {name: NamedSharding(mesh, PartitionSpec("x")) for name in SHAPES}, NamedSharding(mesh, PartitionSpec())


def _start(shardings: Any = None) -> Any:
    """Return the start, on one device or sharded; every process makes its own part."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    dtype = np.float64 if jax.config.read("jax_enable_x64") else np.float32
    host = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    if shardings is None:
        return jax.device_put(host, jax.devices()[0])
    part = lambda name: lambda index: host[name][index]
    return {n: jax.make_array_from_callback(s, shardings[n], part(n)) for n, s in SHAPES.items()}


def _loss(params: Any) -> Any:
    """Return a loss that couples all entries and is neither convex nor quadratic."""
    import jax.numpy as jnp

    w, b = params["w"], params["b"]
    return (
        jnp.sum(jnp.cosh(w) - w)
        + 0.5 * jnp.sum((1 + jnp.arange(16.0).astype(b.dtype))[:, None] * (b - 1) ** 2)
        + 0.1 * jnp.sum(jnp.cos(3 * b))
        + 0.05 * (jnp.sum(w) - jnp.sum(b)) ** 2
    )


def _communication(only: Any = None) -> Iterator[dict[str, Any]]:
    import jax.numpy as jnp
    import optax

    shardings, _ = _shardings()
    x = _start(shardings)
    value = jnp.zeros((), jnp.asarray(x["w"]).dtype)
    wanted = lambda name: only is None or name in only
    for name, optimizer in (_optimizers() | _dense()).items():
        if not wanted(name):
            continue
        extra = {} if name.startswith(("lbfgs", "bfgs")) else {"hvp_fn": _halved}
        update = lambda g, s, x, v, optimizer=optimizer, extra=extra: optimizer.update(g, s, x, value=v, **extra)
        yield _counted(name, update, x, optimizer.init(x), x, value)
    for m in (5, 10, 40):
        optimizer, name = optax.scale_by_lbfgs(memory_size=m), f"optax.scale_by_lbfgs, m = {m}"
        if wanted(name):
            yield _counted(name, optimizer.update, x, optimizer.init(x), x, m=m)


def _counted(name: str, update: Callable[..., Any], *args: Any, m: int = 0) -> dict[str, Any]:
    import jax

    found = counts(jax.jit(update).lower(*args).compile().as_text())
    # The two loops of optax's recursion turn m times each.
    per_step = found.reductions + m * found.in_loops if m else found.reductions
    return {"optimizer": name, **found._asdict(), "per_step": per_step}


def _state() -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    n = 1000
    x = jax.ShapeDtypeStruct((n,), jnp.float32)
    for name, optimizer in (_optimizers() | _dense()).items():
        state = jax.eval_shape(optimizer.init, x)
        leaves = jax.tree.leaves(state)
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        large = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.size >= n)
        copies = large / (n * x.dtype.itemsize)
        yield {"optimizer": name, "n": n, "copies": copies, "bytes_per_parameter": total / n}


def _memory() -> Iterator[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    import secondorder as so

    n = 1_000_000
    loss = lambda x: jnp.sum(jnp.cos(x))
    x = jax.ShapeDtypeStruct((n,), jnp.float32)
    own = _peak(jax.jit(jax.value_and_grad(loss)).lower(x))
    for name, optimizer in {**_optimizers(), "lbfgs, m = 20": so.lbfgs(memory_size=20)}.items():
        extra = {} if name.startswith("lbfgs") else {"hvp_fn": _halved}

        def step(x: Any, state: Any, optimizer: Any = optimizer, extra: Any = extra) -> Any:
            value, grad = jax.value_and_grad(loss)(x)
            move, state = optimizer.update(grad, state, x, value=value, **extra)
            return x + move, state

        state = jax.eval_shape(optimizer.init, x)
        peak = _peak(jax.jit(step, donate_argnums=(0, 1)).lower(x, state))
        yield {"optimizer": name, "copies": (peak - own) / (4 * n), "with_loss": peak / (4 * n)}


def _peak(lowered: Any) -> float:
    memory = lowered.compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return total - memory.alias_size_in_bytes


def _points(optimizer: Any, params: Any, steps: int) -> tuple[list[Any], Any]:
    """Return the points of a run, and the optimizer's state at its end."""
    step = _step(optimizer)
    state, points = optimizer.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        points.append(params)
    return points, state


def _step(optimizer: Any) -> Callable[..., Any]:
    import jax
    import optax

    from secondorder import curvature

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(_loss)(params)
        move, state = optimizer.update(grad, state, params, value=value, hvp_fn=curvature.hvp(_loss))
        return optax.apply_updates(params, move), state

    return step


def _agreement() -> Iterator[dict[str, Any]]:
    import jax
    import numpy as np

    shardings, _ = _shardings()
    for name in AGREEMENT:
        optimizer = _optimizers()[name]
        one, _ = _points(optimizer, _start(), STEPS)
        many, state = _points(optimizer, _start(shardings), STEPS)
        worst = 0.0
        for a, b in zip(one, many, strict=True):
            for u, v in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
                worst = max(worst, float(np.max(np.abs(u - v)) / np.max(np.abs(u))))
        moved = float(np.max(np.abs(np.asarray(one[-1]["w"]) - np.asarray(_start()["w"]))))
        kept = all(many[-1][n].sharding.is_equivalent_to(shardings[n], len(SHAPES[n])) for n in SHAPES)
        eager = optimizer.init(_start(shardings))
        like = lambda leaf: any(leaf.shape[-len(shape) :] == shape for shape in SHAPES.values())
        whole = [leaf for leaf in jax.tree.leaves(eager) if like(leaf) and leaf.sharding.is_fully_replicated]
        yield {
            "optimizer": name,
            "difference": worst,
            "moved": moved,
            "iterations": int(state.info.iterations),
            "sharding_kept": bool(kept),
            "replicated_in_init": len(whole),
        }


def _run(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the last point of a run in hexadecimal, the same in every process; save and resume if asked to."""
    import jax
    import numpy as np

    shardings, replicated = _shardings()
    optimizer = {"newton_cg": "newton_cg", "lbfgs": "lbfgs, m = 5"}.get(chosen.optimizer, chosen.optimizer)
    made = _optimizers()[optimizer]
    params = _start(shardings)

    # A checkpoint must say where each leaf belongs: counters and small matrices on all devices, not on the first one.
    # (`jax.device_put` compares the processes' values, and NaN, "not known yet", differs from NaN.)
    def everywhere(leaf: Any) -> Any:
        if leaf.sharding.num_devices > 1:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, replicated, lambda index: host[index])

    state, done, manager = jax.tree.map(everywhere, made.init(params)), 0, None
    if chosen.checkpoint:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(chosen.checkpoint)
        last = manager.latest_step()
        if last is not None:
            kept = manager.restore(last, args=ocp.args.StandardRestore({"params": params, "state": state}))
            params, state, done = kept["params"], kept["state"], last
    step = _step(made)
    for turn in range(done, STEPS):
        params, state = step(params, state)
        if manager is not None:
            manager.save(turn + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
            manager.wait_until_finished()
        if turn + 1 == chosen.die_after:
            os._exit(9)
    whole = jax.jit(lambda x: x, out_shardings=replicated)(params)
    values = {n: np.asarray(leaf.addressable_data(0)) for n, leaf in whole.items()}
    yield {
        "process": jax.process_index(),
        "devices": jax.device_count(),
        "resumed_from": done,
        "params": {n: [float(v).hex() for v in leaf.ravel()] for n, leaf in values.items()},
    }
    if manager is not None:
        manager.close()


if __name__ == "__main__":
    main(sys.argv[1:])
