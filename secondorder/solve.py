"""The driver: one flat loop of evaluate, update, test.

The loss's value and gradient stand once in the compiled program. Under `vmap` every lane is at its own phase: no lane
waits for another lane's line search, and the loop turns as often as the slowest lane evaluates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from secondorder import checks, closures, compiler, foreign, one_kernel, report, transform
from secondorder.curvature import products, sensitivity
from secondorder.globalization import stopping
from secondorder.globalization.stopping import Status
from secondorder.linalg import box, split, tree
from secondorder.optimizers.lbfgs import lbfgs
from secondorder.optimizers.lbfgsb import lbfgsb
from secondorder.optimizers.newton import newton
from secondorder.optimizers.newton_cg import newton_cg
from secondorder.optimizers.projected_newton import projected_newton

# With optimizer=None: parameters up to which the dense trust-region Newton is taken, and Newton by products.
DENSE_LIMIT, PRODUCTS_LIMIT = 200, 1000
NO_LIMIT = 2**31 - 1


class Result(NamedTuple):
    """The outcome of a run, a pytree; under `vmap` every field has a leading axis of lanes."""

    params: tree.ArrayTree  # the best accepted point
    value: jax.Array  # loss there
    grad: tree.ArrayTree  # gradient there, as jax.grad gives it
    grad_norm: jax.Array  # its max-norm; with bounds that of its free entries, the KKT residual
    curvature: jax.Array  # smallest eigenvalue of the Hessian there, where the optimizer knows it, else NaN
    status: jax.Array  # int32, a Status
    steps: jax.Array  # int32: accepted points after the start
    evaluations: jax.Array  # int32: values and gradients computed by this run
    hessian_products: jax.Array  # int32: single Hessian-vector products
    hessians: jax.Array  # int32: dense Hessians
    aux: Any  # auxiliary output of the loss at `params`, else None
    state: Any  # pass it as `state=` to go on from `params`
    history: report.History | None
    active: tree.ArrayTree | None = None  # int32, like params: -1 held at a lower bound, 1 at an upper one, else 0

    def __str__(self) -> str:
        """Return the outcome in a few lines, without the state."""
        lines = [f"{self.message}", f"value {self.value}, gradient (max-norm) {self.grad_norm}"]
        lines.append(f"{self.steps} steps, {self.evaluations} evaluations, {self.hessians} Hessians")
        return "\n".join([*lines, f"params {self.params}"])

    @property
    def success(self) -> Any:
        """Whether the gradient passes the test: a bool, or an array of them under `vmap`."""
        converged = (self.status == Status.CONVERGED) | (self.status == Status.RANK_DEFICIENT)
        return bool(converged) if is_host_scalar(self.status) else converged

    @property
    def message(self) -> Any:
        """The status in words, with the number of active bounds: a string, or a list of them after `vmap`."""
        return message(self.status, self.active, self.value.dtype)


class _Carry(NamedTuple):
    x: tree.ArrayTree  # the next point to evaluate, joined if the settings say so
    shown: tree.ArrayTree  # the same as the loss takes it: XLA compiles slices of a vector inside the loss slowly
    state: Any
    status: jax.Array
    aux: Any
    history: report.History | None


class Problem(NamedTuple):
    """What is minimized; hashable, and named first in the key of a compiled program."""

    fun: Callable[..., Any]  # fun(x, *args): the loss, or (loss, aux)
    has_aux: bool
    residual_fn: Callable[..., tree.ArrayTree] | None = None  # residual_fn(x, *args), for optimizers that need it
    finish: Callable[..., Any] | None = None  # finish(result, bounds, *args): what to make of the outcome
    aux_name: str = "aux"  # field of the outcome that holds the auxiliary output


class _Settings(NamedTuple):
    """What shapes the program; hashable."""

    problem: Problem
    optimizer: optax.GradientTransformation
    flat: bool
    history: int | None
    progress: bool
    callback: Callable[[report.Step], Any] | None
    aux: Any = None  # shapes and dtypes of the auxiliary output, once the loss has been traced


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
    callback: Callable[[report.Step], Any] | None
    state: Any


def minimize(
    fun: Callable[..., Any],
    x0: tree.ArrayTree,
    optimizer: optax.GradientTransformation | None = None,
    *,
    args: tuple[Any, ...] = (),
    bounds: tuple[Any, Any] | None = None,
    has_aux: bool = False,
    gtol: tree.Numeric | None = None,
    max_steps: int = 10_000,
    max_evaluations: int | None = None,
    history: bool = False,
    progress: bool = False,
    callback: Callable[[report.Step], Any] | None = None,
    state: Any = None,
) -> Result:
    """Minimize a loss from a start.

    Args:
      fun: Loss; fun(x, *args) is a real scalar, or (scalar, aux) with `has_aux`. It must be traceable by JAX.
      x0: Start; any pytree of floating-point arrays (a Python float counts as one). Integers and booleans are refused.
        Without any parameter the start is the answer: one evaluation, converged.
      optimizer: Any optax transformation. Default: `newton(chebyshev=None)` for up to 200 real parameters,
        `newton_cg()` for up to 1,000, else `lbfgs()`; with bounds `projected_newton()` for up to 200, else `lbfgsb()`,
        the two that take them.
      args: Further arguments of `fun`, a tuple of pytrees of arrays. They are traced: pass new data here, and the
        compiled program is used again. (What `fun` closes over is compiled in.)
      bounds: (lower, upper); each a number, or a tree like x0 of arrays that broadcast to its leaves; -inf and inf
        where there is none. The loss is never evaluated outside. x0 must be inside (under a trace, where that cannot
        be seen, it is moved inside).
      has_aux: Whether `fun` returns (value, aux).
      gtol: The run has converged when the max-norm of the gradient (with bounds, of its entries that no bound holds) is
        at most this, >= 0, in units of the gradient [f/x]. With 0 the run goes on to a gradient of exactly zero,
        or until it stalls at rounding level. Default: 1e-5 in float64, 1.2e-4 in float32 (max(1e-5, 1000 eps)).
      max_steps: Accepted steps at most, >= 0; with 0 the start alone is evaluated and tested. Default 10,000.
      max_evaluations: Values and gradients at most, >= 1: the start needs one. Default: no limit. (An optax line search
        evaluates on its own account: its last step may go beyond.)
      history: Record value, gradient norm and step length of every step; makes `max_steps` part of the program.
      progress: Show a tqdm bar, also from inside `jit`.
      callback: Called on the host after every step with a `Step`; the run ends if it returns True.
      state: `Result.state` of an earlier run, to go on with its curvature from `x0 = result.params`.

    Returns:
      A `Result`. Its `status` tells why the run ended and `success` is true only for a gradient that passed the test
      (for the Newton types: with no negative curvature). Budgets run out loudly: `Status.MAX_STEPS`,
      `Status.MAX_EVALUATIONS`. Numerical trouble is a status, never an exception: if the loss, its gradient or x0 is
      not finite at the start, `Status.NONFINITE_START` comes after one evaluation, with `params` equal to x0, and
      value, gradient and gradient norm are Inf, zero and Inf (of a resumed run: all those of the state).

    Raises:
      ValueError, TypeError: for arguments that cannot be right; each names the argument, the value and the remedy.

    Programs are compiled once per (fun, optimizer with its options, shapes) and kept. Works eagerly, in `jit` and under
    `vmap`. The leaves of unsharded parameters are joined into one vector inside; sharded leaves never are.

    Derivatives: `jax.grad`, `jax.jvp` and their compositions differentiate `params`, `value` and `aux` with respect to
    `args` and bounds (and to what `fun` closes over) by the implicit function theorem at the returned point, whatever
    the optimizer; see `docs/differentiation.md`. All other fields, and x0, have zero derivatives. Where the Hessian is
    singular the derivatives are those of least change, and the result of a differentiated run says `RANK_DEFICIENT`.
    After `NONFINITE_START` they are NaN.

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
    checks.flag(who, "has_aux", has_aux)
    if gtol is None:
        gtol = max(1e-5, 1000 * float(jnp.finfo(tree.scalar_dtype(arrays(who, x0, args))).eps))
    options = Options(gtol, max_steps, max_evaluations, history, progress, callback, state)
    x0 = arrays(who, x0, args)
    limits = None if bounds is None else checks.box(who, bounds, x0)
    return drive(who, Problem(fun, has_aux), x0, optimizer, args, limits, options)


