"""Products with the Hessian, without the matrix."""

from collections.abc import Callable
from typing import Any

import jax

from secondorder import checks
from secondorder.linalg import tree


def hvp(
    fun: Callable[..., Any], *args: Any, has_aux: bool = False, **kwargs: Any
) -> Callable[[tree.ArrayTree, tree.ArrayTree], tree.ArrayTree]:
    """Return the Hessian-vector product of a loss, forward over reverse (Pearlmutter 1994).

    Args:
      fun: Loss; fun(params, *args, **kwargs) is a scalar, or (scalar, aux) with `has_aux`.
      *args: Further arguments of `fun`, for instance data.
      has_aux: Whether `fun` also returns auxiliary output.
      **kwargs: Further keyword arguments of `fun`.

    Returns:
      A function (params, vector) -> H(params) vector; `vector` and the result are trees like `params`. It can be
      passed as `hvp_fn` to every optimizer. Cost: about two gradients.

    Raises:
      TypeError: if `fun` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> product = curvature.hvp(lambda x: jnp.sum(x**4))
      >>> product(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])).tolist()
      [12.0, 48.0]
    """
    checks.function("hvp", "fun", fun)
    gradient = jax.grad(fun, has_aux=has_aux)

    def product(params: tree.ArrayTree, vector: tree.ArrayTree) -> tree.ArrayTree:
        def grad(x: tree.ArrayTree) -> tree.ArrayTree:
            g = gradient(x, *args, **kwargs)
            return g[0] if has_aux else g

        return jax.jvp(grad, (params,), (vector,))[1]

    return product
