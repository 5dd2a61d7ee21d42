"""A saddle where gradient descent and Newton's method stall, and saddle-free Newton leaves.

Teaches: a vanishing gradient is not a minimum; the direction-only blocks `scale_by_...` in `optax.chain`; what
`minimize` says about curvature. The loss is x0² - x1² + x1⁴: a saddle at 0, minima of -1/4 at (0, ±1/√2). The start is
1e-6 off the ridge x1 = 0. Newton's method converges to the saddle; gradient descent creeps away from it by a factor of
1.2 a step, and stands there as if it had converged. A second run starts on the saddle, where the gradient is zero.
From farther off the ridge gradient descent does arrive, while Newton's method climbs to the saddle all the same.
Prints where each method ends, checks it against the minimum, saves a picture of the paths. Seconds.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot

import secondorder as so
from secondorder import curvature, plotting, problems

STEPS = 30
STARTS = {"1e-6 off the ridge": jnp.array([1.0, 1e-6]), "0.3 off the ridge": jnp.array([1.0, 0.3])}
OUTPUT = Path(__file__).parent / "output" / "saddle.png"


def path(optimizer, fun, start):
    """Return the points of an optax loop of `STEPS` steps, shape (STEPS + 1, 2)."""

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(fun)(params)
        move, state = optimizer.update(grad, state, params, value=value, hvp_fn=curvature.hvp(fun))
        params = optax.apply_updates(params, move)
        return (params, state), params  # where a trial is rejected, the path shows a step out and back

    _, points = jax.lax.scan(step, (start, optimizer.init(start)), length=STEPS)
    return np.vstack([start, points])


def main():
    card = problems.saddle()
    methods = {
        "gradient descent": optax.with_extra_args_support(optax.sgd(0.1)),
        "Newton": optax.chain(so.scale_by_newton(), optax.scale(-1.0)),
        "saddle-free Newton": so.saddle_free_newton(),
    }
    _, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    ends = {}
    for (place, start), ax in zip(STARTS.items(), axes, strict=True):
        paths = {name: path(optimizer, card.fun, start) for name, optimizer in methods.items()}
        print(f"{place:20}{'loss after ' + str(STEPS):>16}{'gradient':>11}{'smallest eigenvalue':>21}")
        for name, points in paths.items():
            end = jnp.asarray(points[-1])
            gradient, least = jnp.abs(jax.grad(card.fun)(end)).max(), jnp.linalg.eigvalsh(jax.hessian(card.fun)(end))[0]
            print(f"{name:20}{card.fun(end):16.6f}{gradient:11.1e}{least:21.3f}")
            ends[place, name] = float(card.fun(end))
        plotting.paths(card.fun, paths, xlim=(-0.3, 1.2), ylim=(-0.4, 1.3), ax=ax).set_title(f"start {place}")
    OUTPUT.parent.mkdir(exist_ok=True)
    pyplot.savefig(OUTPUT, dpi=110)

    on_ridge, off_ridge = STARTS
    assert abs(ends[on_ridge, "saddle-free Newton"] - card.minimum) < 1e-6, "saddle-free Newton did not arrive"
    assert abs(ends[on_ridge, "gradient descent"]) < 1e-3, "gradient descent left the saddle"
    assert max(abs(ends[start, "Newton"]) for start in STARTS) < 1e-6, "Newton left the saddle"
    assert abs(ends[off_ridge, "gradient descent"] - card.minimum) < 1e-3, "gradient descent did not arrive"

    # Exactly on the saddle the gradient is zero: `minimize` does not call that converged, and leaves.
    result = so.minimize(card.fun, jnp.zeros(2), so.saddle_free_newton())
    print(f"from the saddle itself: loss {result.value:.6f} (minimum {card.minimum}), {result.message}")
    assert result.success
    assert abs(result.value - card.minimum) < 1e-6
    print(f"Picture: {OUTPUT.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