def arrays(who: str, x0: tree.ArrayTree, args: Any, name: str = "x0") -> tree.ArrayTree:
    """Return the start with Python numbers made arrays, after checks of it and of `args`."""
    if not isinstance(args, tuple):
        raise TypeError(f"{who}: args must be a tuple, got {type(args).__name__}; for one argument write args=(a,).")
    checks.data(who, args)
    if x0 is None:
        raise TypeError(f"{who}: {name} must be an array or a pytree of arrays, got None.")
    checks.params(who, x0, allow_complex=True, name=name)
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
    for name, value in (("history", history), ("progress", progress)):
        checks.flag(who, name, value)
    max_steps = _budget(who, "max_steps", max_steps, 0, history, "leave it out for the default.")
    if max_evaluations is not None:
        max_evaluations = _budget(who, "max_evaluations", max_evaluations, 1, False, "the start itself needs one.")
    if optimizer is None:
        optimizer = _default(x0, bounded=bounds is not None)
    check_optimizer(who, optimizer)
    if bounds is not None and not (isinstance(optimizer, transform.Optimizer) and optimizer.takes_bounds):
        raise transform.no_bounds(who)
    if callback is not None:
        checks.function(who, "callback", callback)
    if progress:
        report.require_tqdm()

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
    quick = compiler.quick(*dynamic)
    try:
        hash(settings)
    except TypeError:  # a callable with arrays in it, for instance: compiled for this call alone
        return compiler.jit(functools.partial(_run, settings))(quick, *dynamic)
    return _compiled_run(quick, settings, *dynamic)


