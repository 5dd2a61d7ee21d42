"""A tour of the curvature tools on a small network: the pictures of docs/curvature.md.

Teaches: recording the top eigenvalue during a training (`track`), the spectrum (`curvature.spectral_density`), slices
of the loss with the run projected on them (`curvature.loss_slice`, `curvature.project`), extreme eigenvalues with error
bounds, sharpness, and how a Hessian reveals a softmax that was not shifted. Prints the figures, checks them against
the dense Hessian, saves three pictures. About a minute.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot
from sklearn.datasets import load_digits

import secondorder as so
from secondorder import curvature, plotting, problems

HIDDEN, STEPS, RATE, EVERY = 8, 300, 0.5, 5  # 610 parameters; full-batch gradient descent
OUTPUT = Path(__file__).parent / "output"


def train(loss, start):
    """Return the path of gradient descent, a tree with a leading axis of steps, and the record of its figures."""
    optimizer = so.track(optax.sgd(RATE), ("value", "top_eigenvalue", "trace"), every=EVERY)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state, params, value=value, value_fn=loss)
        return (optax.apply_updates(params, updates), state), params

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=STEPS))
    (_, state), path = run(start)
    return path, so.recorded(state)


def draw_spectra(loss, points, n):
    _, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    spectrum = jax.jit(lambda p: curvature.spectral_density(curvature.hvp(loss), p, steps=80))
    for (name, params), ax in zip(points.items(), axes, strict=True):
        plotting.spectral_density(spectrum(params), num=n, ax=ax).set_title(f"Hessian, {name}")
    pyplot.savefig(OUTPUT / "spectrum.png", dpi=110)


def draw_slices(loss, path, end):
    pairs = curvature.extreme_eigenpairs(curvature.hvp(loss), end)
    steep = jax.tree.map(lambda rows: rows[0], pairs.largest.vectors)
    first = jax.tree.map(lambda rows: rows[0], path)
    travelled = jax.tree.map(jnp.subtract, first, end)
    unit = jax.tree.map(lambda leaf: leaf / optax.tree.norm(travelled), travelled)
    length = float(1.25 * optax.tree.norm(travelled))
    _, axes = pyplot.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    plane = curvature.loss_slice(loss, end, [unit, steep], span=length, points=41)
    projected = curvature.project(path, end, [unit, steep])
    names = "toward the start", "top eigenvector"
    plotting.loss_slice(plane, path=projected, names=names, ax=axes[0]).set_title("through the end of the run")
    for seed in range(3):
        direction = curvature.filter_normalized_direction(end, jax.random.key(seed))
        line = curvature.loss_slice(loss, end, [direction])
        plotting.loss_slice(line, names=("filter-normalized random directions",), ax=axes[1])
    axes[1].set_title("around the end of the run")
    pyplot.savefig(OUTPUT / "slices.png", dpi=110)


def draw_runs(loss, starts, record):
    _, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    curves = {
        name: [so.minimize(loss, start, optimizer, max_steps=100, history=True) for start in starts]
        for name, optimizer in (("lbfgs", so.lbfgs()), ("optax.adam(3e-2)", optax.adam(3e-2)))
    }
    plotting.convergence(curves, ax=axes[0]).set_title(f"{len(starts)} starts: median, 10 % to 90 %")
    axes[1].plot(record.step, record.figures["top_eigenvalue"], label="top eigenvalue")
    axes[1].axhline(2 / RATE, color="black", linestyle="--", linewidth=1, label="2 / learning rate")
    axes[1].set(title="gradient descent", xlabel="step", ylabel="eigenvalue", ylim=(0, None))
    axes[1].legend(frameon=False)
    card = problems.rosenbrock(10)
    optimizer = so.track(so.newton(so.levenberg()), ("step_norm", "damping"), every=1, capacity=200)
    newton = so.recorded(so.minimize(card.fun, jnp.asarray(card.start, jnp.float32), optimizer).state)
    ax = plotting.steps(newton.figures["step_norm"], newton.figures["damping"], ax=axes[2])
    ax.set_title("newton(levenberg()) on Rosenbrock's function")
    ax.set_ylabel("length of the step")
    pyplot.savefig(OUTPUT / "runs.png", dpi=110)


def show_softmax():
    """The same loss twice: without the shift the value is right, and the Hessian already wrong."""
    naive = lambda z: jnp.log(jnp.sum(jnp.exp(z))) - z[0]
    shifted = lambda z: jax.nn.logsumexp(z) - z[0]
    say = lambda x: f"{float(x):9.4f}" if np.isfinite(x) else "     lost"
    print(f"\n{'logits':>6}{'loss, naive':>14}{'shifted':>10}{'eigenvalues, naive':>22}{'shifted':>20}")
    for size in (10.0, 50.0, 100.0, -110.0):
        z = jnp.full(2, size, jnp.float32)
        (one, few), (two, all_) = ((fun(z), jnp.linalg.eigvalsh(jax.hessian(fun)(z))) for fun in (naive, shifted))
        print(f"{size:6.0f}     {say(one)} {say(two)}    {say(few[0])}{say(few[1])}  {say(all_[0])}{say(all_[1])}")
    z = jnp.full(2, 50.0, jnp.float32)
    assert abs(naive(z) - shifted(z)) < 1e-4, "the naive value is wrong at 50 already"
    np.testing.assert_allclose(jnp.linalg.eigvalsh(jax.hessian(shifted)(z)), [0.0, 0.5], atol=1e-6)
    assert jnp.linalg.eigvalsh(jax.hessian(naive)(z))[0] > 0.4, "the naive Hessian is right at 50"


def main():
    images, labels = load_digits(return_X_y=True)
    card = problems.mlp(images / 16, labels, hidden=HIDDEN)
    loss, start = card.fun, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), card.start)
    n = sum(leaf.size for leaf in jax.tree.leaves(start))
    OUTPUT.mkdir(exist_ok=True)
    path, record = train(loss, start)
    end = jax.tree.map(lambda leaf: leaf[-1], path)
    dense = jax.jit(lambda p: curvature.hessian(loss, p))
    for name, params in (("start", start), (f"after {STEPS} steps", end)):
        exact = np.linalg.eigvalsh(np.asarray(dense(params), np.float64))
        pairs = curvature.extreme_eigenpairs(curvature.hvp(loss), params)
        sharp = curvature.sharpness(loss, params)
        small, large = pairs.smallest, pairs.largest
        print(f"{name}: n = {n}, {int(pairs.products)} products")
        print(f"  smallest {small.values[0]:9.5f} +- {small.residuals[0]:.0e} (dense {exact[0]:9.5f})")
        print(f"  largest  {large.values[0]:9.5f} +- {large.residuals[0]:.0e} (dense {exact[-1]:9.5f})")
        print(f"  trace {sharp.trace.value:.2f} +- {sharp.trace.margin:.2f} (dense {exact.sum():.2f})", end=", ")
        print(f"sharpness in a box of 1e-3: {sharp.epsilon_sharpness:.2f} %")
        assert abs(large.values[0] - exact[-1]) < 1e-4 * exact[-1], "the largest eigenvalue is wrong"
        assert abs(sharp.trace.value - exact.sum()) < 2 * sharp.trace.margin, "the trace is outside its interval"
    draw_spectra(loss, {"start": start, f"after {STEPS} steps": end}, n)
    draw_slices(loss, path, end)
    cards = [problems.mlp(images / 16, labels, hidden=HIDDEN, seed=seed) for seed in range(6)]
    draw_runs(loss, [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), card.start) for card in cards], record)
    show_softmax()
    print("Pictures: examples/output/spectrum.png, slices.png, runs.png")


if __name__ == "__main__":
    main()
