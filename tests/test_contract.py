"""What every optimizer promises, whatever its algorithm; parametrized over `registry.REGISTRY`.

Trajectories are compared in float64, where two ways of running the same iteration differ by rounding only. Wherever
a wrapper of optax is meaningful, the test says what it must give; where it is not, it is because

- `optax.apply_if_finite` withholds a non-finite gradient from the optimizer and stays where it is, so that a search
  never learns that its trial hit a wall. The optimizers reject such trials by themselves; around them the wrapper
  changes nothing as long as gradients are finite, which is what is tested.
- `optax.MultiSteps` passes on the value of the last of the k losses that it averages. A search needs the value that
  belongs to the averaged gradient, so it is tested with equal losses, and on a fixed rate with different ones.
- `optax.multi_transform` with two searches: each would see the loss change by the other's move. Tested with one
  search and frozen parameters, and with a fixed rate beside another optimizer.
- `optax.masked` shows the optimizer a tree with holes, and so do the functions see one that it calls (`hvp_fn`).
"""

import functools
import inspect
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import float64
from jax.flatten_util import ravel_pytree
from registry import BLOCKS, RATE, REGISTRY, Block, Entry, extra_args

import secondorder as so
from secondorder import Status

N = 7
START, ELSEWHERE = np.linspace(-1.0, 2.0, N), np.cos(np.arange(N))
TURNS = 12  # evaluations per trajectory
every_optimizer = pytest.mark.parametrize("name", REGISTRY)
of_any_loss = pytest.mark.parametrize("name", [e.name for e in REGISTRY.values() if not e.residual])
searching = pytest.mark.parametrize("name", [e.name for e in REGISTRY.values() if e.searches])
fixed_rate = pytest.mark.parametrize("name", [e.name for e in REGISTRY.values() if not e.searches])
one_of_each_kind = pytest.mark.parametrize(
    "name", [pytest.param(e.name, marks=pytest.mark.slow if e.variant else ()) for e in REGISTRY.values()]
)


class Layer(NamedTuple):
    weight: Any
    bias: Any


@chex.dataclass
class Scale:
    factor: Any
    power: Any


def everything(v: Any) -> Any:
    """Return a tree of N entries with every kind of node, scalar leaves, leaves without entries, and empty subtrees."""
    return {
        "layers": [Layer(v[0:2].reshape(2, 1), None), Layer(v[2:4], {})],
        "nothing": (),
        "none": jnp.zeros((0, 3), v.dtype),
        "scale": Scale(factor=v[4], power=v[5]),
        "scalar": (v[6],),
    }


def bowl(params: Any) -> jax.Array:
    """Return a strictly convex loss that couples all entries, in the order of `jax.tree.leaves`."""
    leaves = jax.tree.leaves(params)
    widest = jnp.result_type(jnp.float32, *leaves) if leaves else jnp.float32
    x = jnp.concatenate([jnp.ravel(leaf).astype(widest) for leaf in leaves]) if leaves else jnp.zeros(0)
    k = jnp.arange(1, x.size + 1)
    return 0.5 * jnp.sum(k * (x - 0.1 * k) ** 2) + jax.nn.logsumexp(jnp.append(x, 0.0))


def bowl_residual(params: Any) -> list[jax.Array]:
    """Return residuals whose half sum of squares is `bowl`."""
    leaves = jax.tree.leaves(params)
    widest = jnp.result_type(jnp.float32, *leaves) if leaves else jnp.float32
    x = jnp.concatenate([jnp.ravel(leaf).astype(widest) for leaf in leaves]) if leaves else jnp.zeros(0)
    k = jnp.arange(1, x.size + 1)
    return [jnp.sqrt(k) * (x - 0.1 * k), jnp.sqrt(2.0 * jax.nn.logsumexp(jnp.append(x, 0.0)))]


RESIDUALS: dict[Any, Callable[..., Any]] = {bowl: bowl_residual}


def residual_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return residuals r with ||r||²/2 = loss: those that are known, or for a positive loss its root."""
    return RESIDUALS.get(loss, lambda x: jnp.sqrt(2.0 * loss(x)))


class Trajectory(NamedTuple):
    points: Any  # parameters shown to the optimizer, with a leading axis
    state: Any  # at the end


def shown(entry: Entry | Block, optimizer: Any, loss: Callable[..., Any], params: Any, state: Any) -> tuple[Any, Any]:
    """Return the move and the new state, when the caller evaluates the loss."""
    value, grad = jax.value_and_grad(loss)(params)
    extra = extra_args(entry, value, so.curvature.hvp(loss), residual_of(loss))
    return optimizer.update(grad, state, params, **extra)


def idiom(optimizer: Any, loss: Callable[..., Any], params: Any, state: Any) -> tuple[Any, Any]:
    """Return the move and the new state of one whole iteration, as code for optax.lbfgs asks for it."""
    value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
    return optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss, residual_fn=residual_of(loss))


def scan(step: Callable[..., Any], optimizer: Any, params: Any, turns: int = TURNS) -> Trajectory:
    """Return the trajectory of `step`, in one `lax.scan`."""

    def turn(carry: Any, _: None) -> Any:
        params, state = carry
        move, state = step(params, state)
        params = optax.apply_updates(params, move)
        return (params, state), params

    (_, state), points = jax.lax.scan(turn, (params, optimizer.init(params)), None, turns)
    return Trajectory(points, state)


def loop(step: Callable[..., Any], optimizer: Any, params: Any, turns: int = TURNS) -> Trajectory:
    """Return the trajectory of `step`, in a Python loop."""
    state, points = optimizer.init(params), []
    for _ in range(turns):
        move, state = step(params, state)
        params = optax.apply_updates(params, move)
        points.append(params)
    return Trajectory(jax.tree.map(lambda *xs: jnp.stack(xs), *points), state)


@functools.cache
def reference(name: str) -> Callable[[Any], Trajectory]:
    """Return the compiled run on one vector with which the other ways of running are compared."""
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    return jax.jit(lambda x: scan(functools.partial(shown, entry, optimizer, bowl), optimizer, x))


def wrapped(name: str, optimizer: Any, start: Any = START, loss: Callable[..., Any] = bowl) -> Trajectory:
    """Return the trajectory of a wrapped optimizer that is called like the entry `name`."""
    step = functools.partial(shown, REGISTRY[name], optimizer, loss)
    return jax.jit(lambda x: scan(step, optimizer, x))(jax.tree.map(jnp.asarray, start))


def assert_same(actual: Any, expected: Any) -> None:
    """Assert that two float64 trajectories agree but for the rounding of sums taken in another order."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


