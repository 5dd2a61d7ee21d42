"""Pictures of runs: the loss against its evaluations, and paths over the contours of a function of two variables.

Needs matplotlib, the extra `plot`. Nothing else in the package imports this module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 30  # contour lines
GRID = 201  # points along each side of a contour plot


def convergence(
    runs: Mapping[str, Any], *, best: float = 0.0, xlabel: str = "evaluations of the gradient", ax: Any = None
) -> Any:
    """Draw the loss, on a logarithmic scale, against the evaluations that it took.

    Args:
      runs: Name -> run. A run is a `Result` of `minimize(..., history=True)`, or a pair (evaluations, losses) of
        sequences of equal length.
      best: Subtracted from every loss [f]; the known minimum shows the order of convergence. Default 0.
      xlabel: Label of the horizontal axis.
      ax: Matplotlib axes to draw on. Default: a new figure.

    Returns:
      The axes. Losses that are not above `best` cannot be shown on a logarithmic scale and are left out.

    Raises:
      ImportError: if matplotlib is missing.
      ValueError: if a run has no history, or is not a pair of sequences of equal length.

    Example:
      >>> from secondorder import plotting
      >>> ax = plotting.convergence({"halving": ([1, 2, 3], [1.0, 0.5, 0.25])})
      >>> ax.get_yscale()
      'log'
    """
    axes = _axes("convergence", ax)
    for name, run in runs.items():
        evaluations, losses = _series(name, run)
        gap = losses - best
        shown = np.isfinite(gap) & (gap > 0)
        axes.plot(evaluations[shown], gap[shown], label=name, linewidth=1.6)
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
