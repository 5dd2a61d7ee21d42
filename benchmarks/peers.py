"""Solvers behind one call: ours, and those of other libraries with the same stopping rule and the same budget.

Each JAX solver is a function `solve(fun, x0, gtol, max_evals) -> Outcome` that can be jitted and vmapped; each SciPy
solver is driven from the host with jitted functions. All stop when the max-norm of the gradient is at most `gtol`.
Where a library tests something else, its own test is switched off and its public `update` or `step` is put in a loop
that tests the gradient; its line searches and defaults are left alone.

Every solver counts its own evaluations; `batched` counts them from outside as well.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import secondorder as so

Fun = Callable[[jax.Array], jax.Array]


class Outcome(NamedTuple):
    """Where a run ended, and what it spent."""

    x: Any
    evaluations: Any  # values with gradients; a value alone counts as one
    hessian_products: Any = 0
    hessians: Any = 0
    claimed: Any = None  # whether the solver itself calls it a success
    status: Any = None  # in the solver's own terms


Solve = Callable[..., Outcome]  # (fun, x0, gtol, max_evals); ours take the options of `minimize` too


def jax_solvers() -> dict[str, Solve]:
    """Return the solvers that run inside `jit` and `vmap`, ours first; absent libraries are left out."""
    solvers: dict[str, Solve] = {
        "minimize": functools.partial(_ours, None),
        "newton": functools.partial(_ours, so.newton()),
        "bfgs": functools.partial(_ours, so.bfgs()),
        "lbfgs": functools.partial(_ours, so.lbfgs()),
        "newton_cg": functools.partial(_ours, so.newton_cg()),
        "optax.lbfgs": _optax_lbfgs,
        "jax.scipy BFGS": _jax_scipy,
    }
    if importlib.util.find_spec("jaxopt"):
        solvers["jaxopt BFGS"] = functools.partial(_jaxopt, "BFGS")
        solvers["jaxopt LBFGS"] = functools.partial(_jaxopt, "LBFGS")
    if importlib.util.find_spec("optimistix"):
        solvers["optimistix BFGS"] = functools.partial(_optimistix, "BFGS")
        solvers["optimistix LBFGS"] = functools.partial(_optimistix, "LBFGS")
    return solvers


def scipy_solvers() -> dict[str, Callable[..., Outcome]]:
    """Return SciPy's solvers, run from the host; empty without SciPy."""
    if not importlib.util.find_spec("scipy"):
        return {}
    methods = ("BFGS", "L-BFGS-B", "Newton-CG", "trust-exact", "trust-krylov", "trust-ncg")
    return {f"scipy {method}": functools.partial(_scipy, method) for method in methods}


def is_ours(name: str) -> bool:
    """Return whether a solver is one of this library's."""
    return name in ("minimize", "newton", "bfgs", "lbfgs", "newton_cg")


# ----------------------------------------------------------------------------------------------------------------------


def _ours(optimizer: Any, fun: Fun, x0: jax.Array, gtol: float, max_evals: int, **options: Any) -> Outcome:
    r = so.minimize(fun, x0, optimizer, gtol=gtol, max_steps=max_evals, max_evaluations=max_evals, **options)
    converged = r.status == so.Status.CONVERGED
    return Outcome(r.params, r.evaluations, r.hessian_products, r.hessians, converged, r.status)


def _optax_lbfgs(fun: Fun, x0: jax.Array, gtol: float, max_evals: int) -> Outcome:
    """The loop of optax's documentation: `value_and_grad_from_state` keeps the search's last gradient."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(fun)

    def turn(carry: Any) -> Any:
        x, state, spent, _ = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=fun)
        searched = optax.tree.get(state, "num_linesearch_steps")
        grad = optax.tree.get(state, "grad")
        return x + updates, state, spent + jnp.asarray(searched, jnp.int32), jnp.max(jnp.abs(grad))

    # The gradient of the start is computed once more here, for the test alone, and counted once.
    norm = jnp.max(jnp.abs(jax.grad(fun)(x0)))
    carry = (x0, optimizer.init(x0), jnp.int32(1), norm)
    x, _, spent, norm = jax.lax.while_loop(lambda c: (c[3] > gtol) & (c[2] < max_evals), turn, carry)
    return Outcome(x, spent, claimed=norm <= gtol)


def _jaxopt(solver: str, fun: Fun, x0: jax.Array, gtol: float, max_evals: int) -> Outcome:
    import jaxopt

    made = getattr(jaxopt, solver)(fun, tol=0.0)

    def running(carry: Any) -> jax.Array:
        _, state, last = carry
        stuck = last & (state.iter_num > 0)
        return (jnp.max(jnp.abs(state.grad)) > gtol) & (state.num_fun_eval < max_evals) & ~stuck

    def turn(carry: Any) -> Any:
        x, state, _ = carry
        new, state = made.update(x, state)
        return new, state, jnp.all(new == x)  # a search that fails leaves x where it is, for good

    x, state, _ = jax.lax.while_loop(running, turn, (x0, made.init_state(x0), jnp.array(False)))
    return Outcome(x, state.num_fun_eval, claimed=jnp.max(jnp.abs(state.grad)) <= gtol)


def _optimistix(solver: str, fun: Fun, x0: jax.Array, gtol: float, max_evals: int) -> Outcome:
    import equinox
    import optimistix

    class Stop(getattr(optimistix, solver)):  # type: ignore[misc]
        """The same solver with the gradient test in place of Cauchy's."""

        def terminate(self, fn: Any, y: Any, args: Any, options: Any, state: Any, tags: Any) -> Any:
            del fn, y, args, options, tags
            norm = jnp.max(jnp.abs(state.f_info.grad))
            return (norm <= gtol) & ~state.first_step, state.result

    made = Stop(rtol=0.0, atol=0.0)
    out = optimistix.minimise(lambda x, _: fun(x), made, x0, max_steps=max_evals, throw=False)
    arrays = equinox.filter(out.state, equinox.is_array)
    claimed = jnp.max(jnp.abs(arrays.f_info.grad)) <= gtol
    return Outcome(out.value, out.stats["num_steps"], claimed=claimed)


