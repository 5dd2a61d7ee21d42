"""The drivers for residuals: `least_squares` and `curve_fit`, on the loop of `solve.run`.

They add what only residuals have: the test by the angle between residual and Jacobian, bounds, robust losses,
weights, and the covariance of what was found.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from secondorder import checks, compiler, report, solve, transform
from secondorder.curvature import linear_model, residuals
from secondorder.globalization import damping, robust
from secondorder.globalization.stopping import Status
from secondorder.linalg import box, tree
from secondorder.optimizers.levenberg_marquardt import levenberg_marquardt

FEW = 50  # parameters: with fewer, a Jacobian of low rank is a matter for the trust region
ASYMMETRY = 1e-5  # largest |C_ij - C_ji| of a covariance matrix, over the standard deviations of i and j: float32 data
LOST = 0.25  # share of singular values that are small, beyond which steps are truncated


class LeastSquaresResult(NamedTuple):
    """The outcome of a fit, a pytree; under `vmap` every field has a leading axis of lanes."""

    params: tree.ArrayTree  # the best accepted point
    value: jax.Array  # loss there: ||r||²/2, or that of the robust loss
    residual: tree.ArrayTree  # r there, as the residual function returns it (in `curve_fit` over sigma)
    grad: tree.ArrayTree  # gradient of the loss there
    grad_norm: jax.Array  # its max-norm
    optimality: jax.Array  # largest |cosine| between r and a column of J; the max-norm where no Jacobian was made
    covariance: jax.Array | None  # of the parameters, shape (n, n) in the order of ravel_pytree; Inf where undetermined
    standard_errors: tree.ArrayTree | None  # square roots of its diagonal, a tree like params
    degrees_of_freedom: jax.Array  # int32: residuals minus rank
    rank: jax.Array  # int32: of J, in the parameters that are not at a bound; -1 where it is not known
    active: tree.ArrayTree  # int32, like params: -1 at a lower bound that holds it, 1 at an upper one, else 0
    status: jax.Array  # int32, a Status
    steps: jax.Array  # int32: accepted points after the start
    evaluations: jax.Array  # int32: residuals computed by this run
    jacobians: jax.Array  # int32: dense Jacobians
    jacobian_products: jax.Array  # int32: single products J v and Jᵀu, where no dense Jacobian is made
    state: Any  # pass it as `state=` to go on from `params`
    history: report.History | None

    def __str__(self) -> str:
        """Return the outcome in a few lines, without the state."""
        lines = [f"{self.message}", f"value {self.value}, largest cosine {self.optimality}, rank {self.rank}"]
        lines.append(f"{self.steps} steps, {self.evaluations} residuals, {self.jacobians} Jacobians")
        lines.append(f"params {self.params}")
        if self.standard_errors is not None:
            lines.append(f"standard errors {self.standard_errors}")
        return "\n".join(lines)

    @property
    def success(self) -> Any:
        """Whether the test was passed, singular Jacobian or not: a bool, or an array of them under `vmap`."""
        passed = (self.status == Status.CONVERGED) | (self.status == Status.RANK_DEFICIENT)
        return bool(passed) if solve.is_host_scalar(self.status) else passed

    @property
    def message(self) -> Any:
        """The status in words, with the number of active bounds: a string, or a list of them after `vmap`."""
        return solve.message(self.status, self.active, self.value.dtype)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of a residual function, with the residual as auxiliary output; hashable."""

    residual: Callable[..., tree.ArrayTree]
    rho: robust.Rho | None

    def __call__(self, x: tree.ArrayTree, scale: Any, *args: Any) -> tuple[jax.Array, tree.ArrayTree]:
        r = self.residual(x, *args)
        return robust.value(self.rho, r, scale), r


@dataclasses.dataclass(frozen=True)
class _Plain:
    """A residual function that takes, and does not need, the scale of a robust loss; hashable."""

    residual: Callable[..., tree.ArrayTree]

    def __call__(self, x: tree.ArrayTree, scale: Any, *args: Any) -> tree.ArrayTree:
        del scale
        return self.residual(x, *args)


class _Errors(NamedTuple):
    """What shapes the program behind the loop; hashable."""

    m: int  # residuals
    covariance: bool | None
    absolute: bool  # the residuals are in units of their standard deviations: the covariance is not rescaled


