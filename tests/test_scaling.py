"""Sharded parameters: reductions counted in compiled programs, the same points on one and many devices, processes."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"


def command(kind: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.scaling_worker", kind, *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[1:]) for line in text.splitlines() if line.startswith("@")]


FEW = ("lbfgs, m = 5", "lbfgs, m = 40", "newton_cg", "optax.scale_by_lbfgs, m = 5")


@functools.cache
def rows(kind: str, *only: str) -> dict[str, dict[str, Any]]:
    """Return what a process with eight devices counted, by optimizer."""
    options = ("--only", *only) if only else ()
    done = subprocess.run(
        command(kind, *options), capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["optimizer"]: row for row in parsed(done.stdout)}


def documented(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of docs/scaling.md, without its head."""
    part = DOCUMENT.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("m", [5, 40])
def test_lbfgs_reduces_three_times_whatever_m_is(m):
    # A maximum, the norm of the gradient, which the driver tests; a sum of scalars; one of 2m products per leaf.
    counted = rows("communication", *FEW)[f"lbfgs, m = {m}"]
    assert counted["gathered"] == 0
    assert counted["per_step"] == 3
    assert counted["in_loops"] == 0
    assert counted["largest"] <= 2 * (2 * m) + 4


def test_a_two_loop_recursion_reduces_2m_times():
    assert rows("communication", *FEW)["optax.scale_by_lbfgs, m = 5"]["per_step"] == 2 * 5 + 1


def test_conjugate_gradients_reduce_twice_per_product():
    counted = rows("communication", *FEW)["newton_cg"]
    assert counted["gathered"] == 0
    assert counted["in_loops"] == 2
    assert counted["reductions"] <= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lbfgs, m = 10", "newton_cg", "saddle_free_newton, rank = 8"])
def test_no_array_of_the_size_of_the_parameters_is_gathered(name):
    assert rows("communication")[name]["gathered"] == 0
    assert rows("communication")["newton"]["gathered"] >= 64  # the counter sees what a dense method gathers


@pytest.mark.slow
def test_reductions_of_lanczos_grow_with_neither_rank_nor_parameters():
    small, large = (rows("communication")[f"saddle_free_newton, rank = {k}"] for k in (8, 16))
    assert small["reductions"] == large["reductions"]
    assert small["in_loops"] == large["in_loops"]
    assert large["largest"] <= 2 * (16 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lbfgs, m = 5", "newton_cg", "saddle_free_newton, rank = 8"])
def test_eight_devices_go_through_the_points_of_one_and_keep_the_sharding(name):
    row = rows("agreement")[name]
    assert row["moved"] > 0.1
    assert row["iterations"] >= 10
    assert row["difference"] < 1e-10  # float64, over 20 updates
    assert row["sharding_kept"]
    assert row["replicated_in_init"] == 0


@pytest.mark.slow
def test_the_documented_reductions_are_those_of_the_programs():
    table = documented("All-reduces per update")
    assert {row[0] for row in table} == set(rows("communication"))
    for name, outside, inside, gathers in table:
        counted = rows("communication")[name]
        assert int(outside) == counted["per_step"], name
        assert int(inside) == (0 if name.startswith("optax") else counted["in_loops"]), name
        assert (gathers == "yes") == (counted["gathered"] > 0), name


def test_the_documented_states_are_those_of_the_optimizers():
    table = documented("Bytes of state")
    assert {row[0] for row in table} == set(rows("state"))
    for name, formula, bytes_per_parameter in table:
        counted, n = rows("state")[name], 1000
        m = int(name.split("m = ")[1].split(",")[0]) if "m = " in name else 0
        k = int(name.split("rank = ")[1]) if "rank = " in name else 0
        expected = eval(formula, {"n": n, "m": m, "k": k})
        # What does not grow with n (m by m matrices) counts in the bytes, and as copies where it is as large as n.
        assert expected <= counted["copies"] <= expected + 3 * m**2 / n + 1e-9, name
        assert abs(float(bytes_per_parameter.replace(",", "")) - 4 * expected) < 1e-9, name


# Several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(*options: str) -> list[subprocess.CompletedProcess[str]]:
    """Run two processes with four devices each, joined by jax.distributed on the loopback address."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            command("run", "--of", "2", "--process", str(i), "--port", port, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        for i in range(2)
    ]
    out = [p.communicate(timeout=600) for p in started]
    return [subprocess.CompletedProcess([], p.returncode, *text) for p, text in zip(started, out, strict=True)]


def end(text: str) -> dict[str, np.ndarray]:
    (row,) = parsed(text)
    assert row["devices"] == 8
    return {name: np.array([float.fromhex(v) for v in values]) for name, values in row["params"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lbfgs", "newton_cg"])
def test_two_processes_go_through_the_points_of_one(name):
    alone = subprocess.run(
        command("run", "--optimizer", name), capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    joined = processes("--optimizer", name)
    assert [p.returncode for p in joined] == [0, 0], joined[0].stderr[-3000:]
    expected = end(alone.stdout)
    for process in joined:
        actual = end(process.stdout)
        for leaf, values in expected.items():
            assert np.max(np.abs(actual[leaf] - values)) < 1e-10 * np.max(np.abs(values))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lbfgs", "newton_cg"])
def test_a_run_that_was_killed_goes_on_from_its_checkpoint_bit_for_bit(name, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    whole = processes("--optimizer", name)
    assert [p.returncode for p in whole] == [0, 0], whole[0].stderr[-3000:]
    folder = ("--optimizer", name, "--checkpoint", str(tmp_path / "kept"))
    killed = processes(*folder, "--die-after", "7")
    assert all(p.returncode != 0 for p in killed)
    resumed = processes(*folder)
    assert [p.returncode for p in resumed] == [0, 0], resumed[0].stderr[-3000:]
    assert parsed(resumed[0].stdout)[0]["resumed_from"] == 7
    for a, b in zip(whole, resumed, strict=True):
        for leaf, values in end(a.stdout).items():
            np.testing.assert_array_equal(end(b.stdout)[leaf], values)
