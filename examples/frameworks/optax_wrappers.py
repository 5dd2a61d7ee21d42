"""Optax's wrappers around a second-order optimizer: accumulation, frozen parameters, groups, options, schedules.

Teaches: which wrapper goes with which use. A search must see its own moves carried out: frozen parameters and groups
leave those of the others as they are, so a full search works, one evaluation at a time. Under a mask the optimizer
sees a tree with holes, and would call `value_fn` with it: leave `value_fn` out there. What scales or delays moves
(accumulation, schedules) goes with a fixed step.
"""

import jax
import jax.numpy as jnp
import optax
from data import cross_entropy, moons, report

import secondorder as so


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["W"] + params["hidden"]["b"])
    return hidden @ params["out"]["W"] + params["out"]["b"]


def start():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden": {"W": jax.random.normal(first, (2, 16)), "b": jnp.zeros(16)},
        "out": {"W": 0.3 * jax.random.normal(second, (16, 2)), "b": jnp.zeros(2)},
    }


def penalized(params, x, y):
    return cross_entropy(network(params, x), y) + 1e-4 * optax.tree.norm(params, squared=True)


def searched(optimizer, params, loss, evaluations):
    """Run a loop with a search, one evaluation and one move at a time."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        move, state = optimizer.update(grad, state, params, value=value)
        return optax.apply_updates(params, move), state

    for _ in range(evaluations):
        params, state = step(params, state)
    return params


def stepped(optimizer, params, batches, steps):
    """Run a loop without a search: gradients alone, one batch at a time."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(penalized)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, *batches[i % len(batches)])
    return params, state


def main():
    x, y = moons()
    loss = lambda params: penalized(params, x, y)
    params = start()
    first = loss(params)

    def show(name, trained):
        report(name, first, loss(trained), jnp.mean(network(trained, x).argmax(1) == y))

    # 1. MultiSteps: four batches make one step, the same as one step on all data.
    quarters = [(x[i::4], y[i::4]) for i in range(4)]
    direction = optax.chain(so.scale_by_lbfgs(), optax.scale(-0.5))
    accumulated, _ = stepped(optax.MultiSteps(direction, 4), params, quarters, 400)
    show("MultiSteps", accumulated)
    whole, _ = stepped(direction, params, [(x, y)], 3)
    parts, _ = stepped(optax.MultiSteps(direction, 4), params, quarters, 12)
    assert optax.tree.norm(optax.tree.sub(whole, parts)) < 1e-4 * optax.tree.norm(whole)

    # 2. masked: the hidden layer is frozen (optax.lbfgs fails here); the output layer alone is a convex problem.
    frozen = optax.chain(
        optax.masked(so.lbfgs(), {"hidden": False, "out": True}),
        optax.masked(optax.set_to_zero(), {"hidden": True, "out": False}),
    )
    trained = searched(frozen, params, loss, 60)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, trained["hidden"], params["hidden"]))
    assert loss(trained) < 0.75 * first
    print(f"masked: loss {first:.4f} -> {loss(trained):.4f} with the hidden layer as it was")

    # 3. multi_transform: the same with labels.
    groups = optax.multi_transform(
        {"train": so.lbfgs(), "freeze": optax.set_to_zero()}, {"hidden": "freeze", "out": "train"}
    )
    both = searched(groups, params, loss, 60)
    assert optax.tree.norm(optax.tree.sub(both, trained)) < 1e-3 * optax.tree.norm(trained)
    print(f"multi_transform: loss {loss(both):.4f}, the same")

    # 4. inject_hyperparams: options that are read and changed in the state, without compiling anew.
    injected = optax.inject_hyperparams(so.lbfgs, static_args=("memory_size", "linesearch", "scale_init_precond"))(
        learning_rate=0.5
    )
    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.25)
    grad = jax.grad(loss)(params)
    halved, _ = injected.update(grad, state, params)
    full, _ = so.lbfgs(0.5).update(grad, so.lbfgs(0.5).init(params), params)
    ratio = optax.tree.norm(halved) / optax.tree.norm(full)
    print(f"inject_hyperparams: half the rate, {ratio:.3f} of the step")
    assert abs(ratio - 0.5) < 1e-5

    # 5. A schedule in place of the fixed rate.
    scheduled, _ = stepped(so.lbfgs(optax.cosine_decay_schedule(0.5, 150)), params, [(x, y)], 120)
    show("schedule", scheduled)


if __name__ == "__main__":
    main()
