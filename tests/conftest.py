"""Precision: every test runs in JAX's default float32 unless it asks for float64, and both run in one process."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def float64(enabled: bool = True) -> Iterator[None]:
    """Switch 64-bit types on, or off, inside the context; what was compiled in the other precision stays apart."""
    if hasattr(jax, "enable_x64"):
        switch = jax.enable_x64(enabled)
    else:  # jax < 0.9
        from jax.experimental import enable_x64

        switch = enable_x64(enabled)
    with switch:
        yield


@pytest.fixture(autouse=True)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked `x64` in float64."""
    if request.node.get_closest_marker("x64") is None:
        yield
        return
    with float64():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where JAX finds no accelerator."""
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; JAX found none"))
