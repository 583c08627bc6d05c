"""The experiments that carry the paper's finding, at the scale of a small machine: `python -m paper_figs.studies NAME`."""

from paper_figs.studies.declared import STUDIES as STUDIES
from paper_figs.studies.declared import Along as Along
from paper_figs.studies.declared import Study as Study
from paper_figs.studies.declared import study_named as study_named
from paper_figs.studies.stored import DATA as DATA
from paper_figs.studies.stored import Stored as Stored
from paper_figs.studies.stored import read_all as read_all
from paper_figs.studies.stored import read_study as read_study
