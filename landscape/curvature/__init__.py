"""Matrix-free curvature."""

from landscape.curvature.blocks import BlockDiagonalOperator as BlockDiagonalOperator
from landscape.curvature.blocks import PreconditionedOperator as PreconditionedOperator
from landscape.curvature.blocks import adam_diagonal as adam_diagonal
from landscape.curvature.blocks import diagonal_blocks as diagonal_blocks
from landscape.curvature.coupled import CoupledOperator as CoupledOperator
from landscape.curvature.density import SpectralDensity as SpectralDensity
from landscape.curvature.density import spectral_density as spectral_density
from landscape.curvature.differences import GradientDifferenceOperator as GradientDifferenceOperator
from landscape.curvature.gauss_newton import fisher as fisher
from landscape.curvature.gauss_newton import ggn as ggn
from landscape.curvature.gradient_moments import gradient_covariance as gradient_covariance
from landscape.curvature.gradient_moments import second_moment as second_moment
from landscape.curvature.hessian import HessianOperator as HessianOperator
from landscape.curvature.hessian import hessian as hessian
from landscape.curvature.lanczos import Eigenpairs as Eigenpairs
from landscape.curvature.lanczos import top_eigenpairs as top_eigenpairs
from landscape.curvature.low_rank import LowRankOperator as LowRankOperator
from landscape.curvature.low_rank import SampleCovarianceOperator as SampleCovarianceOperator
from landscape.curvature.preflight import Preflight as Preflight
from landscape.curvature.preflight import preflight as preflight
from landscape.curvature.trace import DiagonalEstimate as DiagonalEstimate
from landscape.curvature.trace import TraceEstimate as TraceEstimate
from landscape.curvature.trace import diagonal as diagonal
from landscape.curvature.trace import frobenius_norm as frobenius_norm
from landscape.curvature.trace import trace as trace
