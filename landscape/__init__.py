"""landscape: why a multi-GPU training run converged or blew up.

Measures the landscape-dependent noise, the Hessian spectrum and the effective learning rate of synchronous and decentralised SGD on
real training runs, and holds them against the smoothing theory of Zhang et al., arXiv 2112.01433.

What is listed here is what most programs need. The parts, from what others rest on to what rests on them: `landscape.display`, `landscape.functional`,
`landscape.data`, `landscape.models`, `landscape.tasks`, `landscape.training`, `landscape.checkpoints`, `landscape.objective`, `landscape.curvature`,
`landscape.noise`, `landscape.slices`, `landscape.theory`, `landscape.results`, `landscape.plotting`, `landscape.experiments`, `landscape.cli`.
"""

from landscape.checkpoints import CheckpointError as CheckpointError
from landscape.checkpoints import Learners as Learners
from landscape.checkpoints import Run as Run
from landscape.checkpoints import open_run as open_run
from landscape.checkpoints import read_checkpoint as read_checkpoint
from landscape.checkpoints import save_learner as save_learner
from landscape.curvature import diagonal as diagonal
from landscape.curvature import fisher as fisher
from landscape.curvature import frobenius_norm as frobenius_norm
from landscape.curvature import ggn as ggn
from landscape.curvature import gradient_covariance as gradient_covariance
from landscape.curvature import hessian as hessian
from landscape.curvature import preflight as preflight
from landscape.curvature import second_moment as second_moment
from landscape.curvature import spectral_density as spectral_density
from landscape.curvature import top_eigenpairs as top_eigenpairs
from landscape.curvature import trace as trace
from landscape.data import TensorData as TensorData
from landscape.display import estimates as estimates
from landscape.experiments.calibrate import calibrate_noise as calibrate_noise
from landscape.experiments.checkpoint import MeasureConfig as MeasureConfig
from landscape.experiments.edge import edge_scorecard as edge_scorecard
from landscape.experiments.edge import find_edge as find_edge
from landscape.experiments.import_run import ImportConfig as ImportConfig
from landscape.experiments.import_run import import_run as import_run
from landscape.experiments.measure import measure as measure
from landscape.experiments.replay import compare as compare
from landscape.experiments.replay import replay as replay
from landscape.experiments.reproduce import reproduce as reproduce
from landscape.experiments.rescue import rescue_experiment as rescue_experiment
from landscape.experiments.sweep import Variant as Variant
from landscape.experiments.sweep import stability_map as stability_map
from landscape.experiments.train import train as train
from landscape.experiments.trajectory import run_flatness as run_flatness
from landscape.noise import measure_noise as measure_noise
from landscape.objective import Objective as Objective
from landscape.slices import Line as Line
from landscape.slices import Plane as Plane
from landscape.slices import SmoothingKernel as SmoothingKernel
from landscape.slices import disagreement_plane as disagreement_plane
from landscape.slices import gradient_field as gradient_field
from landscape.slices import line_between as line_between
from landscape.slices import line_slice as line_slice
from landscape.slices import plane_slice as plane_slice
from landscape.slices import plane_through as plane_through
from landscape.slices import quadratic_model as quadratic_model
from landscape.slices import random_line as random_line
from landscape.slices import random_plane as random_plane
from landscape.slices import trajectory_plane as trajectory_plane
from landscape.tasks import Task as Task
from landscape.theory.scorecard import run_scorecard as run_scorecard
from landscape.theory.scorecard import scorecard as scorecard
from landscape.theory.scorecard import scorecard_dataset as scorecard_dataset
from landscape.theory.smoothing import smoothed_curvature as smoothed_curvature
from landscape.training import TrainConfig as TrainConfig

__all__ = [
    "CheckpointError",
    "ImportConfig",
    "Learners",
    "Line",
    "MeasureConfig",
    "Objective",
    "Plane",
    "Run",
    "SmoothingKernel",
    "Task",
    "TensorData",
    "TrainConfig",
    "Variant",
    "calibrate_noise",
    "compare",
    "diagonal",
    "disagreement_plane",
    "edge_scorecard",
    "estimates",
    "find_edge",
    "fisher",
    "frobenius_norm",
    "ggn",
    "gradient_covariance",
    "gradient_field",
    "hessian",
    "import_run",
    "line_between",
    "line_slice",
    "measure",
    "measure_noise",
    "open_run",
    "plane_slice",
    "plane_through",
    "preflight",
    "quadratic_model",
    "random_line",
    "random_plane",
    "read_checkpoint",
    "replay",
    "reproduce",
    "rescue_experiment",
    "run_flatness",
    "run_scorecard",
    "save_learner",
    "scorecard",
    "scorecard_dataset",
    "second_moment",
    "smoothed_curvature",
    "spectral_density",
    "stability_map",
    "top_eigenpairs",
    "trace",
    "train",
    "trajectory_plane",
]
