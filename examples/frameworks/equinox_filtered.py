"""Equinox: `filter_value_and_grad`, and a module partitioned into parameters and the rest.

Teaches: partition once, and the arrays are the parameters; the other half holds `None` in their places, so that
activation functions and sizes never reach the optimizer.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from data import cross_entropy, moons, report

import secondorder as so


def main():
    x, y = moons()
    network = eqx.nn.MLP(2, 2, width_size=16, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss(params):
        logits = jax.vmap(eqx.combine(params, static))(x)
        return cross_entropy(logits, y) + 1e-4 * optax.tree.norm(params, squared=True)

    # 1. Ask and tell: one evaluation by equinox, one move.
    optimizer = so.lbfgs()
    state, first, point = optimizer.init(params), loss(params), params

    @eqx.filter_jit
    def step(point, state):
        value, grad = eqx.filter_value_and_grad(loss)(point)
        move, state = optimizer.update(grad, state, point, value=value)
        return eqx.apply_updates(point, move), state

    for _ in range(60):
        point, state = step(point, state)

    # 2. The driver, from the point accepted last.
    result = so.minimize(loss, so.accepted(state).params, so.lbfgs(), max_steps=500)
    trained = eqx.combine(result.params, static)
    report("equinox", first, result.value, jnp.mean(jax.vmap(trained)(x).argmax(1) == y))


if __name__ == "__main__":
    main()