def least_squares(
    residual_fn: Callable[..., tree.ArrayTree],
    x0: tree.ArrayTree,
    optimizer: optax.GradientTransformation | None = None,
    *,
    args: tuple[Any, ...] = (),
    bounds: tuple[Any, Any] | None = None,
    loss: str | Callable[[jax.Array], jax.Array] = "linear",
    f_scale: tree.Numeric = 1.0,
    gtol: tree.Numeric | None = None,
    max_steps: int = 1000,
    max_evaluations: int | None = None,
    covariance: bool | None = None,
    history: bool = False,
    progress: bool = False,
    callback: Callable[[report.Step], Any] | None = None,
    state: Any = None,
) -> LeastSquaresResult:
    """Minimize half the sum of squares of a residual, or a robust loss of it, within bounds.

    Args:
      residual_fn: residual_fn(x, *args) is any pytree of real arrays with m entries in all. Traceable by JAX. With the
        default optimizer it is differentiated forward only, unless residuals are fewer than half the parameters.
      x0: Start; any pytree of real floating-point arrays with n entries in all, inside the bounds.
      optimizer: Default: `levenberg_marquardt()`, with dense Jacobians up to 1000 parameters or residuals (with more
        than 50 parameters, up to 1e7 entries) and where `covariance` is asked for, else with products. Where the
        Jacobian at x0 is far from full rank, as a network's is, `damping=truncation()`: if there are 50 parameters or
        more, dense Jacobians, no bounds, and more than a quarter of the singular values (columns scaled to norm 1)
        below sqrt(eps) of the largest. This look costs a Jacobian more. Under a trace, where x0 is not known, never.
        Any optax transformation works; `bounds` need `levenberg_marquardt`, `lbfgsb` or `projected_newton`.
      args: Further arguments of `residual_fn`, a tuple of pytrees of arrays. They are traced: pass data here.
      bounds: (lower, upper); each a number, or a tree like x0 of arrays that broadcast to its leaves; -inf and inf
        where there is none. No residual is ever evaluated outside of them.
      loss: "linear" (least squares), "soft_l1", "huber", "cauchy", "arctan", as in SciPy, or a function rho(z) of the
        squared residuals z = (r / f_scale)², elementwise, twice differentiable, rho(0) = 0 and rho'(0) = 1. The loss is
        f_scale²/2 * sum rho(z).
      f_scale: Where a residual begins to count as an outlier, > 0, in the unit of the residual. Default 1.
      gtol: The run has converged when the largest |cosine| of the angles between residual and columns of the Jacobian
        is at most this, >= 0, no unit. Default: eps^(3/4), 1.8e-12 in float64 and 6e-6 in float32. It has
        converged, too, when the part of the residual in the range of the Jacobian is at the residual's rounding level.
      max_steps: Accepted steps at most, >= 0. Default 1000.
      max_evaluations: Residuals at most, >= 1. Default: no limit.
      covariance: Whether to compute covariance and standard errors. Default: if a dense Jacobian is made and
        residuals are at least as many as parameters.
      history: Record value, gradient norm and step length of every step; makes `max_steps` part of the program.
      progress: Show a tqdm bar, also from inside `jit`.
      callback: Called on the host after every step with a `Step`; the run ends if it returns True.
      state: `Result.state` of an earlier run, to go on from `x0 = result.params`.

    Returns:
      A `LeastSquaresResult`. `covariance` is (JᵀJ)⁻¹ 2 value / degrees_of_freedom. With a singular Jacobian the status
      is `RANK_DEFICIENT` in place of `CONVERGED`, `rank` tells how many directions the residuals determine, and
      parameters with a part in the others have infinite standard errors. At an active bound they are zero.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; each names the argument, the value and the remedy.
      Never for NaN: such a trial is rejected.

    Works eagerly, in `jit` and under `vmap`; there, bounds and x0 are not checked, and x0 is moved inside the bounds.
    `params`, `value` and `residual` are differentiable with respect to `args` and bounds, as in `minimize`: with the
    whole Hessian of the loss, so that the residual must be differentiable twice, in reverse mode, too.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> t = jnp.linspace(0.0, 3.0, 20)
      >>> def residual(x, y):
      ...     return x[0] * jnp.exp(-x[1] * t) - y
      >>> result = so.least_squares(residual, jnp.array([1.0, 1.0]), args=(3 * jnp.exp(-0.5 * t),))
      >>> print(result.success, f"{result.params[0]:.3f} {result.params[1]:.3f}")
      True 3.000 0.500

    References: Moré (1978); Nocedal & Wright (2006), chapter 10; Triggs et al. (2000), section 4.3.
    """
    who = "least_squares"
    checks.function(who, "residual_fn", residual_fn)
    options = solve.Options(gtol, max_steps, max_evaluations, history, progress, callback, state)
    return _fit(who, residual_fn, x0, optimizer, args, bounds, loss, f_scale, options, covariance, absolute=False)


