"""Drop-in for old code: `scipy.optimize.minimize` with the same call and the same fields in the result.

Names of SciPy's methods choose the optimizer of this library that does the same job. Functions that JAX can trace are
differentiated by JAX and run by `secondorder.minimize`, in one compiled program; others, NumPy code with a `jac` of
its own, are asked point by point. SciPy itself is not needed.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from secondorder import checks, report, secant, solve, transform
from secondorder.globalization import line_search, stopping, trust_region
from secondorder.globalization.stopping import Status
from secondorder.linalg import box, inverse_hessian
from secondorder.optimizers.bfgs import bfgs
from secondorder.optimizers.lbfgs import lbfgs
from secondorder.optimizers.lbfgsb import lbfgsb
from secondorder.optimizers.newton import newton
from secondorder.optimizers.newton_cg import newton_cg
from secondorder.optimizers.projected_newton import projected_newton

NEWTON_LIMIT = 1000  # parameters up to which SciPy's Newton-type names mean a dense Hessian here
METHODS = ("BFGS", "L-BFGS-B", "CG", "Newton-CG", "TNC", "SLSQP", "trust-constr", "dogleg", "trust-ncg", "trust-exact")
METHODS += ("trust-krylov",)
BOUNDED = ("L-BFGS-B", "TNC", "SLSQP", "trust-constr")
DERIVATIVE_FREE = ("Nelder-Mead", "Powell", "COBYLA", "COBYQA")
# Options of SciPy without a meaning here: step sizes of finite differences, which are not used, other stopping rules.
IGNORED = (
    *("ftol", "xtol", "xrtol", "eps", "finite_diff_rel_step", "maxls", "iprint", "return_all", "workers", "verbose"),
    *("max_trust_radius", "eta", "inexact", "maxCGit", "offset", "scale", "stepmx", "accuracy", "minfev", "rescale"),
    *("initial_tr_radius", "initial_constr_penalty", "initial_barrier_parameter", "initial_barrier_tolerance"),
    *("barrier_tol", "sparse_jacobian", "factorization_method", "adaptive", "bounds", "hess_inv0"),
)
USED = ("maxiter", "maxfun", "maxfev", "gtol", "norm", "maxcor", "c1", "c2", "initial_trust_radius", "disp")
CODES = {  # OptimizeResult.status, as far as SciPy's methods agree on it
    Status.CONVERGED: 0,
    Status.RANK_DEFICIENT: 0,
    Status.MAX_STEPS: 1,
    Status.MAX_EVALUATIONS: 1,
    Status.STALLED: 2,
    Status.NONFINITE_START: 3,
    Status.DIVERGED: 3,
    Status.NOT_SYMMETRIC: 3,
    Status.NOT_POSITIVE_DEFINITE: 3,
    Status.UNBOUNDED: 4,
    Status.CALLBACK: 99,
}


class OptimizeResult(dict[str, Any]):
    """What SciPy returns: a dictionary whose entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"OptimizeResult has no {name!r}; it has {', '.join(self)}.") from None

    __setattr__ = dict.__setitem__  # type: ignore[assignment]
    __delattr__ = dict.__delitem__  # type: ignore[assignment]

    def __dir__(self) -> list[str]:
        return list(self)

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:>{width}}: {value}" for name, value in self.items())


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: str | None = None,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    tol: float | None = None,
    callback: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
) -> OptimizeResult:
    """Minimize a function of a vector, with the call and the result of `scipy.optimize.minimize`.

    | SciPy's name | here |
    | --- | --- |
    | None | what `secondorder.minimize` takes for that many parameters; NumPy code: `bfgs()` |
    | BFGS, SLSQP (without constraints) | `bfgs()` |
    | L-BFGS-B, CG | `lbfgs()` |
    | trust-exact, trust-ncg, trust-krylov, dogleg, Newton-CG, TNC | `newton()`, above 1,000 parameters `newton_cg()` |
    | trust-constr (without constraints) | the same |
    | L-BFGS-B, SLSQP with bounds | `lbfgsb()` |
    | None, TNC, trust-constr with bounds | `projected_newton()` up to 200 or 1,000 parameters, else `lbfgsb()` |
    | Nelder-Mead, Powell, COBYLA, COBYQA | an error: they use no derivatives |

    Args:
      fun: fun(x, *args) -> float. Derivatives that are not given are JAX's, never finite differences.
      x0: Start, one-dimensional, n numbers; a number counts as one. The run is in JAX's default precision:
        float64 needs `jax.config.update("jax_enable_x64", True)`.
      args: Further arguments; one that is no tuple counts as one argument.
      method: One of SciPy's names, in any case.
      jac: jac(x, *args) -> gradient, shape (n,); or True: fun returns (value, gradient). Needed for functions that
        JAX cannot trace. None, False and the names of finite differences mean JAX's derivative.
      hess: hess(x, *args) -> matrix, shape (n, n). Default: JAX's.
      hessp: hessp(x, p, *args) -> the Hessian times p. Default: JAX's.
      bounds: A `scipy.optimize.Bounds`, or one (lower, upper) per entry, None where there is none. x0 is moved inside.
        For method None, L-BFGS-B, TNC, SLSQP and trust-constr, as in SciPy; see the table.
      constraints: Not supported.
      tol: The same as options["gtol"].
      callback: callback(xk), or callback(intermediate_result) with fields x and fun; StopIteration ends the run.
      options: maxiter (default 10,000), maxfun or maxfev, gtol (max-norm of the gradient, default 1e-5 in float64),
        maxcor (L-BFGS-B), c1 and c2 (line searches), initial_trust_radius (Newton types), disp. The other options of
        SciPy are accepted and ignored; see IGNORED.

    Returns:
      `OptimizeResult` with x, fun, jac, success, status, message, nit, nfev, njev, nhev; hess_inv after BFGS. Arrays
      are NumPy's. `status` is 0 (converged), 1 (a budget is spent), 2 (rounding level), 3 (not finite), 4 (unbounded),
      99 (callback).

    Raises:
      ValueError, TypeError: for what is not supported; each names the argument and the remedy.
      Exception: what `fun` raises, where it is NumPy code.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import compat
      >>> result = compat.minimize(lambda x, a: jnp.sum((x - a) ** 2), [0.0, 0.0], args=(3.0,), method="BFGS")
      >>> result.success, result.x.round(3).tolist()
      (True, [3.0, 3.0])
    """
    if not callable(fun):
        raise TypeError(f"minimize: fun must be a function, got {fun!r}.")
    args = args if isinstance(args, tuple) else (args,)
    if np.iscomplexobj(np.asarray(x0)):
        raise TypeError(
            f"minimize: x0 must be real, got {np.asarray(x0).dtype}; secondorder.minimize takes complex trees."
        )
    x = jnp.asarray(np.atleast_1d(np.asarray(x0)).astype(float))
    if x.ndim != 1:
        raise ValueError(
            f"minimize: x0 must be one-dimensional, got shape {x.shape}; secondorder.minimize takes any tree."
        )
    chosen = _options(options, tol)
    limits = _box(bounds, x)
    if limits is not None:
        x = jnp.clip(x, *limits)  # as SciPy does
    if constraints is not None and len(constraints if hasattr(constraints, "__len__") else (constraints,)) > 0:
        raise ValueError("minimize: constraints are not supported; use SciPy, or add a penalty to fun.")
    loss = _Loss(fun, *_derivatives(jac, hess, hessp))
    traceable, reason = _traceable(loss, x, args)
    if not traceable and loss.gradient is None and not loss.pair:
        given = "hess" if loss.hess is not None else "hessp"
        if (loss.hess or loss.hessp) and _traceable(_Loss(fun, False, None, None, None), x, args)[0]:
            raise TypeError(
                f"minimize: JAX cannot trace {given}, so that everything must be NumPy code: pass jac, too, or write "
                f"{given} with jax.numpy in place of numpy. The reason: {reason}"
            )
        raise TypeError(
            f"minimize: JAX cannot trace fun ({getattr(fun, '__name__', fun)!s}), so its gradient must be given: pass "
            f"jac, or write fun with jax.numpy in place of numpy. The reason: {reason}"
        )
    optimizer = _optimizer(method, x.size, chosen, traceable, bounded=limits is not None)
    watch = None if callback is None else _Watch(callback, _takes_result(callback))
    run = _compiled if traceable else _on_host
    result = run(loss, x, args, optimizer, limits, chosen, watch)
    if chosen.get("disp"):
        print(result)  # noqa: T201 (what SciPy's disp asks for)
    return result


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The function with the derivatives that were given with it; hashable, so that equal calls share a program."""

    fun: Callable[..., Any]
    pair: bool  # fun returns (value, gradient)
    gradient: Callable[..., Any] | None
    hess: Callable[..., Any] | None
    hessp: Callable[..., Any] | None

    def __call__(self, x: jax.Array, *args: Any) -> jax.Array:
        """Return the value, with the given derivatives in place of JAX's."""
        if self.gradient is None and not self.pair and self.hess is None and self.hessp is None:
            return self._value(x, *args)

        def gradient(x: jax.Array) -> jax.Array:
            return jnp.asarray(self._grad(x, *args), x.dtype).reshape(x.shape)

        slope: Callable[..., jax.Array] = gradient
        if self.hess is not None or self.hessp is not None:
            slope = jax.custom_jvp(gradient)
            slope.defjvp(lambda p, t: (gradient(*p), self._product(*p, *t, *args)))

        value = jax.custom_jvp(lambda x: self._value(x, *args))
        value.defjvp(lambda p, t: (value(*p), jnp.sum(slope(*p) * t[0])))
        return value(x)

    def _value(self, x: Any, *args: Any) -> jax.Array:
        out = self.fun(x, *args)
        out = jnp.asarray(out[0] if self.pair else out)
        return out.reshape(()) if out.size == 1 else out

    def _grad(self, x: Any, *args: Any) -> Any:
        if self.pair:
            return self.fun(x, *args)[1]
        return jax.grad(self._value)(x, *args) if self.gradient is None else self.gradient(x, *args)

    def _product(self, x: Any, v: Any, *args: Any) -> jax.Array:
        if self.hess is not None:
            return jnp.asarray(self.hess(x, *args), x.dtype) @ v
        assert self.hessp is not None
        return jnp.asarray(self.hessp(x, v, *args), x.dtype)


