"""Code written for `optax.lbfgs` runs unchanged after replacing the name, also on batches that change.

The rule for losses with extra arguments (a batch): a call of `update` begins with the gradient it was handed, makes its
trials on the batch it was handed, and learns from the difference of two gradients of that batch. The value that it ends
with belongs to that batch alone, so the next call of `optax.value_and_grad_from_state` evaluates anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import REGISTRY

import secondorder as so
from secondorder.linalg.inverse_hessian import current

NAMES = ("lbfgs", "bfgs", "newton", "saddle_free_newton")
MAKE: dict[str, Callable[[], Any]] = {name: getattr(so, name) for name in NAMES}
every = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.x64

RNG = np.random.default_rng(0)
BATCHES = [(RNG.normal(size=(12, 4)), RNG.normal(size=12)) for _ in range(4)]
X0 = np.array([1.0, -1.0, 0.5, 2.0])


def regression(w: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return a strictly convex loss of a batch: pseudo-Huber residuals and a ridge."""
    r = inputs @ w - targets
    return jnp.sum(jnp.sqrt(1.0 + r**2)) + 0.05 * jnp.sum(w**2)


def plain(w: jax.Array) -> jax.Array:
    """Return the loss of the first batch."""
    return regression(w, *(jnp.asarray(a) for a in BATCHES[0]))


