"""What the README shows, runs."""

import re
from pathlib import Path

import numpy as np
import pytest

import secondorder as so

OPTIMIZERS = ("lbfgs", "bfgs", "newton", "saddle_free_newton", "levenberg_marquardt", "gauss_newton")
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_code_of_the_readme_runs_and_finds_the_known_answers(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert "True converged: the gradient passes the test" in capsys.readouterr().out
    for params in (names["result"].params, names["params"]):
        np.testing.assert_allclose(params["a"], 3.0, atol=1e-2)
        np.testing.assert_allclose(params["k"], 0.7, atol=1e-2)
    np.testing.assert_allclose(names["best"], 2.0, atol=0.1)


@pytest.mark.slow
def test_code_of_the_curvature_guide_runs():
    guide = (Path(__file__).parents[1] / "docs" / "curvature.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL):
        exec(compile(block, "curvature.md", "exec"), names)
    assert names["curvature"].Kind(int(names["found"].kind)).name == "NOT_CRITICAL"
    np.testing.assert_array_equal(so.recorded(names["state"]).step, [0, 5, 10, 15])
    assert names["blocks"]["W"].shape == (24, 24)


def test_readme_names_every_curvature_tool():
    for name in so.curvature.__all__:
        assert name[0].isupper() or re.search(rf"\b{name}\b", README), name


def test_readme_names_every_status_and_every_optimizer():
    for status in so.Status:
        assert status is so.Status.RUNNING or f"`{status.name}`" in README
    for name in so.__all__:
        if name.startswith("scale_by_") or name in OPTIMIZERS:
            assert f"`{name}" in README


@pytest.mark.parametrize("mark", ["quickstart-command", "test-command"])
def test_each_command_is_one_line_between_its_marks(mark):
    section = re.search(f"<!-- {mark} -->\n```sh\n(.*?)```\n<!-- /{mark} -->", README, flags=re.DOTALL)
    assert section is not None
    assert section.group(1).count("\n") == 1
