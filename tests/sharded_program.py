"""Run L-BFGS on eight devices and print what became of the sharding; started by test_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so

ROWS, COLUMNS, MEMORY, TURNS = 16, 4, 5, 12
MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
SHARDING = {"w": NamedSharding(MESH, PartitionSpec("x")), "b": NamedSharding(MESH, PartitionSpec(None, "x"))}
HISTORY = {key: NamedSharding(MESH, PartitionSpec(None, *s.spec)) for key, s in SHARDING.items()}


def loss(params):
    w, b = params["w"], params["b"]
    return jnp.sum(jnp.cosh(w - 0.3)) + 0.5 * jnp.sum((1 + jnp.arange(b.size).reshape(b.shape)) * (b - 1) ** 2)


def same(tree, shardings):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in pairs)


def own_trees(state):
    return state.params, state.grad, state.direction


def main():
    whole = {"w": jnp.zeros((ROWS, COLUMNS)), "b": jnp.zeros((2, 8))}
    optimizer = so.lbfgs(memory_size=MEMORY)
    for calling in ("value", "value_fn"):
        extra = {"value_fn": loss} if calling == "value_fn" else {}

        @jax.jit
        def evaluate(params):
            return jax.value_and_grad(loss)(params)

        @jax.jit
        def update(grad, state, params, value, extra=extra):
            return optimizer.update(grad, state, params, value=value, **extra)

        ends = []
        for params in (whole, jax.device_put(whole, SHARDING)):
            state = optimizer.init(params)
            started = state
            for _ in range(TURNS):
                value, grad = evaluate(params)
                move, state = update(grad, state, params, value)
                # XLA's CPU client hangs where a loop runs 32 computations ahead: one device waits for a free place
                # among them, the others for that device in an all-reduce.
                params = jax.block_until_ready(optax.apply_updates(params, move))
            ends.append(so.accepted(state).params)
        program = update.lower(grad, state, params, value).compile().as_text()
        kept = all(same(tree, SHARDING) for s in (started, state) for tree in own_trees(s))
        close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), *ends)
        history = same(started.memory.rows, HISTORY) and same(state.memory.rows, HISTORY)
        print(f"{calling}, updates keep the sharding: {same(move, SHARDING)}")
        print(f"{calling}, the state keeps the sharding: {kept}")
        print(f"{calling}, the history is sharded like the parameters: {history}")
        print(f"{calling}, no leaf is gathered: {'all-gather' not in program and 'all-to-all' not in program}")
        print(f"{calling}, the points are those of one device: {all(jax.tree.leaves(close))}")
    result = so.minimize(loss, jax.device_put(whole, SHARDING), optimizer)
    print(f"minimize keeps the sharding: {same(result.params, SHARDING)}")
    print(f"minimize converges: {result.success}")
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))
    for what, sharding in (
        ("a state that is sharded differently", NamedSharding(MESH, PartitionSpec())),
        ("parameters on a mesh of other axes", NamedSharding(mesh, PartitionSpec("y"))),
    ):
        try:
            so.minimize(loss, jax.device_put(result.params, sharding), optimizer, state=result.state)
        except ValueError as error:
            refused = "sharding" in str(error) and "device_put" in str(error)
        else:
            refused = False
        print(f"minimize refuses {what}: {refused}")
    again = so.minimize(loss, result.params, optimizer, state=result.state)
    print(f"minimize resumes from a state that is sharded alike: {again.success}")


if __name__ == "__main__":
    main()
