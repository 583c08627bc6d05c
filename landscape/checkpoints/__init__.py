"""The run format: writer and reader."""

from landscape.checkpoints.format import CheckpointError as CheckpointError
from landscape.checkpoints.reader import Learners as Learners
from landscape.checkpoints.reader import Run as Run
from landscape.checkpoints.reader import open_run as open_run
from landscape.checkpoints.reader import read_checkpoint as read_checkpoint
