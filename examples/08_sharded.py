"""Train on several devices: the parameters sharded, the same optimizers, the same iterates.

Teaches: `jax.make_mesh` and `NamedSharding` are all that is needed; `init` and `minimize` keep the sharding; L-BFGS and
Newton-CG without gathering the parameters. A softmax regression on the digits, its weights sharded by pixel. Without
accelerators it forces eight CPU devices; where JAX finds several devices, it uses those, unchanged.
Prints the training loss and accuracy, and what sits on each device; checks them against a run on one device. Seconds.
"""

import os

if not os.environ.get("JAX_PLATFORMS", "cpu").startswith(("cuda", "gpu", "tpu")):  # takes effect on CPUs alone
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import secondorder as so
from secondorder import problems


def main():
    images, labels = load_digits(return_X_y=True)
    card = problems.softmax_regression(images / 16, labels)
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), card.start)
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    shardings = {"W": NamedSharding(mesh, PartitionSpec("x")), "b": NamedSharding(mesh, PartitionSpec())}
    sharded = jax.device_put(start, shardings)
    print(f"{jax.device_count()} devices ({jax.devices()[0].platform}), W is {start['W'].shape}")
    for name, optimizer in {"lbfgs": so.lbfgs(), "newton_cg": so.newton_cg()}.items():
        one = so.minimize(card.fun, start, optimizer)
        many = so.minimize(card.fun, sharded, optimizer)
        W = many.params["W"]
        logits = (images / 16) @ np.asarray(W) + np.asarray(many.params["b"])
        right = np.mean(np.argmax(logits, axis=1) == labels)
        print(
            f"{name:10} loss {many.value:.5f} (one device {one.value:.5f}), accuracy {right:.3f}, {many.evaluations} "
            f"evaluations, {many.hessian_products} products, {W.addressable_shards[0].data.shape} of W per device"
        )
        assert many.success, many.message
        assert abs(many.value - one.value) < 1e-4, "one device and many disagree"
        assert W.sharding.is_equivalent_to(shardings["W"], W.ndim), "the sharding was lost"
        assert right > 0.95, "the digits were not learnt"


if __name__ == "__main__":
    main()
