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


def test_several_runs_are_a_median_and_a_band():
    runs = [([1, 2, 3], [8.0, 4.0 + i, 2.0]) for i in range(11)] + [([1, 2], [8.0, 9.0])]
    ax = plotting.convergence({"many": runs})
    drawn = ax.lines[0].get_xydata()
    np.testing.assert_allclose(drawn[:, 0], [1, 2, 3])
    np.testing.assert_allclose(drawn[:, 1], np.median([[8, 4 + i, 2] for i in range(11)] + [[8, 9, 9]], axis=0))
    low, high = (f(ax.collections[0].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    assert low == 2.0
    assert 12.0 < high < 14.0  # the 90 % quantile of 4, ..., 14 and 9


class Density:  # as curvature.spectral_density returns it
    nodes = jnp.array([[0.0, 0.1, 5.0], [0.02, 0.12, 5.0]])
    weights = jnp.array([[0.3, 0.19, 0.01], [0.3, 0.19, 0.01]])

    def density(self, grid, width):
        z = (grid[:, None] - self.nodes.ravel()[None]) / width
        return jnp.exp(-0.5 * z**2) @ self.weights.ravel() / (width * (2 * jnp.pi) ** 0.5)


def test_a_spectrum_is_drawn_on_a_logarithmic_scale_with_its_outliers_marked():
    ax = plotting.spectral_density(Density(), num=100)
    assert ax.get_yscale() == "log"
    marked = next(line for line in ax.lines if line.get_label() == "outliers")
    np.testing.assert_allclose(marked.get_xdata(), [5.0, 5.0])
    curve = ax.lines[0].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(100.0, rel=0.05)


def test_slices_show_their_values_and_the_projected_path():
    steps = np.linspace(-1, 1, 5)
    line = plotting.loss_slice(so.curvature.LossSlice(steps**2, steps), path=[[0.5], [0.0]])
    np.testing.assert_allclose(line.lines[0].get_xydata(), np.stack([steps, steps**2], axis=1))
    np.testing.assert_allclose(line.lines[2].get_xydata(), [[0.5, 0.25], [0.0, 0.0]])
    plane = so.curvature.LossSlice(steps[:, None] ** 2 + 3 * steps[None] ** 4, steps)
    ax = plotting.loss_slice(plane, path=[[1.0, 0.5], [0.0, 0.0]], names=("u", "v"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("u", "v")
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[1.0, 0.5], [0.0, 0.0]])


def test_critical_points_and_steps_are_drawn_where_they_are():
    ax = plotting.minimum_ratio({"saddles": ([2.0, 1.0], [0.5, 0.8]), "minima": ([0.5], [1.0])})
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[2.0, 0.5], [1.0, 0.8]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.5, 1.0]])
    ax = plotting.steps([1.0, 0.0, 0.5], [1e-3, 1e-2, np.nan], name="radius")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 1.0], [2, 0.5]])
    twin = next(other for other in ax.figure.axes if other is not ax)
    assert twin.get_ylabel() == "radius"
    np.testing.assert_allclose(twin.lines[0].get_xydata(), [[0, 1e-3], [1, 1e-2]])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plotting.steps([1.0, 2.0], [1.0]), "damping must have the shape"),
        (lambda: plotting.minimum_ratio({"a": ([1.0], [1.0, 2.0])}), "'a' must be a pair"),
        (
            lambda: plotting.loss_slice(so.curvature.LossSlice(np.ones(3), np.arange(3.0)), path=[[1.0, 2.0]]),
            r"path must have shape \(points, 1\)",
        ),
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


def test_flat_slices_even_grids_and_empty_lists():
    two = [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
    plotting.loss_slice(so.curvature.loss_slice(lambda x: 0.0 * jnp.sum(x) + 3.0, jnp.zeros(2), two, points=5))
    axes = plotting.loss_slice(so.curvature.loss_slice(lambda x: jnp.sum(x**2), jnp.zeros(2), two[:1], points=4))
    assert len(axes.lines) == 1  # no cross where no value is known
    with pytest.raises(ValueError, match="'none' must hold at least one run"):
        plotting.convergence({"none": []})
    plotting.convergence({"done": [([1, 2], [0.0, 0.0])] * 2})
