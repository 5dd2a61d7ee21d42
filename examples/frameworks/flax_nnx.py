"""Flax NNX: the parameters are split off the module, and what remains is merged back in the loss.

Teaches: `nnx.split` gives a pytree that `update` and `minimize` take like any other; the loss is a function of it.
"""

import jax
import jax.numpy as jnp
import optax
from data import cross_entropy, moons, report
from flax import nnx

import secondorder as so


class Network(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 16, rngs=rngs)
        self.out = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def main():
    x, y = moons()
    structure, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)

    def loss(params):
        return cross_entropy(nnx.merge(structure, params)(x), y) + 1e-4 * optax.tree.norm(params, squared=True)

    # 1. A training loop: one update is one iteration, with a full line search inside.
    optimizer = so.lbfgs()
    state, first = optimizer.init(params), loss(params)
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)

    # 2. Or the driver, which goes on from there until the gradient is small.
    result = so.minimize(loss, params, so.lbfgs(), max_steps=500)
    network = nnx.merge(structure, result.params)
    report("flax NNX", first, result.value, jnp.mean(network(x).argmax(1) == y))


if __name__ == "__main__":
    main()