def valley(x: jax.Array) -> jax.Array:
    """Return the Rosenbrock function, chained."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def written_for_optax(optimizer: Any, loss: Callable[..., Any], params: Any, iterations: int) -> tuple[Any, Any]:
    """Return all points and the last state, by a loop as one writes it for optax.lbfgs."""
    value_and_grad = optax.value_and_grad_from_state(loss)

    def iteration(carry: Any, _: None) -> Any:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        move, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = optax.apply_updates(params, move)
        return (params, state), params

    def run(params: Any) -> Any:
        return jax.lax.scan(iteration, (params, optimizer.init(params)), None, iterations)

    (_, state), points = jax.jit(run)(jnp.asarray(params))
    return points, state


def fixed_steps(optimizer: Any, params: Any, iterations: int, loss: Callable[..., Any]) -> Any:
    """Return all points of a loop for an optimizer that needs the gradient only."""

    def iteration(carry: Any, _: None) -> Any:
        params, state = carry
        move, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, move)
        return (params, state), params

    run = jax.jit(lambda x: jax.lax.scan(iteration, (x, optimizer.init(x)), None, iterations)[1])
    return run(jnp.asarray(params))


@functools.cache
def plain_run(name: str) -> tuple[Any, Any]:
    """Return 25 points of a search on `plain`, and the last state."""
    return written_for_optax(MAKE[name](), plain, X0, 25)


@functools.cache
def on_batches(name: str, rate: float | None = None) -> Callable[..., Any]:
    """Return a compiled call of `update` on one batch, with a value that may come from the state."""
    optimizer = MAKE[name]() if rate is None else MAKE[name](rate)
    value_and_grad = optax.value_and_grad_from_state(regression)

    def iteration(w: Any, state: Any, inputs: Any, targets: Any) -> Any:
        value, grad = value_and_grad(w, inputs, targets, state=state)
        move, state = optimizer.update(
            grad, state, w, value=value, grad=grad, value_fn=regression, inputs=inputs, targets=targets
        )
        return w + move, state, value, grad

    return jax.jit(iteration)


def start(name: str, rate: float | None = None) -> tuple[Any, Any]:
    w = jnp.asarray(X0)
    return w, (MAKE[name]() if rate is None else MAKE[name](rate)).init(w)


@functools.cache
def minimum_by_optax() -> jax.Array:
    return written_for_optax(optax.lbfgs(), plain, X0, 40)[0][-1]


# The name alone changes


@every
def test_a_loop_for_optax_finds_the_minimum_that_optax_finds_and_never_climbs(name):
    points, state = plain_run(name)
    chex.assert_trees_all_close(points[-1], minimum_by_optax(), atol=1e-6)
    values = np.array([plain(x) for x in points])
    assert np.all(np.diff(values) <= 1e-14 * np.abs(values[0]))
    assert values[0] < plain(X0)
    chex.assert_trees_all_close(state.value, values[-1], rtol=1e-14)


@every
def test_the_loop_of_optaxs_documentation_runs_unchanged(name):
    # It asks the state for its count and its gradient to decide when to stop.
    optimizer = MAKE[name]()
    value_and_grad = optax.value_and_grad_from_state(plain)

    def iteration(carry: Any) -> Any:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        move, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=plain)
        return optax.apply_updates(params, move), state

    def going_on(carry: Any) -> Any:
        _, state = carry
        count = optax.tree.get(state, "count")
        error = optax.tree.norm(optax.tree.get(state, "grad"))
        return (count == 0) | ((count < 50) & (error >= 1e-7))

    x = jnp.asarray(X0)
    x, state = jax.lax.while_loop(going_on, iteration, (x, optimizer.init(x)))
    assert jnp.linalg.norm(jax.grad(plain)(x)) < 1e-7
    assert 1 < optax.tree.get(state, "count") < 50
    chex.assert_trees_all_close(optax.tree.get(state, "value"), plain(x), rtol=1e-14)


@every
def test_the_value_and_gradient_kept_for_the_next_call_are_those_of_the_new_point(name):
    optimizer = MAKE[name]()
    x = jnp.asarray(X0)
    state = optimizer.init(x)
    value, grad = jax.value_and_grad(plain)(x)
    for _ in range(3):
        move, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=plain)
        x = x + move
        # A function that must not be evaluated shows that the pair came from the state.
        value, grad = optax.value_and_grad_from_state(lambda x: jnp.sum(jnp.full_like(x, jnp.nan) * x))(x, state=state)
        chex.assert_trees_all_close((value, grad), jax.value_and_grad(plain)(x), rtol=1e-12, atol=1e-14)


@every
def test_the_first_call_evaluates_since_nothing_is_kept_yet(name):
    x = jnp.asarray(X0)
    state = MAKE[name]().init(x)
    kept = optax.value_and_grad_from_state(plain)(x, state=state)
    chex.assert_trees_all_close(kept, jax.value_and_grad(plain)(x), rtol=1e-14)


@pytest.mark.parametrize("name", [n for n, e in REGISTRY.items() if e.searches and not e.residual])
def test_whole_iterations_are_the_accepted_points_of_one_evaluation_at_a_time(name):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    x0 = jnp.array([-1.2, 1.0, 0.3])
    points, _ = written_for_optax(optimizer, valley, x0, 10)
    hvp = so.curvature.hvp(valley)

    def turn(carry: Any, _: None) -> Any:
        x, state = carry
        value, grad = jax.value_and_grad(valley)(x)
        curvature = {"hvp_fn": hvp} if entry.curvature else {}
        move, state = optimizer.update(grad, state, x, value=value, **curvature)
        return (x + move, state), (x, state.info.accepted)

    _, (shown, accepted) = jax.jit(lambda x: jax.lax.scan(turn, (x, optimizer.init(x)), None, 30))(x0)
    assert not np.all(accepted)  # trials were rejected on the way, and must not matter
    one_by_one = shown[accepted][1:]
    chex.assert_trees_all_close(one_by_one[:10], points, rtol=1e-6, atol=1e-8)


# Oracles: optax itself


@pytest.mark.parametrize("scale_init_precond", [True, False])
def test_with_a_fixed_rate_the_points_are_those_of_optax(scale_init_precond):
    # Six pairs in five dimensions, and enough iterations to drop the oldest.
    options = {"memory_size": 6, "scale_init_precond": scale_init_precond, "linesearch": None}
    x0 = np.array([0.5, -0.3, 0.2, 1.0, 0.1])
    loss = lambda x: jnp.sum(jnp.cosh(x)) + 0.5 * jnp.sum(x) ** 2
    points = fixed_steps(so.lbfgs(0.3, **options), x0, 12, loss)
    expected = fixed_steps(optax.lbfgs(0.3, **options), x0, 12, loss)
    chex.assert_trees_all_close(points, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("maker", ["lbfgs", "bfgs"])
def test_a_schedule_sets_the_rate_of_each_iteration(maker):
    rates = np.array([0.5, 0.1, 0.25, 0.02, 1.0])
    schedule = lambda count: jnp.asarray(rates)[count]
    block = getattr(so, f"scale_by_{maker}")()
    chain = optax.chain(block, optax.scale_by_learning_rate(schedule))
    points = fixed_steps(MAKE[maker](schedule), X0, len(rates), plain)
    chex.assert_trees_all_close(points, fixed_steps(chain, X0, len(rates), plain), rtol=1e-9)
    chex.assert_trees_all_close(points[0] - X0, -rates[0] * unit(jax.grad(plain)(jnp.asarray(X0))), rtol=1e-9)


def unit(g: jax.Array) -> jax.Array:
    """Return the first direction of a fixed rate, g shortened to length 1 (optax's scale of the first step)."""
    return g * jnp.minimum(1.0, 1.0 / jnp.linalg.norm(g))


def test_a_schedule_gives_the_points_of_optax():
    schedule = optax.exponential_decay(0.5, transition_steps=2, decay_rate=0.7)
    points = fixed_steps(so.lbfgs(schedule), X0, 10, plain)
    expected = fixed_steps(optax.lbfgs(schedule, linesearch=None), X0, 10, plain)
    chex.assert_trees_all_close(points, expected, rtol=1e-8)


SEARCHES: dict[str, Callable[[], Any]] = {
    "zoom": lambda: optax.scale_by_zoom_linesearch(max_linesearch_steps=20, initial_guess_strategy="one"),
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(max_backtracking_steps=20, store_grad=True),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_an_optax_line_search_gives_the_points_of_optax(search):
    points, state = written_for_optax(so.lbfgs(linesearch=SEARCHES[search]()), plain, X0, 8)
    expected, theirs = written_for_optax(optax.lbfgs(linesearch=SEARCHES[search]()), plain, X0, 8)
    chex.assert_trees_all_close(points, expected, rtol=1e-7)
    for key in ("count", "value", "grad"):
        chex.assert_trees_all_close(optax.tree.get(state, key), optax.tree.get(theirs, key), rtol=1e-6, atol=1e-9)


# Auxiliary output


@every
def test_a_loss_with_auxiliary_output_gives_the_same_points(name):
    def with_aux(x: jax.Array) -> tuple[jax.Array, Any]:
        return plain(x), {"largest": jnp.max(x)}

    optimizer = MAKE[name]()

    @jax.jit
    def iteration(x: Any, state: Any) -> Any:
        (value, _), grad = jax.value_and_grad(with_aux, has_aux=True)(x)
        move, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=with_aux)
        return x + move, state

    x = jnp.asarray(X0)
    state = optimizer.init(x)
    for point in plain_run(name)[0][:4]:
        x, state = iteration(x, state)
        chex.assert_trees_all_close(x, point, rtol=1e-9)


# Batches


@every
def test_the_value_of_another_batch_is_never_returned_from_the_state(name):
    iteration = on_batches(name)
    w, state = start(name)
    for batch in (*BATCHES, *BATCHES):
        expected = jax.value_and_grad(regression)(w, *batch)
        w, state, value, grad = iteration(w, state, *batch)
        chex.assert_trees_all_close((value, grad), expected, rtol=1e-12)


@every
def test_the_accepted_point_belongs_to_the_batch_of_the_call(name):
    iteration = on_batches(name)
    w, state = start(name)
    for batch in BATCHES:
        w, state, value, _ = iteration(w, state, *batch)
        accepted = so.accepted(state)
        chex.assert_trees_all_close(accepted.params, w, rtol=1e-14)
        expected = jax.value_and_grad(regression)(w, *batch)
        chex.assert_trees_all_close((accepted.value, accepted.grad), expected, rtol=1e-10, atol=1e-12)
        assert accepted.value < value  # the batch's own loss fell, whatever the loss of the batch before


@pytest.mark.parametrize("rate", [None, 0.5], ids=["search", "fixed rate"])
def test_lbfgs_pairs_are_differences_of_gradients_of_one_batch(rate):
    iteration = on_batches("lbfgs", rate)
    w, state = start("lbfgs", rate)
    gradient = jax.jit(jax.grad(regression))
    written = 0
    for batch in (*BATCHES, *BATCHES):
        m, pairs = state.memory.yy.shape[0], int(state.memory.pairs)
        old, slot = w, pairs % m
        w, state, _, _ = iteration(w, state, *batch)
        if int(state.memory.pairs) == pairs:
            continue
        assert int(state.memory.pairs) == pairs + 1
        s, y = state.memory.rows[slot], state.memory.rows[m + slot]
        chex.assert_trees_all_close(s, w - old, rtol=1e-10, atol=1e-13)
        chex.assert_trees_all_close(y, gradient(w, *batch) - gradient(old, *batch), rtol=1e-9, atol=1e-11)
        chex.assert_trees_all_close(state.memory.yy[slot, slot], y @ y, rtol=1e-9)
        chex.assert_trees_all_close(1.0 / state.memory.inv_r[slot, slot], s @ y, rtol=1e-9)
        written += 1
    assert written == 8  # the loss is strictly convex, so that every pair of one batch has positive curvature


@pytest.mark.parametrize("rate", [None, 0.5], ids=["search", "fixed rate"])
def test_bfgs_satisfies_the_secant_equation_of_one_batch(rate):
    iteration = on_batches("bfgs", rate)
    w, state = start("bfgs", rate)
    gradient = jax.jit(jax.grad(regression))
    for batch in (*BATCHES, *BATCHES):
        old = w
        w, state, _, _ = iteration(w, state, *batch)
        s, y = w - old, gradient(w, *batch) - gradient(old, *batch)
        chex.assert_trees_all_close(current(state.inverse) @ y, s, rtol=1e-8, atol=1e-11)  # (N&W 6.6)
    assert int(state.inverse.pairs) == 8


@pytest.mark.parametrize("name", ["newton", "saddle_free_newton"])
def test_the_hessian_is_that_of_the_batch_of_the_call(name):
    iteration = on_batches(name)
    w, state = start(name)
    for batch in BATCHES:
        expected = jax.hessian(regression)(w, *batch)
        w, state, _, _ = iteration(w, state, *batch)
        values, Q = state.spectrum
        chex.assert_trees_all_close((Q * values) @ Q.T, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("maker", ["lbfgs", "bfgs"])
def test_on_one_batch_extra_arguments_change_nothing_for_a_fixed_rate(maker):
    iteration = on_batches(maker, 0.5)
    w, state = start(maker, 0.5)
    for point in fixed_steps(MAKE[maker](0.5), X0, 6, plain):
        w, state, _, _ = iteration(w, state, *BATCHES[0])
        chex.assert_trees_all_close(w, point, rtol=1e-9)


@every
def test_on_one_batch_extra_arguments_change_nothing_for_a_search(name):
    iteration = on_batches(name)
    w, state = start(name)
    for point in plain_run(name)[0][:5]:
        w, state, _, _ = iteration(w, state, *BATCHES[0])
        chex.assert_trees_all_close(w, point, rtol=1e-9)


@every
def test_parameters_edited_between_calls_are_where_the_next_iteration_begins(name):
    # A user who projects, averages or restores parameters must get steps from there, not from the state's own point.
    iteration = on_batches(name)
    w, state = start(name)
    for batch in BATCHES[:2]:
        w, state, _, _ = iteration(w, state, *batch)
    edited = w + jnp.array([0.3, -0.2, 0.1, 0.4])
    after, state, value, grad = iteration(edited, state, *BATCHES[2])
    chex.assert_trees_all_close((value, grad), jax.value_and_grad(regression)(edited, *BATCHES[2]), rtol=1e-12)
    assert regression(after, *BATCHES[2]) < value
    assert np.vdot(after - edited, grad) < 0


# Complex parameters


A = np.array([[1, -2, 0.5j], [3, 4, 1], [-4 + 2j, 5 - 3j, 0], [-2 - 2j, 6, 1 - 1j]])
Z0 = np.array([1 - 1j, 0.5 + 1j, -0.3j])


def modulus(z: jax.Array) -> jax.Array:
    """Return a convex, non-holomorphic loss of complex parameters."""
    return 0.05 * jnp.sum(jnp.abs(A @ z - 1.0) ** 2) + jnp.sum(jnp.sqrt(1.0 + jnp.abs(z) ** 2))


def real_modulus(x: jax.Array) -> jax.Array:
    return modulus(x[0] + 1j * x[1])


LBFGS: dict[str, Callable[[], Any]] = {
    "search": so.lbfgs,
    "fixed rate": lambda: so.lbfgs(0.5),
    "zoom of optax": lambda: so.lbfgs(linesearch=SEARCHES["zoom"]()),
}


@pytest.mark.parametrize("kind", LBFGS)
def test_complex_parameters_move_like_their_real_and_imaginary_parts(kind):
    optimizer = LBFGS[kind]()

    def run(loss: Callable[..., Any], x: Any) -> Any:
        def iteration(carry: Any, _: None) -> Any:
            x, state = carry
            value, grad = jax.value_and_grad(loss)(x)
            grad = jnp.conj(grad)  # the direction of ascent, as every optax optimizer wants it
            move, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=loss)
            return (x + move, state), x + move

        return jax.jit(lambda x: jax.lax.scan(iteration, (x, optimizer.init(x)), None, 8)[1])(x)

    z = run(modulus, jnp.asarray(Z0))
    x = run(real_modulus, jnp.stack([Z0.real, Z0.imag]))
    assert z.dtype == jnp.complex128
    chex.assert_trees_all_close(z, x[:, 0] + 1j * x[:, 1], rtol=1e-7, atol=1e-9)
    assert modulus(z[-1]) < modulus(Z0)


def test_the_value_and_gradient_kept_for_complex_parameters_are_in_the_convention_of_jax_grad():
    optimizer = so.lbfgs()
    z = jnp.asarray(Z0)
    state = optimizer.init(z)
    value, grad = jax.value_and_grad(modulus)(z)
    move, state = optimizer.update(jnp.conj(grad), state, z, value=value, value_fn=modulus)
    kept = optax.value_and_grad_from_state(modulus)(z + move, state=state)
    chex.assert_trees_all_close(kept, jax.value_and_grad(modulus)(z + move), rtol=1e-10)


# The accepted point


@pytest.mark.parametrize("name", [n for n, e in REGISTRY.items() if e.searches and not e.residual])
def test_the_accepted_point_was_shown_and_its_loss_never_rises(name):
    entry, optimizer = REGISTRY[name], REGISTRY[name].make()
    value_and_grad = jax.jit(jax.value_and_grad(valley))
    hvp = so.curvature.hvp(valley)
    curvature = {"hvp_fn": hvp} if entry.curvature else {}
    x = jnp.array([-1.2, 1.0, 0.3])
    state = optimizer.init(x)
    chex.assert_trees_all_equal(so.accepted(state).params, x)
    best = so.accepted(state)
    assert best.value == np.inf
    seen: list[tuple[Any, Any, Any]] = []
    for _ in range(15):
        value, grad = value_and_grad(x)
        seen.append((np.asarray(x), np.asarray(value), np.asarray(grad)))
        move, state = optimizer.update(grad, state, x, value=value, **curvature)
        last, best = best, so.accepted(state)
        assert any(
            np.array_equal(best.params, p) and best.value == v and np.array_equal(best.grad, g) for p, v, g in seen
        )
        assert best.value <= last.value
        assert state.info.accepted == np.array_equal(best.params, x)
        x = x + move
    assert best.value < seen[0][1]


def test_the_accepted_point_is_found_inside_wrappers():
    x = {"a": jnp.ones(2), "b": jnp.ones(1)}
    optimizer = optax.chain(optax.identity(), optax.masked(so.lbfgs(), {"a": True, "b": False}))
    found = so.accepted(optimizer.init(x))
    chex.assert_trees_all_equal(found.params["a"], x["a"])
    assert len(jax.tree.leaves(found.params)) == 1


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.1), optax.chain(so.lbfgs(0.1), so.bfgs(0.1)), so.scale_by_newton()],
    ids=["none", "two", "no state"],
)
def test_a_state_without_exactly_one_accepted_point_is_refused(optimizer):
    with pytest.raises(ValueError, match="accepted: state must hold one state"):
        so.accepted(optimizer.init(jnp.zeros(2)))
