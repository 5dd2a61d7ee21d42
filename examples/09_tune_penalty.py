"""A solver inside of a solver: the penalties of a regression are tuned by the gradient of the validation loss.

Teaches: `minimize` is differentiable in its `args`, so that the loss of an outer `minimize` may call an inner one.
Ridge regression with one penalty per feature; half of the features are noise. The inner minimum has a closed form,
so that the gradient through the solver is checked against the gradient through that formula, and the tuned penalties
must shut out the noise. Seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np

import secondorder as so

jax.config.update("jax_enable_x64", True)

FEATURES, SIGNAL = 8, 4


def make(samples, rng):
    X = rng.normal(size=(samples, FEATURES))
    truth = np.where(np.arange(FEATURES) < SIGNAL, 1.0, 0.0)
    return jnp.array(X), jnp.array(X @ truth + rng.normal(size=samples))


def train(w, log_penalty, X, y):
    return jnp.mean((X @ w - y) ** 2) / 2 + jnp.exp(log_penalty) @ w**2 / 2


def main():
    rng = np.random.default_rng(0)
    X, y = make(24, rng)
    X_held, y_held = make(400, rng)

    def validation(log_penalty, solve):
        w = solve(log_penalty)
        return jnp.mean((X_held @ w - y_held) ** 2) / 2 + 1e-4 * jnp.sum(log_penalty**2)  # keeps them finite

    def by_solver(log_penalty):
        return so.minimize(train, jnp.zeros(FEATURES), args=(log_penalty, X, y), gtol=1e-10).params

    def by_formula(log_penalty):
        return jnp.linalg.solve(X.T @ X / len(y) + jnp.diag(jnp.exp(log_penalty)), X.T @ y / len(y))

    # 1. The gradient through the solver is that through the formula.
    start = jnp.full(FEATURES, -3.0)
    through, formula = (jax.grad(validation)(start, solve) for solve in (by_solver, by_formula))
    error = jnp.max(jnp.abs(through - formula)) / jnp.max(jnp.abs(formula))
    print(f"gradient through the solver: relative error {error:.1e}")
    assert error < 1e-8

    # 2. The outer run: quasi-Newton steps on the penalties, an inner run at each.
    tuned = so.minimize(lambda z: validation(z, by_solver), start, so.bfgs(), max_steps=60)
    before, after = validation(start, by_formula), tuned.value
    weights = jnp.abs(by_formula(tuned.params))
    print(f"validation loss {before:.4f} -> {after:.4f} in {tuned.evaluations} evaluations; {tuned.message}")
    print(f"weights of the signal >= {jnp.min(weights[:SIGNAL]):.2f}, of the noise <= {jnp.max(weights[SIGNAL:]):.3f}")
    assert after < before
    assert 3 * jnp.max(weights[SIGNAL:]) < jnp.min(weights[:SIGNAL])


if __name__ == "__main__":
    main()
