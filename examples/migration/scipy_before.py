"""scipy.optimize.minimize on NumPy code with a gradient of its own."""

import numpy as np
from data import make, numpy_loss
from scipy.optimize import minimize


def main():
    X, y = make()
    result = minimize(numpy_loss, np.zeros(X.shape[1]), args=(X, y), jac=True, method="BFGS", options={"gtol": 1e-5})
    print(f"loss {result.fun:.6f} after {result.nit} iterations, {result.nfev} evaluations; success {result.success}")
    return result.x


if __name__ == "__main__":
    main()
