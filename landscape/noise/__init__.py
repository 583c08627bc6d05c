"""Gradient noise at a checkpoint."""

from landscape.noise.covariance import gradient_covariance_summary as gradient_covariance_summary
from landscape.noise.decomposition import measure_noise as measure_noise
from landscape.noise.draws import draw_gradients as draw_gradients