@dataclasses.dataclass(frozen=True)
class _Watch:
    """A callback of SciPy's kind as one of ours; hashable."""

    function: Callable[..., Any]
    takes_result: bool

    def __call__(self, step: Any) -> bool:
        """Return whether to stop."""
        if int(step.step) == 0:
            return False
        x = np.asarray(step.params)
        try:
            if self.takes_result:
                self.function(intermediate_result=OptimizeResult(x=x, fun=float(step.value)))
            else:
                self.function(x)
        except StopIteration:
            return True
        return False


def _options(options: dict[str, Any] | None, tol: float | None) -> dict[str, Any]:
    chosen = dict(options or {})
    for name in chosen:
        if name not in USED and name not in IGNORED:
            known = f"{', '.join(USED)} are used, {', '.join(IGNORED)} ignored"
            raise ValueError(f"minimize: unknown option {name!r}; {known}.")
    if chosen.get("norm", np.inf) != np.inf:
        raise ValueError(f"minimize: norm must be inf, the max-norm of the gradient, got {chosen['norm']}.")
    if tol is not None:
        chosen.setdefault("gtol", tol)
    return chosen


def _box(bounds: Any, x: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """Return lower and upper bounds, shape (n,), from SciPy's forms; None if nothing is bounded."""
    if bounds is None:
        return None
    if hasattr(bounds, "lb"):
        ends = [np.broadcast_to(np.asarray(end, float), x.shape) for end in (bounds.lb, bounds.ub)]
    else:
        pairs = [(-np.inf if low is None else low, np.inf if high is None else high) for low, high in bounds]
        if len(pairs) != x.size:
            raise ValueError(
                f"minimize: bounds must have one (lower, upper) per entry of x0, {x.size}, got {len(pairs)}."
            )
        ends = list(np.asarray(pairs, float).reshape(-1, 2).T)
    if np.any(np.isnan(ends)):
        raise ValueError(f"minimize: a bound is NaN, got {bounds!r}; use None, -inf or inf where there is none.")
    if not np.any(np.isfinite(ends)):
        return None
    lower, upper = (jnp.asarray(end, x.dtype) for end in ends)
    return checks.box("minimize", (lower, upper), jnp.clip(x, lower, upper))


def _derivatives(jac: Any, hess: Any, hessp: Any) -> tuple[bool, Any, Any, Any]:
    """Return whether fun returns a pair, and the derivatives that are functions."""
    for name, given in (("jac", jac), ("hess", hess)):
        if isinstance(given, str) and given not in ("2-point", "3-point", "cs"):
            raise ValueError(f"minimize: {name} must be a function, or '2-point', '3-point' or 'cs', got {given!r}.")
    own = lambda given: given if callable(given) else None
    return jac is True, own(jac), own(hess), own(hessp)


def _traceable(loss: _Loss, x: jax.Array, args: tuple[Any, ...]) -> tuple[bool, str]:
    """Return whether JAX can trace the function and the derivatives given with it, and what it says if not."""
    for leaf in jax.tree.leaves(args):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            return False, f"args holds {leaf!r}, which is no array; bind it to fun by functools.partial"
    errors = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)
    try:
        jax.eval_shape(_all_of(loss), x, *args)
    except Exception as error:
        if isinstance(error, errors) or loss.gradient is not None or loss.pair:
            return False, str(error).split("\n", 1)[0]
        raise
    return True, ""


