"""Interleaved timing: what is compared is measured in turns, so that a busy machine slows all of it alike."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

try:
    from tqdm.auto import tqdm
except ImportError:  # the bar is a comfort

    def tqdm(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        """Return the items as they are."""
        return items


class Task(NamedTuple):
    """Something to time: `run(prepare())`, without the preparation, divided by `turns`."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    turns: int = 1


def interleaved(tasks: dict[str, Task], repeats: int, label: str) -> dict[str, list[float]]:
    """Return seconds per turn, `repeats` samples of every task, taken in rounds after one warm-up each."""
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        _once(task)
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for name, task in tasks.items():
            samples[name].append(_once(task))
    return samples


def ratio(samples: dict[str, list[float]], name: str, reference: str, minus: str | None = None) -> float:
    """Return the median over rounds of (name - minus) / reference."""
    less = samples[minus] if minus is not None else [0.0] * len(samples[name])
    rounds = zip(samples[name], less, samples[reference], strict=True)
    return statistics.median((a - b) / c for a, b, c in rounds)


def compile_seconds(function: Callable[..., Any], *args: Any) -> float:
    """Return the CPU seconds from tracing to the program, with JAX's caches emptied before."""
    jax.clear_caches()
    begin = time.process_time()  # a busy machine stretches wall time only
    jax.jit(function).lower(*args).compile()
    return time.process_time() - begin


def _once(task: Task) -> float:
    ready = jax.block_until_ready(task.prepare())
    begin = time.perf_counter()
    jax.block_until_ready(task.run(ready))
    return (time.perf_counter() - begin) / task.turns