def curve_fit(
    model: Callable[..., jax.Array],
    xdata: Any,
    ydata: Any,
    p0: tree.ArrayTree,
    *,
    sigma: Any = None,
    absolute_sigma: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    bounds: tuple[Any, Any] | None = None,
    loss: str | Callable[[jax.Array], jax.Array] = "linear",
    f_scale: tree.Numeric = 1.0,
    gtol: tree.Numeric | None = None,
    max_steps: int = 1000,
    max_evaluations: int | None = None,
    history: bool = False,
    progress: bool = False,
    callback: Callable[[report.Step], Any] | None = None,
    state: Any = None,
) -> LeastSquaresResult:
    """Fit a model to data, with error bars.

    Args:
      model: model(params, xdata) is the prediction, with the shape of ydata. Traceable by JAX. Parameters come first,
        as one tree (not as in SciPy, where they follow x one by one).
      xdata: What the model takes besides the parameters: any pytree of arrays.
      ydata: Data, an array of m real numbers.
      p0: Start; any pytree of real floating-point arrays with n <= m entries in all, inside the bounds.
      sigma: Standard deviations of the data, > 0, a number or an array that broadcasts to ydata; or the covariance
        matrix of the data, shape (m, m), symmetric positive definite, for one-dimensional ydata. Default: all equal.
      absolute_sigma: Whether sigma has the unit of ydata. If not, only its ratios matter, and the covariance is scaled
        by 2 value / degrees_of_freedom. Default False.
      optimizer: As in `least_squares`, and so are the arguments that follow here.
      bounds: (lower, upper).
      loss: Loss of the residuals (model - ydata) / sigma.
      f_scale: Where a residual begins to count as an outlier, in units of sigma.
      gtol: Largest cosine between residual and columns of the Jacobian at the end.
      max_steps: Accepted steps at most.
      max_evaluations: Evaluations of the model at most.
      history: Record every step.
      progress: Show a tqdm bar.
      callback: Called on the host after every step.
      state: `Result.state` of an earlier run.

    Returns:
      A `LeastSquaresResult` with `params`, `standard_errors` and `covariance`; `residual` is (model - ydata) / sigma.
      With a robust loss the covariance is that of the reweighted problem. With as many data as parameters there are
      no degrees of freedom: the covariance is then infinite unless `absolute_sigma`.

    Raises:
      ValueError, TypeError: for arguments that cannot be right, fewer data than parameters among them; each names the
        argument, the value and the remedy.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> x = jnp.arange(6.0)
      >>> y = jnp.array([1.1, 2.9, 5.2, 6.8, 9.1, 10.9])
      >>> fit = so.curve_fit(lambda p, x: p["slope"] * x + p["offset"], x, y, {"slope": 1.0, "offset": 0.0})
      >>> print(f"{fit.params['slope']:.3f} +- {fit.standard_errors['slope']:.3f}")
      1.977 +- 0.040

    References: Bates & Watts (1988), section 2.5; Nocedal & Wright (2006), section 10.1.
    """
    who = "curve_fit"
    checks.function(who, "model", model)
    checks.flag(who, "absolute_sigma", absolute_sigma)
    p0 = solve.arrays(who, p0, (), name="p0")
    checks.params(who, p0, name="p0")
    dtype = tree.scalar_dtype(p0)
    if isinstance(xdata, (list, tuple)) and all(np.ndim(x) == 0 for x in xdata):
        xdata = jnp.asarray(xdata)  # numbers, as for ydata; arrays stay a pytree
    xdata = jax.tree.map(jnp.asarray, xdata)
    ydata = _data(who, ydata, dtype)
    m, n = ydata.size, tree.size(p0)
    if m < n:
        raise ValueError(
            f"{who}: {m} data cannot determine {n} parameters and their covariance; use least_squares, fix parameters, "
            "or take more data."
        )
    shape = jax.eval_shape(model, p0, xdata)
    if getattr(shape, "shape", None) != ydata.shape:
        raise ValueError(
            f"{who}: model(params, xdata) must return an array of the shape of ydata, {ydata.shape}, got {shape}; "
            "parameters come first, as one tree."
        )
    weight = _weight(who, sigma, ydata)
    residual = _Misfit(model, weight.ndim == 2 and ydata.ndim == 1)
    options = solve.Options(gtol, max_steps, max_evaluations, history, progress, callback, state)
    data = (xdata, ydata, weight)
    return _fit(who, residual, p0, optimizer, data, bounds, loss, f_scale, options, True, absolute=absolute_sigma)