def _all_of(loss: _Loss) -> Callable[..., Any]:
    """Return the value, gradient and Hessian product in one function, as far as they are given."""

    def evaluate(x: jax.Array, *args: Any) -> Any:
        out = [loss._value(x, *args)]
        if loss.gradient is not None or loss.pair:
            out.append(jnp.asarray(loss._grad(x, *args)))
        if loss.hess is not None or loss.hessp is not None:
            out.append(loss._product(x, x, *args))
        return out

    return evaluate


def _optimizer(method: str | None, n: int, options: dict[str, Any], traceable: bool, *, bounded: bool) -> Any:
    """Return the optimizer that does the job of SciPy's method."""
    names = {name.lower(): name for name in (*METHODS, *DERIVATIVE_FREE)}
    search = line_search.line_search(**{key: options[key] for key in ("c1", "c2") if key in options})
    memory = int(options.get("maxcor", 10))
    if method is None and traceable:
        return None
    if method is None:
        return lbfgsb(memory, search) if bounded else bfgs(linesearch=search)
    name = names.get(method.lower()) if isinstance(method, str) else None
    if name is None:
        raise ValueError(f"minimize: method must be one of {', '.join(METHODS)}, got {method!r}.")
    if name in DERIVATIVE_FREE:
        raise ValueError(
            f"minimize: {name} uses no derivatives and has no counterpart here; for a function that JAX can trace take "
            "method='BFGS' or leave method out, else use SciPy."
        )
    if bounded and name not in BOUNDED:
        raise ValueError(f"minimize: {name} takes no bounds; take one of {', '.join(BOUNDED)}, or leave method out.")
    if bounded and (name in ("L-BFGS-B", "SLSQP") or n > NEWTON_LIMIT):
        return lbfgsb(memory, search)
    if name in ("BFGS", "SLSQP"):
        return bfgs(linesearch=search)
    if name in ("L-BFGS-B", "CG"):
        return lbfgs(memory_size=memory, linesearch=search)
    radius = {"radius": options["initial_trust_radius"]} if "initial_trust_radius" in options else {}
    if n > NEWTON_LIMIT:
        return newton_cg()
    return (projected_newton if bounded else newton)(trust_region.trust_region(**radius))


