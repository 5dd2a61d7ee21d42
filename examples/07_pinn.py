"""Physics-informed networks: Burgers' equation with a steep front, and Poisson's equation.

Teaches: from Adam to a quasi-Newton method in three lines; points drawn anew while the inverse Hessian is kept
(`state=result.state`, points as `args`); which method to take. The answers are known: Burgers' solution by the integral
of Cole and Hopf, exact to rounding, Poisson's by choice of the right-hand side. Float64, two minutes; draws
docs/images/pinn.png. The guide is docs/pinn.md.
"""

import functools
import itertools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import secondorder as so

ROOT = pathlib.Path(__file__).resolve().parent.parent
NU = 0.01 / np.pi
POINTS, ADAM, ROUNDS, ROUND = 2000, 1000, 5, 300  # collocation points, Adam steps, draws of points, evaluations each


def network(key, widths):
    """Return weights and biases of a tanh network (Glorot's normal)."""
    sizes = list(itertools.pairwise(widths))
    keys = jax.random.split(key, len(sizes))
    return [(jax.random.normal(k, s) * np.sqrt(2 / sum(s)), jnp.zeros(s[1])) for k, s in zip(keys, sizes, strict=True)]


def apply(layers, z):
    for W, b in layers[:-1]:
        z = jnp.tanh(z @ W + b)
    W, b = layers[-1]
    return (z @ W + b)[0]


def along(u, x):
    """Return u, u' and u'' of a function of one number: two nested forward derivatives, no reverse mode."""
    first = lambda x: jax.jvp(u, (x,), (1.0,))
    (value, slope), (_, bend) = jax.jvp(first, (x,), (1.0,))
    return value, slope, bend


def burgers(layers, t, x):
    """Return u at one point; the initial value -sin(pi x) and the period are built in."""
    return -jnp.sin(jnp.pi * x) + t * apply(layers, jnp.array([t, jnp.cos(jnp.pi * x), jnp.sin(jnp.pi * x)]))


@functools.partial(jax.vmap, in_axes=(None, 0))
def burgers_residual(layers, point):
    t, x = point
    u, u_x, u_xx = along(lambda x: burgers(layers, t, x), x)
    u_t = jax.jvp(lambda t: burgers(layers, t, x), (t,), (1.0,))[1]
    return u_t + u * u_x - NU * u_xx


def burgers_loss(layers, points):
    return jnp.mean(burgers_residual(layers, points) ** 2)


def cole_hopf(t, x):
    """Return the exact solution by the trapezoidal rule (Cole 1951, Hopf 1950); t > 0."""
    z = np.linspace(-14, 14, 1001)
    y = x[:, None] - np.sqrt(4 * NU * t[:, None]) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * NU) - z**2
    weight = np.exp(exponent - exponent.max(1, keepdims=True))
    return -(weight * np.sin(np.pi * y)).sum(1) / weight.sum(1)


def uniform(key, count):
    return jax.random.uniform(key, (count, 2), minval=jnp.array([0.0, -1.0]))


@jax.jit
def redraw(layers, key):
    """Return points with a density of 1 + |r| / mean |r|: more of them where the equation is violated."""
    pool = uniform(key, 4 * POINTS)
    r = jnp.abs(burgers_residual(layers, pool))
    return pool[jax.random.choice(key, len(pool), (POINTS,), replace=False, p=1 / len(pool) / 2 * (1 + r / r.mean()))]


def adam(loss, layers, points, steps, rate=5e-3):
    """What most people do today."""
    optimizer = optax.adam(optax.exponential_decay(rate, steps, 0.1))

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(loss)(x, points), state)
        return (optax.apply_updates(x, updates), state), None

    return jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), None, length=steps)[0][0])(layers)


def train(optimizer, layers, points, error):
    """Return parameters and the errors after every round; the curvature is kept while the points change."""
    state, errors = None, [float(error(layers))]
    for key in jax.random.split(jax.random.key(2), ROUNDS):
        result = so.minimize(
            burgers_loss, layers, optimizer, args=(points,), state=state, gtol=0.0, max_evaluations=ROUND
        )
        layers, state, points = result.params, result.state, redraw(result.params, key)
        errors.append(float(error(layers)))
    return layers, errors


def poisson_loss(layers, inside, edge):
    """-laplace u = 2 pi² sin(pi x) sin(pi y) inside, u = 0 on the edge."""

    def interior(z):
        u_xx = along(lambda x: apply(layers, jnp.array([x, z[1]])), z[0])[2]
        u_yy = along(lambda y: apply(layers, jnp.array([z[0], y])), z[1])[2]
        return u_xx + u_yy + 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * z))

    boundary = lambda z: apply(layers, z)
    return jnp.mean(jax.vmap(interior)(inside) ** 2) + jnp.mean(jax.vmap(boundary)(edge) ** 2)