@dataclasses.dataclass(frozen=True)
class _Misfit:
    """The residual of a curve fit, (model - ydata) / sigma, or L⁻¹ (model - ydata) with L Lᵀ the covariance of data."""

    model: Callable[..., jax.Array]
    correlated: bool

    def __call__(self, params: tree.ArrayTree, xdata: Any, ydata: jax.Array, weight: jax.Array) -> jax.Array:
        misfit = self.model(params, xdata) - ydata
        if self.correlated:
            return jax.scipy.linalg.solve_triangular(weight, misfit, lower=True)
        return misfit / weight


def _data(who: str, ydata: Any, dtype: Any) -> jax.Array:
    """Return the data as a floating-point array, after checks of what is concrete."""
    y = jnp.asarray(ydata)
    if jnp.iscomplexobj(y):
        raise TypeError(f"{who}: ydata must be real, got {y.dtype}; stack real and imaginary parts, in the model, too.")
    if not checks.traced(y) and not np.all(np.isfinite(np.asarray(y))):  # by NumPy: in a `jit` JAX would trace it
        raise ValueError(f"{who}: ydata has entries that are not finite; leave these points out.")
    return y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(dtype)


def _weight(who: str, sigma: Any, ydata: jax.Array) -> jax.Array:
    """Return the divisor of the misfit: standard deviations, or the lower Cholesky factor of a covariance matrix."""
    if sigma is None:
        return jnp.ones((), ydata.dtype)
    try:
        s = jnp.asarray(sigma) if checks.traced(sigma) else np.asarray(sigma, float)
    except (TypeError, ValueError):
        raise TypeError(
            f"{who}: sigma must be real numbers, one standard deviation per datum, got {sigma!r}."
        ) from None
    known = not checks.traced(s)
    if s.ndim == 2 and ydata.ndim == 1:
        if s.shape != (ydata.size, ydata.size):
            raise ValueError(
                f"{who}: sigma as a covariance matrix must have shape {(ydata.size, ydata.size)}, got {s.shape}."
            )
        return jnp.asarray(_factor(who, np.asarray(s)) if known else jnp.linalg.cholesky(s), ydata.dtype)
    if not checks.broadcasts(s.shape, ydata.shape):
        raise ValueError(
            f"{who}: sigma has shape {s.shape}, which does not broadcast to ydata, {ydata.shape}; give one standard "
            "deviation per datum."
        )
    if known and not np.all((s > 0) & np.isfinite(s)):
        raise ValueError(f"{who}: sigma must be > 0 and finite, got {np.min(s)} among its entries; leave points out.")
    return jnp.asarray(s, ydata.dtype)


def _factor(who: str, covariance: np.ndarray) -> np.ndarray:
    """Return the lower Cholesky factor of a covariance matrix that is known, in double precision."""
    spread = np.sqrt(np.abs(np.diagonal(covariance)))
    skew = np.abs(covariance - covariance.T) > ASYMMETRY * np.outer(spread, spread)
    try:
        L = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        L = np.full_like(covariance, np.nan)
    if np.any(skew) or not np.all(np.isfinite(L)):
        raise ValueError(f"{who}: sigma as a covariance matrix must be symmetric positive definite; check its rows.")
    return L


