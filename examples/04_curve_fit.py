"""A curve fit with error bars: the growth of onion bulbs, one of NIST's certified regressions.

Teaches: `curve_fit` with named parameters, standard errors, and a 95 % confidence band from the covariance by linear
propagation. The answer is known: NIST certifies parameters and standard deviations to eleven digits (dataset Rat43,
Ratkowsky 1983). Float64, because eleven digits do not fit into float32. Seconds; draws docs/images/curve_fit.png.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so

ROOT = pathlib.Path(__file__).resolve().parent.parent
T_95 = 2.201  # Student's t, 97.5 %, for the 11 degrees of freedom of this fit


def growth(p, week):
    """Richards' curve: the dry weight of a bulb after some weeks."""
    return p["limit"] * (1 + jnp.exp(p["delay"] - p["rate"] * week)) ** (-1 / p["shape"])


def load():
    """Return weeks, weights, a poor start, and the certified parameters with their standard deviations."""
    datasets = json.loads((ROOT / "tests" / "data" / "nist_strd.json").read_text())["datasets"]
    rat43 = next(entry for entry in datasets if entry["name"] == "Rat43")
    start, certified, deviations = (
        dict(zip(("limit", "delay", "rate", "shape"), map(float, rat43[key]), strict=True))
        for key in ("start1", "certified", "certified_sd")
    )
    return np.array(rat43["x"]), np.array(rat43["y"]), start, certified, deviations


def band(fit, week):
    """Return curve and half-width of the band: grad' C grad is the variance of the curve."""
    flat, restore = jax.flatten_util.ravel_pytree(fit.params)
    J = jax.jacfwd(lambda v: growth(restore(v), week))(flat)
    return growth(fit.params, week), T_95 * jnp.sqrt(jnp.einsum("ij,jk,ik->i", J, fit.covariance, J))


def picture(fit, week, weight, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fine = jnp.linspace(week.min() - 0.5, week.max() + 0.5, 200)
    curve, half = band(fit, fine)
    _, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    ax.fill_between(fine, curve - half, curve + half, color="tab:blue", alpha=0.25, label="95 % band of the curve")
    ax.plot(fine, curve, color="tab:blue", label="fit")
    ax.plot(week, weight, "o", color="black", ms=4, label="data (Rat43)")
    ax.set(xlabel="weeks", ylabel="dry weight [g]", title="Growth of onion bulbs, Richards' curve")
    ax.legend(frameon=False, loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    plt.savefig(path, dpi=120)


def main():
    jax.config.update("jax_enable_x64", True)
    week, weight, start, certified, deviations = load()
    fit = so.curve_fit(growth, week, weight, start)
    print(f"{fit.message}: {fit.evaluations} residuals, {fit.jacobians} Jacobians")
    print(f"{'':8}{'fit':>16} {'+-':>12}   {'certified':>14} {'+-':>12}")
    digits = []
    for name in start:
        value, error = float(fit.params[name]), float(fit.standard_errors[name])
        print(f"{name:8}{value:16.9f} {error:12.9f}   {certified[name]:14.9f} {deviations[name]:12.9f}")
        digits += [-np.log10(abs(value / certified[name] - 1)), -np.log10(abs(error / deviations[name] - 1))]
    scatter = float(jnp.sqrt(2 * fit.value / fit.degrees_of_freedom))
    print(f"residual standard deviation {scatter:.6f}, {fit.degrees_of_freedom} degrees of freedom")
    print(f"correct digits of the worst figure: {min(digits):.1f} of 11 that are certified")
    assert fit.success
    assert min(digits) > 8, "the certified answer was not reached"
    picture(fit, week, weight, ROOT / "docs" / "images" / "curve_fit.png")


if __name__ == "__main__":
    main()
