"""Does saddle-free Newton end lower than SGD and damped Newton, and at no saddle? The table of Dauphin et al. (2014).

A network with one hidden layer of tanh on the digits, pooled to 4 by 4 pixels as they pool their images: training error
and most negative eigenvalue at the end, against the number of hidden units. Rivals are tuned: the row is the best of a
grid, by training loss. Minibatches are drawn with replacement from a fixed key, equally many for both methods that take
them, with rates that fall to zero by half a cosine. One start per size. Ten minutes on one core.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import secondorder as so
from benchmarks.report import Report, Table
from secondorder import curvature

RATES, MOMENTA, DAMPINGS = (0.03, 0.1, 0.3, 1.0), (0.0, 0.9), (1e-3, 1e-2, 1e-1)
NEWTON_RATES = (0.3, 1.0)
NOISY_DAMPINGS = (3e-2, 1e-1, 3e-1)  # for minibatches
BATCH, PART = 200, 100  # samples per gradient, and of them for the curvature
Loss = Callable[..., jax.Array]


def run(repeats: int, quick: bool, dtype: str = "float64") -> list[Report]:
    """Return the table; with `quick`, of the smallest network and a few steps."""
    del repeats
    jax.config.update("jax_enable_x64", dtype == "float64")
    images, labels = load_digits(return_X_y=True)
    pooled = images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    data = (jnp.asarray(pooled / 16, dtype), jnp.asarray(labels))
    units, epochs, steps = ((5,), 300, 60) if quick else ((5, 10), 1000, 150)
    raw = [row for hidden in units for row in _rows(hidden, data, epochs, steps)]
    rows = []
    for row in raw:
        print(row, flush=True)
        rows.append([row["method"], row["hidden"], row["error"], row["loss"], row["least"], row["choice"]])
    columns = ["method", "hidden units", "training error, %", "loss", "most negative eigenvalue", "best of the grid"]
    note = f"Minibatches: {epochs} epochs. Full batch: {steps} updates. {len(labels)} samples."
    return [
        Report("saddle", Table("Ends on the digits, as in Dauphin et al. (2014), Figure 1", columns, rows, note), raw)
    ]


def _rows(hidden: int, data: Any, epochs: int, steps: int) -> Iterator[dict[str, Any]]:
    start = _start(hidden, data)

    def row(method: str, choice: str, params: Any) -> dict[str, Any]:
        least = float(jnp.linalg.eigvalsh(_hessian(params, data))[0])
        logits = _model(params, data[0])
        error = 100 * float(jnp.mean(jnp.argmax(logits, axis=1) != data[1]))
        return {
            "method": method,
            "hidden": hidden,
            "error": error,
            "loss": float(_loss(params, *data)),
            "least": least,
            "choice": choice,
        }

    def best(method: str, ends: dict[str, Any]) -> dict[str, Any]:
        losses = {choice: float(_loss(params, *data)) for choice, params in ends.items()}
        choice = min(losses, key=lambda c: losses[c] if np.isfinite(losses[c]) else np.inf)
        return row(method, choice, ends[choice])

    turns = epochs * len(data[1]) // BATCH
    falling = lambda rate: optax.cosine_decay_schedule(rate, turns)
    sgd = {}
    for rate, momentum in itertools.product(RATES, MOMENTA):
        ends = _batches(optax.sgd(falling(rate), momentum), start, data, turns, second=False)
        sgd[f"rate {rate:g}, momentum {momentum:g}"] = ends
    yield best("SGD, minibatch", sgd)
    newton = {}
    for damping, rate in itertools.product(DAMPINGS, NEWTON_RATES):
        optimizer = optax.chain(so.scale_by_newton(damping), optax.scale_by_learning_rate(rate))
        newton[f"damping {damping:g}, rate {rate:g}"] = _full(optimizer, start, data, steps)
    yield best("damped Newton, full batch", newton)
    for name, optimizer in (
        ("saddle_free_newton, full batch", so.saddle_free_newton()),
        ("saddle_free_newton(rank=40), full batch", so.saddle_free_newton(rank=40)),
    ):
        result = so.minimize(_loss, start, optimizer, args=data, max_evaluations=steps, gtol=1e-8)
        yield row(name, "-", result.params)
    small = {}
    for damping, rate in itertools.product(NOISY_DAMPINGS, NEWTON_RATES):
        direction = so.scale_by_saddle_free_newton(damping, rank=20)
        optimizer = optax.chain(direction, optax.scale_by_learning_rate(falling(rate)))
        small[f"damping {damping:g}, rate {rate:g}"] = _batches(optimizer, start, data, turns, second=True)
    yield best("scale_by_saddle_free_newton(rank=20), minibatch", small)


def _start(hidden: int, data: Any) -> dict[str, jax.Array]:
    first, second = jax.random.split(jax.random.key(0))
    n, dtype = data[0].shape[1], data[0].dtype
    return {
        "W1": jax.random.normal(first, (n, hidden), dtype) / n**0.5,
        "b1": jnp.zeros(hidden, dtype),
        "W2": jax.random.normal(second, (hidden, 10), dtype) / hidden**0.5,
        "b2": jnp.zeros(10, dtype),
    }


def _model(params: Any, inputs: jax.Array) -> jax.Array:
    return jnp.tanh(inputs @ params["W1"] + params["b1"][None]) @ params["W2"] + params["b2"][None]


def _loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(_model(params, inputs), labels))


@jax.jit
def _hessian(params: Any, data: Any) -> jax.Array:
    return curvature.hessian(_loss, params, *data)


def _full(optimizer: Any, start: Any, data: Any, steps: int) -> Any:
    """Return the end of `steps` updates on all samples."""

    def turn(carry: Any, _: None) -> Any:
        params, state = carry
        grad = jax.grad(_loss)(params, *data)
        move, state = optimizer.update(grad, state, params, hvp_fn=curvature.hvp(_loss, *data))
        return (optax.apply_updates(params, move), state), None

    run = jax.jit(lambda x: jax.lax.scan(turn, (x, optimizer.init(x)), None, steps)[0][0])
    return run(start)


def _batches(optimizer: Any, start: Any, data: Any, turns: int, second: bool) -> Any:
    """Return the end of `turns` updates on minibatches, the curvature from a part of each."""
    optimizer = optax.with_extra_args_support(optimizer)

    def turn(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        index = jax.random.randint(key, (BATCH,), 0, data[1].size)
        batch = tuple(x[index] for x in data)
        grad = jax.grad(_loss)(params, *batch)
        extra = {"hvp_fn": curvature.hvp(_loss, *(x[:PART] for x in batch))} if second else {}
        move, state = optimizer.update(grad, state, params, **extra)
        return (optax.apply_updates(params, move), state), None

    keys = jax.random.split(jax.random.key(1), turns)
    run = jax.jit(lambda x: jax.lax.scan(turn, (x, optimizer.init(x)), keys)[0][0])
    return run(start)
