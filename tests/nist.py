"""The NIST Statistical Reference Datasets for nonlinear regression, for tests, examples and benchmarks.

Source: NIST/ITL StRD, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml, a work of the US Government in the
public domain. `data/nist_strd.json` was parsed from the .dat files that NIST distributes: data, models, both starts,
certified parameters, standard deviations and residual sums of squares, eleven digits each.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

FILE = pathlib.Path(__file__).parent / "data" / "nist_strd.json"
FUNCTIONS = {"exp": jnp.exp, "cos": jnp.cos, "sin": jnp.sin, "log": jnp.log, "arctan": jnp.arctan, "pi": jnp.pi}
CERTIFIED = 11.0  # digits


class Dataset(NamedTuple):
    """One regression problem with its certified answer."""

    name: str
    difficulty: str
    model: Callable[[Any, Any], Any]  # model(b, x)
    x: np.ndarray
    y: np.ndarray
    starts: tuple[np.ndarray, np.ndarray]
    parameters: np.ndarray
    deviations: np.ndarray
    residual_sum_of_squares: float


def load() -> dict[str, Dataset]:
    """Return the 27 problems by name."""
    return {entry["name"]: _dataset(entry) for entry in json.loads(FILE.read_text())["datasets"]}


def digits(estimate: Any, certified: Any) -> float:
    """Return the log relative error of the worst entry, at most the 11 digits that are certified."""
    estimate, certified = np.asarray(estimate, float), np.asarray(certified, float)
    error = np.abs(estimate - certified) / np.abs(certified)
    error = np.where(np.isfinite(error), error, np.inf)
    return float(np.min(np.minimum(-np.log10(np.maximum(error, 1e-17)), CERTIFIED)))


def _dataset(entry: dict[str, Any]) -> Dataset:
    y = np.array(entry["y"])
    return Dataset(
        name=entry["name"],
        difficulty=entry["difficulty"],
        model=eval("lambda b, x: " + entry["expr"], dict(FUNCTIONS)),
        x=np.array(entry["x"]),
        y=np.log(y) if entry["response"] == "log(y)" else y,
        starts=(np.array(entry["start1"], float), np.array(entry["start2"], float)),
        parameters=np.array(entry["certified"]),
        deviations=np.array(entry["certified_sd"]),
        residual_sum_of_squares=float(entry["certified_rss"]),
    )