def check_optimizer(who: str, optimizer: Any) -> None:
    """Raise unless this is an optax transformation."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{who}: optimizer must be an optax transformation such as lbfgs(), got {optimizer!r}"
            + ("; call it: optimizer()." if callable(optimizer) else ".")
        )


def _run(
    settings: _Settings,
    x0: tree.ArrayTree,
    args: tuple[Any, ...],
    bounds: tuple[tree.ArrayTree, tree.ArrayTree] | None,
    state: Any,
    budget: _Budget,
) -> Any:
    """Return the outcome; the traced part of the drivers."""
    problem, args, aux = _hoisted(settings.problem, x0, args)
    return _solution(settings._replace(problem=problem, aux=aux), x0, args, bounds, state, budget)


_compiled_run = compiler.jit(_run, static_argnums=0)


def _hoisted(problem: Problem, x0: tree.ArrayTree, args: tuple[Any, ...]) -> tuple[Problem, tuple[Any, ...], Any]:
    """Return the problem with the traced values that its functions close over made arguments, and what aux looks like.

    A function that closes over nothing traced is returned as it is. For value and gradient the loss is traced here and
    in the loop, no more.
    """
    number = len(args)

    def hoist(function: Callable[..., Any], first: int) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        run, values, shape = closures.hoist(function, x0, *args)
        if not values:
            return lambda x, *given: function(x, *given[:number]), (), shape
        last = first + len(values)
        return lambda x, *given: run(given[first:last], x, *given[:number]), values, shape

    fun, values, shape = hoist(problem.fun, number)
    checks.scalar_loss("minimize", problem.fun, shape, has_aux=problem.has_aux)
    aux = shape[1] if problem.has_aux else None
    residual_fn, more = problem.residual_fn, ()
    if residual_fn is not None:
        residual_fn, more, _ = hoist(residual_fn, number + len(values))
    if not (values or more):
        return problem, args, aux
    return problem._replace(fun=fun, residual_fn=residual_fn), (*args, *values, *more), aux


def _solution(settings: _Settings, *dynamic: Any) -> Any:
    """Return the outcome, differentiable as a minimum is.

    The settings are closed over: as an argument that is not differentiated, JAX would build their trees anew, and an
    optimizer would lose what it knows besides `init` and `update`. What its options have traced is handed in.
    """
    run, options, _ = closures.hoist(functools.partial(_outcome, settings), *dynamic)
    solution = jax.custom_jvp(one_kernel.as_one(run))
    solution.defjvp(functools.partial(_derivatives, solution, settings.problem), symbolic_zeros=True)
    return solution(options, *dynamic)


def _outcome(
    settings: _Settings,
    x0: tree.ArrayTree,
    args: tuple[Any, ...],
    bounds: tuple[tree.ArrayTree, tree.ArrayTree] | None,
    state: Any,
    budget: _Budget,
) -> Any:
    """Return the outcome of the loop."""
    fun, has_aux, residual_fn, finish, _ = settings.problem
    dtype = tree.scalar_dtype(x0)
    if bounds is not None:
        x0 = jax.tree.map(jnp.clip, x0, *bounds)

    def restore(x: tree.ArrayTree) -> tree.ArrayTree:
        return split.split(x, x0) if settings.flat else x

    def loss(x: tree.ArrayTree) -> tuple[jax.Array, Any]:
        out = fun(x, *args)
        return out if has_aux else (out, None)

    def joined(x: tree.ArrayTree) -> tree.ArrayTree:
        return tree.ravel(x, jax.tree.leaves(x0)[0].dtype) if settings.flat else x

    start = joined(x0)

    def value_fn(x: tree.ArrayTree, hvp_fn: Any = None, residual_fn: Any = None) -> jax.Array:
        del hvp_fn, residual_fn  # optax's zoom line search refuses arguments that the loss does not take
        return loss(restore(x))[0]

    optimizer = foreign.tracked(settings.optimizer, value_fn)
    ours = isinstance(optimizer, transform.Optimizer)
    makes_gradient = ours and optimizer.makes_gradient
    extra: dict[str, Any] = {"hvp_fn": products.hvp(value_fn)}
    if residual_fn is not None:
        extra["residual_fn"] = lambda x: residual_fn(restore(x), *args)
    limits = None if bounds is None else tuple(joined(bound) for bound in bounds)
    if limits is not None:
        extra["bounds"] = limits
    elif state is not None and ours and optimizer.takes_bounds:
        # Bounds belong to a call, like all its options: those that the state remembers are over.
        extra["bounds"] = tuple(
            jax.tree.map(lambda x, far=far: jnp.full_like(x, far), start) for far in (-np.inf, np.inf)
        )
    if ours:
        extra["gtol"] = budget.gtol
    if state is None:  # what another optimizer's `init` returns need not be arrays, which parts ask for
        state = (one_kernel.in_parts(optimizer.init, start) if ours else optimizer.init)(start)
    seen = transform.info(state)  # before this run
    assert seen is not None

    def turn(carry: _Carry) -> _Carry:
        # 1. Evaluate: the only place where the loss stands.
        if makes_gradient:
            (value, aux), grad = loss(carry.shown), carry.state.grad
        else:
            (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(carry.shown)
            grad = tree.join_like(grad, carry.x)
        x, *others = follow(carry, value, grad, aux)
        return _Carry(x, restore(x), *others)

    def after(carry: _Carry, value: jax.Array, grad: tree.ArrayTree, aux: Any) -> tuple[Any, ...]:
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
            track = report.write(track, jnp.where(stepped, steps, NO_LIMIT), entry)
        if settings.progress:
            jax.debug.callback(report.show, steps, budget.max_steps, value, info.grad_norm, status)
        if settings.callback is not None:
            step = report.Step(steps, evaluations, value, info.grad_norm, carry.shown)
            stop = report.tell(settings.callback, stepped, step)
            status = jnp.where(stop & (status == Status.RUNNING), Status.CALLBACK, status).astype(jnp.int32)
        x = jax.tree.map(jnp.add, carry.x, move)
        if limits is not None:
            x = jax.tree.map(box.land, x, *limits)  # the sum may round to either side of a bound
        return x, state, status, aux, track

    follow = one_kernel.in_parts(after, start)
    aux = tree.zeros_like(settings.aux)
    track = report.empty_history(settings.history, dtype)
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
        active=None if bounds is None else box.active(restore(best.params), restore(best.grad), bounds),
    )
    return result if finish is None else finish(result, bounds, *args)


def _derivatives(
    solution: Callable[..., Any], problem: Problem, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Return the outcome and its derivatives along a change of args and bounds, by the implicit function theorem.

    `params`, `value` and the auxiliary output (the residual) move; all else is constant. Options of the optimizer, the
    start, a state and the budgets have no influence on a minimum.
    """
    _, _, args, bounds, _, _ = primals
    _, _, args_dot, bounds_dot, _, _ = tangents
    outcome = solution(*primals)
    still = jax.tree.map(jax.custom_derivatives.zero_from_primal, outcome)
    if all(map(_is_zero, jax.tree.leaves((args_dot, bounds_dot), is_leaf=_is_zero))):
        return outcome, still
    args_dot, bounds_dot = jax.tree.map(_instantiate, (args_dot, bounds_dot), is_leaf=_is_zero)
    x, held = outcome.params, None
    if bounds is not None:
        move = jax.tree.map(
            lambda side, lower, upper: jnp.where(side < 0, lower, jnp.where(side > 0, upper, 0.0)),
            outcome.active,
            *bounds_dot,
        )
        held = sensitivity.Held(jax.tree.map(lambda side: side == 0, outcome.active), move)
    dot = sensitivity.tangents(problem.fun, problem.has_aux, x, args, args_dot, held)
    singular = dot.singular & (outcome.status == Status.CONVERGED)
    outcome = outcome._replace(status=jnp.where(singular, Status.RANK_DEFICIENT, outcome.status).astype(jnp.int32))
    # No run, no minimum: NaN. A factor, since only what is linear in the tangent has a reverse mode.
    known = jnp.where(outcome.status == Status.NONFINITE_START, jnp.nan, 1.0)
    moving = {
        "params": jax.tree.map(lambda u: (known * u).astype(u.dtype), dot.params),
        "value": (known * dot.value).astype(outcome.value.dtype),
    }
    if problem.has_aux:
        moving[problem.aux_name] = dot.aux
    return outcome, still._replace(**moving)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _instantiate(tangent: Any) -> Any:
    """Return a tangent as an array; zeros of integers have the dtype that `jax.jvp` asks for."""
    if not _is_zero(tangent):
        return tangent
    if tangent.dtype == jax.dtypes.float0:
        return np.zeros(tangent.shape, jax.dtypes.float0)
    return jnp.zeros(tangent.shape, tangent.dtype)


