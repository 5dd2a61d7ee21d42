"""The same with this library. What the loss takes goes through `args`; the status tells whether the run converged."""

import jax
import jax.numpy as jnp
from data import loss, make

import secondorder as so


def main():
    X, y = map(jnp.asarray, make())
    solve = lambda y: so.minimize(loss, jnp.zeros(X.shape[1]), so.lbfgs(), args=(X, y), max_steps=200, gtol=1e-4)
    result = solve(y)
    print(f"loss {result.value:.6f} after {result.steps} steps; {result.message}")

    def first_weight(y):
        return solve(y).params[0]

    return result.params, jax.grad(first_weight)(y)


if __name__ == "__main__":
    main()
