"""Products with curvature matrices, without the matrices: Hessian, generalized Gauss-Newton, Fisher.

Each constructor returns a function (params, vector) -> matrix times vector, which every optimizer takes as `hvp_fn`
and every tool of this room as its first argument. A product is linear in the vector, so that `jax.linearize` shares
the work that depends on the parameters alone between many products.

Data sets that do not fit are given as `batches`: a tuple of arrays with one leading axis of batches more than the
function takes. The product is then the mean over batches, accumulated in a `lax.scan` whose body is recomputed instead
of stored, so that the memory is that of one batch whatever is done with the product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from secondorder import checks, jaxprs
from secondorder.linalg import tree

Product = Callable[[tree.ArrayTree, tree.ArrayTree], tree.ArrayTree]


def hvp(
    fun: Callable[..., Any], *args: Any, has_aux: bool = False, batches: tuple[Any, ...] | None = None, **kwargs: Any
) -> Product:
    """Return the Hessian-vector product of a loss, forward over reverse (Pearlmutter 1994).

    Args:
      fun: Loss; fun(params, *args, **kwargs) is a scalar, or (scalar, aux) with `has_aux`.
      *args: Further arguments of `fun`, for instance data.
      has_aux: Whether `fun` also returns auxiliary output.
      batches: Data with a leading axis of batches, a tuple; the loss is then the mean over batches of
        fun(params, *batch, *args, **kwargs), and only one batch is in memory at a time. See `split_batches`.
      **kwargs: Further keyword arguments of `fun`.

    Returns:
      A function (params, vector) -> H(params) vector; `vector` and the result are trees like `params`. It can be
      passed as `hvp_fn` to every optimizer. Cost: about two gradients; the memory of a gradient, doubled. A loss with a
      `jax.custom_vjp` rule has no forward mode: there it is reverse over reverse.

    Raises:
      TypeError: here, if `fun` is not callable; in the product, if the loss or the parameters are not real.
      ValueError: in the product, if the loss is not a scalar, or `vector` is not shaped like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> product = curvature.hvp(lambda x: jnp.sum(x**4))
      >>> product(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])).tolist()
      [12.0, 48.0]

    References: Pearlmutter (1994), "Fast exact multiplication by the Hessian", Neural Computation 6.
    """
    checks.function("hvp", "fun", fun)

    def product(params: tree.ArrayTree, vector: tree.ArrayTree, _: jax.Array, *batch: Any) -> tree.ArrayTree:
        def loss(x: tree.ArrayTree) -> Any:
            out = fun(x, *batch, *args, **kwargs)
            if isinstance(out, (float, int)):
                out = jnp.asarray(out, float)
            checks.scalar_loss("hvp", fun, out, has_aux=has_aux)
            return out[0] if has_aux else out

        return along(jax.grad(loss), params, vector)

    return _averaged("hvp", product, batches)


def along(gradient: Callable[[Any], Any], x: tree.ArrayTree, v: tree.ArrayTree) -> tree.ArrayTree:
    """Return the derivative of a gradient along v: forward mode, or reverse where a loss has reverse rules alone.

    The derivative of a gradient is a symmetric matrix, so that both modes give the same.
    """
    forward = lambda x, v: jax.jvp(gradient, (x,), (v,))[1]
    try:
        return jaxprs.staged(forward, x, v)(x, v) if jaxprs.in_program((x, v)) else forward(x, v)
    except (TypeError, NotImplementedError) as error:
        if not ("custom_vjp" in str(error) or "custom_lin" in str(error)):
            raise
    return jax.vjp(gradient, x)[1](v)[0]


def linear(product: Callable[[tree.ArrayTree], tree.ArrayTree], zero: tree.ArrayTree) -> Callable[[Any], Any]:
    """Return a product that is linear in its vector, with what does not depend on the vector computed once.

    Where JAX cannot tell that part apart, the product is left as it is: of a loss with reverse rules alone, say, which
    call others of that kind, so that the product has no forward mode (`odeint`).
    """
    try:
        _, apply = jax.linearize(product, zero)
        jaxprs.staged(apply, zero)
    except Exception:  # what is wrong with the product itself, it says again
        return product
    return apply


def gnvp(
    model: Callable[..., Any],
    loss: Callable[..., jax.Array],
    inputs: Any = None,
    *targets: Any,
    batches: tuple[Any, ...] | None = None,
) -> Product:
    """Return the generalized Gauss-Newton product J' (d2 loss / d outputs2) J v (Schraudolph 2002).

    It is the Hessian of the loss with the model linearized: positive semidefinite wherever the loss is convex in the
    outputs, equal to the Hessian where the model is linear, and to J'J for half a sum of squares.

    Args:
      model: model(params, inputs) -> outputs, any tree; model(params) if there are no inputs.
      loss: loss(outputs, *targets) -> scalar.
      inputs: What the model takes besides parameters; any tree. Default: nothing.
      *targets: What the loss takes besides outputs.
      batches: (inputs, *targets) with a leading axis of batches, in place of `inputs` and `targets`; the product is
        the mean over batches, one of which is in memory at a time.

    Returns:
      A function (params, vector) -> G(params) vector, to be passed as `hvp_fn`. Cost: about one gradient and one
      forward derivative of the model.

    Raises:
      TypeError: here, if `model` or `loss` is not callable.
      ValueError: here, for both `inputs` and `batches`; in the product, if the loss is not a scalar, or `vector` is
        not shaped like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> product = curvature.gnvp(lambda p, x: p * x, lambda out, y: jnp.sum((out - y) ** 2) / 2, 3.0, 1.0)
      >>> float(product(jnp.array(2.0), jnp.array(1.0)))
      9.0

    References: Schraudolph (2002), "Fast curvature matrix-vector products", Neural Computation 14; Martens (2020),
    "New insights and perspectives on the natural gradient method", JMLR 21, section 8.
    """
    checks.function("gnvp", "model", model)
    checks.function("gnvp", "loss", loss)

    def inner(out: Any, tangent: Any, _: jax.Array, *batch: Any) -> Any:
        def value(z: Any) -> jax.Array:
            total = loss(z, *batch)
            checks.scalar_loss("gnvp", loss, jnp.asarray(total), has_aux=False)
            return total

        return along(jax.grad(value), out, tangent)

    return _gauss_newton("gnvp", model, inner, inputs, targets, batches)


def fisher_vp(
    model: Callable[..., Any],
    losses: Callable[..., jax.Array],
    sample: Callable[[jax.Array, Any], Any],
    key: jax.Array,
    inputs: Any = None,
    *,
    draws: int = 1,
    batches: tuple[Any, ...] | None = None,
) -> Product:
    """Return the product with the true Fisher matrix, its expectation over the model's own predictions by sampling.

    F = mean over samples of E[g g'], g the gradient of the negative log-likelihood of a target that is drawn from the
    model. The targets are drawn from `key`, the same in every product: the product is a fixed matrix.

    Args:
      model: model(params, inputs) -> outputs.
      losses: losses(outputs, targets) -> negative log-likelihood of every sample, shape (samples,).
      sample: sample(key, outputs) -> targets drawn from the model; `jax.random.categorical` for logits.
      key: Random key.
      inputs: What the model takes besides parameters. Default: nothing.
      draws: Targets drawn per sample, >= 1. Default 1. More cost little: all draws share one derivative of the model.
      batches: (inputs,) with a leading axis of batches, in place of `inputs`.

    Returns:
      A function (params, vector) -> F(params) vector, to be passed as `hvp_fn`. Its expectation is `gnvp` for
      likelihoods of exponential families whose natural parameters are the outputs. Cost: as `gnvp`.

    Raises:
      TypeError, ValueError: here, for arguments that cannot be right; in the product, if `losses` returns another
        shape than (samples,), or `vector` is not shaped like `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from secondorder import curvature
      >>> x, W = jnp.array([[1.0], [2.0]]), jnp.zeros((1, 2))
      >>> product = curvature.fisher_vp(lambda W, x: x @ W, optax.losses.softmax_cross_entropy_with_integer_labels,
      ...                               jax.random.categorical, jax.random.key(0), x)
      >>> product(W, jnp.array([[1.0, -1.0]])).tolist()  # g = x (1/2, -1/2) up to sign, whatever is drawn
      [[1.25, -1.25]]

    References: Martens (2020), JMLR 21, sections 5 and 9; Kunstner, Balles & Hennig (2019), "Limitations of the
    empirical Fisher approximation", NeurIPS.
    """
    who = "fisher_vp"
    for name, function in (("model", model), ("losses", losses), ("sample", sample)):
        checks.function(who, name, function)
    checks.integer(who, "draws", draws, 1, hint="1 is the default.")

    def inner(out: Any, tangent: Any, index: jax.Array) -> Any:
        def one(draw: jax.Array) -> Any:
            return _outer(who, losses, out, tangent, sample(draw, jax.lax.stop_gradient(out)))

        keys = jax.random.split(jax.random.fold_in(key, index), draws)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(one)(keys))

    return _gauss_newton(who, model, inner, inputs, (), batches)


def empirical_fisher_vp(
    model: Callable[..., Any],
    losses: Callable[..., jax.Array],
    inputs: Any = None,
    *targets: Any,
    batches: tuple[Any, ...] | None = None,
) -> Product:
    """Return the product with the empirical Fisher matrix, the mean of g g' over the gradients of the samples.

    Cheap, and often mistaken for the Fisher matrix; it is not a curvature away from a good fit (Kunstner et al. 2019).

    Args:
      model: model(params, inputs) -> outputs.
      losses: losses(outputs, *targets) -> loss of every sample, shape (samples,).
      inputs: What the model takes besides parameters. Default: nothing.
      *targets: What `losses` takes besides outputs.
      batches: (inputs, *targets) with a leading axis of batches, in place of `inputs` and `targets`.

    Returns:
      A function (params, vector) -> F(params) vector, to be passed as `hvp_fn`. Cost: as `gnvp`; the gradients of the
      samples are never formed.

    Raises:
      TypeError, ValueError: as `fisher_vp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> product = curvature.empirical_fisher_vp(
      ...     lambda p, x: p * x, lambda out, y: (out - y) ** 2 / 2, jnp.array([1.0, 2.0]), jnp.zeros(2))
      >>> float(product(jnp.array(1.0), jnp.array(1.0)))  # gradients 1 and 4
      8.5

    References: Kunstner, Balles & Hennig (2019), NeurIPS.
    """
    who = "empirical_fisher_vp"
    checks.function(who, "model", model)
    checks.function(who, "losses", losses)

    def inner(out: Any, tangent: Any, _: jax.Array, *batch: Any) -> Any:
        return _outer(who, losses, out, tangent, *batch)

    return _gauss_newton(who, model, inner, inputs, targets, batches)


def split_batches(data: Any, size: int) -> Any:
    """Return data with its first axis, of samples, split into (batches, size).

    Args:
      data: Any tree of arrays with the same number of samples along their first axis.
      size: Samples per batch, >= 1; it must divide the number of samples, so that the mean over batches is the mean
        over samples.

    Returns:
      The same tree, leaves of shape (samples / size, size, ...), to be passed as `batches`.

    Raises:
      ValueError: if the sizes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> curvature.split_batches((jnp.zeros((6, 4)), jnp.zeros(6)), 2)[0].shape
      (3, 2, 4)
    """
    checks.integer("split_batches", "size", size, 1)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(counts) != 1 or () in counts:
        raise ValueError(f"split_batches: data must share one first axis, of samples, got {sorted(counts)}.")
    ((samples,),) = counts
    if samples % size:
        divisors = [k for k in range(1, samples + 1) if samples % k == 0]
        near = min(divisors, key=lambda k: abs(k - size))
        raise ValueError(
            f"split_batches: size must divide the number of samples, {samples}, got {size}; take {near}, or drop "
            f"{samples % size} samples: batches of different sizes have another mean."
        )
    return jax.tree.map(lambda x: jnp.reshape(x, (samples // size, size, *jnp.shape(x)[1:])), data)


def over_batches(fun: Callable[..., jax.Array], batches: tuple[Any, ...]) -> Callable[..., jax.Array]:
    """Return the mean of a loss over batches, in whose derivatives, too, only one batch is in memory at a time.

    Every tool of this room that takes a loss takes this one; so do `minimize` and `jax.grad`.

    Args:
      fun: Loss of one batch; fun(params, *batch, *args) is a scalar.
      batches: Data with a leading axis of batches, a tuple; see `split_batches`.

    Returns:
      A function (params, *args) -> mean over batches. Its derivatives recompute the batch's forward pass instead of
      keeping it: a gradient costs about four thirds of one that keeps everything.

    Raises:
      TypeError, ValueError: if `fun` is not callable, or `batches` not a tuple of arrays with a common first axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from secondorder import curvature
      >>> data = curvature.split_batches((jnp.arange(8.0),), 2)
      >>> float(curvature.over_batches(lambda p, x: jnp.mean((x - p) ** 2), data)(jnp.array(3.5)))
      5.25
    """
    who = "over_batches"
    checks.function(who, "fun", fun)
    count = _count(who, batches)

    def mean(params: tree.ArrayTree, *args: Any) -> jax.Array:
        def add(total: jax.Array, batch: Any) -> tuple[jax.Array, None]:
            value = jnp.asarray(fun(params, *batch, *args))
            checks.scalar_loss(who, fun, value, has_aux=False)
            return total + value.astype(total.dtype) / count, None

        return jax.lax.scan(jax.checkpoint(add), jnp.zeros((), tree.scalar_dtype(params)), batches)[0]

    return mean


# ----------------------------------------------------------------------------------------------------------------------


def _gauss_newton(
    who: str, model: Callable[..., Any], inner: Callable[..., Any], inputs: Any, targets: tuple[Any, ...], batches: Any
) -> Product:
    """Return v -> J' inner(outputs, J v, batch index, *targets), averaged over batches."""
    if batches is not None and (inputs is not None or targets):
        raise ValueError(f"{who}: pass the data either as inputs and targets or as batches=(inputs, *targets).")

    def product(
        params: tree.ArrayTree, vector: tree.ArrayTree, index: jax.Array, inputs: Any = inputs, *rest: Any
    ) -> tree.ArrayTree:
        data = () if inputs is None else (inputs,)
        out, tangent = jax.jvp(lambda x: model(x, *data), (params,), (vector,))
        _, pull = jax.vjp(lambda x: model(x, *data), params)
        return pull(inner(out, tangent, index, *(rest or targets)))[0]

    return _averaged(who, product, batches)


def _outer(who: str, losses: Callable[..., jax.Array], out: Any, tangent: Any, *targets: Any) -> Any:
    """Return mean over samples of s s' tangent, s the gradient of a sample's loss with respect to the outputs."""
    fun = lambda z: losses(z, *targets)
    values, slopes = jax.jvp(fun, (out,), (tangent,))
    if jnp.ndim(values) != 1:
        raise ValueError(
            f"{who}: losses must return one number per sample, shape (samples,), got shape {jnp.shape(values)}; "
            "leave out the mean over samples."
        )
    _, pull = jax.vjp(fun, out)
    return pull((slopes / values.shape[0]).astype(values.dtype))[0]


def _averaged(who: str, product: Callable[..., tree.ArrayTree], batches: tuple[Any, ...] | None) -> Product:
    """Return (params, vector) -> mean over batches of product(params, vector, index, *batch), after the checks."""
    count = 1 if batches is None else _count(who, batches)

    def averaged(params: tree.ArrayTree, vector: tree.ArrayTree) -> tree.ArrayTree:
        checks.params(who, params)
        remedy = "the vector must be a tree like params"
        checks.same_shapes(who, vector, params, "vector", remedy=remedy)
        params = jax.tree.map(jnp.asarray, params)
        vector = tree.cast_like(vector, params)
        if batches is None:
            return product(params, vector, jnp.int32(0))

        def add(total: tree.ArrayTree, indexed: Any) -> tuple[tree.ArrayTree, None]:
            index, batch = indexed
            return tree.axpy(1.0 / count, product(params, vector, index, *batch), total), None

        # Without the checkpoint, linearizing the product would store the activations of all batches.
        indices = jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(jax.checkpoint(add), tree.zeros_like(params), (indices, batches))[0]

    return averaged


def _count(who: str, batches: Any) -> int:
    """Return the number of batches."""
    if not isinstance(batches, tuple) or not jax.tree.leaves(batches):
        raise TypeError(
            f"{who}: batches must be a tuple of arrays with a leading axis of batches, got {type(batches).__name__}; "
            "make it by curvature.split_batches((x, y), size)."
        )
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or () in counts or (0,) in counts:
        raise ValueError(
            f"{who}: all arrays in batches must have the same number of batches along their first axis, got "
            f"{sorted(counts)}; make them by curvature.split_batches((x, y), size)."
        )
    return next(iter(counts))[0]
