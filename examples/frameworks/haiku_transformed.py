"""Haiku: a transformed function is a pure function of its parameters, and needs nothing further."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from data import cross_entropy, moons, report

import secondorder as so


def main():
    x, y = moons()
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 2], activation=jnp.tanh)(x)))
    params = network.init(jax.random.key(0), x)

    def loss(params):
        return cross_entropy(network.apply(params, x), y) + 1e-4 * optax.tree.norm(params, squared=True)

    result = so.minimize(loss, params, so.lbfgs(), max_steps=500)
    report("haiku", loss(params), result.value, jnp.mean(network.apply(result.params, x).argmax(1) == y))


if __name__ == "__main__":
    main()
