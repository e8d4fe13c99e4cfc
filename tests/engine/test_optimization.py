"""Optimizers against torch's plain steps, parameters that have no gradient at first among them."""

import pytest
import torch
from torch import nn

from defeat_cli.config.schema import Optimizer
from defeat_cli.engine.optimization import build_optimizer


@pytest.mark.parametrize(("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_steps_are_the_plain_ones(name, plain):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    theirs.load_state_dict(ours.state_dict())
    settings = Optimizer(name=name, lr=0.01, weight_decay=0.1, norm_weight_decay=0.0)
    optimizer = build_optimizer(settings, ours)
    assert all(bool(group["fused"]) == (name == "adamw") for group in optimizer.param_groups)
    kernels = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    own = {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999)}
    expected = plain(
        [{"params": kernels, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01, foreach=False, fused=False, **own,
    )  # fmt: skip
    for step in range(5):
        for i, (one, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            if i > 3 and step < 2:  # as a term's adapters, while it is off
                continue
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        optimizer.step()
        expected.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
