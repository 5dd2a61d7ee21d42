"""Why is training stuck? Saddles high up, minima low down, and the way out of a saddle.

Teaches: finding critical points near a training run, `curvature.classify_critical_point`, leaving a saddle with
`saddle_free_newton`. The protocol of Pascanu, Dauphin, Ganguli & Bengio (2014): train a small network on the digits
with gradient descent, from 12 starts; at several moments minimize the squared gradient norm with Newton's method, whose
curvature is given as an argument (H², the Gauss-Newton matrix of the gradient); classify where that ends. Many of these
runs end where the gradient is flat but not zero (Frye et al. 2021); they are counted, and left out.

Then the highest saddle found is a new start: there gradient descent stands still, and `saddle_free_newton` leaves.
Prints a table and checks it, saves a picture of the minimum ratio against the loss. One to two minutes on two cores.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import secondorder as so
from secondorder import curvature, plotting

INPUTS, HIDDEN, SAMPLES, RIDGE = 6, 4, 300, 3e-3  # 78 parameters; the ridge leaves no direction flat
STARTS, MOMENTS = 12, (0, 5, 20, 50, 100, 300, 1000)  # steps of gradient descent
TRIALS = 80  # of Newton's method on the squared gradient norm, from each point
OUTPUT = Path(__file__).parent / "output" / "critical_points.png"


def make_loss():
    images, labels = load_digits(return_X_y=True)
    features = PCA(INPUTS, whiten=True, random_state=0).fit_transform(images)[:SAMPLES]
    x, y = jnp.asarray(features), jnp.asarray(labels[:SAMPLES])

    def loss(params):
        logits = jnp.tanh(x @ params["W1"] + params["b1"]) @ params["W2"] + params["b2"]
        ridge = sum(jnp.sum(leaf**2) for leaf in params.values())
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)) + 0.5 * RIDGE * ridge

    return loss


def start(key):
    one, two = jax.random.split(key)
    return {
        "W1": jax.random.normal(one, (INPUTS, HIDDEN)) / INPUTS**0.5,
        "b1": jnp.zeros(HIDDEN),
        "W2": jax.random.normal(two, (HIDDEN, 10)) / HIDDEN**0.5,
        "b2": jnp.zeros(10),
    }


def train(loss, params):
    """Return the points of gradient descent at `MOMENTS`, from all starts, with a leading axis of moments * starts."""
    step = jax.vmap(lambda p: jax.tree.map(lambda a, b: a - b, p, jax.grad(loss)(p)))
    many = jax.jit(lambda p, count: jax.lax.fori_loop(0, count, lambda _, p: step(p), p))
    points = []
    for before, moment in zip((0, *MOMENTS), MOMENTS, strict=False):
        params = many(params, moment - before)
        points.append(params)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *points)


def nearby_critical_point(loss, params):
    """Return where Newton's method on half the squared gradient norm ends."""
    gradient, product = jax.grad(loss), curvature.hvp(loss)
    unravel = ravel_pytree(params)[1]
    optimizer = so.newton()

    def square(p, v):  # curvature of the squared gradient norm: H²
        H = curvature.hessian(loss, p)
        return unravel(H @ (H @ ravel_pytree(v)[0]))

    def turn(carry):
        p, state, trials = carry
        g = gradient(p)
        value = 0.5 * optax.tree.vdot(g, g)
        move, state = optimizer.update(product(p, g), state, p, value=value, hvp_fn=square)
        return optax.apply_updates(p, move), state, trials + 1

    def unfinished(carry):
        _, state, trials = carry
        return (trials < TRIALS) & (state.loss > 1e-26) & (state.info.status == so.Status.RUNNING)

    _, state, _ = jax.lax.while_loop(unfinished, turn, (params, optimizer.init(params), 0))
    return so.accepted(state).params


