"""The function under study."""

from landscape.objective.modes import BatchNormPolicy as BatchNormPolicy
from landscape.objective.objective import Objective as Objective
from landscape.objective.setting import Weights as Weights
