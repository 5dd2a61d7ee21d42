"""Least-squares solvers behind one call: ours, and those of other libraries.

Each is a function `fit(residual, x0, tolerance, max_evals) -> Fit`. Ours and optimistix's can be jitted and vmapped;
SciPy is driven from the host with jitted residuals and exact Jacobians. Residuals and Jacobians are counted by the
solvers themselves where they say, and from outside otherwise. Tolerance None is ours by default, 1e-15 for the others.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so

Residual = Callable[[jax.Array], jax.Array]
DENSE_ENTRIES = 20_000_000  # of a Jacobian; above, solvers that need it as a matrix are not started


class Fit(NamedTuple):
    """Where a run ended, and what it spent."""

    x: Any
    evaluations: Any  # residuals
    jacobians: Any  # dense ones, or linearizations
    products: Any = 0  # J v and Jᵀu, without a dense Jacobian
    claimed: Any = None  # whether the solver itself calls it a success
    standard_errors: Any = None
    value: Any = None


def solvers() -> dict[str, Callable[..., Fit]]:
    """Return the solvers by name, ours first; absent libraries are left out."""
    found: dict[str, Callable[..., Fit]] = {"least_squares": _ours}
    if importlib.util.find_spec("scipy"):
        found["scipy lm"] = functools.partial(_scipy, "lm")
        found["scipy trf"] = functools.partial(_scipy, "trf")
    if importlib.util.find_spec("optimistix"):
        found["optimistix LM"] = functools.partial(_optimistix, "LevenbergMarquardt")
        found["optimistix Dogleg"] = functools.partial(_optimistix, "Dogleg")
    return found


def check_size(m: int, n: int, name: str) -> None:
    """Raise if a solver would need a Jacobian that is too large to be a matrix."""
    if m * n > DENSE_ENTRIES and name not in ("least_squares", "scipy trf"):
        raise MemoryError(f"a dense Jacobian of {m} x {n}")


# ----------------------------------------------------------------------------------------------------------------------


def _ours(residual: Residual, x0: jax.Array, tolerance: float | None, max_evals: int) -> Fit:
    r = so.least_squares(residual, x0, gtol=tolerance, max_evaluations=max_evals, max_steps=max_evals)
    models = jnp.where(r.jacobians > 0, r.jacobians, r.steps + 1)
    return Fit(r.params, r.evaluations, models, r.jacobian_products, r.success, r.standard_errors, r.value)


def _optimistix(solver: str, residual: Residual, x0: jax.Array, tolerance: float | None, max_evals: int) -> Fit:
    import equinox
    import optimistix

    tol = 1e-15 if tolerance is None else tolerance
    made = getattr(optimistix, solver)(rtol=tol, atol=tol)
    out = optimistix.least_squares(lambda x, _: residual(x), made, x0, max_steps=max_evals, throw=False)
    arrays = equinox.filter(out.stats, equinox.is_array)
    # One residual per step, and it says how many steps were accepted: at each the linearization is made anew.
    return Fit(
        out.value,
        arrays["num_steps"],
        out.state.num_accepted_steps,
        claimed=out.result == optimistix.RESULTS.successful,
    )


def _scipy(method: str, residual: Residual, x0: jax.Array, tolerance: float | None, max_evals: int) -> Fit:
    import scipy.optimize
    import scipy.sparse.linalg

    functions = compiled(residual)
    spent = {"residuals": 0}

    def fun(x: np.ndarray) -> np.ndarray:
        spent["residuals"] += 1
        r = np.asarray(functions["residual"](x))
        # MINPACK calls an infinite residual a success and trf raises: a wall is what both understand.
        return np.where(np.isfinite(r), r, 1e100) if spent["residuals"] > 1 else r

    m, n = jax.eval_shape(residual, x0).size, x0.size
    large = m * n > DENSE_ENTRIES

    def jac(x: np.ndarray) -> Any:
        if not large:
            return np.asarray(functions["jacobian"](x))
        push, pull = functions["push"], functions["pull"]
        return scipy.sparse.linalg.LinearOperator(
            (m, n), lambda v: np.asarray(push(x, v.ravel())), lambda u: np.asarray(pull(x, u.ravel())), dtype=float
        )

    tol = 1e-15 if tolerance is None else tolerance
    r = scipy.optimize.least_squares(
        fun, np.asarray(x0, float), jac=jac, method=method, ftol=tol, xtol=tol, gtol=tol, max_nfev=max_evals
    )
    return Fit(r.x, spent["residuals"], r.njev, claimed=bool(r.success), value=r.cost)


@functools.cache
def compiled(residual: Residual) -> dict[str, Callable[..., Any]]:
    """Return jitted residual, Jacobian and products."""
    return {
        "residual": jax.jit(residual),
        "jacobian": jax.jit(lambda x: so.curvature.jacobian(residual, x, mode="forward")),
        "push": jax.jit(lambda x, v: jax.jvp(residual, (x,), (v,))[1]),
        "pull": jax.jit(lambda x, u: jax.vjp(residual, x)[1](u)[0]),
    }
