"""What a run tells on its way: a history, kept inside of the program; a progress bar and a callback, on the host."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from secondorder.globalization.stopping import Status
from secondorder.linalg import tree


class History(NamedTuple):
    """One entry per step, the start first; entries past the last step are NaN. Shape (max_steps + 1,) each."""

    value: jax.Array  # loss
    grad_norm: jax.Array  # max-norm of the gradient
    step_length: jax.Array  # alpha of the step that led here; 0 at the start
    step_norm: jax.Array  # its Euclidean norm
    evaluations: jax.Array  # values and gradients so far


class Step(NamedTuple):
    """What a callback sees after each step."""

    step: Any
    evaluations: Any
    value: Any
    grad_norm: Any
    params: tree.ArrayTree


def empty_history(max_steps: int | None, dtype: jax.typing.DTypeLike) -> History | None:
    """Return a history of NaN with room for this many steps; None where none is kept."""
    if max_steps is None:
        return None
    nothing = jnp.full(max_steps + 1, jnp.nan, dtype)
    return History(nothing, nothing, nothing, nothing, jnp.zeros(max_steps + 1, jnp.int32))


def write(history: History, index: jax.Array, entry: tuple[jax.Array, ...]) -> History:
    """Return the history with one more entry; an index out of range writes nothing."""
    rows = zip(history, entry, strict=True)
    return History(*(row.at[index].set(new.astype(row.dtype), mode="drop") for row, new in rows))


def tell(callback: Callable[[Step], Any], stepped: jax.Array, step: Step) -> jax.Array:
    """Return whether the callback asks to stop, from inside a program; lanes of a `vmap` have none."""

    @jax.custom_batching.custom_vmap
    def ask(stepped: jax.Array, step: Step) -> jax.Array:
        return io_callback(functools.partial(call, callback), jax.ShapeDtypeStruct((), jnp.bool_), stepped, step)

    @ask.def_vmap
    def _(*_: Any) -> Any:
        raise ValueError(
            f"minimize, least_squares: callback = {callback!r} cannot be called by the lanes of a vmap; "
            "record their steps with history=True, or leave it out."
        )

    return ask(stepped, step)


def call(callback: Callable[[Step], Any], stepped: Any, step: Step) -> np.ndarray:
    """Call back on the host if a step was taken; return whether to stop: where it returns True, of whatever library."""
    answer = callback(step) if stepped else False
    scalar = isinstance(answer, (bool, np.bool_, np.ndarray, jax.Array)) and np.shape(answer) == ()
    return np.asarray(scalar and np.asarray(answer).dtype == bool and bool(answer))


def require_tqdm() -> Any:
    """Return the class of bars, or say how to get it."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("minimize: progress=True needs tqdm; install it with: pip install tqdm") from None
    return tqdm


_BARS: dict[str, Any] = {}


def show(steps: Any, max_steps: Any, value: Any, grad_norm: Any, status: Any) -> None:
    """Update the bar of the run in flight; runs on the host."""
    if "bar" not in _BARS:
        _BARS["bar"] = require_tqdm()(total=int(max_steps), unit="step")
    bar = _BARS["bar"]
    bar.n = int(steps)
    bar.set_postfix_str(f"value {float(value):.4g}, gradient {float(grad_norm):.2g}")
    if int(status) != Status.RUNNING:
        _BARS.pop("bar").close()