def _fit(
    who: str,
    residual_fn: Callable[..., tree.ArrayTree],
    x0: tree.ArrayTree,
    optimizer: optax.GradientTransformation | None,
    args: tuple[Any, ...],
    bounds: tuple[Any, Any] | None,
    loss: Any,
    f_scale: Any,
    options: solve.Options,
    covariance: bool | None,
    *,
    absolute: bool,
) -> LeastSquaresResult:
    """Return the outcome of a fit, after the checks that both drivers make."""
    x0 = solve.arrays(who, x0, args)
    checks.params(who, x0, name="x0")
    dtype = tree.scalar_dtype(x0)
    if covariance is not None:
        checks.flag(who, "covariance", covariance)
    checks.number(who, "f_scale", f_scale, hint="it is where a residual begins to count as an outlier.")
    shape = jax.eval_shape(residual_fn, x0, *args)
    checks.residual(who, residual_fn, shape)
    rho = _rho(who, loss, shape)
    m, n = tree.size(shape), tree.size(x0)
    if m == 0:
        raise ValueError(f"{who}: there are no residuals, got {shape}; a fit needs data.")
    residual = _Plain(residual_fn) if rho is None else robust.Reweighted(residual_fn, rho)
    scale = f_scale if checks.traced(f_scale) else np.asarray(f_scale, dtype)
    if optimizer is None:
        looked = bounds is None and n >= FEW and not checks.traced((x0, scale, args))
        solver = linear_model.direct() if covariance and m >= n else linear_model.by_size(m, n)
        optimizer = _default_optimizer(residual, x0, (scale, *args), options.state, solver, looked=looked)
    solve.check_optimizer(who, optimizer)
    if covariance:
        _check_covariance(who, optimizer, x0, m)
    if options.gtol is None:
        options = options._replace(gtol=_default_gtol(optimizer, x0))
    name = "p0" if who == "curve_fit" else "x0"
    box = None if bounds is None else checks.box(who, bounds, x0, name)
    finish = _Finish(_Errors(m, covariance, absolute))
    problem = solve.Problem(_Loss(residual_fn, rho), True, residual, finish, "residual")
    return solve.drive(who, problem, x0, optimizer, (scale, *args), box, options)


def _rho(who: str, loss: Any, residual: tree.ArrayTree) -> Any:
    """Return the function rho of a robust loss, None for least squares; `residual` has the shapes that it is given."""
    if callable(loss):
        for z in jax.tree.leaves(residual):
            out = jax.eval_shape(loss, z)
            if getattr(out, "shape", None) != z.shape:
                raise ValueError(
                    f"{who}: loss must be a function rho(z) that works on each entry of z, shape {z.shape}, got {out}; "
                    "derivatives are JAX's: return rho alone."
                )
        return loss
    if not isinstance(loss, str) or loss not in robust.LOSSES:
        raise ValueError(f"{who}: loss must be one of {', '.join(robust.LOSSES)}, or a function rho(z), got {loss!r}.")
    return robust.LOSSES[loss]


def _default_optimizer(
    residual: Any, x0: tree.ArrayTree, args: tuple[Any, ...], state: Any, solver: Any, *, looked: bool
) -> transform.Optimizer:
    """Return Levenberg-Marquardt with this solver; with truncated steps if J is far from full rank."""
    plain, truncated = levenberg_marquardt(solver=solver), levenberg_marquardt(damping.truncation())
    if not looked or not isinstance(solver, linear_model.Direct):
        return plain
    if state is not None:  # the run that is resumed has looked
        bend = getattr(state, "acceleration", None)
        return truncated if bend is not None and bend.size else plain
    quick = compiler.quick(x0, args)
    try:
        hash(residual)
    except TypeError:  # a callable with arrays in it, for instance: compiled for this call alone
        share = compiler.jit(partial(_deficiency, residual))(quick, x0, *args)
    else:
        share = _compiled_deficiency(quick, residual, x0, *args)
    return truncated if not checks.traced(share) and float(share) > LOST else plain


def _deficiency(residual: Any, x0: tree.ArrayTree, *args: Any) -> jax.Array:
    """Return the share of singular values of J, columns scaled to norm 1, that are below sqrt(eps) of the largest."""
    J = residuals.matrix(residuals.linearize(lambda x: residual(x, *args), x0))
    norms = jnp.linalg.norm(J, axis=0)
    J = jnp.where(jnp.all(jnp.isfinite(J)), J / jnp.where(norms > 0, norms, 1.0), jnp.ones_like(J[:1, :1]))
    R = J if J.shape[0] <= J.shape[1] else jnp.linalg.qr(J, mode="r")
    s = jnp.linalg.svd(R, compute_uv=False)
    return jnp.mean(s <= jnp.finfo(s.dtype).eps ** 0.5 * s[0])


