"""Run on eight devices with shardings in the types, and print how each run ended; started by test_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import secondorder as so

MESH = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
ROWS, COLUMNS = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in (("x",), (None, "x")))
SHARDING = {"b": ROWS, "w": COLUMNS}
OPTIMIZERS = {
    "minimize": None,
    "newton": so.newton(),
    "bfgs": so.bfgs(),
    "lbfgs": so.lbfgs(),
    "newton_cg": so.newton_cg(),
    "saddle_free_newton": so.saddle_free_newton(),
    "sr1": so.sr1(),
    "ssbroyden": so.ssbroyden(),
}


def separable(params):
    return jnp.sum(jnp.cosh(params["w"] - 0.3)) + jnp.sum((params["b"] - 1) ** 2)


def residual(w, x, y):
    return jnp.tanh(x @ w) - y


def fit(w, x, y):
    return jnp.mean(residual(w, x, y) ** 2) + 1e-2 * jnp.sum(w**2)


def main():
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    whole = x, np.sin(x.sum(axis=1))
    with jax.set_mesh(MESH):
        data = jax.device_put(whole, ROWS)
        params = jax.device_put({"b": jnp.zeros(16), "w": jnp.zeros((2, 8))}, SHARDING)
        for name, optimizer in OPTIMIZERS.items():
            run = so.minimize(separable, params, optimizer)
            kept = all(jax.tree.leaves(jax.tree.map(lambda p, s: p.sharding == s, run.params, SHARDING)))
            near = all(np.allclose(run.params[k], v, atol=1e-3) for k, v in (("w", 0.3), ("b", 1.0)))
            print(f"{name}, parameters: {bool(run.success) and kept and near}")
        ends = {name: so.minimize(fit, jnp.zeros(8), optimizer, args=data) for name, optimizer in OPTIMIZERS.items()}
        ends["least_squares"] = so.least_squares(residual, jnp.zeros(8), args=data)
        H = np.asarray(so.curvature.hessian(separable, params))
    alone = dict.fromkeys(OPTIMIZERS, so.minimize(fit, jnp.zeros(8), args=whole))
    alone["least_squares"] = so.least_squares(residual, jnp.zeros(8), args=whole)
    for name, end in ends.items():
        near = np.allclose(end.params, alone[name].params, atol=1e-3)
        print(f"{name}, data: {bool(end.success) and near}")
    expected = np.diag(np.concatenate([np.full(16, 2.0), np.full(16, np.cosh(0.3))]))
    print(f"hessian, parameters: {np.allclose(H, expected, rtol=1e-5)}")


if __name__ == "__main__":
    main()
