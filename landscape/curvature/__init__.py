"""Matrix-free curvature."""

from landscape.curvature.lanczos import Eigenpairs as Eigenpairs
from landscape.curvature.lanczos import top_eigenpairs as top_eigenpairs
from landscape.curvature.operators import HessianOperator as HessianOperator
from landscape.curvature.operators import hessian as hessian
