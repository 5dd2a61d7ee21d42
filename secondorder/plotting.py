"""Pictures of runs and of curvature: convergence, paths, spectra, slices, critical points, step lengths.

Needs matplotlib, the extra `plot`. Nothing else in the package imports this module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 30  # contour lines
GAP = 1e-4  # of the peak of a density: below it, no eigenvalue is near
GRID = 201  # points along each side of a contour plot


def convergence(
    runs: Mapping[str, Any], *, best: float = 0.0, xlabel: str = "evaluations of the gradient", ax: Any = None
) -> Any:
    """Draw the loss, on a logarithmic scale, against the evaluations that it took.

    Args:
      runs: Name -> run. A run is a `Result` of `minimize(..., history=True)`, or a pair (evaluations, losses) of
        sequences of equal length. A list of runs is drawn as their median and a band from the least to the greatest
        tenth (10 % to 90 % quantiles); a run that has ended keeps its last loss.
      best: Subtracted from every loss [f]; the known minimum shows the order of convergence. Default 0.
      xlabel: Label of the horizontal axis.
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes. Losses that are not above `best` cannot be shown on a logarithmic scale and are left out.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if a run has no history, or is not a pair of sequences of equal length, or for a list without runs.

    Example:
      >>> from secondorder import plotting
      >>> ax = plotting.convergence({"halving": ([1, 2, 3], [1.0, 0.5, 0.25])})
      >>> ax.get_yscale()
      'log'
    """
    axes = _axes("convergence", ax)
    for name, run in runs.items():
        if isinstance(run, list):
            if not run:
                raise ValueError(f"convergence: the list of runs {name!r} must hold at least one run, got none.")
            evaluations, low, losses, high = _band(name, run)
        else:
            evaluations, losses = _series(name, run)
            low = high = None
        gap = losses - best
        shown = np.isfinite(gap) & (gap > 0)
        (line,) = axes.plot(evaluations[shown], gap[shown], label=name, linewidth=1.6)
        if low is not None and high is not None:
            floor = np.maximum(low[shown] - best, gap[shown].min(initial=np.inf) / 10)
            axes.fill_between(
                evaluations[shown], floor, high[shown] - best, color=line.get_color(), alpha=0.2, linewidth=0
            )
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("loss" if best == 0 else f"loss - {best:g}")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    return axes


def paths(
    fun: Callable[[jax.Array], jax.Array],
    runs: Mapping[str, Any],
    *,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    ax: Any = None,
) -> Any:
    """Draw the points that optimizers went through, over the contours of a function of two variables.

    Args:
      fun: Loss; fun(x) is a scalar for x of shape (2,). It must be traceable by JAX.
      runs: Name -> points, shape (steps, 2). The first point is marked by a circle, the last by a cross.
      xlim: Range of x[0]. Default: the points and a margin of a quarter around them.
      ylim: Range of x[1], likewise.
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes. Contour levels are quantiles of the values shown, so that they crowd neither valleys nor walls.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if there is no run, or its points have another shape.

    Example:
      >>> from secondorder import plotting
      >>> ax = plotting.paths(lambda x: x[0] ** 2 + x[1] ** 2, {"straight": [[1.0, 1.0], [0.0, 0.0]]})
      >>> ax.get_xlabel()
      '$x_0$'
    """
    if not runs:
        raise ValueError("paths: runs must hold at least one path, got none; pass {name: points}.")
    tracks = {name: _points(name, points) for name, points in runs.items()}
    axes = _axes("paths", ax)
    together = np.concatenate(list(tracks.values()))
    x = np.linspace(*(xlim or _range(together[:, 0])), GRID)
    y = np.linspace(*(ylim or _range(together[:, 1])), GRID)
    grid = jnp.stack(jnp.meshgrid(jnp.asarray(x), jnp.asarray(y)), axis=-1)
    values = np.asarray(jax.vmap(jax.vmap(fun))(grid))
    levels = np.unique(np.nanquantile(values[np.isfinite(values)], np.linspace(0, 1, LEVELS)))
    axes.contour(x, y, values, levels=levels, cmap="Greys_r", linewidths=0.6, alpha=0.8)
    widths = np.linspace(4.5, 1.5, len(tracks)) if len(tracks) > 1 else [1.5]  # paths that coincide stay visible
    for (name, track), width in zip(tracks.items(), widths, strict=True):
        (line,) = axes.plot(track[:, 0], track[:, 1], ".-", label=name, linewidth=width, markersize=2.5 * width + 2)
        axes.plot(*track[0], "o", color="black", markersize=9, fillstyle="none")
        axes.plot(*track[-1], "X", color=line.get_color(), markersize=2 * width + 7, markeredgecolor="white")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    axes.set_xlabel("$x_0$")
    axes.set_ylabel("$x_1$")
    axes.legend(frameon=True, loc="best")
    return axes


def spectral_density(density: Any, *, width: float | None = None, num: int | None = None, ax: Any = None) -> Any:
    """Draw the density of the eigenvalues on a logarithmic scale, with the outliers marked.

    Args:
      density: What `curvature.spectral_density` returned.
      width: Standard deviation of the Gaussians that widen the nodes [f/x²]. Default: 1 % of their range.
      num: Number of parameters n; the curve then counts eigenvalues per unit, and its floor is a hundredth of one
        eigenvalue. Default: shares.
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes. Triangles mark the outliers: nodes that a gap, where the curve falls below 1e-4 of its peak, separates
      from the median eigenvalue.

    Raises:
      ImportError: if matplotlib is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature, plotting
      >>> found = curvature.spectral_density(curvature.hvp(lambda x: jnp.sum(x**4)), jnp.arange(9.0))
      >>> plotting.spectral_density(found).get_yscale()
      'log'
    """
    axes = _axes("spectral_density", ax)
    nodes, weights = np.asarray(density.nodes, float).ravel(), np.asarray(density.weights, float).ravel()
    spread = float(np.ptp(nodes)) or 1.0
    sigma = width or 0.01 * spread
    grid = np.linspace(nodes.min() - 4 * sigma, nodes.max() + 4 * sigma, 1200)
    curve = np.asarray(density.density(jnp.asarray(grid), sigma)) * (num or 1)
    peak = 1 / (sigma * (2 * np.pi) ** 0.5)  # height of one eigenvalue, for one parameter
    floor = 1e-2 * peak if num else 1e-6 * peak
    axes.fill_between(grid, floor, np.maximum(curve, floor), alpha=0.35, linewidth=0)
    axes.plot(grid, np.maximum(curve, floor), linewidth=1.2)
    low, high = _bulk(grid, curve, float(nodes[np.argsort(nodes)][np.searchsorted(_cumulated(nodes, weights), 0.5)]))
    outside = (weights > 1e-7) & ((nodes < low) | (nodes > high))
    if outside.any():
        height = np.interp(nodes[outside], grid, curve)
        axes.plot(nodes[outside], 1.6 * np.maximum(height, floor), "v", color="C3", markersize=5, label="outliers")
        axes.legend(frameon=False)
    axes.axvline(0.0, color="black", linewidth=0.8, alpha=0.6)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("eigenvalues per unit" if num else "density")
    axes.grid(visible=True, which="major", alpha=0.3)
    return axes


def loss_slice(found: Any, *, path: Any = None, names: tuple[str, ...] = (), ax: Any = None) -> Any:
    """Draw a slice of the loss: a curve over a line, or contours over a plane, with the path of a run projected on it.

    Args:
      found: What `curvature.loss_slice` returned.
      path: Coordinates of a run in the slice, shape (points, 2) or (points, 1), from `curvature.project`. Default:
        none.
      names: Labels of the directions. Default: "first direction", "second direction".
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes. A cross marks the middle (on a line, where it is one of the points); the path begins at a circle. On a
      line, the path is drawn on the curve, at the height of the slice and not of the run.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if `path` has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature, plotting
      >>> found = curvature.loss_slice(lambda x: jnp.sum(x**2), jnp.zeros(2), [jnp.array([1.0, 0.0])])
      >>> plotting.loss_slice(found).get_ylabel()
      'loss'
    """
    values, steps = np.asarray(found.values, float), np.asarray(found.coordinates, float)
    first, second = (*names, *("first direction", "second direction")[len(names) :])[:2]
    track = None if path is None else np.asarray(path, float)
    if track is not None and (track.ndim != 2 or track.shape[1] != values.ndim):
        raise ValueError(
            f"loss_slice: path must have shape (points, {values.ndim}), got {track.shape}; pass curvature.project(...)."
        )
    axes = _axes("loss_slice", ax)
    axes.set_xlabel(first)
    if values.ndim == 1:
        axes.plot(steps, values, linewidth=1.6)
        if np.any(steps == 0):  # an even number of points has none in the middle
            axes.plot(0, values[steps == 0][0], "x", color="black", markersize=9)
        if track is not None:
            height = np.interp(track[:, 0], steps, values)
            axes.plot(track[:, 0], height, ".-", color="C1", markersize=5, linewidth=1.0, label="run, projected")
            axes.legend(frameon=False)
        axes.set_ylabel("loss")
        axes.grid(visible=True, which="major", alpha=0.3)
        return axes
    finite = values[np.isfinite(values)] if np.any(np.isfinite(values)) else np.zeros(1)
    levels = np.unique(np.nanquantile(finite, np.linspace(0, 1, 24)))
    if levels.size == 1:  # a plane
        levels = levels[0] + max(abs(levels[0]), 1.0) * np.array([-1e-3, 1e-3])
    drawn = axes.contourf(steps, steps, values.T, levels=levels, cmap="viridis_r", alpha=0.9)
    axes.figure.colorbar(drawn, ax=axes, label="loss", format="%.3g")
    axes.plot(0, 0, "x", color="black", markersize=9)
    if track is not None:
        axes.plot(*track.T, ".-", color="C3", markersize=5, linewidth=1.2, label="run, projected")
        axes.plot(*track[0], "o", color="black", markersize=9, fillstyle="none")
        axes.legend(frameon=True, loc="best")
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(steps[0], steps[-1])
    axes.set_ylabel(second)
    return axes


def minimum_ratio(points: Mapping[str, Any], *, ax: Any = None) -> Any:
    """Draw the loss of critical points against their minimum ratio: saddles high up, minima low down.

    Args:
      points: Name -> pair (losses, minimum ratios) of sequences of equal length, for instance one per kind of point or
        one per moment of the training. A name with "minim" in it is drawn by stars.
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if a pair has sequences of different lengths.

    Example:
      >>> from secondorder import plotting
      >>> plotting.minimum_ratio({"saddles": ([2.3, 0.7], [0.6, 0.9])}).get_xlabel()
      'loss at the critical point'

    References: Pascanu et al. (2014), "On the saddle point problem for non-convex optimization", Figure 1.
    """
    axes = _axes("minimum_ratio", ax)
    markers = "osD^vPX<"
    for i, (name, (losses, ratios)) in enumerate(points.items()):
        losses, ratios = np.asarray(losses, float), np.asarray(ratios, float)
        if losses.ndim != 1 or losses.shape != ratios.shape:
            raise ValueError(
                f"minimum_ratio: {name!r} must be a pair of sequences of equal length, got shapes {losses.shape} and "
                f"{ratios.shape}."
            )
        marker = "*" if "minim" in name.lower() else markers[i % len(markers)]
        size = 13 if marker == "*" else 8
        axes.plot(losses, ratios, marker, label=name, markersize=size, alpha=0.75, markeredgecolor="white")
    axes.axhline(1.0, color="black", linewidth=0.8, alpha=0.6)
    axes.set_xlabel("loss at the critical point")
    axes.set_ylabel("minimum ratio (share of positive eigenvalues)")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    return axes


def steps(step_length: Any, damping: Any = None, *, steps: Any = None, name: str = "damping", ax: Any = None) -> Any:
    """Draw step length, and damping or radius, over the steps of a run.

    Args:
      step_length: Sequence, one number per step; zeros and NaN are left out.
      damping: Sequence of the same length, on an axis of its own. Default: none.
      steps: Number of each step. Default: 0, 1, 2, ...
      name: Label of the damping; "radius" for a trust region.
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes of the step length; those of the damping share its horizontal axis.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if the sequences differ in length.

    Example:
      >>> from secondorder import plotting
      >>> plotting.steps([1.0, 0.5, 1.0], [1e-3, 1e-2, 1e-3]).get_ylabel()
      'step length'
    """
    lengths = np.asarray(step_length, float)
    at = np.arange(lengths.size) if steps is None else np.asarray(steps, float)
    shifts = None if damping is None else np.asarray(damping, float)
    for what, series in (("steps", at), ("damping", shifts)):
        if series is not None and series.shape != lengths.shape:
            raise ValueError(f"steps: {what} must have the shape of step_length, {lengths.shape}, got {series.shape}.")
    axes = _axes("steps", ax)

    def draw(axes: Any, series: np.ndarray, color: str, label: str, mark: str) -> None:
        shown = np.isfinite(series) & (series > 0)
        axes.plot(at[shown], series[shown], mark, color=color, markersize=4, linewidth=1.2)
        axes.set_yscale("log")
        axes.set_ylabel(label, color=color)
        axes.tick_params(axis="y", which="both", labelcolor=color)

    draw(axes, lengths, "C0", "step length", ".-")
    axes.set_xlabel("step")
    axes.grid(visible=True, which="major", alpha=0.3)
    if shifts is not None:
        draw(axes.twinx(), shifts, "C1", name, "s--")
    return axes


def _axes(who: str, ax: Any) -> Any:
    """Return the axes to draw on."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(f"{who}: pictures need matplotlib; install it with: pip install matplotlib") from None
    return pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")[1]


