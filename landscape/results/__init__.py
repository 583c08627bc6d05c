"""Labelled results on disk."""

from landscape.results.storage import load_dataset as load_dataset
from landscape.results.storage import load_groups as load_groups
from landscape.results.storage import save_dataset as save_dataset
from landscape.results.storage import save_groups as save_groups
from landscape.results.storage import stamp as stamp
