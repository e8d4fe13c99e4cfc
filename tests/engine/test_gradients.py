"""Norms of gradients: in all, the largest, by part, and clipping as torch does it."""

import pytest
import torch
from tiny import batch, build, distil

from defeat_cli.distillation.distiller import Distiller
from defeat_cli.engine.gradients import gradients_of, part_of


@pytest.fixture(scope="module")
def distiller():
    """A distiller after a backward pass."""
    made = distil(build(), build(seed=1, fpn_channels=16), ["neck"])
    torch.manual_seed(0)
    sum(made(*batch()).weighted.values()).backward()
    return made


def over(distiller: Distiller) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)


def test_norms_of_a_hand_made_gradient():
    module = torch.nn.ModuleDict({"terms": torch.nn.ModuleDict({"neck": torch.nn.Linear(2, 1)})})
    head = torch.nn.Linear(1, 1, bias=False)
    module["roi_heads"] = head
    linear = module["terms"]["neck"]
    linear.weight.grad, linear.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    head.weight.grad = torch.tensor([[12.0]])
    gradients = gradients_of(torch.optim.SGD(module.parameters(), lr=1))
    # sqrt(9 + 16) = 5 of the term, sqrt(25 + 144) = 13 of all; 144 of 169 are the head's.
    assert gradients.total.item() == 13
    assert gradients.by_part(module) == {"terms.neck": 5.0, "roi_heads": 12.0}
    found = gradients.largest(module)
    assert (found["norm"], found["largest"]) == (13.0, "roi_heads.weight")
    assert found["share"] == pytest.approx(144 / 169)
    gradients.clip(6.5)  # half of 13
    assert head.weight.grad.item() == pytest.approx(6.0)


def test_norm_and_clipping_are_torchs_to_the_last_bit(distiller):
    optimizer = over(distiller)
    parameters = [p for p in distiller.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in parameters]
    theirs = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    clipped = [p.grad.clone() for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient.clone()
    ours = gradients_of(optimizer)
    ours.clip(0.5)
    assert torch.equal(ours.total, theirs)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, clipped, strict=True))


def test_parts_add_up_to_the_whole_and_are_those_of_a_detector(distiller):
    gradients = gradients_of(over(distiller))
    parts = gradients.by_part(distiller)
    assert set(parts) == {"backbone.body", "backbone.fpn", "rpn", "roi_heads", "terms.neck"}
    assert sum(norm**2 for norm in parts.values()) ** 0.5 == pytest.approx(gradients.total.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("student.model.backbone.body.stem.0.weight", "backbone.body"),
        ("student.model.head.classification_head.cls_logits.weight", "head"),
        ("terms.neck.adapters.0.conv.weight", "terms.neck"),
        ("stem.weight", "stem"),
    ],
)
def test_parts_are_named_as_people_name_them(parameter, part):
    assert part_of(parameter) == part
