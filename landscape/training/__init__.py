"""Training: algorithms, topologies, schedules, and the stacked program."""

from landscape.training.config import TrainConfig as TrainConfig
from landscape.training.loop import Program as Program
from landscape.training.state import LearnerState as LearnerState
from landscape.training.topology import Topology as Topology
from landscape.training.topology import topology as topology