# The registry


def test_every_public_optimizer_and_block_is_in_the_registry():
    def returns_a_transformation(f: Any) -> bool:
        hint = inspect.signature(f).return_annotation
        return inspect.isclass(hint) and issubclass(hint, optax.GradientTransformation)

    public = {name: getattr(so, name) for name in so.__all__}
    constructors = {name for name, f in public.items() if inspect.isfunction(f) and returns_a_transformation(f)}
    constructors -= {"track"}  # wraps an optimizer, and is none
    constructors -= {"natural_gradient"}  # newton_cg with a product of its own: see test_newton_cg.py
    blocks = {name for name in constructors if name.startswith("scale_by_")}
    assert blocks == set(BLOCKS)
    assert constructors - blocks == {name.split(",")[0] for name in REGISTRY}


# Parameters are any pytree, and types never change


@one_of_each_kind
@pytest.mark.x64
def test_a_tree_is_optimized_like_the_vector_of_its_entries(name):
    if REGISTRY[name].draws:
        pytest.skip("draws random vectors leaf by leaf")
    tree = everything(jnp.asarray(START))
    vector, _ = ravel_pytree(tree)
    points = wrapped(name, REGISTRY[name].make(), tree).points
    chex.assert_trees_all_equal_structs(points, tree)
    flat = np.concatenate([np.reshape(leaf, (TURNS, -1)) for leaf in jax.tree.leaves(points)], axis=1)
    assert_same(flat, reference(name)(vector).points)


MIXED = {"half": (jnp.float16, (2,)), "brain": (jnp.bfloat16, ()), "single": (jnp.float32, (2, 2))}
TREES: dict[str, Callable[[], Any]] = {
    "every kind of node": lambda: everything(jnp.asarray(START, jnp.float32)),
    "mixed dtypes": lambda: {k: jnp.ones(shape, dtype) for k, (dtype, shape) in MIXED.items()},
    "float16 scalar": lambda: jnp.ones((), jnp.float16),
    "no leaf": lambda: {"nothing": None, "empty": ()},
}