def poisson():
    """Return the relative error after Adam and after ssbroyden, with as many gradients."""
    line, side = np.linspace(0, 1, 32)[1:-1], np.linspace(0, 1, 30)
    inside = jnp.array(np.stack(np.meshgrid(line, line), -1).reshape(-1, 2))
    sides = [pair for s in (0.0, 1.0) for pair in ((side, s), (s, side))]
    edge = jnp.array(np.concatenate([np.stack(np.broadcast_arrays(*pair), -1) for pair in sides]))
    layers = network(jax.random.key(0), (2, 32, 1))
    truth = jnp.prod(jnp.sin(jnp.pi * inside), -1)
    error = lambda p: float(jnp.linalg.norm(jax.vmap(lambda z: apply(p, z))(inside) - truth) / jnp.linalg.norm(truth))
    first = adam(lambda p, _: poisson_loss(p, inside, edge), layers, None, 1500)
    result = so.minimize(poisson_loss, layers, so.ssbroyden(), args=(inside, edge), gtol=0.0, max_evaluations=1500)
    return error(first), error(result.params)


def picture(grid, truth, u, curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1, 1, 1.1))
    t, x = (np.asarray(g) for g in grid)
    shown = axes[0].pcolormesh(t, x, u, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
    fig.colorbar(shown, ax=axes[0])
    axes[0].set(title="u by ssbroyden", xlabel="t", ylabel="x")
    gap = np.log10(np.maximum(np.abs(u - truth), 1e-9))
    shown = axes[1].pcolormesh(t, x, gap, cmap="viridis", vmin=-7, vmax=gap.max(), rasterized=True)
    fig.colorbar(shown, ax=axes[1])
    axes[1].set(title="log10 of its error", xlabel="t", ylabel="x")
    for name, errors in curves.items():
        axes[2].semilogy(ROUND * np.arange(len(errors)), errors, "o-", ms=3.5, label=name)
    axes[2].set(title="Burgers' equation", xlabel="evaluations after Adam", ylabel="relative L2 error")
    axes[2].grid(alpha=0.3)
    axes[2].legend(frameon=False)
    axes[2].spines[["top", "right"]].set_visible(False)
    plt.savefig(path, dpi=120)


def main():
    jax.config.update("jax_enable_x64", True)
    begin = time.time()
    t, x = np.meshgrid(np.linspace(0, 1, 101)[1:], np.linspace(-1, 1, 129))
    truth = cole_hopf(t.ravel(), x.ravel()).reshape(t.shape)
    solution = jax.jit(lambda p: jax.vmap(lambda t, x: burgers(p, t, x))(t.ravel(), x.ravel()).reshape(t.shape))
    error = lambda p: jnp.linalg.norm(solution(p) - truth) / np.linalg.norm(truth)

    points = uniform(jax.random.key(1), POINTS)
    start = adam(burgers_loss, network(jax.random.key(0), (3, 20, 20, 20, 1)), points, ADAM)
    points = redraw(start, jax.random.key(3))
    curves, layers = {}, start
    print(f"Burgers, relative L2 error after {ADAM} steps of Adam: {error(start):.1e}")
    more = adam(burgers_loss, start, points, ROUNDS * ROUND, 1e-3)
    print(f"{'Adam':10} goes on for {ROUNDS * ROUND} steps: {error(more):.1e}")
    for name, optimizer in {"lbfgs": so.lbfgs(), "bfgs": so.bfgs(), "ssbroyden": so.ssbroyden()}.items():
        layers, curves[name] = train(optimizer, start, points, error)
        print(f"{name:10} for {ROUNDS * ROUND} evaluations: {curves[name][-1]:.1e}", flush=True)
    by_adam, by_ssbroyden = poisson()
    print(f"Poisson, 1,500 gradients: Adam {by_adam:.1e}, ssbroyden {by_ssbroyden:.1e}")
    print(f"{time.time() - begin:.0f} s")
    picture((t, x), truth, np.asarray(solution(layers)), curves, ROOT / "docs" / "images" / "pinn.png")
    assert curves["ssbroyden"][-1] < min(5e-3, curves["lbfgs"][-1] / 10, float(error(more)) / 10)
    assert by_ssbroyden < min(1e-4, by_adam / 10)


if __name__ == "__main__":
    main()
