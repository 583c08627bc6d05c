from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from landscape.losses import ExampleLoss, as_example_loss

EXAMPLES, CLASSES = 31, 5
RAGGED = [(31,), (1, 30), (7, 7, 7, 7, 3), (1,) * 31, (20, 2, 9)]
WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.0, 0.7], dtype=torch.float64)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logits(*shape: int) -> Tensor:
    return torch.randn(EXAMPLES, CLASSES, *shape, generator=_generator(), dtype=torch.float64)


def _classes(*shape: int, ignored: int | None = None) -> Tensor:
    targets = torch.randint(0, CLASSES, (EXAMPLES, *shape), generator=_generator())
    if ignored is not None:
        targets[torch.rand(targets.shape, generator=_generator()) < 0.4] = ignored
        targets[:8] = ignored  # the first batches hold nothing else
    return targets


def _probabilities(*shape: int) -> Tensor:
    return torch.rand(EXAMPLES, CLASSES, *shape, generator=_generator(), dtype=torch.float64).softmax(1)


def _signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, (EXAMPLES, *shape), generator=_generator()).double() * 2 - 1


def _multilabel_indices() -> Tensor:
    """Class indices that end at the first -1, as MultiLabelMarginLoss wants them."""
    rows = torch.stack([torch.randperm(CLASSES, generator=_generator()) for _ in range(EXAMPLES)])
    rows[:, 2] = -1
    return rows


CLASS_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "ignore_index": {"ignore_index": 2},
    "weight and ignore_index": {"weight": WEIGHT, "ignore_index": 2},
    "negative ignore_index": {"ignore_index": -1, "weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, weight and ignore_index": {"label_smoothing": 0.3, "weight": WEIGHT, "ignore_index": 2},
}


def _class_cases() -> list[Any]:
    cases = []
    for name, options in CLASS_OPTIONS.items():
        ignored = options.get("ignore_index")
        for shape in ((), (3,), (2, 3)):
            output, target = _logits(*shape), _classes(*shape, ignored=ignored)
            cases.append(pytest.param(nn.CrossEntropyLoss, F.cross_entropy, options, output, target,
                                      id=f"cross entropy, {name}, {len(shape)} extra axes"))  # fmt: skip
            if "label_smoothing" not in options:
                cases.append(pytest.param(nn.NLLLoss, F.nll_loss, options, output.log_softmax(1), target,
                                          id=f"nll, {name}, {len(shape)} extra axes"))  # fmt: skip
    for name in ("plain", "weight", "smoothing"):
        for shape in ((), (3,)):
            cases.append(pytest.param(nn.CrossEntropyLoss, F.cross_entropy, CLASS_OPTIONS[name], _logits(*shape),
                                      _probabilities(*shape), id=f"probabilities, {name}, {len(shape)} extra axes"))  # fmt: skip
    return cases


ELEMENTWISE_CASES = [
    pytest.param(nn.MSELoss, F.mse_loss, {}, _logits(), _logits().cos(), id="mse"),
    pytest.param(nn.MSELoss, F.mse_loss, {}, _logits()[:, 0], _logits()[:, 1], id="mse, one number an example"),
    pytest.param(nn.MSELoss, F.mse_loss, {}, _logits(2, 3), _logits(2, 3).cos(), id="mse, images"),
    pytest.param(nn.L1Loss, F.l1_loss, {}, _logits(), _logits().cos(), id="l1"),
    pytest.param(nn.SmoothL1Loss, F.smooth_l1_loss, {"beta": 0.3}, _logits(), _logits().cos(), id="smooth l1"),
    pytest.param(nn.HuberLoss, F.huber_loss, {"delta": 0.3}, _logits(), _logits().cos(), id="huber"),
    pytest.param(nn.BCELoss, F.binary_cross_entropy, {}, _logits().sigmoid(), _probabilities(), id="bce"),
    pytest.param(nn.BCELoss, F.binary_cross_entropy, {"weight": WEIGHT}, _logits().sigmoid(), _probabilities(), id="bce, weight"),
    pytest.param(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, {"pos_weight": WEIGHT}, _logits(),
                 _probabilities(), id="bce with logits, pos_weight"),
    pytest.param(nn.PoissonNLLLoss, F.poisson_nll_loss, {"full": True}, _logits(), _classes(CLASSES).double(), id="poisson"),
    pytest.param(nn.SoftMarginLoss, F.soft_margin_loss, {}, _logits(), _signs(CLASSES), id="soft margin"),
    pytest.param(nn.HingeEmbeddingLoss, F.hinge_embedding_loss, {"margin": 0.5}, _logits(), _signs(CLASSES), id="hinge embedding"),
    pytest.param(nn.KLDivLoss, F.kl_div, {"log_target": True}, _logits().log_softmax(1), _probabilities().log(), id="kl"),
    pytest.param(nn.MultiLabelMarginLoss, F.multilabel_margin_loss, {}, _logits(), _multilabel_indices(), id="multilabel margin"),
    pytest.param(nn.MultiLabelSoftMarginLoss, F.multilabel_soft_margin_loss, {"weight": WEIGHT}, _logits(),
                 (_signs(CLASSES) + 1) / 2, id="multilabel soft margin"),
    pytest.param(nn.MultiMarginLoss, F.multi_margin_loss, {"weight": WEIGHT, "p": 2}, _logits(), _classes(), id="multi margin"),
]  # fmt: skip
CASES = _class_cases() + ELEMENTWISE_CASES


