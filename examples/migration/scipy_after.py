"""The same call of this library: first with the old NumPy code as it is, then with the loss that JAX differentiates."""

import numpy as np
from data import loss, make, numpy_loss

from secondorder.compat import minimize  # was: from scipy.optimize import minimize


def main():
    X, y = make()
    result = minimize(numpy_loss, np.zeros(X.shape[1]), args=(X, y), jac=True, method="BFGS", options={"gtol": 1e-5})
    print(f"loss {result.fun:.6f} after {result.nit} iterations, {result.nfev} evaluations; success {result.success}")

    # Nothing to differentiate by hand, one compiled program, and a method that needs the Hessian for free.
    newton = minimize(loss, np.zeros(X.shape[1]), args=(X, y), method="trust-exact")
    print(f"loss {newton.fun:.6f} after {newton.nit} iterations, {newton.nfev} evaluations; success {newton.success}")
    np.testing.assert_allclose(newton.x, result.x, atol=1e-2)
    return result.x


if __name__ == "__main__":
    main()
