"""What the second derivative says: products with it, dense matrices, spectra, critical points, sharpness."""

from secondorder.curvature.critical_points import CriticalPoint, Kind, classify_critical_point
from secondorder.curvature.dense import hessian, hessian_blocks, jacobian, unravel
from secondorder.curvature.estimate import Estimate
from secondorder.curvature.extreme import Eigenpairs, ExtremeEigenpairs, extreme_eigenpairs, lobpcg_eigenpairs
from secondorder.curvature.products import (
    empirical_fisher_vp,
    fisher_vp,
    gnvp,
    hvp,
    over_batches,
    split_batches,
)
from secondorder.curvature.sharp_minima import Sharpness, sharpness
from secondorder.curvature.slices import LossSlice, filter_normalized_direction, filter_norms, loss_slice, project
from secondorder.curvature.spectrum import (
    ConditionNumber,
    SpectralDensity,
    condition_number,
    effective_dimension,
    jacobian_condition_number,
    log_determinant,
    spectral_density,
)
from secondorder.curvature.traces import Diagonal, diagonal, trace, trace_hutchpp

__all__ = [
    "ConditionNumber",
    "CriticalPoint",
    "Diagonal",
    "Eigenpairs",
    "Estimate",
    "ExtremeEigenpairs",
    "Kind",
    "LossSlice",
    "Sharpness",
    "SpectralDensity",
    "classify_critical_point",
    "condition_number",
    "diagonal",
    "effective_dimension",
    "empirical_fisher_vp",
    "extreme_eigenpairs",
    "filter_normalized_direction",
    "filter_norms",
    "fisher_vp",
    "gnvp",
    "hessian",
    "hessian_blocks",
    "hvp",
    "jacobian",
    "jacobian_condition_number",
    "lobpcg_eigenpairs",
    "log_determinant",
    "loss_slice",
    "over_batches",
    "project",
    "sharpness",
    "spectral_density",
    "split_batches",
    "trace",
    "trace_hutchpp",
    "unravel",
]
