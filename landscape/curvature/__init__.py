"""Matrix-free curvature."""

from landscape.curvature.hessian import HessianOperator as HessianOperator
from landscape.curvature.hessian import hessian as hessian
from landscape.curvature.lanczos import Eigenpairs as Eigenpairs
from landscape.curvature.lanczos import top_eigenpairs as top_eigenpairs
