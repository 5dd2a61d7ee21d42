"""L-BFGS with its full line search on an objective that JAX cannot trace.

Teaches: ask and tell. `update` needs only numbers, the value and gradient at the point it asked for, so the objective
may be anything: here, plain NumPy code with its own adjoint, standing in for an external simulator. It marches the
temperature of a rod through 20 time steps and asks which initial temperature led to the final one that was measured.
The known answer is the initial temperature that made the measurement. Seconds.
"""

import jax.numpy as jnp
import numpy as np

import secondorder as so

CELLS, TIME_STEPS = 40, 20
MATRIX = np.eye(CELLS) + 0.2 * (np.eye(CELLS, k=1) + np.eye(CELLS, k=-1) - 2 * np.eye(CELLS))  # explicit Euler
RIDGE = 1e-6


def simulate(initial):
    temperature = initial
    for _ in range(TIME_STEPS):
        temperature = MATRIX @ temperature
    return temperature


class Experiment:
    """The objective: misfit to the measurement. Counts its runs; JAX sees nothing of it."""

    def __init__(self, truth):
        self.measured, self.runs = simulate(truth), 0

    def evaluate(self, initial):
        self.runs += 1
        adjoint = misfit = simulate(initial) - self.measured
        for _ in range(TIME_STEPS):  # the adjoint code: back through time
            adjoint = MATRIX.T @ adjoint
        value = 0.5 * misfit @ misfit + 0.5 * RIDGE * initial @ initial
        return value, adjoint + RIDGE * initial


def main():
    grid = np.linspace(0, 1, CELLS)
    truth = np.exp(-100 * (grid - 0.3) ** 2) + 0.5 * np.exp(-100 * (grid - 0.7) ** 2)
    experiment = Experiment(truth)

    optimizer = so.lbfgs()
    params = jnp.zeros(CELLS)  # the next point to evaluate
    state = optimizer.init(params)
    for _ in range(200):
        value, gradient = experiment.evaluate(np.asarray(params, np.float64))  # ask the simulator
        move, state = optimizer.update(jnp.asarray(gradient, params.dtype), state, params, value=value)  # tell
        params = params + move
        if state.info.grad_norm < 1e-6 or state.info.status != so.Status.RUNNING:
            break

    best = so.accepted(state)  # `params` may be a trial of the line search; this is the point accepted last
    error = np.abs(np.asarray(best.params) - truth).max()
    print(f"misfit {best.value:.2e}, gradient {state.info.grad_norm:.1e}, {experiment.runs} runs of the simulator")
    print(f"steps accepted: {state.info.iterations}; largest error of the initial temperature: {error:.3f} of 1")
    assert experiment.runs == state.info.evaluations, "a hidden evaluation"
    assert error < 0.1, "the initial temperature was not recovered"


if __name__ == "__main__":
    main()
