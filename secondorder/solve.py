"""The driver: one flat loop of evaluate, update, test.

The loss's value and gradient stand once in the compiled program. Under `vmap` every lane is at its own phase: no lane
waits for another lane's line search, and the loop turns as often as the slowest lane evaluates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import io_callback

from secondorder import checks, transform
from secondorder.curvature import products
from secondorder.globalization import stopping
from secondorder.globalization.stopping import Status
from secondorder.linalg import tree
from secondorder.optimizers.lbfgs import lbfgs
from secondorder.optimizers.levenberg_marquardt import LevenbergMarquardtState
from secondorder.optimizers.newton import newton

DENSE_LIMIT = 200  # with optimizer=None: parameters up to which the dense trust-region Newton is taken
NO_LIMIT = 2**31 - 1


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


class Result(NamedTuple):
    """The outcome of a run, a pytree; under `vmap` every field has a leading axis of lanes."""

    params: tree.ArrayTree  # the best accepted point
    value: jax.Array  # loss there
    grad: tree.ArrayTree  # gradient there, as jax.grad gives it
    grad_norm: jax.Array  # its max-norm
    curvature: jax.Array  # smallest eigenvalue of the Hessian there, where the optimizer knows it, else NaN
    status: jax.Array  # int32, a Status
    steps: jax.Array  # int32: accepted points after the start
    evaluations: jax.Array  # int32: values and gradients computed by this run
    hessian_products: jax.Array  # int32: single Hessian-vector products
    hessians: jax.Array  # int32: dense Hessians
    aux: Any  # auxiliary output of the loss at `params`, else None
    state: Any  # pass it as `state=` to go on from `params`
    history: History | None

    def __str__(self) -> str:
        """Return the outcome in a few lines, without the state."""
        lines = [f"{self.message}", f"value {self.value}, gradient (max-norm) {self.grad_norm}"]
        lines.append(f"{self.steps} steps, {self.evaluations} evaluations, {self.hessians} Hessians")
        return "\n".join([*lines, f"params {self.params}"])

    @property
    def success(self) -> Any:
        """Whether the gradient passes the test: a bool, or an array of them under `vmap`."""
        converged = self.status == Status.CONVERGED
        return bool(converged) if is_host_scalar(self.status) else converged

    @property
    def message(self) -> Any:
        """The status in words: a string, or a list of them after `vmap`."""
        return message(self.status)


class _Tracked(NamedTuple):
    """State of an optimizer that is not ours, with the point that a run would return."""

    params: tree.ArrayTree  # the point with the lowest loss, or the one accepted last
    loss: jax.Array
    grad: tree.ArrayTree
    fresh: jax.Array
    info: stopping.Info
    inner: Any  # its own state


class _Carry(NamedTuple):
    x: tree.ArrayTree  # the next point to evaluate, joined if the settings say so
    shown: tree.ArrayTree  # the same as the loss takes it: XLA compiles slices of a vector inside the loss slowly
    state: Any
    status: jax.Array
    aux: Any
    history: History | None


class Problem(NamedTuple):
    """What is minimized; hashable, and named first in the key of a compiled program."""

    fun: Callable[..., Any]  # fun(x, *args): the loss, or (loss, aux)
    has_aux: bool
    residual_fn: Callable[..., tree.ArrayTree] | None = None  # residual_fn(x, *args), for optimizers that need it
    finish: Callable[..., Any] | None = None  # finish(result, bounds, *args): what to make of the outcome


class _Settings(NamedTuple):
    """What shapes the program; hashable."""

    problem: Problem
    optimizer: optax.GradientTransformation
    flat: bool
    history: int | None
    progress: bool
    callback: Callable[[Step], Any] | None


class _Budget(NamedTuple):
    """What the program tests against; traced."""

    gtol: Any
    max_steps: Any
    max_evaluations: Any


class Options(NamedTuple):
    """The arguments that the drivers share, as the user gave them."""

    gtol: Any
    max_steps: Any
    max_evaluations: Any
    history: bool
    progress: bool
    callback: Callable[[Step], Any] | None
    state: Any


def minimize(
    fun: Callable[..., Any],
    x0: tree.ArrayTree,
    optimizer: optax.GradientTransformation | None = None,
    *,
    args: tuple[Any, ...] = (),
    has_aux: bool = False,
    gtol: chex.Numeric | None = None,
    max_steps: int = 10_000,
    max_evaluations: int | None = None,
    history: bool = False,
    progress: bool = False,
    callback: Callable[[Step], Any] | None = None,
    state: Any = None,
) -> Result:
    """Minimize a loss from a start.

    Args:
      fun: Loss; fun(x, *args) is a real scalar, or (scalar, aux) with `has_aux`. It must be traceable by JAX.
      x0: Start; any pytree of floating-point arrays (a Python float counts as one). Integers and booleans are refused.
        Without any parameter the start is the answer: one evaluation, converged.
      optimizer: Any optax transformation. Default: `newton()` for up to 200 real parameters, else `lbfgs()`.
      args: Further arguments of `fun`, a tuple of pytrees of arrays. They are traced: pass new data here, and the
        compiled program is used again. (What `fun` closes over is compiled in.)
      has_aux: Whether `fun` returns (value, aux).
      gtol: The run has converged when the max-norm of the gradient is at most this, >= 0, in units of the gradient
        [f/x]. With 0 the run goes on to a gradient of exactly zero, or until it stalls at rounding level. Default: 1e-5
        in float64, 1.2e-4 in float32 (max(1e-5, 1000 eps)).
      max_steps: Accepted steps at most, >= 0; with 0 the start alone is evaluated and tested. Default 10,000.
      max_evaluations: Values and gradients at most, >= 1: the start needs one. Default: no limit.
      history: Record value, gradient norm and step length of every step; makes `max_steps` part of the program.
      progress: Show a tqdm bar, also from inside `jit`.
      callback: Called on the host after every step with a `Step`; the run ends if it returns True.
      state: `Result.state` of an earlier run, to go on with its curvature from `x0 = result.params`.

    Returns:
      A `Result`. Its `status` tells why the run ended and `success` is true only for a gradient that passed the test
      (for the Newton types: with no negative curvature). Budgets run out loudly: `Status.MAX_STEPS`,
      `Status.MAX_EVALUATIONS`. Numerical trouble is a status, never an exception: if the loss, its gradient or x0 is
      not finite at the start, `Status.NONFINITE_START` comes after one evaluation, with `params` equal to x0, and
      value, gradient and gradient norm are Inf, zero and Inf.

    Raises:
      ValueError, TypeError: for arguments that cannot be right; each names the argument, the value and the remedy.

    Programs are compiled once per (fun, optimizer with its options, shapes) and kept. Works eagerly, in `jit` and under
    `vmap`. The leaves of unsharded parameters are joined into one vector inside; sharded leaves never are.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def loss(x, target):
      ...     return jnp.sum(jnp.cosh(x - target))
      >>> result = so.minimize(loss, jnp.zeros(2), args=(jnp.array([1.0, 2.0]),))
      >>> result.success, result.params.round(3).tolist()
      (True, [1.0, 2.0])
    """
    who = "minimize"
    checks.function(who, "fun", fun)
    if gtol is None:
        gtol = max(1e-5, 1000 * float(jnp.finfo(tree.scalar_dtype(arrays(who, x0, args))).eps))
    options = Options(gtol, max_steps, max_evaluations, history, progress, callback, state)
    return drive(who, Problem(fun, has_aux), x0, optimizer, args, None, options)


def arrays(who: str, x0: tree.ArrayTree, args: Any) -> tree.ArrayTree:
    """Return the start with Python numbers made arrays, after checks of it and of the type of `args`."""
    if not isinstance(args, tuple):
        raise TypeError(f"{who}: args must be a tuple, got {type(args).__name__}; for one argument write args=(a,).")
    checks.params(who, x0, allow_complex=True, name="x0")
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x0)):
        return x0
    return jax.tree.map(jnp.asarray, x0)


def drive(
    who: str,
    problem: Problem,
    x0: tree.ArrayTree,
    optimizer: optax.GradientTransformation | None,
    args: tuple[Any, ...],
    bounds: tuple[tree.ArrayTree, tree.ArrayTree] | None,
    options: Options,
) -> Any:
    """Return the outcome of a run: what all drivers do with their arguments.

    `bounds` are trees with the shapes and dtypes of x0. Programs are compiled once per (problem, optimizer, shapes).
    """
    gtol, max_steps, max_evaluations, history, progress, callback, state = options
    x0 = arrays(who, x0, args)
    dtype = tree.scalar_dtype(x0)
    checks.number(who, "gtol", gtol, strict=False, hint="leave it out for a default that fits the precision.")
    _check_budget(who, max_steps, max_evaluations, history)
    if optimizer is None:
        optimizer = _default(x0)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{who}: optimizer must be an optax transformation such as lbfgs(), got {optimizer!r}"
            + ("; call it: optimizer()." if callable(optimizer) else ".")
        )
    if callback is not None:
        checks.function(who, "callback", callback)
    if progress:
        _tqdm()

    flat = isinstance(optimizer, transform.Optimizer) and optimizer.joins and tree.joinable(x0)
    if state is not None:
        flat = _check_state(who, optimizer, state, x0, flat)
    settings = _Settings(problem, optimizer, flat, int(max_steps) if history else None, progress, callback)
    budget = _Budget(
        np.asarray(gtol, dtype) if not checks.traced(gtol) else gtol,
        max_steps,
        NO_LIMIT if max_evaluations is None else max_evaluations,
    )
    dynamic = (x0, args, bounds, state, budget)
    if checks.traced(dynamic):
        return _run(settings, *dynamic)
    try:
        hash(settings)
    except TypeError:  # a callable with arrays in it, for instance: compiled for this call alone
        return jax.jit(functools.partial(_run, settings))(*dynamic)
    return _compiled_run(settings, *dynamic)


def _run(
    settings: _Settings,
    x0: tree.ArrayTree,
    args: tuple[Any, ...],
    bounds: tuple[tree.ArrayTree, tree.ArrayTree] | None,
    state: Any,
    budget: _Budget,
) -> Any:
    """Return the outcome; the traced part of the drivers."""
    fun, has_aux, residual_fn, finish = settings.problem
    dtype = tree.scalar_dtype(x0)
    checks.scalar_loss("minimize", fun, jax.eval_shape(fun, x0, *args), has_aux=has_aux)
    if bounds is not None:
        x0 = jax.tree.map(jnp.clip, x0, *bounds)

    def restore(x: tree.ArrayTree) -> tree.ArrayTree:
        return tree.unravel(x, x0) if settings.flat else x

    def loss(x: tree.ArrayTree) -> tuple[jax.Array, Any]:
        out = fun(x, *args)
        return out if has_aux else (out, None)

    def joined(x: tree.ArrayTree) -> tree.ArrayTree:
        return tree.ravel(x, jax.tree.leaves(x0)[0].dtype) if settings.flat else x

    start = joined(x0)

    def value_fn(x: tree.ArrayTree, hvp_fn: Any = None, residual_fn: Any = None) -> jax.Array:
        del hvp_fn, residual_fn  # optax's zoom line search refuses arguments that the loss does not take
        return loss(restore(x))[0]

    optimizer = _tracked(settings.optimizer, value_fn)
    extra: dict[str, Any] = {"hvp_fn": products.hvp(value_fn)}
    if residual_fn is not None:
        extra["residual_fn"] = lambda x: residual_fn(restore(x), *args)
    box = None if bounds is None else tuple(joined(bound) for bound in bounds)
    if box is not None:
        extra["bounds"] = box
    if isinstance(optimizer, transform.Optimizer):
        extra["gtol"] = budget.gtol
    state = optimizer.init(start) if state is None else state
    seen = stopping.initial(dtype) if state is None else transform.info(state)
    assert seen is not None

    def turn(carry: _Carry) -> _Carry:
        # 1. Evaluate: the only place where the loss stands.
        if _makes_gradient(carry.state):
            (value, aux), grad = loss(carry.shown), carry.state.grad
        else:
            (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(carry.shown)
            grad = tree.join_like(grad, carry.x)
        # 2. Update: judge this point, choose the next.
        move, state = optimizer.update(tree.conj(grad), carry.state, carry.x, value=value, **extra)
        # 3. Test.
        info = transform.info(state)
        assert info is not None
        evaluations, steps = info.evaluations - seen.evaluations, info.iterations - seen.iterations
        status = _status(info, steps, evaluations, budget)
        aux = jax.tree.map(lambda new, old: jnp.where(info.accepted, new, old), aux, carry.aux)
        before = transform.info(carry.state)
        assert before is not None
        stepped = (info.iterations > before.iterations) | (info.accepted & (before.evaluations == 0))
        track = carry.history
        if track is not None:
            entry = (value, info.grad_norm, info.step_length, info.step_norm, evaluations)
            track = _write(track, jnp.where(stepped, steps, NO_LIMIT), entry)
        if settings.progress:
            jax.debug.callback(_show, steps, budget.max_steps, value, info.grad_norm, status)
        if settings.callback is not None:
            report = Step(steps, evaluations, value, info.grad_norm, carry.shown)
            host = functools.partial(_call, settings.callback)
            stop = io_callback(host, jax.ShapeDtypeStruct((), jnp.bool_), stepped, report)
            status = jnp.where(stop & (status == Status.RUNNING), Status.CALLBACK, status).astype(jnp.int32)
        x = jax.tree.map(jnp.add, carry.x, move)
        if box is not None:
            x = jax.tree.map(jnp.clip, x, *box)  # the sum may round to the other side
        return _Carry(x, restore(x), state, status, aux, track)

    aux = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(loss, x0)[1])
    track = _empty_history(settings.history, dtype)
    carry = _Carry(start, x0, state, jnp.int32(Status.RUNNING), aux, track)
    end = jax.lax.while_loop(lambda c: c.status == Status.RUNNING, turn, carry)
    info = transform.info(end.state)
    assert info is not None
    best = transform.accepted(end.state)
    result = Result(
        params=restore(best.params),
        value=best.value,
        grad=restore(best.grad),
        grad_norm=info.grad_norm,
        curvature=info.curvature,
        status=end.status,
        steps=info.iterations - seen.iterations,
        evaluations=info.evaluations - seen.evaluations,
        hessian_products=info.hessian_products - seen.hessian_products,
        hessians=info.hessians - seen.hessians,
        aux=end.aux,
        state=transform.settle(end.state),
        history=end.history,
    )
    return result if finish is None else finish(result, bounds, *args)


_compiled_run = jax.jit(_run, static_argnums=0)


def _status(info: stopping.Info, steps: jax.Array, evaluations: jax.Array, budget: _Budget) -> jax.Array:
    """Return the status after a turn; what comes later here takes precedence."""
    status = jnp.int32(Status.RUNNING)
    status = jnp.where(evaluations >= budget.max_evaluations, Status.MAX_EVALUATIONS, status)
    status = jnp.where(steps >= budget.max_steps, Status.MAX_STEPS, status)
    status = jnp.where(info.status != Status.RUNNING, info.status, status)
    converged = (info.optimality <= budget.gtol) & ~info.indefinite
    return jnp.where(converged, Status.CONVERGED, status).astype(jnp.int32)


def _makes_gradient(state: Any) -> bool:
    """Return whether the optimizer of this state takes the gradient from the Jacobian that it makes anyway."""
    return isinstance(state, LevenbergMarquardtState)


def _default(x0: tree.ArrayTree) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for a problem of this size."""
    is_complex = any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x0))
    return newton() if tree.size(x0) <= DENSE_LIMIT and not is_complex else lbfgs()


