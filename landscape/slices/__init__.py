"""Slices of the landscape: lines and planes in weight space, and the loss along them."""

from landscape.slices.directions import PrincipalAxes as PrincipalAxes
from landscape.slices.directions import filter_normalised as filter_normalised
from landscape.slices.directions import principal_axes as principal_axes
from landscape.slices.directions import random_direction as random_direction
from landscape.slices.evaluate import SmoothingKernel as SmoothingKernel
from landscape.slices.lines import Barrier as Barrier
from landscape.slices.lines import LineSlice as LineSlice
from landscape.slices.lines import line_slice as line_slice
from landscape.slices.local import GradientField as GradientField
from landscape.slices.local import QuadraticModel as QuadraticModel
from landscape.slices.local import gradient_field as gradient_field
from landscape.slices.local import quadratic_model as quadratic_model
from landscape.slices.planes import Line as Line
from landscape.slices.planes import Plane as Plane
from landscape.slices.planes import Projection as Projection
from landscape.slices.planes import disagreement_plane as disagreement_plane
from landscape.slices.planes import line_between as line_between
from landscape.slices.planes import plane_through as plane_through
from landscape.slices.planes import random_line as random_line
from landscape.slices.planes import random_plane as random_plane
from landscape.slices.planes import trajectory_plane as trajectory_plane
from landscape.slices.surfaces import PlaneSlice as PlaneSlice
from landscape.slices.surfaces import plane_slice as plane_slice
