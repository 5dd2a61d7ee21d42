"""A training loop with optax.lbfgs, as its documentation writes it."""

import jax.numpy as jnp
import optax
from data import loss, make


def main():
    X, y = map(jnp.asarray, make())
    fun = lambda w: loss(w, X, y)
    optimizer = optax.lbfgs()
    w = jnp.zeros(X.shape[1])
    state = optimizer.init(w)
    value_and_grad = optax.value_and_grad_from_state(fun)
    for _ in range(20):
        value, grad = value_and_grad(w, state=state)
        updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=fun)
        w = optax.apply_updates(w, updates)
    print(f"loss {fun(w):.6f}")
    return w


if __name__ == "__main__":
    main()
