"""Orbax: save, be killed, restore, and go on as if nothing had happened, to the last bit.

Teaches: the state is a pytree of arrays, the search in flight included. A fresh process makes the same tree by
`optimizer.init`, and orbax fills it. The middle of a line search is as good a place to stop as any.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import secondorder as so

START = {"w": jnp.array([-1.2, 1.0, -1.2, 1.0]), "b": jnp.zeros(())}
optimizer = so.lbfgs()


def loss(params):
    w = params["w"]
    return jnp.sum(100.0 * (w[1:] - w[:-1] ** 2) ** 2 + (1.0 - w[:-1]) ** 2) + (params["b"] - 1.0) ** 2


@jax.jit
def step(params, state):
    value, grad = jax.value_and_grad(loss)(params)
    move, state = optimizer.update(grad, state, params, value=value)
    return jax.tree.map(jnp.add, params, move), state


def train(params, state, steps):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def first_half(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "half", train(START, optimizer.init(START), 17))
    sys.stdout.flush()
    os._exit(9)  # killed


def second_half(folder):
    like = jax.eval_shape(lambda: (START, optimizer.init(START)))
    with ocp.StandardCheckpointer() as checkpointer:
        params, state = checkpointer.restore(folder / "half", like)
    params, state = train(params, state, 17)
    np.savez(folder / "end.npz", *jax.tree.leaves((params, state)))


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for half, code in (("first", 9), ("second", 0)):
            done = subprocess.run([sys.executable, __file__, half, name], check=False)
            assert done.returncode == code, f"the {half} half ended with {done.returncode}"
        restored = [np.asarray(leaf) for leaf in np.load(folder / "end.npz").values()]
    whole = [np.asarray(leaf) for leaf in jax.tree.leaves(train(START, optimizer.init(START), 34))]
    same = sum(np.array_equal(a, b, equal_nan=True) for a, b in zip(restored, whole, strict=True))
    print(f"orbax: {same} of {len(whole)} leaves equal to the last bit after a restart")
    assert same == len(whole)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        {"first": first_half, "second": second_half}[sys.argv[1]](Path(sys.argv[2]))
    else:
        main()
