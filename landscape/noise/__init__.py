"""Gradient noise at a checkpoint."""

from landscape.noise.covariance import covariance_spectrum as covariance_spectrum
from landscape.noise.covariance import gradient_covariance_spectrum as gradient_covariance_spectrum
from landscape.noise.covariance import gradient_covariance_summary as gradient_covariance_summary
from landscape.noise.covariance import replica_covariance as replica_covariance
from landscape.noise.decomposition import measure_noise as measure_noise
from landscape.noise.draws import draw_gradients as draw_gradients
from landscape.noise.gram import example_gram as example_gram
from landscape.noise.tails import noise_scale_from_norms as noise_scale_from_norms
from landscape.noise.tails import tail_index as tail_index