def recombined(loss: ExampleLoss, output: Tensor, target: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The loss of all examples from its parts in batches of the given sizes."""
    parts = [loss(o, t) for o, t in zip(output.split(sizes), target.split(sizes), strict=True)]
    total, weight = (torch.stack([p[i].sum() for p in parts]).sum() for i in (0, 1))
    return total / weight if loss.reduction == "mean" else total


def options_of(function: Callable[..., Tensor], options: dict[str, Any], reduction: str) -> dict[str, Any]:
    """With a reduction; the Kullback-Leibler divergence is only summed, for torch warns of its element-wise mean."""
    return {**options, "reduction": "sum" if function is F.kl_div else reduction}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("module", "function", "options", "output", "target"), CASES)
def test_any_batching_recombines_to_torchs_value(
    module: type[nn.Module],
    function: Callable[..., Tensor],
    options: dict[str, Any],
    output: Tensor,
    target: Tensor,
    reduction: str,
) -> None:
    options = options_of(function, options, reduction)
    expected = function(output, target, **options)
    for taken_apart in (as_example_loss(module(**options)), as_example_loss(partial(function, **options))):
        for sizes in RAGGED:
            torch.testing.assert_close(recombined(taken_apart, output, target, sizes), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch lacks a batching rule for some rare losses
@pytest.mark.parametrize(("module", "function", "options", "output", "target"), CASES)
def test_parts_are_one_number_an_example_and_can_be_batched(
    module: type[nn.Module], function: Callable[..., Tensor], options: dict[str, Any], output: Tensor, target: Tensor
) -> None:
    loss = as_example_loss(module(**options_of(function, options, "mean")))
    contributions, weights = loss(output, target)
    assert contributions.shape == weights.shape == (EXAMPLES,)
    assert contributions.dtype == weights.dtype == output.dtype
    stacked, stacked_weights = torch.vmap(loss, in_dims=(0, None))(torch.stack([output, 0.9 * output]), target)
    torch.testing.assert_close(stacked[0], contributions, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stacked[1], loss(0.9 * output, target)[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stacked_weights[0], weights, rtol=1e-12, atol=1e-13)


def test_gradients_recombine_too() -> None:
    output, target = _logits().requires_grad_(), _classes(ignored=2)
    options = CLASS_OPTIONS["smoothing, weight and ignore_index"]
    (expected,) = torch.autograd.grad(F.cross_entropy(output, target, **options), output)
    loss = as_example_loss(nn.CrossEntropyLoss(**options))
    (found,) = torch.autograd.grad(recombined(loss, output, target, (20, 2, 9)), output)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_examples_that_are_all_ignored_give_nan_as_torch_does() -> None:
    output, target = _logits()[:4], torch.full((4,), 2)
    assert F.cross_entropy(output, target, ignore_index=2).isnan()
    assert recombined(as_example_loss(nn.CrossEntropyLoss(ignore_index=2)), output, target, (2, 2)).isnan()


def test_weights_of_another_floating_point_type_are_converted() -> None:
    output, target = _logits(), _classes()
    loss = as_example_loss(nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0, 0.0, 4.0])))
    expected = F.cross_entropy(output, target, weight=torch.tensor([0.5, 2.0, 1.0, 0.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(recombined(loss, output, target, (20, 11)), expected, rtol=1e-12, atol=0)


def _each_squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


@pytest.mark.parametrize("loss_fn", [_each_squared, lambda o, t: _each_squared(o, t).mean(1), nn.MSELoss(reduction="none"),
                                     partial(F.mse_loss, reduction="none"), F.mse_loss])  # fmt: skip
def test_losses_that_are_not_reduced_are_averaged(loss_fn: Callable[..., Tensor]) -> None:
    output, target = _logits(), _logits().cos()
    expected = F.mse_loss(output, target)
    torch.testing.assert_close(
        recombined(as_example_loss(loss_fn), output, target, (20, 11)), expected, rtol=1e-12, atol=0
    )


def test_the_mean_weighs_every_target_alike_where_examples_hold_several() -> None:
    """Not the mean of the examples' means: an example with more kept targets weighs more."""
    output, target = _logits(6), _classes(6, ignored=2)
    loss = as_example_loss(nn.CrossEntropyLoss(ignore_index=2))
    kept = (target != 2).sum(1)
    assert torch.equal(loss(output, target)[1], kept.double())
    assert len(kept.unique()) > 2


def test_the_callers_loss_is_left_alone() -> None:
    module = nn.CrossEntropyLoss(weight=WEIGHT.clone(), reduction="sum", label_smoothing=0.1)
    before = copy.deepcopy(module.__dict__)
    as_example_loss(module)(_logits(), _classes())
    assert module.reduction == before["reduction"]
    assert torch.equal(module.weight, before["_buffers"]["weight"])


def test_a_loss_already_taken_apart_passes_through() -> None:
    loss = as_example_loss(F.mse_loss)
    assert as_example_loss(loss) is loss


@pytest.mark.parametrize("loss_fn", [nn.KLDivLoss(reduction="batchmean"), partial(F.kl_div, reduction="batchmean"),
                                     partial(F.mse_loss, reduction="median")])  # fmt: skip
def test_a_reduction_that_cannot_be_taken_apart_is_refused_by_name(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"reduction '(batchmean|median)'.*'mean', 'sum' or 'none'"):
        as_example_loss(loss_fn)
