"""All 27 certified regressions of NIST from both starts, with default settings, against the certified digits."""

import jax.numpy as jnp
import nist
import numpy as np
import pytest

import secondorder as so
from secondorder import Status

DATASETS = nist.load()
FAST = ("BoxBOD", "Lanczos3", "MGH10")  # a plateau, a singular Jacobian, a long valley; the others are slow
ZERO_RESIDUAL = ("Lanczos1",)  # 1e-25: rounding of the data
STARTS = pytest.mark.parametrize("start", [0, 1], ids=["far", "near"])
NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in DATASETS]
)


@NAMES
@STARTS
@pytest.mark.x64
def test_eight_certified_digits_with_default_settings(name, start):
    data = DATASETS[name]
    fit = so.curve_fit(data.model, data.x, data.y, jnp.asarray(data.starts[start]))
    assert Status(int(fit.status)) == Status.CONVERGED
    assert nist.digits(fit.params, data.parameters) >= 8
    assert int(fit.rank) == data.parameters.size
    assert int(fit.degrees_of_freedom) == data.y.size - data.parameters.size
    assert int(fit.jacobians) == int(fit.steps) + 1
    if name not in ZERO_RESIDUAL:
        assert nist.digits(2 * fit.value, data.residual_sum_of_squares) >= 8
        assert nist.digits(fit.standard_errors, data.deviations) >= 8


def test_the_data_are_those_of_the_certificate():
    assert len(DATASETS) == 27
    for name, data in DATASETS.items():
        environment = {key: getattr(np, key) for key in ("exp", "cos", "sin", "log", "arctan", "pi")}
        model = type(data.model)(data.model.__code__, environment)
        residual = model(data.parameters, data.x) - data.y
        if name not in ZERO_RESIDUAL:
            assert nist.digits(np.sum(residual**2), data.residual_sum_of_squares) > 4, name  # 11 digits of the answer


def test_digits_are_those_of_the_worst_entry():
    assert nist.digits([1.0, 2.0002], [1.0, 2.0]) == pytest.approx(4.0)
    assert nist.digits([1.0, np.nan], [1.0, 2.0]) < -300
    assert nist.digits([3.0], [3.0]) == 11
