"""Update rules, one a file: what happens to the learners in one step. A new rule is a file and a line here."""

from collections.abc import Callable

from landscape.training.algorithms import Evaluation, Step
from landscape.training.rules.adjacent_leader import adjacent_leader
from landscape.training.rules.dpsgd import dpsgd
from landscape.training.rules.local_sgd import local_sgd
from landscape.training.rules.ssgd import ssgd
from landscape.training.rules.ubar import ubar
from landscape.training.state import LearnerState

Rule = Callable[[Step], tuple[LearnerState, Evaluation]]

RULES: dict[str, Rule] = {
    "ssgd": ssgd,
    "ssgd-star": ssgd,
    "dpsgd": dpsgd,
    "local-sgd": local_sgd,
    "adjacent-leader": adjacent_leader,
    "ubar": ubar,
}
"""By the name of the algorithm."""