def _takes_result(callback: Callable[..., Any]) -> bool:
    """Return whether a callback has the one parameter `intermediate_result`, SciPy's rule."""
    try:
        return list(inspect.signature(callback).parameters) == ["intermediate_result"]
    except (TypeError, ValueError):
        return False


def _budget(options: dict[str, Any], dtype: Any) -> tuple[float, int, int | None]:
    """Return the tolerance, the most steps and the most evaluations."""
    gtol = options.get("gtol")
    if gtol is None:
        gtol = max(1e-5, 1000 * float(jnp.finfo(dtype).eps))
    checks.number("minimize", "tol, options['gtol']", gtol, strict=False, hint="leave it out for the default.")
    whole = lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
    evaluations = whole(options.get("maxfun", options.get("maxfev")))
    steps = whole(options.get("maxiter"))
    if steps is not None:
        checks.integer("minimize", "options['maxiter']", steps, 0, hint="leave it out for 10,000.")
    if evaluations is not None:
        checks.integer("minimize", "options['maxfun']", evaluations, 1, hint="leave it out for no limit.")
    return float(gtol), 10_000 if steps is None else int(steps), None if evaluations is None else int(evaluations)


def _compiled(
    loss: _Loss,
    x: jax.Array,
    args: tuple[Any, ...],
    optimizer: Any,
    limits: Any,
    options: dict[str, Any],
    watch: _Watch | None,
) -> OptimizeResult:
    """Run `secondorder.minimize`."""
    gtol, steps, evaluations = _budget(options, x.dtype)
    found = solve.minimize(
        loss,
        x,
        optimizer,
        args=args,
        bounds=limits,
        gtol=gtol,
        max_steps=steps,
        max_evaluations=evaluations,
        callback=watch,
    )
    return _result(found.params, found.value, found.grad, found.status, found.state, found.steps, found.evaluations)


