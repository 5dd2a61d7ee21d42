"""Programs written for other libraries, before and after: the same answers."""

import importlib.util
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "migration"

pytestmark = pytest.mark.x64


def outcome(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jaxopt announces its end
        spec.loader.exec_module(module)
        found = jax.tree.leaves(module.main())
    sys.modules.pop("data", None)
    return [np.asarray(leaf) for leaf in found]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("library", "tolerance"),
    [("optax", 1e-6), pytest.param("jaxopt", 1e-2, marks=SLOW), pytest.param("scipy", 1e-3, marks=SLOW)],
)
def test_a_program_gives_the_same_numbers_before_and_after(library, tolerance, monkeypatch, capsys):
    pytest.importorskip(library)
    before, after = (outcome(f"{library}_{when}", monkeypatch) for when in ("before", "after"))
    assert len(before) == len(after) >= 1
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, atol=tolerance)
    losses = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert len(losses) >= 2
    np.testing.assert_allclose(np.array(losses, float), float(losses[0]), atol=1e-5)