_compiled_deficiency = compiler.jit(_deficiency, static_argnums=0)


def _check_covariance(who: str, optimizer: Any, x0: tree.ArrayTree, m: int) -> None:
    """Raise unless the run will know a dense Jacobian of at least as many rows as columns."""
    n, model = tree.size(x0), _model(jax.eval_shape(optimizer.init, x0))
    if m < n:
        raise ValueError(
            f"{who}: covariance=True needs at least as many residuals as parameters, got {m} and {n}; leave it out."
        )
    if model is None or model.vectors.shape != (n, n):
        remedy = "leave optimizer out" if who == "curve_fit" else "leave one of them out"
        raise ValueError(
            f"{who}: a covariance needs a dense Jacobian, which optimizer={optimizer!r} does not make; "
            f"take levenberg_marquardt(solver=direct()), or {remedy}."
        )


def _default_gtol(optimizer: optax.GradientTransformation, x0: tree.ArrayTree) -> float:
    """Return eps^(3/4) for a test of cosines, or for an optimizer without Jacobian the default of `minimize`."""
    eps = max(float(jnp.finfo(tree.scalar_dtype(leaf)).eps) for leaf in jax.tree.leaves(x0))  # of the coarsest leaf
    return eps**0.75 if _model(jax.eval_shape(optimizer.init, x0)) else max(1e-5, 1000 * eps)


def _model(state: Any) -> linear_model.LinearModel | None:
    """Return the linear model of the residual in a state, if the optimizer keeps one."""
    model = getattr(state, "model", None)
    return model if isinstance(model, linear_model.LinearModel) else None


@dataclasses.dataclass(frozen=True)
class _Finish:
    """From the outcome of the loop to that of the fit; hashable."""

    errors: _Errors

    def __call__(self, result: solve.Result, bounds: Any, scale: jax.Array, *args: Any) -> LeastSquaresResult:
        del scale, args
        m, wanted, absolute = self.errors
        params, dtype = result.params, tree.scalar_dtype(result.params)
        n = tree.size(params)
        active = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)
        if bounds is not None:
            active = box.active(params, result.grad, bounds)
        free = tree.ravel(active, jnp.int32) == 0
        status, rank, C = result.status, jnp.int32(-1), None
        model = _model(result.state)
        if model is not None:
            rank = model.rank
            most = jnp.minimum(m, jnp.sum(free, dtype=jnp.int32))
            deficient = (rank >= 0) & (rank < most) & (status == Status.CONVERGED)
            status = jnp.where(deficient, Status.RANK_DEFICIENT, status).astype(jnp.int32)
        freedom = m - jnp.where(rank < 0, min(m, n), rank)
        dense = model is not None and model.vectors.shape == (n, n)
        if model is not None and (wanted or (wanted is None and dense and m >= n)):
            C = linear_model.inverse(model, free)
            if not absolute:
                variance = 2.0 * result.value / jnp.maximum(freedom, 1).astype(dtype)
                unknown = jnp.isinf(C) | ((freedom <= 0) & free[:, None] & free[None, :])
                C = jnp.where(unknown, jnp.inf, jnp.where(unknown, 0.0, C) * variance).astype(dtype)
        errors = None if C is None else tree.unravel(jnp.sqrt(jnp.diagonal(C)), params)
        info = transform.info(result.state)
        optimality = result.grad_norm if info is None else info.optimality
        return LeastSquaresResult(
            params=params,
            value=result.value,
            residual=result.aux,
            grad=result.grad,
            grad_norm=result.grad_norm,
            optimality=optimality,
            covariance=C,
            standard_errors=errors,
            degrees_of_freedom=freedom.astype(jnp.int32),
            rank=rank,
            active=active,
            status=status,
            steps=result.steps,
            evaluations=result.evaluations,
            jacobians=result.hessians,
            jacobian_products=result.hessian_products,
            state=result.state,
            history=result.history,
        )
