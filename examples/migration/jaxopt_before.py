"""A solve with jaxopt.LBFGS, and the derivative of its solution with respect to the data."""

import jax
import jax.numpy as jnp
import jaxopt
from data import loss, make


def main():
    X, y = map(jnp.asarray, make())
    solver = jaxopt.LBFGS(fun=loss, maxiter=200, tol=1e-4)
    result = solver.run(jnp.zeros(X.shape[1]), X, y)
    print(f"loss {result.state.value:.6f} after {result.state.iter_num} iterations")

    def first_weight(y):
        return solver.run(jnp.zeros(X.shape[1]), X, y).params[0]

    return result.params, jax.grad(first_weight)(y)


if __name__ == "__main__":
    main()