def _on_host(
    loss: _Loss,
    x: jax.Array,
    args: tuple[Any, ...],
    optimizer: Any,
    limits: Any,
    options: dict[str, Any],
    watch: _Watch | None,
) -> OptimizeResult:
    """Ask for one point after another: `fun` and `jac` are NumPy code."""
    gtol, max_steps, max_evaluations = _budget(options, x.dtype)
    extra: dict[str, Any] = {}
    if isinstance(optimizer, optax.GradientTransformationExtraArgs) and _needs_curvature(optimizer, x):
        extra["hvp_fn"] = _host_product(loss, args)
    if limits is not None:
        extra["bounds"] = limits
    state, status = optimizer.init(x), Status.RUNNING
    while True:
        point = np.array(x)  # a copy: old code may write into it
        if loss.pair:
            value, grad = loss.fun(point, *args)
        else:
            value, grad = loss.fun(point, *args), loss._grad(np.array(x), *args)
        value, grad = np.asarray(value, x.dtype).reshape(()), np.asarray(grad, x.dtype).reshape(x.shape)
        before = transform.info(state)
        move, state = optimizer.update(jnp.asarray(grad), state, x, value=jnp.asarray(value), **extra)
        info = transform.info(state)
        assert info is not None
        assert before is not None
        status = _host_status(info, gtol, max_steps, max_evaluations)
        if watch is not None and int(info.iterations) > int(before.iterations):
            step = report.Step(info.iterations, info.evaluations, value, info.grad_norm, x)
            if watch(step) and status is Status.RUNNING:
                status = Status.CALLBACK
        if status is not Status.RUNNING:
            best = transform.accepted(state)
            return _result(best.params, best.value, best.grad, status, state, info.iterations, info.evaluations)
        x = jnp.add(x, jnp.asarray(move))
        if limits is not None:
            x = box.land(x, *limits)  # the sum may round to either side of a bound


def _host_status(info: stopping.Info, gtol: float, max_steps: int, max_evaluations: int | None) -> Status:
    """Return the verdict after one evaluation, in the driver's order."""
    if float(info.optimality) <= gtol and not bool(info.indefinite):
        return Status.CONVERGED
    if int(info.status) != Status.RUNNING:
        return Status(int(info.status))
    if int(info.iterations) >= max_steps:
        return Status.MAX_STEPS
    if max_evaluations is not None and int(info.evaluations) >= max_evaluations:
        return Status.MAX_EVALUATIONS
    return Status.RUNNING


def _needs_curvature(optimizer: Any, x: jax.Array) -> bool:
    """Return whether an optimizer asks for Hessian products: its update refuses to go without."""
    state = optimizer.init(x)
    try:
        jax.eval_shape(lambda g, s: optimizer.update(g, s, x, value=jnp.zeros((), x.dtype)), x, state)
    except ValueError:
        return True
    return False


def _host_product(loss: _Loss, args: tuple[Any, ...]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the Hessian product of NumPy code, called back from the compiled step."""
    if loss.hess is None and loss.hessp is None:
        raise ValueError(
            "minimize: this method needs the Hessian, which JAX cannot take of NumPy code: pass hess, or take "
            "method='BFGS'."
        )
    product = _HostProduct(loss, args)
    try:
        hash(product)
    except TypeError:  # arrays among the arguments: compiled for this call alone
        return lambda x, v: product(x, v)
    return product


@dataclasses.dataclass(frozen=True)
class _HostProduct:
    """The Hessian of NumPy code times a vector; equal ones share a program."""

    loss: _Loss
    args: tuple[Any, ...]

    def __call__(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Return H(x) v."""
        shape = jax.ShapeDtypeStruct((x.size, x.size), x.dtype)
        return jax.pure_callback(self._matrix, shape, jax.lax.stop_gradient(x)) @ v

    def _matrix(self, at: Any) -> np.ndarray:
        x, hess, hessp = np.array(at), self.loss.hess, self.loss.hessp
        if hess is not None:
            return np.asarray(hess(x, *self.args), x.dtype)
        assert hessp is not None
        return np.stack([hessp(x, unit, *self.args) for unit in np.eye(x.size)]).astype(x.dtype)


def _result(x: Any, value: Any, grad: Any, status: Any, state: Any, steps: Any, evaluations: Any) -> OptimizeResult:
    status = Status(int(status))
    info = transform.info(state)
    assert info is not None
    result = OptimizeResult(
        x=np.asarray(x),
        fun=float(value),
        jac=np.asarray(grad),
        success=CODES[status] == 0,
        status=CODES[status],
        message=status.message,
        nit=int(steps),
        nfev=int(evaluations),
        njev=int(evaluations),
        nhev=int(info.hessians),
    )
    if isinstance(state, secant.SecantState):
        result["hess_inv"] = np.asarray(inverse_hessian.current(state.inverse))
    return result