def _tracked(
    optimizer: optax.GradientTransformation, value_fn: Callable[..., jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer whose state is one of ours: itself, or a foreign or wrapped one with its point tracked."""
    if isinstance(optimizer, transform.Optimizer):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def init(params: tree.ArrayTree) -> _Tracked:
        dtype = tree.scalar_dtype(params)
        infinite = jnp.full((), jnp.inf, dtype)
        zeros = tree.zeros_like(params)
        info = stopping.initial(dtype)
        return _Tracked(tree.copy(params), infinite, zeros, jnp.array(True), info, inner.init(params))

    def update(
        updates: tree.ArrayTree, state: _Tracked, params: tree.ArrayTree, *, value: jax.Array, **curvature: Any
    ) -> tuple[tree.ArrayTree, _Tracked]:
        own = transform.info(state.inner) is not None
        extra: dict[str, Any] = {} if own else {"value_fn": value_fn, "grad": updates}
        move, inner_state = inner.update(updates, state.inner, params, value=value, **curvature, **extra)
        loss = value.astype(state.loss.dtype)
        grad_norm = tree.max_norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        first = state.info.evaluations == 0
        if own:
            info = transform.info(inner_state)
            assert info is not None
            better = info.accepted
        else:
            tie = (loss <= state.loss + stopping.noise(state.loss)) & (grad_norm < state.info.grad_norm)
            better = finite & (first | (loss < state.loss) | tie)
            distance = tree.norm(tree.sub(params, state.params))
            info = stopping.record(
                state.info,
                accepted=better,
                first=first,
                stuck=jnp.array(False),
                before=state.loss,
                loss=loss,
                grad_norm=grad_norm,
                step_length=jnp.ones_like(loss),
                step_norm=distance,
                patient=True,
            )
            status = jnp.where(finite | first, info.status, Status.DIVERGED).astype(jnp.int32)
            # An optax line search evaluates on its own account and says how often.
            hidden = [n for _, n in optax.tree.get_all_with_path(inner_state, "num_linesearch_steps")]
            info = info._replace(
                status=status,
                iterations=state.info.iterations + ~first,
                evaluations=info.evaluations + sum(jnp.asarray(n, jnp.int32) for n in hidden),
            )
        point = (params, loss, tree.conj(updates))
        x, loss, grad = tree.where(better, point, (state.params, state.loss, state.grad))
        move = tree.cast_like(move, params)
        return move, _Tracked(x, loss, grad, jnp.array(True), info, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _check_state(who: str, optimizer: optax.GradientTransformation, state: Any, x0: tree.ArrayTree, flat: bool) -> bool:
    """Return whether `state` belongs to the joined leaves; raise if it fits neither them nor x0."""

    def fits(x: tree.ArrayTree) -> bool:
        expected = jax.eval_shape(_tracked(optimizer, lambda _: jnp.zeros(())).init, x)
        if jax.tree.structure(expected) != jax.tree.structure(state):
            return False
        pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True)
        return all(jnp.shape(a) == jnp.shape(b) and a.dtype == b.dtype for a, b in pairs)

    if flat and fits(jnp.zeros(tree.size(x0), jax.tree.leaves(x0)[0].dtype)):
        return True
    if fits(x0):
        checks.same_shardings(who, x0, transform.accepted(state).params)
        return False
    raise ValueError(
        f"{who}: state does not belong to this optimizer and x0 (structure, shapes or dtypes differ); pass "
        "Result.state of a run with the same optimizer options and parameters of the same shapes, or leave it out."
    )


def _check_budget(who: str, max_steps: Any, max_evaluations: Any, history: bool) -> None:
    if history or not checks.traced(max_steps):
        checks.integer(who, "max_steps", max_steps, 0, hint="10_000 is the default.")
    if max_evaluations is not None and not checks.traced(max_evaluations):
        checks.integer(who, "max_evaluations", max_evaluations, 1, hint="the start itself needs one.")


def _empty_history(max_steps: int | None, dtype: jax.typing.DTypeLike) -> History | None:
    if max_steps is None:
        return None
    nothing = jnp.full(max_steps + 1, jnp.nan, dtype)
    return History(nothing, nothing, nothing, nothing, jnp.zeros(max_steps + 1, jnp.int32))


def _write(history: History, index: jax.Array, entry: tuple[jax.Array, ...]) -> History:
    """Write one entry; an index out of range writes nothing."""
    rows = zip(history, entry, strict=True)
    return History(*(row.at[index].set(new.astype(row.dtype), mode="drop") for row, new in rows))


def _call(callback: Callable[[Step], Any], stepped: Any, report: Step) -> np.ndarray:
    """Call back on the host if a step was taken; return whether to stop."""
    return np.asarray(bool(stepped) and callback(report) is True)


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("minimize: progress=True needs tqdm; install it with: pip install tqdm") from None
    return tqdm


_BARS: dict[str, Any] = {}


def _show(steps: Any, max_steps: Any, value: Any, grad_norm: Any, status: Any) -> None:
    """Update the bar of the run in flight; runs on the host."""
    if "bar" not in _BARS:
        _BARS["bar"] = _tqdm()(total=int(max_steps), unit="step")
    bar = _BARS["bar"]
    bar.n = int(steps)
    bar.set_postfix_str(f"value {float(value):.4g}, gradient {float(grad_norm):.2g}")
    if int(status) != Status.RUNNING:
        _BARS.pop("bar").close()


def message(status: Any) -> Any:
    """Return a status in words: a string, or a list of them after `vmap`."""
    codes = np.asarray(status)
    return Status(int(codes)).message if codes.ndim == 0 else [Status(int(c)).message for c in codes.ravel()]


def is_host_scalar(status: Any) -> bool:
    """Return whether a status is one number that is known now."""
    return not isinstance(status, Tracer) and np.ndim(status) == 0