def _jax_scipy(fun: Fun, x0: jax.Array, gtol: float, max_evals: int) -> Outcome:
    from jax.scipy.optimize import minimize

    # It has no limit on evaluations that its search respects; iterations are limited instead.
    r = minimize(fun, x0, method="BFGS", options={"gtol": gtol, "maxiter": max_evals})
    return Outcome(r.x, r.nfev, claimed=r.success, status=r.status)


class OutOfBudget(Exception):
    """Raised inside SciPy's callbacks when the evaluations or the seconds are spent."""


def _scipy(method: str, fun: Fun, x0: jax.Array, gtol: float, max_evals: int, *, check: Callable[[], None]) -> Outcome:
    """Run SciPy from the host; `check` raises `OutOfBudget` when the time is over."""
    import scipy.optimize

    functions = compiled_functions(fun)
    spent = {"f": 0, "hvp": 0, "hessian": 0}
    best: dict[str, Any] = {"x": np.asarray(x0, np.float64), "f": np.inf}

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        if spent["f"] >= max_evals:
            raise OutOfBudget("evaluations")
        check()
        spent["f"] += 1
        f, g = functions["value_and_grad"](x.astype(x0.dtype))
        if f < best["f"]:
            best.update(x=x.copy(), f=float(f))
        return float(f), np.asarray(g, np.float64)

    def product(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        check()
        spent["hvp"] += 1
        return np.asarray(functions["product"](x.astype(x0.dtype), v.astype(x0.dtype)), np.float64)

    def hessian(x: np.ndarray) -> np.ndarray:
        check()
        spent["hessian"] += 1
        return np.asarray(functions["hessian"](x.astype(x0.dtype)), np.float64)

    options: dict[str, Any] = {"maxiter": max_evals}
    more: dict[str, Any] = {}
    if method == "L-BFGS-B":
        options |= {"gtol": gtol, "ftol": 0.0, "maxfun": max_evals}
    elif method == "Newton-CG":
        options |= {"xtol": 0.0}
        more["hessp"] = product
    else:
        options |= {"gtol": gtol}
    if method == "trust-exact":
        more["hess"] = hessian
    elif method in ("trust-krylov", "trust-ncg"):
        more["hessp"] = product

    def stop(intermediate_result: Any) -> None:
        # Newton-CG tests steps and the trust regions the Euclidean norm: all of them stop by the max-norm here.
        x = intermediate_result.x
        if np.max(np.abs(np.asarray(functions["value_and_grad"](x.astype(x0.dtype))[1]))) <= gtol:
            best.update(x=x.copy())
            raise StopIteration

    status, x = "", None
    try:
        r = scipy.optimize.minimize(
            value_and_grad, np.asarray(x0, np.float64), jac=True, method=method, options=options, callback=stop, **more
        )
        x, status = r.x, str(r.message)
    except OutOfBudget as reason:
        status = f"out of {reason}"
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        status = f"{type(error).__name__}: {error}"
    x = best["x"] if x is None or not np.all(np.isfinite(x)) else x
    grad = np.asarray(functions["value_and_grad"](x.astype(x0.dtype))[1])
    claimed = bool(np.max(np.abs(grad)) <= gtol)
    return Outcome(x, spent["f"], spent["hvp"], spent["hessian"], claimed, status)


@functools.cache
def compiled_functions(fun: Fun) -> dict[str, Callable[..., Any]]:
    """Return jitted value and gradient, Hessian-vector product and Hessian of `fun`."""
    return {
        "value_and_grad": jax.jit(jax.value_and_grad(fun)),
        "product": jax.jit(lambda x, v: jax.jvp(jax.grad(fun), (x,), (v,))[1]),
        "hessian": jax.jit(jax.hessian(fun)),
    }