def _status(info: stopping.Info, steps: jax.Array, evaluations: jax.Array, budget: _Budget) -> jax.Array:
    """Return the status after a turn; what comes later here takes precedence."""
    status = jnp.int32(Status.RUNNING)
    status = jnp.where(evaluations >= budget.max_evaluations, Status.MAX_EVALUATIONS, status)
    status = jnp.where(steps >= budget.max_steps, Status.MAX_STEPS, status)
    status = jnp.where(info.status != Status.RUNNING, info.status, status)
    # What a resumed run knows of its last point says nothing about a start that is not finite.
    converged = (info.optimality <= budget.gtol) & ~info.indefinite & (info.status != Status.NONFINITE_START)
    return jnp.where(converged, Status.CONVERGED, status).astype(jnp.int32)


def _default(x0: tree.ArrayTree, *, bounded: bool) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer for a problem of this size."""
    is_complex = any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(x0))
    small = tree.size(x0) <= DENSE_LIMIT and not is_complex
    if bounded:
        return projected_newton() if small else lbfgsb()
    if small:
        return newton(chebyshev=None)
    return newton_cg() if tree.size(x0) <= PRODUCTS_LIMIT and not is_complex else lbfgs()


def _check_state(who: str, optimizer: optax.GradientTransformation, state: Any, x0: tree.ArrayTree, flat: bool) -> bool:
    """Return whether `state` belongs to the joined leaves; raise if it fits neither them nor x0."""

    def fits(x: tree.ArrayTree) -> bool:
        expected = jax.eval_shape(foreign.tracked(optimizer, lambda _: jnp.zeros(())).init, x)
        if jax.tree.structure(expected) != jax.tree.structure(state):
            return False
        pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True)
        return all(jnp.shape(a) == jnp.shape(b) and a.dtype == getattr(b, "dtype", None) for a, b in pairs)

    if flat and fits(jnp.zeros(tree.size(x0), jax.tree.leaves(x0)[0].dtype)):
        return True
    if fits(x0):
        checks.same_shardings(who, x0, transform.accepted(state).params)
        return False
    expected = jax.eval_shape(foreign.tracked(optimizer, lambda _: jnp.zeros(())).init, x0)
    kinds = type(getattr(state, "inner", state)).__name__, type(getattr(expected, "inner", expected)).__name__
    differ = f"got {kinds[0]}, need {kinds[1]}" if kinds[0] != kinds[1] else "structure, shapes or dtypes differ"
    raise ValueError(
        f"{who}: state does not belong to this optimizer and x0 ({differ}); pass Result.state of a run with the same "
        "optimizer options and parameters of the same shapes, or leave it out."
    )


def _budget(who: str, name: str, value: Any, low: int, shapes: bool, hint: str) -> Any:
    """Return the budget as an int32 can hold it, after checks; one that `shapes` the program must be known."""
    if checks.traced(value) and not shapes:
        return value
    if checks.traced(value):
        raise TypeError(f"{who}: with history=True, {name} must be known when the program is traced, got {value!r}.")
    if isinstance(value, jax.Array) and not checks.traced(value) and value.shape == () and value.dtype.kind in "iu":
        value = int(value)
    checks.integer(who, name, value, low, hint)
    return min(int(value), NO_LIMIT)


def message(status: Any, active: tree.ArrayTree | None, dtype: Any) -> Any:
    """Return a status in words, with the number of active bounds: a string, or a list of them after `vmap`.

    A run of this dtype that stalled where the loss's own products may have lost digits says so.
    """
    hint = ""
    set_to = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if dtype == np.float32 and jax.default_backend() != "cpu" and set_to is None:
        hint = "; accelerators round the factors of float32 products: see jax_default_matmul_precision"
    codes = np.asarray(status)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(active)]
    held = sum((np.sum(leaf != 0, axis=tuple(range(codes.ndim, leaf.ndim))) for leaf in leaves), np.int64(0))
    counts = np.broadcast_to(held, codes.shape).ravel()
    tails = [f"; {count} active bound{'s' if count > 1 else ''}" if count else "" for count in counts]
    words = [
        Status(int(code)).message + tail + (hint if code == Status.STALLED else "")
        for code, tail in zip(codes.ravel(), tails, strict=True)
    ]
    return words[0] if codes.ndim == 0 else words


def is_host_scalar(status: Any) -> bool:
    """Return whether a status is one number that is known now."""
    return not isinstance(status, Tracer) and np.ndim(status) == 0
