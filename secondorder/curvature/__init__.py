"""What the derivatives say: products with the Hessian, and dense Hessians and Jacobians."""

from secondorder.curvature.dense import hessian
from secondorder.curvature.products import hvp
from secondorder.curvature.residuals import jacobian

__all__ = ["hessian", "hvp", "jacobian"]
