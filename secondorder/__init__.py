"""secondorder: second-order optimizers for JAX."""

from secondorder import curvature, problems
from secondorder.globalization.damping import levenberg, modified_cholesky
from secondorder.globalization.line_search import line_search
from secondorder.globalization.stopping import Info, Status
from secondorder.globalization.trust_region import trust_region
from secondorder.optimizers.bfgs import bfgs, scale_by_bfgs
from secondorder.optimizers.lbfgs import lbfgs, scale_by_lbfgs
from secondorder.optimizers.newton import newton, scale_by_newton
from secondorder.optimizers.saddle_free_newton import saddle_free_newton, scale_by_saddle_free_newton
from secondorder.solve import Result, minimize
from secondorder.track import recorded, track
from secondorder.transform import accepted

__version__ = "0.1.0"

__all__ = [
    "Info",
    "Result",
    "Status",
    "accepted",
    "bfgs",
    "curvature",
    "lbfgs",
    "levenberg",
    "line_search",
    "minimize",
    "modified_cholesky",
    "newton",
    "problems",
    "recorded",
    "saddle_free_newton",
    "scale_by_bfgs",
    "scale_by_lbfgs",
    "scale_by_newton",
    "scale_by_saddle_free_newton",
    "track",
    "trust_region",
]
