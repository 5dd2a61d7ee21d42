"""NumPyro: a maximum a posteriori estimate by its SVI, and a Laplace approximation by the curvature room.

Teaches: (1) what numpyro's optax adapter can carry. It hands gradients alone to `update`, so that only optimizers
without a search go through it: a fixed `learning_rate`. (2) The potential energy is an ordinary loss: `minimize` finds
its minimum in a few Newton steps, and the inverse of its Hessian is the covariance of the Laplace approximation. The
model is conjugate, so that both are known in closed form.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.util import initialize_model
from numpyro.optim import optax_to_numpyro

import secondorder as so

NOISE = 0.5


def model(X, y=None):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(X.shape[1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(X @ w, NOISE), obs=y)


def main():
    X = jax.random.normal(jax.random.key(0), (50, 3))
    y = X @ jnp.array([1.0, -2.0, 0.5]) + NOISE * jax.random.normal(jax.random.key(1), (50,))
    precision = X.T @ X / NOISE**2 + jnp.eye(3)  # of the posterior
    exact_mean, exact_covariance = jnp.linalg.solve(precision, X.T @ y / NOISE**2), jnp.linalg.inv(precision)

    # 1. SVI with L-BFGS directions and a fixed step. Its loss is deterministic here, because the guide is a point.
    adapter = optax_to_numpyro(optax.chain(so.scale_by_lbfgs(), optax.scale(-0.3)))
    guide = AutoDelta(model)
    run = SVI(model, guide, adapter, Trace_ELBO()).run(jax.random.key(2), 100, X, y, progress_bar=False)
    by_svi = guide.median(run.params)["w"]

    # 2. The driver on the potential energy: the status tells that it is done.
    info = initialize_model(jax.random.key(3), model, model_args=(X, y))
    result = so.minimize(lambda z: info.potential_fn(z), info.param_info.z, gtol=1e-3)
    assert result.success

    # 3. Laplace: the covariance is the inverse Hessian.
    covariance = jnp.linalg.inv(so.curvature.hessian(info.potential_fn, result.params))
    errors = [jnp.max(jnp.abs(w - exact_mean)) for w in (by_svi, result.params["w"])]
    relative = jnp.max(jnp.abs(covariance - exact_covariance)) / jnp.max(exact_covariance)
    print(f"numpyro: error of the mean, SVI {errors[0]:.1e}, minimize {errors[1]:.1e} in {result.steps} steps")
    print(f"numpyro: relative error of the covariance {relative:.1e}")
    assert max(errors) < 1e-3
    assert relative < 1e-4


if __name__ == "__main__":
    main()
