"""secondorder: second-order optimizers for JAX."""

from secondorder import compat, curvature, problems
from secondorder.curvature.linear_model import direct, iterative
from secondorder.curvature.pointwise import pointwise
from secondorder.fit import LeastSquaresResult, curve_fit, least_squares
from secondorder.globalization.capped_cg import capped_cg
from secondorder.globalization.damping import levenberg, modified_cholesky, target_ratio, truncation
from secondorder.globalization.line_search import line_search
from secondorder.globalization.stopping import Info, Status
from secondorder.globalization.trust_region import trust_region
from secondorder.optimizers.bfgs import bfgs, scale_by_bfgs
from secondorder.optimizers.broyden_class import broyden_class, dfp, ssbfgs, ssbroyden
from secondorder.optimizers.cubic_newton import cubic_newton
from secondorder.optimizers.gauss_newton import gauss_newton
from secondorder.optimizers.lbfgs import lbfgs, scale_by_lbfgs
from secondorder.optimizers.lbfgsb import lbfgsb
from secondorder.optimizers.levenberg_marquardt import levenberg_marquardt
from secondorder.optimizers.natural_gradient import scale_by_natural_gradient
from secondorder.optimizers.newton import newton, scale_by_newton
from secondorder.optimizers.newton_cg import natural_gradient, newton_cg
from secondorder.optimizers.projected_newton import projected_newton
from secondorder.optimizers.saddle_free_newton import saddle_free_newton, scale_by_saddle_free_newton
from secondorder.optimizers.sr1 import sr1
from secondorder.preconditioner import diagonal_preconditioner, lbfgs_preconditioner
from secondorder.solve import Result, minimize
from secondorder.track import recorded, track
from secondorder.transform import accepted

__version__ = "0.1.0"

__all__ = [
    "Info",
    "LeastSquaresResult",
    "Result",
    "Status",
    "accepted",
    "bfgs",
    "broyden_class",
    "capped_cg",
    "compat",
    "cubic_newton",
    "curvature",
    "curve_fit",
    "dfp",
    "diagonal_preconditioner",
    "direct",
    "gauss_newton",
    "iterative",
    "lbfgs",
    "lbfgs_preconditioner",
    "lbfgsb",
    "least_squares",
    "levenberg",
    "levenberg_marquardt",
    "line_search",
    "minimize",
    "modified_cholesky",
    "natural_gradient",
    "newton",
    "newton_cg",
    "pointwise",
    "problems",
    "projected_newton",
    "recorded",
    "saddle_free_newton",
    "scale_by_bfgs",
    "scale_by_lbfgs",
    "scale_by_natural_gradient",
    "scale_by_newton",
    "scale_by_saddle_free_newton",
    "sr1",
    "ssbfgs",
    "ssbroyden",
    "target_ratio",
    "track",
    "truncation",
    "trust_region",
]