def main():
    jax.config.update("jax_enable_x64", True)  # a gradient of 1e-13 tells critical points from flat ones
    loss = make_loss()
    points = train(loss, jax.vmap(start)(jax.random.split(jax.random.key(0), STARTS)))
    ends = jax.jit(lambda all_points: jax.lax.map(lambda p: nearby_critical_point(loss, p), all_points))(points)
    classify = lambda p: curvature.classify_critical_point(loss, p, gtol=1e-9)
    found = jax.tree.map(np.asarray, jax.jit(lambda all_points: jax.lax.map(classify, all_points))(ends))

    # 1. Minimum ratio against loss.
    critical = found.kind != curvature.Kind.NOT_CRITICAL
    print(f"{critical.sum()} of {critical.size} runs ended in a critical point, the others where the gradient is flat")
    print(f"{'near step':>10}{'kind':>12}{'loss':>9}{'gradient':>10}{'negative':>10}{'ratio':>8}{'smallest':>11}")
    order = np.argsort(-found.value)
    for i in order[critical[order]]:
        kind = curvature.Kind(int(found.kind[i])).name.lower()
        print(
            f"{MOMENTS[i // STARTS]:10}{kind:>12}{found.value[i]:9.4f}{found.grad_norm[i]:10.1e}"
            f"{found.negative[i]:10.0f}{found.minimum_ratio[i]:8.3f}{found.smallest[i]:11.1e}"
        )
    value, ratio = found.value[critical], found.minimum_ratio[critical]
    correlation = np.corrcoef(value, ratio)[0, 1]
    print(f"correlation of loss and minimum ratio: {correlation:.2f}")
    kinds = {kind: found.kind == kind for kind in (curvature.Kind.SADDLE, curvature.Kind.MINIMUM)}
    shown = {
        f"{kind.name.lower()}, near step {moment}": (found.value[here], found.minimum_ratio[here])
        for kind, of_kind in kinds.items()
        for k, moment in enumerate(MOMENTS)
        if (here := of_kind & (np.arange(critical.size) // STARTS == k)).any()
    }

    # 2. The way out of the highest saddle.
    top = int(np.argmax(np.where(kinds[curvature.Kind.SADDLE], found.value, -np.inf)))
    saddle = jax.tree.map(lambda leaf: leaf[top], ends)
    stuck = so.minimize(loss, saddle, optax.sgd(1.0), max_steps=50, gtol=0.0, history=True)
    escape = so.minimize(loss, saddle, so.saddle_free_newton(), max_steps=100, history=True)
    print(f"from the saddle at loss {found.value[top]:.4f}: 50 steps of gradient descent lead to {stuck.value:.4f},")
    print(f"{escape.steps} steps of saddle-free Newton to {escape.value:.4f}; {escape.message}")
    end = curvature.classify_critical_point(loss, escape.params, gtol=1e-4)
    print(f"there: {curvature.Kind(int(end.kind)).message}")

    _, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
    plotting.minimum_ratio(shown, ax=axes[0]).set_title(f"{critical.sum()} critical points near 12 trainings")
    runs = {"gradient descent": stuck, "saddle-free Newton": escape}
    plotting.convergence(runs, ax=axes[1]).set_title("from the highest saddle")
    OUTPUT.parent.mkdir(exist_ok=True)
    pyplot.savefig(OUTPUT, dpi=110)
    print(f"Picture: {OUTPUT.relative_to(Path(__file__).parent.parent)}")

    lowest = ratio[value <= np.median(value)].mean()
    assert kinds[curvature.Kind.SADDLE].sum() >= 3, "too few saddles were found"
    assert kinds[curvature.Kind.MINIMUM].sum() >= 1, "no minimum was found"
    assert correlation < -0.5, f"saddles are not higher than minima: correlation {correlation:.2f}"
    assert ratio[np.argmax(value)] < lowest, "the highest critical point is no worse than the low ones"
    assert abs(stuck.value - found.value[top]) < 1e-6, "gradient descent left the saddle"
    assert escape.value < stuck.value - 0.5, "saddle-free Newton did not escape"


if __name__ == "__main__":
    main()
