"""Strict loading: everything or nothing, and an error that says in groups what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from defeat_cli.checkpoints.weights import load_strict
from defeat_cli.errors import CheckpointError


def network(norm=nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    blocks = {f"layer{i}": nn.Sequential(nn.Conv2d(3, 3, 1), norm(3)) for i in range(1, 3)}
    return nn.ModuleDict({"backbone": nn.ModuleDict(blocks), "head": nn.Linear(3, 2)})


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def filled(model: nn.Module, value: float = 2.0) -> dict[str, torch.Tensor]:
    return {key: torch.full_like(tensor, value) for key, tensor in model.state_dict().items()}


def test_all_weights_are_loaded():
    model = network()
    load_strict(model, filled(model), "x.pth")
    assert all((value == 2).all() for value in model.state_dict().values())


def test_an_error_lists_what_does_not_fit_in_groups_and_changes_nothing():
    model = network()
    before, weights = copy_of(model), filled(model)
    for key in list(weights):
        if key.startswith("backbone.layer1.1."):
            del weights[key]
    weights["neck.a.weight"] = torch.zeros(1)
    weights["head.weight"] = torch.zeros(5, 3)
    with pytest.raises(CheckpointError) as caught:
        load_strict(model, weights, "teacher.pth")
    message = str(caught.value)
    assert message.startswith("teacher.pth: ")
    assert "5 missing" in message  # weight, bias, mean, variance, counter: the norm is not here at all
    assert "backbone.layer1.1 (5): backbone.layer1.1.weight, backbone.layer1.1.bias, " in message
    assert "…" in message
    assert "1 unexpected" in message
    assert "neck.a (1): neck.a.weight" in message
    assert "1 of another shape" in message
    assert "head.weight is 5x3, expected 2x3" in message
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_half_precision_is_cast_up():
    model = network()
    load_strict(model, {key: v.half() if v.is_floating_point() else v for key, v in filled(model).items()}, "x")
    assert model["head"].weight.dtype == torch.float32
    assert (model["head"].weight == 2).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = network()
    before, weights = copy_of(model), filled(model)
    weights["head.bias"][1] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinity[\s\S]*head\.bias"):
        load_strict(model, weights, "x")
    assert torch.equal(model["head"].bias, before["head.bias"])


def test_weights_of_another_kind_of_number_are_refused():
    model = network()
    with pytest.raises(CheckpointError, match=r"head\.bias is torch\.int64, expected torch\.float32"):
        load_strict(model, {**filled(model), "head.bias": torch.zeros(2, dtype=torch.int64)}, "x")


def test_batchnorm_counters_may_come_and_go():
    trained, frozen = network(), network(FrozenBatchNorm2d)
    load_strict(frozen, filled(trained), "x")
    assert (frozen["backbone"]["layer1"][1].running_mean == 2).all()
    trained["backbone"]["layer1"][1].num_batches_tracked.fill_(7)
    load_strict(trained, filled(frozen, 3.0), "x")
    assert (trained["backbone"]["layer1"][1].running_var == 3).all()
    assert trained["backbone"]["layer1"][1].num_batches_tracked == 0


def test_a_counter_without_its_norm_is_not_forgiven():
    model = network()
    with pytest.raises(CheckpointError, match=r"1 unexpected[\s\S]*elsewhere\.num_batches_tracked"):
        load_strict(model, {**filled(model), "elsewhere.num_batches_tracked": torch.tensor(1)}, "x")
