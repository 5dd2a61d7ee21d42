"""The main job: a softmax regression and a small network on real data, full batch, with several optimizers.

Teaches: one call, `secondorder.minimize`, runs every optimizer of this library and of optax; what a `Result` says;
what a fair comparison counts. Data: scikit-learn's bundled digits, 1,797 images of 8 by 8 pixels in 10 classes.

Every run may spend 300 evaluations of the loss and its gradient, trials of line searches included. Dense Hessians
come on top: one is n Hessian-vector products, a product costs about two gradients, and the table has both columns.
Prints the table, checks it against what is known, saves a picture of loss against evaluations. About two minutes.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import secondorder as so
from secondorder import Status, plotting

BUDGET, GTOL = 300, 1e-5  # evaluations of each run; a run with a smaller gradient (max-norm) ends early
HIDDEN = 32  # the network has 64 * 32 + 32 + 32 * 10 + 10 = 2,410 parameters, the regression 650
NEWTON_STEPS = 8  # limit for the network, where one Hessian and its eigendecomposition take seconds
OUTPUT = Path(__file__).parent / "output" / "quickstart.png"


def softmax_regression(params, images):
    return images @ params["W"] + params["b"]


def network(params, images):
    return jnp.tanh(images @ params["W1"] + params["b1"]) @ params["W2"] + params["b2"]


def make_loss(model):
    def loss(params, images, labels):  # cross-entropy, and a ridge on the weights that makes the regression convex
        ridge = sum(jnp.sum(leaf**2) for name, leaf in params.items() if name.startswith("W"))
        entropy = optax.softmax_cross_entropy_with_integer_labels(model(params, images), labels)
        return jnp.mean(entropy) + 0.5e-3 * ridge

    return loss


def run_minimize(optimizer, max_steps=BUDGET):
    """Return the driver's run as a function of (loss, params, *data); it can be jitted like any other."""

    def run(loss, params, *data):
        result = so.minimize(
            loss, params, optimizer, args=data, gtol=GTOL, max_steps=max_steps, max_evaluations=BUDGET, history=True
        )
        return result.params, result.history.evaluations, result.history.value, result.hessians, result.status

    return run


def run_optax_lbfgs(loss, params, *data):
    """The same for optax.lbfgs in optax's own loop, which evaluates nothing twice; trials of its search are counted."""
    optimizer, fun = optax.lbfgs(), lambda p: loss(p, *data)
    value_and_grad = optax.value_and_grad_from_state(fun)

    def step(carry):
        params, state, (value, grad), spent, steps, (counts, losses) = carry
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=fun)
        params = optax.apply_updates(params, updates)
        evaluated = value_and_grad(params, state=state)  # known from the search: no further evaluation
        spent, steps = spent + optax.tree.get(state, "num_linesearch_steps"), steps + 1
        return params, state, evaluated, spent, steps, (counts.at[steps].set(spent), losses.at[steps].set(evaluated[0]))

    def unfinished(carry):
        return (optax.tree.norm(carry[2][1], ord=np.inf) > GTOL) & (carry[3] < BUDGET)

    state, evaluated = optimizer.init(params), jax.value_and_grad(fun)(params)
    record = jnp.zeros(BUDGET + 1, jnp.int32).at[0].set(1), jnp.full(BUDGET + 1, jnp.nan).at[0].set(evaluated[0])
    carry = (params, state, evaluated, jnp.int32(1), jnp.int32(0), record)
    params, _, (_, grad), _, _, (counts, losses) = jax.lax.while_loop(unfinished, step, carry)
    converged = optax.tree.norm(grad, ord=np.inf) <= GTOL
    return params, counts, losses, jnp.int32(0), jnp.where(converged, Status.CONVERGED, Status.MAX_EVALUATIONS)


def main():
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.astype(np.float32) / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = map(jnp.asarray, split)
    rng = np.random.default_rng(0)
    start = {
        softmax_regression: {"W": jnp.zeros((64, 10)), "b": jnp.zeros(10)},
        network: {
            "W1": jnp.asarray(rng.normal(size=(64, HIDDEN)) / 64**0.5, jnp.float32),
            "b1": jnp.zeros(HIDDEN),
            "W2": jnp.asarray(rng.normal(size=(HIDDEN, 10)) / HIDDEN**0.5, jnp.float32),
            "b2": jnp.zeros(10),
        },
    }
    runs = {
        "lbfgs": run_minimize(so.lbfgs()),
        "bfgs": run_minimize(so.bfgs()),
        "optax.lbfgs": run_optax_lbfgs,
        "optax.adam(1e-2)": run_minimize(optax.adam(1e-2)),
    }
    newton_type = {
        softmax_regression: {"newton": run_minimize(so.newton())},
        network: {"saddle_free_newton": run_minimize(so.saddle_free_newton(), NEWTON_STEPS)},
    }
    _, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for model, ax in zip(start, axes, strict=True):
        loss, curves = make_loss(model), {}
        n = sum(leaf.size for leaf in jax.tree.leaves(start[model]))
        print(f"\n{model.__name__}, {n} parameters, at most {BUDGET} evaluations")
        print(
            f"{'':20}{'loss':>10}{'gradient':>10}{'held-out':>10}{'evals':>7}{'products':>10}{'compile':>9}{'run':>8}"
        )
        for name, run in {**runs, **newton_type[model]}.items():
            begin = time.perf_counter()
            compiled = jax.jit(run, static_argnums=0).lower(loss, start[model], train_x, train_y).compile()
            ready = time.perf_counter()
            params, counts, losses, hessians, status = jax.block_until_ready(compiled(start[model], train_x, train_y))
            end = time.perf_counter()
            value, grad = jax.value_and_grad(loss)(params, train_x, train_y)
            norm, accuracy = optax.tree.norm(grad, ord=np.inf), jnp.mean(model(params, test_x).argmax(1) == test_y)
            assert jnp.isfinite(value), f"{name}: the loss is not finite"
            assert accuracy > 0.93, f"{name}: held-out accuracy {accuracy:.3f}; a linear classifier reaches 0.95"
            print(
                f"{name:20}{value:10.6f}{norm:10.1e}{accuracy:10.3f}{counts.max():7}{n * hessians:10}"
                f"{ready - begin:8.1f}s{end - ready:7.2f}s  {Status(int(status)).name.lower()}"
            )
            curves[name + (" (and Hessians)" if hessians else "")] = counts[counts > 0], losses[counts > 0]
        best = min(float(np.nanmin(losses)) for _, losses in curves.values())
        if model is network:  # its minimum is not known: measure from a round number below
            best = np.floor(100 * best) / 100
        plotting.convergence(curves, best=best, ax=ax).set_title(f"{model.__name__}, {n} parameters")
    OUTPUT.parent.mkdir(exist_ok=True)
    pyplot.savefig(OUTPUT, dpi=110)
    print(f"\nA product costs about two gradients. Picture: {OUTPUT.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
