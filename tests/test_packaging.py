"""What a user installs and imports."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NEW_MODULES = """
import sys
import jax, optax
before = set(sys.modules)
import secondorder
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(new)))
print("jax.experimental.pallas" in set(sys.modules) - before, "jax.extend.core" in set(sys.modules) - before)
"""

# A user's program for pyright and for the smoke test: all kinds of use, with types.
PROGRAM = """
import jax
import jax.numpy as jnp
import optax

import secondorder as so


def loss(params: dict[str, jax.Array], shift: jax.Array) -> jax.Array:
    return jnp.sum((params["w"] - shift) ** 2) + params["b"] ** 2


start = {"w": jnp.zeros(3), "b": jnp.ones(())}
result: so.Result = so.minimize(loss, start, so.lbfgs(memory_size=5), args=(jnp.ones(3),))
assert result.success, result.message
status: so.Status = so.Status(int(result.status))
optimizer = optax.chain(so.scale_by_lbfgs(), optax.scale(-0.1))
state = optimizer.init(start)
value, grad = jax.value_and_grad(loss)(start, jnp.ones(3))
updates, state = optimizer.update(grad, state, start)
moved = optax.apply_updates(start, updates)
fit: so.LeastSquaresResult = so.curve_fit(lambda p, x: p * x, jnp.arange(4.0), 2 * jnp.arange(4.0), jnp.ones(()))
slope = jax.grad(lambda s: so.minimize(loss, start, args=(s,)).params["w"][0])(jnp.ones(3))
old = so.compat.minimize(lambda x: jnp.sum(x**2), [1.0, 2.0], method="BFGS")
assert old.success
assert abs(float(slope[0]) - 1) < 1e-3
assert so.curvature.hessian(lambda x: jnp.sum(x**2), jnp.ones(2)).shape == (2, 2)
print(status.name, so.__version__)
"""


def run(*command, cwd=None):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH",)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_it_loads_nothing_but_itself_besides_jax_and_optax():
    command = [sys.executable, "-c", NEW_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    packages, heavy = done.stdout.splitlines()
    assert packages == "secondorder"
    assert heavy == "False False"


@pytest.mark.slow
def test_a_wheel_and_a_source_archive_build_and_the_wheel_runs_in_an_empty_environment(tmp_path):
    pytest.importorskip("build")
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT))
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert archive.stat().st_size > 0
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(str(python), "-m", "pip", "install", "--quiet", str(wheel))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert run(str(python), str(program), cwd=tmp_path).startswith("CONVERGED")
    marker = "import secondorder, pathlib; print((pathlib.Path(secondorder.__file__).parent / 'py.typed').exists())"
    assert run(str(python), "-c", marker, cwd=tmp_path).strip() == "True"


@pytest.mark.slow
def test_pyright_finds_nothing_in_a_program_of_a_user(tmp_path):
    pytest.importorskip("pyright")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    config = f'{{"extraPaths": ["{ROOT}"], "typeCheckingMode": "standard"}}'
    (tmp_path / "pyrightconfig.json").write_text(config)
    out = run(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(tmp_path))
    assert "0 errors" in out
