"""Pictures: what is drawn, from what; not how it looks."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder import plotting

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def bowl(x):
    return x[0] ** 2 + 4 * x[1] ** 2


def test_convergence_draws_the_history_of_a_result():
    result = so.minimize(bowl, jnp.array([3.0, 1.0]), so.lbfgs(), history=True, max_steps=50)
    ax = plotting.convergence({"lbfgs": result})
    drawn = ax.lines[0].get_xydata()
    steps = int(result.steps)
    expected = np.stack([result.history.evaluations[: steps + 1], result.history.value[: steps + 1]], axis=1)
    np.testing.assert_allclose(drawn, expected[expected[:, 1] > 0])
    assert ax.get_legend().get_texts()[0].get_text() == "lbfgs"


def test_convergence_subtracts_the_known_minimum_and_leaves_out_what_a_logarithm_cannot_show():
    ax = plotting.convergence({"run": ([1, 2, 3, 4], [5.0, 3.0, 2.0, np.nan])}, best=2.0)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 3], [2, 1]])


def test_pictures_draw_on_the_axes_they_are_given():
    _, axes = pyplot.subplots(1, 2)
    assert plotting.convergence({"run": ([1], [1.0])}, ax=axes[0]) is axes[0]
    assert plotting.paths(bowl, {"run": [[0.0, 0.0], [1.0, 1.0]]}, ax=axes[1]) is axes[1]


def test_paths_draw_every_point_within_the_limits():
    track = np.array([[1.0, 2.0], [0.5, 0.5], [0.0, 0.0]])
    ax = plotting.paths(bowl, {"run": track}, xlim=(-1, 2))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), track)
    assert ax.get_xlim() == (-1.0, 2.0)
    assert ax.get_ylim() == (-0.5, 2.5)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plotting.convergence({"a": so.minimize(bowl, jnp.zeros(2))}), "'a' has no history"),
        (lambda: plotting.convergence({"a": ([1, 2], [1.0])}), "'a' must be a Result or a pair"),
        (lambda: plotting.paths(bowl, {}), "at least one path"),
        (lambda: plotting.paths(bowl, {"a": [1.0, 2.0]}), r"'a' must have shape \(steps, 2\)"),
    ],
)
def test_bad_input_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plotting.convergence({})


def test_the_package_does_not_import_matplotlib():
    code = "import sys, secondorder; assert not any(m.startswith('matplotlib') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
