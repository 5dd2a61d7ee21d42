"""Flax linen: `TrainState` with an optimizer that needs the value of the loss.

Teaches: `TrainState.apply_gradients` hands no extra arguments to `tx.update`, so the one line is written out; the rest
of the state (step, params, opt_state) is used as it is, and goes into checkpoints as before.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from data import cross_entropy, moons, report
from flax.training.train_state import TrainState

import secondorder as so


class Network(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.Dense(16)(x)))


def main():
    x, y = moons()
    network = Network()
    params = network.init(jax.random.key(0), x)["params"]
    train = TrainState.create(apply_fn=network.apply, params=params, tx=so.lbfgs())

    def loss(params):
        return cross_entropy(network.apply({"params": params}, x), y) + 1e-4 * optax.tree.norm(params, squared=True)

    @jax.jit
    def step(train):
        value, grad = optax.value_and_grad_from_state(loss)(train.params, state=train.opt_state)
        updates, opt_state = train.tx.update(grad, train.opt_state, train.params, value=value, grad=grad, value_fn=loss)
        params = optax.apply_updates(train.params, updates)
        return train.replace(step=train.step + 1, params=params, opt_state=opt_state)

    first = loss(train.params)
    for _ in range(100):
        train = step(train)
    accuracy = jnp.mean(network.apply({"params": train.params}, x).argmax(1) == y)
    report("flax linen", first, loss(train.params), accuracy)


if __name__ == "__main__":
    main()