def assert_types_kept(step: Callable[..., Any], optimizer: Any, params: Any) -> None:
    """Assert, without running anything, that a step keeps structure, shapes, dtypes and weak types."""

    def types(x: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), x)

    state = jax.eval_shape(optimizer.init, params)
    move, after = jax.eval_shape(step, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(move, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert types(after) == types(state)


@every_optimizer
@pytest.mark.parametrize("tree", TREES)
def test_updates_and_state_keep_structure_shapes_and_dtypes(name, tree):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    assert_types_kept(functools.partial(shown, entry, optimizer, bowl), optimizer, TREES[tree]())


@every_optimizer
def test_one_whole_iteration_keeps_structure_shapes_and_dtypes(name):
    optimizer = REGISTRY[name].make()
    tree = {key: make() for key, make in TREES.items()}
    assert_types_kept(functools.partial(idiom, optimizer, bowl), optimizer, tree)


@every_optimizer
@pytest.mark.x64
def test_float32_and_float64_leaves_keep_their_own_precision(name):
    params = {"single": jnp.ones(2, jnp.float32), "double": jnp.ones(2, jnp.float64)}
    optimizer = REGISTRY[name].make()
    assert_types_kept(functools.partial(shown, REGISTRY[name], optimizer, bowl), optimizer, params)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("tree", TREES)
def test_a_block_keeps_structure_shapes_and_dtypes(name, tree):
    block = BLOCKS[name]
    optimizer = block.make()
    assert_types_kept(functools.partial(shown, block, optimizer, bowl), optimizer, TREES[tree]())


@every_optimizer
def test_no_rank_is_promoted_silently(name):
    # A (3,) that meets a (3, 3) by broadcasting is an error in most programs; ours writes its axes.
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    params = jnp.ones(3)
    loss = lambda x: jnp.sum(x**4)
    with jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(functools.partial(shown, entry, optimizer, loss), params, state)


@every_optimizer
def test_no_dtype_is_promoted_silently(name):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    params = jnp.ones(3)
    loss = lambda x: jnp.sum(x**4)
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(functools.partial(shown, entry, optimizer, loss), params, state)


@pytest.mark.parametrize("block", [so.scale_by_lbfgs, so.scale_by_bfgs])
def test_blocks_promote_nothing_silently(block):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda x: block().update(x, block().init(x), x), jnp.ones(3))


def test_fits_histories_of_lower_precision_and_lanczos_promote_no_rank_and_run_without_jit():
    t = jnp.linspace(0.0, 1.0, 10)
    with jax.numpy_rank_promotion("raise"):
        fit = so.curve_fit(lambda p, t: p["a"] * jnp.exp(-p["c"] * t), t, jnp.exp(-t), {"a": 1.0, "c": 0.5})
        lower = so.lbfgs(history_dtype=jnp.bfloat16)
        run = so.minimize(lambda x: jnp.sum(jnp.cosh(x)), jnp.ones(3), lower)
    assert fit.success
    assert run.success
    with jax.disable_jit():
        pairs = so.curvature.extreme_eigenpairs(lambda x, v: jnp.arange(1.0, 4.0) * v, jnp.zeros(3))
    np.testing.assert_allclose([pairs.smallest.values[0], pairs.largest.values[0]], [1.0, 3.0], rtol=1e-5)


@one_of_each_kind
def test_mixed_precision_is_optimized_to_the_precision_of_each_leaf(name):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    params = {"brain": jnp.zeros(2, jnp.bfloat16), "single": jnp.zeros(2, jnp.float32)}
    target = {"brain": jnp.array([1.0, -2.0]), "single": jnp.array([0.3, 0.7])}

    def loss(x: Any) -> jax.Array:
        return sum(jnp.sum(jnp.cosh(x[k].astype(jnp.float32) - target[k])) for k in x)

    RESIDUALS[loss] = lambda x: {k: 2.0 * jnp.sinh(0.5 * (x[k].astype(jnp.float32) - target[k])) for k in x}  # + const
    run = jax.jit(lambda x: scan(functools.partial(shown, entry, optimizer, loss), optimizer, x, 25))
    best = so.accepted(run(params).state).params
    # bfloat16 has steps of 2^-7 at 1; a fixed rate of 1/2 loses the moves that are shorter than half of one.
    resolution = 2.0**-7 if entry.searches else 2.0**-6
    chex.assert_trees_all_close(best["brain"].astype(jnp.float32), target["brain"], atol=resolution)
    chex.assert_trees_all_close(best["single"], target["single"], atol=1e-2)


# Same result eager, under jit, in scan, and per lane under vmap


COMPILED: list[str] = []


def _note_compilation(event: str, duration: float, **_: Any) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


def counted(loss: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """Return a function of its own with the values of `loss`, and a list that grows whenever it is traced."""
    traces: list[Any] = []

    def same(x: Any) -> Any:
        traces.append(x)
        return loss(x)

    return same, traces


def eager(optimizer: Any, x: Any, turns: int, **extra: Any) -> tuple[Trajectory, list[int]]:
    """Return the trajectory of an eager loop, and how many programs had been compiled after each call of `update`."""
    value_and_grad = jax.jit(optax.value_and_grad_from_state(bowl))
    compiled = []

    def step(params: Any, state: Any) -> Any:
        value, grad = value_and_grad(params, state=state)
        out = optimizer.update(grad, state, params, value=value, **extra)
        compiled.append(len(COMPILED))
        return out

    return loop(step, optimizer, x, turns), compiled


@every_optimizer
@pytest.mark.x64
def test_fifty_eager_updates_compile_once_and_give_the_points_of_a_scan(name):
    entry = REGISTRY[name]
    loss, traces = counted(bowl_residual if entry.residual else bowl)
    extra = {"hvp_fn": so.curvature.hvp(loss)} if entry.curvature else {}
    if entry.residual:
        extra = {"residual_fn": loss}
    optimizer = entry.make()
    _, first = eager(optimizer, jnp.asarray(START), 1, **extra)
    before = len(traces), len(COMPILED)
    actual, compiled = eager(optimizer, jnp.asarray(START), 50, **extra)
    assert first[0] > 0  # the counter counts
    assert bool(traces) == (entry.curvature or entry.residual)
    assert len(traces) == before[0]
    assert compiled[-1] == compiled[0]
    expected = reference(name)(START)
    assert_same(actual.points[:TURNS], expected.points)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual.state, expected.state)


@every_optimizer
@pytest.mark.x64
def test_jitted_updates_give_the_points_of_a_scan(name):
    step = functools.partial(poisoned_step(name), value_poison=0.0, grad_poison=0.0)
    actual = loop(lambda x, s: step(x, s)[:2], REGISTRY[name].make(), jnp.asarray(START))
    assert_same(actual.points, reference(name)(START).points)


@every_optimizer
@pytest.mark.x64
def test_every_lane_of_vmap_runs_as_if_alone(name):
    run = reference(name)
    lanes = jax.vmap(run)(np.stack([START, ELSEWHERE]))
    assert_same(lanes.points[0], run(START).points)
    assert_same(lanes.points[1], run(ELSEWHERE).points)


@every_optimizer
@pytest.mark.x64
def test_fifty_eager_iterations_compile_once_and_are_those_of_a_lane_of_a_scan(name):
    optimizer = REGISTRY[name].make()
    lanes = jax.jit(jax.vmap(lambda x: scan(functools.partial(idiom, optimizer, bowl), optimizer, x, 6)))
    points = lanes(np.stack([START, ELSEWHERE])).points
    loss, traces = counted(bowl)
    # (A fixed rate makes no trials, and does not call the loss.)
    one, _ = eager(optimizer, jnp.asarray(START), 6, value_fn=loss, residual_fn=bowl_residual)
    before = len(traces)
    assert bool(traces) == REGISTRY[name].searches
    other, compiled = eager(optimizer, jnp.asarray(ELSEWHERE), 50, value_fn=loss, residual_fn=bowl_residual)
    assert len(traces) == before
    assert compiled[-1] == compiled[0]
    assert_same(points[0], one.points)
    assert_same(points[1], other.points[:6])


@pytest.mark.parametrize("make", [so.lbfgs, so.bfgs])
def test_updates_of_many_lanes_by_an_eager_vmap_compile_once(make):
    optimizer, x = make(), jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
    value_and_grad, state, counts = jax.vmap(jax.value_and_grad(bowl)), jax.vmap(optimizer.init)(x), []
    for _ in range(4):
        value, grad = value_and_grad(x)
        before = len(COMPILED)
        move, state = jax.vmap(lambda *args: optimizer.update(*args[:3], value=args[3]))(grad, state, x, value)
        counts.append(len(COMPILED) - before)
        x = x + move
    assert counts[2:] == [0, 0]


@one_of_each_kind
def test_new_data_in_extra_arguments_compile_nothing(name):
    optimizer = REGISTRY[name].make()
    traces = []

    def loss(x: Any, scale: Any) -> jax.Array:
        traces.append(x)
        return jnp.sum(scale * jnp.cosh(x))

    def residual(x: Any, scale: Any) -> jax.Array:
        return jnp.sqrt(2.0 * scale * jnp.cosh(x))

    value_and_grad = jax.jit(jax.value_and_grad(lambda x, scale: jnp.sum(scale * jnp.cosh(x))))
    x = jnp.array([1.0, -0.5])
    state, counts = optimizer.init(x), []
    for turn in range(5):
        scale = jnp.array([1.0, 2.0 + turn])
        value, grad = value_and_grad(x, scale)
        # `key` and `step` are meant for somebody else in a chain: the loss does not take them.
        extra = {"scale": scale, "key": jnp.arange(2), "step": 3}
        move, state = optimizer.update(grad, state, x, value=value, value_fn=loss, residual_fn=residual, **extra)
        x = x + move
        counts.append((len(traces), len(COMPILED)))
    assert traces
    assert counts[-1][0] == counts[0][0]
    assert counts[-1][1] == counts[1][1]  # the first turn also compiled the addition


# Composition


@one_of_each_kind
@pytest.mark.x64
def test_identities_around_it_and_a_watch_for_non_finite_gradients_change_nothing(name):
    chain = optax.chain(optax.identity(), optax.apply_if_finite(REGISTRY[name].make(), 3), optax.identity())
    run = wrapped(name, chain)
    expected = reference(name)(START)
    assert_same(run.points, expected.points)
    assert_same(so.accepted(run.state), so.accepted(expected.state))


@pytest.mark.x64
@pytest.mark.parametrize("quasi_newton", ["lbfgs", "bfgs"])
def test_a_block_with_a_learning_rate_is_the_optimizer_with_a_fixed_rate(quasi_newton):
    name = f"{quasi_newton}, fixed rate"
    chain = optax.chain(BLOCKS[f"scale_by_{quasi_newton}"].make(), optax.scale_by_learning_rate(RATE))
    assert_same(wrapped(name, chain).points, reference(name)(START).points)


@pytest.mark.x64
@pytest.mark.parametrize("name", [b.name for b in BLOCKS.values() if b.curvature])
def test_a_curvature_block_with_unit_rate_solves_a_convex_quadratic_at_once(name):
    A = np.diag([1.0, 10.0, 100.0]) + 0.5
    b = np.array([1.0, 2.0, 3.0])
    chain = optax.chain(BLOCKS[name].make(), optax.scale_by_learning_rate(1.0))
    x = {"a": jnp.ones(1), "b": jnp.ones((1, 2))}

    def loss(x: Any) -> jax.Array:
        v = ravel_pytree(x)[0]
        return 0.5 * v @ A @ v - b @ v

    grad = jax.grad(loss)(x)
    move, _ = chain.update(grad, chain.init(x), x, value_fn=loss)
    solution = ravel_pytree(optax.apply_updates(x, move))[0]
    chex.assert_trees_all_close(solution, np.linalg.solve(A, b), rtol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_turns_a_non_finite_gradient_into_no_move_and_recovers(name):
    block = BLOCKS[name]
    optimizer = optax.chain(block.make(), optax.scale_by_learning_rate(0.5))
    step = jax.jit(lambda g, s, x: optimizer.update(g, s, x, **extra_args(block, None, so.curvature.hvp(bowl))))
    x = jnp.asarray(START, jnp.float32)
    state = optimizer.init(x)
    for turn in range(40):
        grad = jax.grad(bowl)(x)
        if turn in (0, 7):
            move, state = step(grad.at[2].set(jnp.nan), state, x)
            assert not np.any(move)
        move, state = step(grad, state, x)
        x = x + move
        chex.assert_tree_all_finite(state)
    assert jnp.max(jnp.abs(jax.grad(bowl)(x))) < 1e-3


FROZEN = np.array([0.4, -0.3])


def part_of(params: Any) -> jax.Array:
    """Return the loss of {"live", "frozen"}."""
    return bowl([params["live"], params["frozen"]])


@functools.cache
def alone(name: str) -> Any:
    """Return the points of the live parameters, with the frozen ones as constants of the loss."""
    loss = lambda x: part_of({"live": x, "frozen": jnp.asarray(FROZEN)})
    RESIDUALS[loss] = lambda x: bowl_residual([x, jnp.asarray(FROZEN)])
    return wrapped(name, REGISTRY[name].make(), START[:4], loss).points


def masked_args(name: str, optimizer: Any) -> Callable[..., Any]:
    """Return a step whose curvature is that of the live parameters: a mask leaves a hole for the frozen ones."""
    entry = REGISTRY[name]
    hvp = so.curvature.hvp(lambda live: part_of({"live": live, "frozen": jnp.asarray(FROZEN)}))

    def hvp_fn(params: Any, vector: Any) -> Any:
        return {"live": hvp(params["live"], vector["live"]), "frozen": params["frozen"]}

    def residual_fn(params: Any) -> Any:
        return bowl_residual([params["live"], jnp.asarray(FROZEN)])

    def step(params: Any, state: Any) -> Any:
        value, grad = jax.value_and_grad(part_of)(params)
        return optimizer.update(grad, state, params, **extra_args(entry, value, hvp_fn, residual_fn))

    return step


@one_of_each_kind
@pytest.mark.parametrize("wrapper", ["masked", "multi_transform"])
@pytest.mark.x64
def test_frozen_parameters_stay_and_the_others_move_as_if_alone(name, wrapper):
    optimizer = REGISTRY[name].make()
    live = {"live": True, "frozen": False}
    if wrapper == "masked":
        frozen = {"live": False, "frozen": True}
        both = optax.chain(optax.masked(optimizer, live), optax.masked(optax.set_to_zero(), frozen))
    else:
        labels = {"live": "search", "frozen": "freeze"}
        both = optax.multi_transform({"search": optimizer, "freeze": optax.set_to_zero()}, labels)
    start = {"live": jnp.asarray(START[:4]), "frozen": jnp.asarray(FROZEN)}
    actual = jax.jit(lambda x: scan(masked_args(name, both), both, x))(start).points
    assert np.all(actual["frozen"] == FROZEN)
    assert_same(actual["live"], alone(name))


@fixed_rate
@pytest.mark.x64
def test_a_fixed_rate_beside_another_optimizer_minds_its_own_parameters(name):
    # The loss is a sum of a part for each, so each must move as if alone.
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    both = optax.multi_transform({"ours": optimizer, "sgd": optax.sgd(0.05)}, {"a": "ours", "b": "sgd"})
    loss = lambda x: bowl(x["a"]) + jnp.sum((x["b"] - 1.0) ** 4)
    start = {"a": jnp.asarray(START), "b": jnp.zeros(3)}
    points = jax.jit(lambda x: scan(functools.partial(shown, entry, both, loss), both, x))(start).points
    b = jnp.zeros(3)
    for turn in range(TURNS):
        b = b - 0.05 * 4 * (b - 1.0) ** 3
        assert_same(points["b"][turn], b)
    assert_same(points["a"], reference(name)(START).points)


@pytest.mark.x64
@pytest.mark.parametrize(
    ("name", "injected"),
    [
        (
            "lbfgs, fixed rate",
            lambda: optax.inject_hyperparams(so.lbfgs, static_args=("memory_size", "scale_init_precond"))(RATE),
        ),
        ("bfgs, fixed rate", lambda: optax.inject_hyperparams(so.bfgs, static_args=("scale_init_precond",))(RATE)),
        ("saddle_free_newton", lambda: optax.inject_hyperparams(so.saddle_free_newton)(damping=0.0)),
    ],
    ids=["lbfgs", "bfgs", "saddle_free_newton"],
)
def test_injected_hyperparameters_give_the_same_points(name, injected):
    assert_same(wrapped(name, injected()).points, reference(name)(START).points)


@pytest.mark.x64
def test_a_hyperparameter_can_be_changed_during_the_run():
    optimizer = optax.inject_hyperparams(so.lbfgs, static_args=("memory_size", "scale_init_precond"))(
        learning_rate=0.5, memory_size=3
    )
    x = jnp.asarray(START)
    state = optimizer.init(x)
    step = jax.jit(optimizer.update)
    grad = jax.grad(bowl)(x)
    move, _ = step(grad, state, x)
    state.hyperparams["learning_rate"] = jnp.asarray(0.25)
    half, _ = step(grad, state, x)
    assert_same(2 * half, move)


def test_a_traced_memory_size_is_refused_with_the_remedy():
    optimizer = optax.inject_hyperparams(so.lbfgs, static_args=("scale_init_precond",))(0.5, memory_size=3)
    with pytest.raises(TypeError, match=r"memory_size.*static_args"):
        optimizer.init(jnp.zeros(2))


@one_of_each_kind
@pytest.mark.x64
def test_multi_steps_over_equal_losses_moves_every_second_time(name):
    optimizer = optax.MultiSteps(REGISTRY[name].make(), every_k_schedule=2)
    points = wrapped(name, optimizer).points
    expected = reference(name)(START).points
    atol = 1e-5 if name == "sr1" else 1e-6  # MultiSteps adds up in float32, and sr1 divides by small differences
    chex.assert_trees_all_close(points[1::2], expected[: TURNS // 2], rtol=1e-5, atol=atol)
    assert np.all(points[2::2] == points[1:-1:2])


@fixed_rate
@pytest.mark.x64
def test_multi_steps_with_a_fixed_rate_uses_the_mean_of_the_gradients(name):
    optimizer = optax.MultiSteps(REGISTRY[name].make(), every_k_schedule=2)
    x = jnp.asarray(START)
    state = optimizer.init(x)
    step = jax.jit(optimizer.update)
    plain = REGISTRY[name].make()
    plain_state, y = plain.init(x), x
    shift = jnp.linspace(0.0, 1.0, N)
    for _ in range(5):
        for sign in (-1.0, 1.0):
            move, state = step(jax.grad(bowl)(x) + sign * shift, state, x)
            x = x + move
        move, plain_state = plain.update(jax.grad(bowl)(y), plain_state, y)
        y = y + move
        chex.assert_trees_all_close(x, y, rtol=1e-5, atol=1e-6)  # MultiSteps adds up in float32


@every_optimizer
def test_unknown_extra_arguments_do_not_change_the_program(name):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    x = jnp.ones(3)
    value, grad = jax.value_and_grad(bowl)(x)
    extra = extra_args(entry, value, so.curvature.hvp(bowl), bowl_residual)

    def program(**unknown: Any) -> str:
        update = lambda g, s, x: optimizer.update(g, s, x, **extra, **unknown)
        return str(jax.make_jaxpr(update)(grad, optimizer.init(x), x))

    assert program() == program(key=jnp.arange(2), step=3, name="not an array")


# A NaN or Inf is a rejected trial, never a poisoned state


@functools.cache
def poisoned_step(name: str) -> Callable[..., Any]:
    """Return a compiled step on `bowl` whose evaluation may be spoilt by adding to its value and one gradient entry."""
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()

    def step(params: Any, state: Any, value_poison: Any, grad_poison: Any) -> Any:
        value, grad = jax.value_and_grad(bowl)(params)
        extra = extra_args(entry, value, so.curvature.hvp(bowl), bowl_residual) | {"value": value + value_poison}
        move, state = optimizer.update(grad.at[1].add(grad_poison), state, params, **extra)
        return move, state, grad

    return jax.jit(step)


def assert_healthy(state: Any) -> None:
    """Assert that everything which steers the next step is finite."""
    allowed = {
        "value",
        "ray",
        "gain_ratio",
        "damping",
        "curvature",
        "loss",
        "lower",
        "upper",
        "longest",
    }  # Inf or NaN where not known, or where there is no bound

    def check(path: Any, leaf: Any) -> None:
        names = {getattr(key, "name", None) for key in path}
        if not names & allowed:
            assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        assert not (names & {"ray", "loss", "value"} and np.any(np.isnan(leaf))), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, state)


POISONS = {
    "NaN value": (np.nan, 0.0),
    "Inf value": (np.inf, 0.0),
    "-Inf value": (-np.inf, 0.0),
    "NaN in the gradient only": (0.0, np.nan),
    "Inf in the gradient only": (0.0, np.inf),
    "NaN in both": (np.nan, np.nan),
}


@every_optimizer
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.x64
def test_a_non_finite_trial_is_rejected_and_the_run_recovers(name, poison):
    optimizer, step = REGISTRY[name].make(), poisoned_step(name)
    value_poison, grad_poison = POISONS[poison]
    x = jnp.asarray(START)
    state = optimizer.init(x)
    for turn in range(60):
        spoilt = turn in (1, 2, 5)
        before = so.accepted(state)
        move, state, _ = step(x, state, value_poison if spoilt else 0.0, grad_poison if spoilt else 0.0)
        if spoilt:
            assert not state.info.accepted
            assert np.all(so.accepted(state).params == before.params)
            assert not np.array_equal(x + move, x)  # the next trial is another one
        assert_healthy(state)
        x = x + move
        assert np.all(np.isfinite(x))
    assert np.max(np.abs(jax.grad(bowl)(so.accepted(state).params))) < 1e-6


def fence(x: jax.Array, trap: jax.Array) -> jax.Array:
    """Return a loss with its minimum at 0.8; beyond 1 it is NaN, or with `trap` finite and low with a NaN gradient."""
    inside = x < 1.0
    safe = jnp.where(inside, x, 0.0)
    beyond = jnp.where(trap, -1e3 + jnp.sqrt(jnp.maximum(1.0 - x, 0.0)), jnp.nan)
    return jnp.sum(jnp.where(inside, -jnp.log(1.0 - safe) - 5.0 * safe, beyond))


@functools.cache
def iterations_at_the_fence(name: str) -> Callable[..., Trajectory]:
    optimizer = REGISTRY[name].make()

    def run(x: Any, trap: Any) -> Trajectory:
        return scan(functools.partial(idiom, optimizer, functools.partial(fence, trap=trap)), optimizer, x, 40)

    return jax.jit(run)


def test_the_fence_has_finite_values_with_nan_gradients_beyond_it():
    value, grad = jax.value_and_grad(fence)(jnp.array([1.5]), True)
    assert np.isfinite(value)
    assert np.isnan(grad)


@of_any_loss
@pytest.mark.parametrize("beyond", ["NaN value", "NaN gradient"])
@pytest.mark.x64
def test_whole_iterations_end_on_the_finite_side_of_a_fence(name, beyond):
    result = iterations_at_the_fence(name)(jnp.array([0.0, 0.5, -3.0]), beyond == "NaN gradient")
    # A search returns accepted points. A fixed rate makes no trials of its own: it may step over, and then retreats.
    assert np.all((result.points if REGISTRY[name].searches else so.accepted(result.state).params) < 1.0)
    assert np.all(np.isfinite(result.points))
    assert_healthy(result.state)
    chex.assert_trees_all_close(result.points[-1], np.full(3, 0.8), atol=1e-6)


@of_any_loss
@pytest.mark.parametrize("beyond", ["NaN value", "NaN gradient"])
@pytest.mark.x64
def test_whole_iterations_from_a_non_finite_start_evaluate_nothing_and_say_so(name, beyond):
    x0 = jnp.array([0.0, 2.0, -3.0])
    result = iterations_at_the_fence(name)(x0, beyond == "NaN gradient")
    assert np.all(result.points == x0)
    assert Status(int(result.state.info.status)) == Status.NONFINITE_START
    # At most the caller's own evaluation of each of the 40 calls was counted, and no trial.
    assert result.state.info.evaluations <= 40
    assert result.state.info.iterations == 0
    assert np.all(so.accepted(result.state).params == x0)


# Objectives without an ordinary minimum end with the right status and finite parameters

OBJECTIVES: tuple[Callable[[Any], jax.Array], ...] = (
    lambda x: jnp.sum((x - 1.0) ** 2),  # from its minimum: the gradient is zero
    lambda x: jnp.full((), 3.0, x.dtype),
    lambda x: jnp.sum(x),
    lambda x: -jnp.sum(x**2),
    lambda x: 0.5 * (jnp.sum(x) - 7.0) ** 2,  # Hessian of rank one everywhere
    lambda x: jnp.sum(x**4),  # Hessian zero at the minimum
    lambda x: x[0] ** 2 - x[1] ** 2 + 0.5 * x[1] ** 4,  # indefinite at the start; minima at (0, +-1)
    lambda x: jnp.sqrt(1.0 - x[0]) + jnp.sqrt(jnp.abs(x[1])),  # NaN for x0 > 1; infinite derivative at x1 = 0
)


def chosen(x: jax.Array, which: jax.Array) -> jax.Array:
    """Return one of the objectives; one compiled program runs them all."""
    return jax.lax.switch(which, OBJECTIVES, x)


CASES: dict[str, tuple[int, tuple[float, float], Status, Callable[[Any], Any]]] = {
    "zero gradient": (0, (1.0, 1.0), Status.CONVERGED, lambda x: x - 1.0),
    "constant": (1, (1.0, 2.0), Status.CONVERGED, lambda x: x - np.array([1.0, 2.0])),
    "linear": (2, (1.0, 2.0), Status.UNBOUNDED, lambda x: 0.0),
    "concave": (3, (1.0, 0.5), Status.UNBOUNDED, lambda x: 0.0),
    "singular everywhere": (4, (1.0, 2.0), Status.CONVERGED, lambda x: np.sum(x) - 7.0),
    "singular at the minimum": (5, (1.0, -2.0), Status.CONVERGED, lambda x: 4 * x**3),
    "indefinite": (6, (0.5, 0.1), Status.CONVERGED, lambda x: np.array([x[0], np.abs(x[1]) - 1.0])),
}


@of_any_loss
@pytest.mark.parametrize("case", CASES)
@pytest.mark.x64
def test_objectives_without_an_ordinary_minimum_end_with_the_right_status(name, case):
    which, start, status, zero_at_the_answer = CASES[case]
    entry = REGISTRY[name]
    result = so.minimize(chosen, jnp.array(start), entry.make(), args=(jnp.int32(which),), max_steps=1000)
    ended = Status(int(result.status))
    assert np.all(np.isfinite(result.params))
    assert np.isfinite(result.value)
    assert result.success == (ended == Status.CONVERGED)
    if not entry.descends and case in ("concave", "indefinite") and result.success:
        chex.assert_trees_all_close(result.grad, np.zeros(2), atol=1e-5)  # a maximum, or the saddle
        return
    if (not entry.searches or entry.own_lengths) and status == Status.UNBOUNDED:
        assert ended in (Status.UNBOUNDED, Status.MAX_STEPS)  # a fixed rate may need more steps than there are
    else:
        assert ended == status
    answer = np.asarray(zero_at_the_answer(np.asarray(result.params)))
    chex.assert_trees_all_close(answer, np.zeros_like(answer), atol=2e-5)


@of_any_loss
@pytest.mark.x64
def test_a_saddle_without_gradient_is_left_by_those_that_know_the_curvature(name):
    entry = REGISTRY[name]
    result = so.minimize(chosen, jnp.zeros(2), entry.make(), args=(jnp.int32(6),), max_steps=1000)
    if entry.leaves_saddles:
        assert result.success
        chex.assert_trees_all_close(np.abs(result.params), np.array([0.0, 1.0]), atol=1e-5)
    elif entry.curvature:  # it cannot leave, but it sees the negative eigenvalue and does not call this a success
        assert not result.success
        assert np.all(result.params == 0)
        if not np.isnan(result.curvature):  # it may know the sign alone
            chex.assert_trees_all_close(np.asarray(result.curvature), -2.0, rtol=1e-6)
    else:
        assert np.all(result.params == 0)


@of_any_loss
@pytest.mark.parametrize(
    ("start", "value"), [((2.0, 0.5), np.nan), ((0.0, 0.0), 1.0)], ids=["NaN value", "Inf gradient"]
)
@pytest.mark.x64
def test_a_non_finite_start_is_reported_and_not_looped_on(name, start, value):
    x0 = jnp.array(start)
    chex.assert_trees_all_equal(np.asarray(OBJECTIVES[7](x0)), value)
    assert not np.all(np.isfinite(jax.grad(OBJECTIVES[7])(x0)))
    result = so.minimize(chosen, x0, REGISTRY[name].make(), args=(jnp.int32(7),), max_steps=1000)
    assert Status(int(result.status)) == Status.NONFINITE_START
    assert not result.success
    assert result.evaluations == 1
    assert np.all(result.params == x0)


# Buffers are updated in place


HISTORY, MATRIX = (20_000, 2 * 10 * 20_000), (500, 500 * 500)  # parameters, entries of the large buffer
BIG = {"lbfgs": HISTORY, "lbfgs, fixed rate": HISTORY, "bfgs": MATRIX, "bfgs, fixed rate": MATRIX, "ssbroyden": MATRIX}
# An n-vector is 5 % of the L-BFGS history: the bound leaves room for some vectors, and none for a second history.
SPARE = {"lbfgs": 0.8, "lbfgs, fixed rate": 0.8, "bfgs": 0.1, "bfgs, fixed rate": 0.1, "ssbroyden": 0.1}


def quadratic(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((1.0 + jnp.arange(x.size) / x.size) * (x - 1.0) ** 2)


RESIDUALS[quadratic] = lambda x: jnp.sqrt(1.0 + jnp.arange(x.size) / x.size) * (x - 1.0)


def once(name: str, calling: str, x: Any, state: Any) -> Any:
    """Return the next parameters and state."""
    optimizer = REGISTRY[name].make()
    if calling == "value_fn":
        move, state = idiom(optimizer, quadratic, x, state)
    else:
        move, state = shown(REGISTRY[name], optimizer, quadratic, x, state)
    return x + move, state


def many(name: str, calling: str, x: Any, state: Any) -> Any:
    """Return the parameters and state after a loop."""
    return jax.lax.fori_loop(0, 5, lambda _, carry: once(name, calling, *carry), (x, state))


@pytest.mark.parametrize(
    ("name", "calling", "times"),
    [
        pytest.param(name, calling, times, marks=() if REGISTRY[name].searches else pytest.mark.slow)
        for name in BIG
        for calling, times in (("value", "once"), ("value_fn", "once"), ("value", "many"))
    ],
)
def test_the_large_buffer_is_updated_in_place(name, calling, times):
    n, entries = BIG[name]
    size = 4 * entries
    x = jnp.zeros(n)
    state = REGISTRY[name].make().init(x)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == entries  # one copy, and it is the largest buffer
    program = jax.jit(functools.partial(once if times == "once" else many, name, calling), donate_argnums=(0, 1))
    memory = program.lower(x, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size  # the donated buffer is the result's
    assert memory.temp_size_in_bytes < SPARE[name] * size


@one_of_each_kind
def test_a_donated_state_gives_the_same_points(name):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()

    def step(x: Any, state: Any) -> Any:
        move, state = shown(entry, optimizer, quadratic, x, state)
        return x + move, state

    kept, donated = jax.jit(step), jax.jit(step, donate_argnums=(0, 1))
    x = jnp.linspace(-1.0, 1.0, 12)
    y = x.copy()
    s, t = optimizer.init(x), optimizer.init(y)
    for _ in range(6):
        x, s = kept(x, s)
        y, t = donated(y, t)
    chex.assert_trees_all_close(y, x, rtol=1e-5, atol=1e-6)


# Sharding


@functools.cache
def eight_devices(name: str = "sharded_program.py") -> str:
    """Return what a program beside this file printed, run with eight CPU devices."""
    program = pathlib.Path(__file__).parent / name
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    root = str(program.parent.parent)
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sharded() -> dict[str, str]:
    """Return the answers of the sharded run by name."""
    return dict(line.split(": ", 1) for line in eight_devices().splitlines())


@pytest.mark.slow
def test_shardings_may_be_in_the_types():
    answers = dict(line.split(": ", 1) for line in eight_devices("explicit_program.py").splitlines())
    assert len(answers) == 2 * 8 + 2
    assert set(answers.values()) == {"True"}, answers


@pytest.mark.parametrize("calling", ["value", "value_fn"])
@pytest.mark.parametrize(
    "fact",
    [
        "updates keep the sharding",
        "the state keeps the sharding",
        "the history is sharded like the parameters",
        "no leaf is gathered",
        "the points are those of one device",
    ],
)
def test_on_sharded_parameters(sharded, calling, fact):
    assert sharded[f"{calling}, {fact}"] == "True"


def test_minimize_returns_sharded_parameters_sharded(sharded):
    assert sharded["minimize keeps the sharding"] == "True"
    assert sharded["minimize converges"] == "True"
    assert sharded["minimize refuses a state that is sharded differently"] == "True"
    assert sharded["minimize refuses parameters on a mesh of other axes"] == "True"
    assert sharded["minimize resumes from a state that is sharded alike"] == "True"


def test_float64_is_off_outside_of_the_tests_that_ask_for_it():
    assert jnp.zeros(1).dtype == jnp.float32
    with float64():
        assert jnp.zeros(1).dtype == jnp.float64
    assert jnp.zeros(1).dtype == jnp.float32
