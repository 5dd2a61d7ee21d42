"""What the second derivative says: products with it, and the dense matrix."""

from secondorder.curvature.dense import hessian
from secondorder.curvature.products import hvp

__all__ = ["hessian", "hvp"]
