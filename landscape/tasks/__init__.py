"""What can be trained: a task is a model, a loss, data, a recipe and a convergence threshold, by name."""

from landscape.tasks.names import TASKS as TASKS
from landscape.tasks.names import get_task as get_task
from landscape.tasks.names import is_ours as is_ours
from landscape.tasks.task import CONVERGENCE_WINDOW as CONVERGENCE_WINDOW
from landscape.tasks.task import Recipe as Recipe
from landscape.tasks.task import Scale as Scale
from landscape.tasks.task import Task as Task
