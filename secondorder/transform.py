"""From an algorithm to an optax transformation: one evaluation in, one move out.

An algorithm is four pure functions on its own state (see `Algorithm`). This file turns them into the `update` of an
`optax.GradientTransformationExtraArgs`, in the two ways of calling that optax knows:

- *one evaluation in, one move out*: without `value_fn`, `update` judges the point it was shown and returns the move
  to the next point worth evaluating;
- *the optax idiom*: with `value_fn`, `update` begins at the gradient it was handed and goes through trials of its own
  until one is accepted, so that one call is one iteration.

Both run the same functions; nothing here knows which algorithm it drives.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, compiler, one_kernel
from secondorder.curvature import products
from secondorder.globalization import stopping
from secondorder.linalg import tree

Hvp = Callable[[tree.ArrayTree, tree.ArrayTree], tree.ArrayTree]
F = TypeVar("F", bound=Callable[..., Any])
LEAVES = 4  # of the parameters, of which a whole iteration in parts compiles faster than as it is


class Point(NamedTuple):
    """An evaluated point."""

    params: tree.ArrayTree
    loss: jax.Array  # shape (), the state's scalar dtype; Inf if it is not known
    grad: tree.ArrayTree  # as `jax.grad` gives it


class Algorithm(NamedTuple):
    """The pure functions that make an optimizer.

    Every state has the fields `count` (calls of `update`; optax's name), `params`, `loss` and `grad` of the point that
    was accepted last, `value` (the same loss while the caller stands at that point, else Inf: what
    `optax.value_and_grad_from_state` looks for), `fresh` (no ray or region is in flight) and `info`.
    """

    name: str  # public name, for error messages
    init: Callable[[tree.ArrayTree], Any]  # params -> state
    judge: Callable[[Any, Point], Any]  # accept the point (then state.fresh), or prepare the next trial
    begin: Callable[[Any, Any, Any], Any]  # start a ray or region at the accepted point, where the flag holds; it is
    # handed the curvature: hvp_fn, or residual_fn where the algorithm needs one
    rebase: Callable[[Any, Point], Any]  # stand at a point whose value and gradient the caller vouches for
    trial: Callable[[Any], tree.ArrayTree]  # the next point to evaluate
    needs_value: bool = True
    needs_curvature: bool = False
    needs_residual: bool = False
    confine: Callable[[Any, Any], Any] | None = None  # take in (lower, upper), trees like params
    until: Callable[[Any, Any], Any] | None = None  # take in gtol, the gradient norm at which the driver will stop
    aim: Callable[[Any, Any], Any] | None = None  # what each trial needs, beyond what begin made
    makes_gradient: bool = False  # takes the gradient from the Jacobian; the one handed in is only looked at for NaN
    allow_complex: bool = False
    joins: bool = True  # works on the leaves joined into one vector as well as on a tree


class Optimizer(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` whose state holds the point accepted last; see `accepted`."""

    makes_gradient: bool = False  # itself, from the Jacobian: a driver hands it the one in its state back
    takes_bounds: bool = False  # keeps all trials within the extra argument `bounds`
    joins: bool = True  # a driver may show it the leaves joined into one vector


class Accepted(NamedTuple):
    """The point that an optimizer accepted last."""

    params: tree.ArrayTree
    value: jax.Array
    grad: tree.ArrayTree


def accepted(state: optax.OptState) -> Accepted:
    """Return the point accepted last, from the state of any optimizer of this library.

    A loop that stops at any moment, also in the middle of a line search, can return these parameters.

    Args:
      state: State of an optimizer, also inside `optax.chain`, `optax.masked` and other wrappers (there the trees are
        those that the wrapper showed to the optimizer).

    Returns:
      `Accepted(params, value, grad)`. Before the first evaluation the value is Inf. With a fixed learning rate and no
      `value` passed to `update`, the value is Inf as well.

    Raises:
      ValueError: if `state` holds none, or more than one, of this library's states.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> optimizer = so.lbfgs()
      >>> state = optimizer.init(jnp.array([1.0]))
      >>> so.accepted(state).params.tolist()
      [1.0]
    """
    found = _own_states(state)
    if len(found) != 1:
        raise ValueError(
            f"accepted: state must hold one state of a secondorder optimizer with a search, found {len(found)}; pass "
            "what optimizer.init or optimizer.update returned."
        )
    return Accepted(found[0].params, found[0].loss, found[0].grad)


def info(state: optax.OptState) -> stopping.Info | None:
    """Return the `Info` inside a state, through wrappers; None if there is none or more than one."""
    found = _own_states(state)
    return found[0].info if len(found) == 1 else None


def valid(loss: jax.Array, needs_value: bool) -> jax.Array:
    """Return whether a loss may be accepted; one that nobody gave (Inf) may where no value is needed."""
    return jnp.isfinite(loss) if needs_value else ~jnp.isnan(loss)


def settle(state: Any) -> Any:
    """Return a state with no ray in flight: the next `update` starts at the point that it is shown."""

    def one(node: Any) -> Any:
        if not _is_own(node):
            return node
        inside = {"inner": settle(node.inner)} if hasattr(node, "inner") else {}
        return node._replace(fresh=jnp.ones_like(node.fresh), **inside)

    return jax.tree.map(one, state, is_leaf=_is_own)


def cached(constructor: F) -> F:
    """Return equal objects for equal options, so that programs compiled for one optimizer serve the next."""
    store: dict[Any, Any] = {}
    signature = inspect.signature(constructor)

    @wraps(constructor)
    def build(*args: Any, **kwargs: Any) -> Any:
        for name, value in kwargs.items():
            if name not in signature.parameters:
                options = ", ".join(signature.parameters) or "none"
                raise TypeError(f"{constructor.__name__}: no option {name}={value!r}; its options are: {options}.")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{constructor.__name__}: {error}.") from None
        bound.apply_defaults()
        # 1, 1.0 and True are equal in Python, but not as options: the types belong to the key.
        key = tuple((name, type(value), value) for name, value in bound.arguments.items())
        try:
            hash(key)
        except TypeError:  # arrays and tracers, as optax.inject_hyperparams passes them
            return constructor(*args, **kwargs)
        if key not in store:
            store[key] = constructor(*args, **kwargs)
        return store[key]

    return build  # type: ignore[return-value]


def optimizer(algorithm: Algorithm) -> Optimizer:
    """Return the optax pair that runs `algorithm`."""
    who = algorithm.name

    def init(params: tree.ArrayTree) -> Any:
        checks.params(who, params, allow_complex=algorithm.allow_complex)
        return _separate(algorithm.init(as_arrays(params)))

    def update(
        updates: tree.ArrayTree,
        state: Any,
        params: tree.ArrayTree | None = None,
        *,
        value: tree.Numeric | None = None,
        grad: tree.ArrayTree | None = None,
        value_fn: Callable[..., Any] | None = None,
        hvp_fn: Hvp | None = None,
        residual_fn: Callable[..., Any] | None = None,
        bounds: tuple[tree.ArrayTree, tree.ArrayTree] | None = None,
        gtol: tree.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, Any]:
        del grad  # optax.lbfgs asks for it; it is the gradient in `updates`
        _check_update(algorithm, updates, state, params, value, value_fn, hvp_fn, residual_fn, bounds)
        functions = _Functions(value_fn, hvp_fn, residual_fn if algorithm.needs_residual else None)
        extra = taken_by(value_fn, extra_args)
        residual_extra = taken_by(functions.residual, extra_args)
        if algorithm.until is None:
            gtol = None
        dynamic = (updates, state, params, value, bounds, gtol, extra, residual_extra)
        inline = checks.traced(dynamic) or not _all_arrays(dynamic) or not _hashable(*functions)
        if inline or not algorithm_is_static:
            return _update(algorithm, step, functions, *dynamic)
        return compiled(compiler.quick(params), functions, *dynamic)

    # An eager call runs one compiled program per (shapes, functions). Inside a trace, `update` is inlined.
    algorithm_is_static = not _closes_over_arrays(algorithm)
    step = _one_step(algorithm)
    compiled = compiler.jit(partial(_update, algorithm, step), static_argnums=0)
    made = Optimizer(init, update)
    made.makes_gradient = algorithm.makes_gradient
    made.takes_bounds = algorithm.confine is not None
    made.joins = algorithm.joins
    return made


def pair(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """Return the optax pair of a direction-only block; the loose types let `update` name its own state."""
    return optax.GradientTransformationExtraArgs(lambda params: _separate(init(params)), update)


def curvature(
    who: str, updates: tree.ArrayTree, params: Any, value_fn: Any, hvp_fn: Hvp | None, extra_args: dict[str, Any]
) -> Hvp:
    """Return the curvature product that the caller of a direction-only block handed in, after the checks."""
    if params is None:
        raise checks.missing(who, "the parameters", "update(grads, state, params, hvp_fn=...)")
    checks.params(who, params)
    checks.same_shapes(who, updates, params, "the gradient (first argument)")
    if hvp_fn is not None:
        checks.product(who, hvp_fn)
        return hvp_fn
    if value_fn is None:
        raise _no_curvature(who)
    checks.function(who, "value_fn", value_fn)
    return products.hvp(_value_only(who, value_fn), **taken_by(value_fn, extra_args))


def as_arrays(params: tree.ArrayTree) -> tree.ArrayTree:
    """Return the tree with Python numbers made arrays; abstract leaves (`jax.ShapeDtypeStruct`) stay as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x), params)


def _separate(state: Any) -> Any:
    """Return the state with a buffer of its own for every leaf: one buffer cannot be donated twice."""
    return state if checks.traced(state) else tree.copy(state)


class _Functions(NamedTuple):
    """What a caller handed to `update` that is a function; hashable."""

    value: Callable[..., Any] | None
    hvp: Hvp | None
    residual: Callable[..., Any] | None


def _update(
    algorithm: Algorithm,
    step: Callable[[Any, Any, Point], tuple[tree.ArrayTree, Any]],
    functions: _Functions,
    updates: tree.ArrayTree,
    state: Any,
    params: tree.ArrayTree,
    value: tree.Numeric | None,
    bounds: tuple[tree.ArrayTree, tree.ArrayTree] | None,
    gtol: tree.Numeric | None,
    extra: dict[str, Any],
    residual_extra: dict[str, Any],
) -> tuple[tree.ArrayTree, Any]:
    """Return the move and the new state; the two ways of calling."""
    params = jax.tree.map(jnp.asarray, params)
    # jax.grad's convention inside; optax users hand in the conjugate, which is the direction of ascent.
    grad = tree.conj(tree.cast_like(updates, state.grad))
    loss = _known(jnp.inf if value is None else value, state.loss, given=value is not None)
    shown = Point(params, loss, grad)
    value_fn, curvature, residual_fn = functions
    if residual_fn is not None:
        curvature = partial(residual_fn, **residual_extra)
    elif curvature is None and value_fn is not None and algorithm.needs_curvature:
        curvature = products.hvp(_value_only(algorithm.name, value_fn), **extra)
    if bounds is not None and algorithm.confine is not None:
        state = algorithm.confine(state, bounds)
    if gtol is not None and algorithm.until is not None:
        state = algorithm.until(state, gtol)
    own_trials = value_fn is not None and (algorithm.needs_value or bool(extra))
    if own_trials:
        state = _iterate(
            algorithm, state, shown, curvature, partial(_value_and_grad(algorithm.name, value_fn), **extra)
        )
        if not extra:  # extra arguments may be a batch: its value and gradient hold for this call only
            state = state._replace(value=state.loss)
        target = state.params
    else:
        return step(curvature, state, shown)
    return tree.sub(target, params), state._replace(count=state.count + 1)


def _one_step(algorithm: Algorithm) -> Callable[[Any, Any, Point], tuple[tree.ArrayTree, Any]]:
    """Return the function from the curvature, a state and the point shown to the move and the new state."""

    def step(curvature: Any, state: Any, shown: Point) -> tuple[tree.ArrayTree, Any]:
        state = algorithm.judge(state, shown)
        state = algorithm.begin(state, curvature, state.fresh & jnp.isfinite(state.info.grad_norm))
        state = _aimed(algorithm, state, curvature)
        return tree.sub(algorithm.trial(state), shown.params), state._replace(count=state.count + 1)

    if algorithm.needs_curvature or algorithm.needs_residual:  # a function, and another one for every trace
        return lambda curvature, state, shown: one_kernel.in_parts(partial(step, curvature), shown.params)(state, shown)
    known = jax.jit(partial(step, None))  # an eager `vmap` of it compiles once
    return lambda _, state, shown: one_kernel.in_parts(known, shown.params)(state, shown)


def _known(loss: Any, like: jax.Array, *, given: bool) -> jax.Array:
    """Return the loss in the dtype of the state; one that is given and not finite is NaN, to tell it from none."""
    loss = jnp.asarray(loss).astype(like.dtype)
    return jnp.where(jnp.isfinite(loss), loss, jnp.nan) if given else loss


def _iterate(
    algorithm: Algorithm,
    state: Any,
    shown: Point,
    curvature: Any,
    value_and_grad: Callable[[tree.ArrayTree], tuple[jax.Array, tree.ArrayTree]],
) -> Any:
    """Return the state after one whole iteration from the point shown, by trials of our own."""
    cut = partial(one_kernel.in_parts, params=shown.params, most=LEAVES)

    def start(state: Any, shown: Point) -> Any:
        finite = jnp.isfinite(tree.max_norm(shown.grad)) & valid(shown.loss, algorithm.needs_value)
        first = state.info.evaluations == 0
        # A non-finite point leaves no ray to follow: we stay at the point accepted last, and the status says why.
        last = Point(state.params, state.loss, state.grad)
        state = algorithm.rebase(state, tree.where(finite, shown, last))
        evaluations = state.info.evaluations + first.astype(jnp.int32)  # the caller's own evaluation of the start
        state = state._replace(info=state.info._replace(evaluations=evaluations))
        state = algorithm.begin(state, curvature, jnp.array(True))
        status = jnp.where(finite, state.info.status, jnp.int32(stopping.Status.NONFINITE_START))
        info = state.info._replace(status=status, accepted=finite)
        return state._replace(fresh=~finite, value=jnp.full_like(state.value, jnp.inf), info=info)

    def trial(state: Any) -> tuple[Any, tree.ArrayTree]:
        state = _aimed(algorithm, state, curvature)
        return state, algorithm.trial(state)

    def judge(state: Any, x: tree.ArrayTree, loss: jax.Array, grad: tree.ArrayTree) -> Any:
        return algorithm.judge(state, Point(x, _known(loss, state.loss, given=True), tree.cast_like(grad, state.grad)))

    def turn(state: Any) -> Any:
        state, x = cut(trial)(state)
        return cut(judge)(state, x, *value_and_grad(x))

    return jax.lax.while_loop(lambda s: ~s.fresh, turn, cut(start)(state, shown))


def _aimed(algorithm: Algorithm, state: Any, curvature: Any) -> Any:
    """Return the state that knows what its next trial asks of the curvature."""
    return state if algorithm.aim is None else algorithm.aim(state, curvature)


def _check_update(
    algorithm: Algorithm,
    updates: tree.ArrayTree,
    state: Any,
    params: tree.ArrayTree | None,
    value: Any,
    value_fn: Any,
    hvp_fn: Any,
    residual_fn: Any,
    bounds: Any,
) -> None:
    who = algorithm.name
    if params is None:
        raise checks.missing(who, "the parameters", "update(grads, state, params, value=value)")
    checks.params(who, params, allow_complex=algorithm.allow_complex)
    checks.same_shapes(who, updates, params, "the gradient (first argument)")
    if not hasattr(state, "params"):
        raise TypeError(
            f"{who}: state must be what init(params) or the last update returned, got {type(state).__name__}."
        )
    checks.same_shapes(who, state.params, params, "state.params", remedy="pass the state of a run with these params")
    if value_fn is not None:
        checks.function(who, "value_fn", value_fn)
    if hvp_fn is not None:
        checks.product(who, hvp_fn)
    if value is not None:
        checks.scalar_value(who, value)
    elif algorithm.needs_value:
        raise checks.missing(who, "the value of the loss at params", "update(grads, state, params, value=value)")
    if algorithm.needs_curvature and value_fn is None and hvp_fn is None:
        raise _no_curvature(who)
    if algorithm.needs_residual:
        _check_residual(who, residual_fn)
    if bounds is not None:
        _check_bounds(algorithm, params, bounds)


def _check_residual(who: str, residual_fn: Any) -> None:
    if residual_fn is None:
        raise checks.missing(
            who,
            "residual_fn, which returns the residuals r of the loss ||r||²/2",
            "update(grads, state, params, value=value, residual_fn=residual_fn), or least_squares(residual_fn, x0)",
        )
    checks.function(who, "residual_fn", residual_fn)


def no_bounds(who: str) -> ValueError:
    """Return the error for bounds that would not be kept."""
    return ValueError(
        f"{who}: bounds are not supported by this optimizer; lbfgsb() and projected_newton() take them, and "
        "levenberg_marquardt() in least_squares, each unwrapped."
    )


def _check_bounds(algorithm: Algorithm, params: tree.ArrayTree, bounds: Any) -> None:
    who = algorithm.name
    if algorithm.confine is None:
        raise no_bounds(who)
    if not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise TypeError(f"{who}: bounds must be (lower, upper), two trees like params, got {bounds!r}.")
    for name, bound in zip(("lower", "upper"), bounds, strict=True):
        checks.same_shapes(who, bound, params, f"bounds ({name})", remedy="use -inf or inf where there is no bound")


def _no_curvature(who: str) -> ValueError:
    return checks.missing(
        who,
        "curvature, as hvp_fn or value_fn",
        "update(grads, state, params, value=value, hvp_fn=secondorder.curvature.hvp(loss))",
    )


def taken_by(value_fn: Callable[..., Any] | None, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the extra arguments that `value_fn` takes; in a chain the others are meant for somebody else."""
    if value_fn is None or not extra:
        return {}
    try:
        parameters = inspect.signature(value_fn).parameters
    except (TypeError, ValueError):
        return extra
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}


def _all_arrays(dynamic: Any) -> bool:
    return all(hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex)) for leaf in jax.tree.leaves(dynamic))


def _hashable(*functions: Any) -> bool:
    try:
        hash(functions)
    except TypeError:
        return False
    return True


def _closes_over_arrays(algorithm: Algorithm) -> bool:
    """Return whether an option of the algorithm is an array: such a closure must not be a key of a program cache."""
    cells = [
        cell.cell_contents
        for function in algorithm
        if inspect.isfunction(function)
        for cell in function.__closure__ or ()
    ]
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cells))


def _value_only(who: str, value_fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Return the loss without its auxiliary output; it raises where that is no real scalar."""

    def value(params: tree.ArrayTree, **extra: Any) -> jax.Array:
        out = value_fn(params, **extra)
        out = out[0] if isinstance(out, tuple) else out
        checks.scalar_value(who, out, "what value_fn returns")
        return out

    return value


def _value_and_grad(who: str, value_fn: Callable[..., Any] | None) -> Callable[..., tuple[jax.Array, tree.ArrayTree]]:
    assert value_fn is not None
    return jax.value_and_grad(_value_only(who, value_fn))


def _is_own(node: Any) -> bool:
    return hasattr(node, "_fields") and {"params", "loss", "grad", "fresh", "info"} <= set(node._fields)


def _own_states(state: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(state, is_leaf=_is_own) if _is_own(node)]
