"""The run format, its writer and reader, and importers of other systems' checkpoints."""

from landscape.checkpoints.format import CheckpointError as CheckpointError
from landscape.checkpoints.learners import Learners as Learners
from landscape.checkpoints.reader import Run as Run
from landscape.checkpoints.reader import open_run as open_run
from landscape.checkpoints.reader import read_checkpoint as read_checkpoint
from landscape.checkpoints.recorder import save_learner as save_learner