def _series(name: str, run: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return evaluations and losses of a run, shapes (entries,)."""
    if hasattr(run, "history"):
        if run.history is None:
            raise ValueError(f"convergence: run {name!r} has no history; call minimize(..., history=True).")
        evaluations, losses = np.asarray(run.history.evaluations), np.asarray(run.history.value)
        written = evaluations > 0
        return evaluations[written], losses[written]
    evaluations, losses = (np.asarray(series, float) for series in run)
    if evaluations.ndim != 1 or evaluations.shape != losses.shape:
        raise ValueError(
            f"convergence: run {name!r} must be a Result or a pair of sequences of equal length, got shapes "
            f"{evaluations.shape} and {losses.shape}."
        )
    return evaluations, losses


def _band(name: str, runs: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return evaluations, and the 10 %, 50 % and 90 % quantiles of the losses of several runs there."""
    series = [_series(name, run) for run in runs]
    grid = np.unique(np.concatenate([evaluations for evaluations, _ in series]))
    grid = grid[grid >= max(evaluations.min() for evaluations, _ in series)]  # from where all runs have a loss

    def at(evaluations: np.ndarray, losses: np.ndarray) -> np.ndarray:  # the last loss known, as in a run that goes on
        return losses[np.searchsorted(evaluations, grid, side="right") - 1]

    low, middle, high = np.nanquantile([at(*one) for one in series], [0.1, 0.5, 0.9], axis=0)
    return grid, low, middle, high


def _cumulated(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of the weight up to each node, in ascending order of the nodes."""
    return np.cumsum(weights[np.argsort(nodes)]) / weights.sum() * (1 - 1e-6)


def _bulk(grid: np.ndarray, curve: np.ndarray, middle: float) -> tuple[float, float]:
    """Return the interval around `middle` in which the curve stays above GAP times its peak."""
    gaps = grid[curve < GAP * curve.max()]
    low, high = gaps[gaps < middle], gaps[gaps > middle]
    return float(low.max(initial=grid[0])), float(high.min(initial=grid[-1]))


def _points(name: str, points: Any) -> np.ndarray:
    """Return the points of a path, shape (steps, 2)."""
    track = np.asarray(points, float)
    if track.ndim != 2 or track.shape[1] != 2 or track.shape[0] == 0:
        raise ValueError(
            f"paths: run {name!r} must have shape (steps, 2), got {track.shape}; stack the points as rows."
        )
    return track


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the range of the finite values with a margin."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    margin = 0.25 * (high - low) or 1.0
    return low - margin, high + margin
