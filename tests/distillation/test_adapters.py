"""Adapters have the right shape, start, and activation."""

from __future__ import annotations

import math

import pytest
import torch

from defeat_cli.distillation.adapters import Adapter, adapted


def test_it_keeps_the_map_and_changes_the_channels():
    assert Adapter(8, 32)(torch.randn(2, 8, 7, 9)).shape == (2, 32, 7, 9)


def test_it_is_a_plain_convolution():
    # With a kernel of ones an inner cell is the sum over 3 x 3 cells and both channels: 9 * (1 + 2) + bias; at a
    # corner 4 cells are inside: 4 * 3 + bias.
    adapter = Adapter(2, 1)
    torch.nn.init.ones_(adapter.conv.weight)
    torch.nn.init.constant_(adapter.conv.bias, -20.0)
    features = torch.ones(1, 2, 3, 3) * torch.tensor([1.0, 2.0])[:, None, None]
    adapted = adapter(features)
    assert adapted[0, 0, 1, 1] == 9 * 3 - 20
    assert adapted[0, 0, 0, 0] == 4 * 3 - 20


def test_backbone_adapters_end_with_a_relu():
    torch.manual_seed(0)
    neck, backbone = Adapter(4, 4), Adapter(4, 4, relu=True)
    backbone.load_state_dict(neck.state_dict())
    features = torch.randn(1, 4, 6, 6)
    assert neck(features).min() < 0
    assert torch.equal(backbone(features), neck(features).clamp(min=0))


def test_initial_weights():
    # 128 * 256 * 9 = 294912 draws: the sample deviation is within 1% of 1e-4, the mean within 5 standard errors of 0.
    torch.manual_seed(0)
    conv = Adapter(128, 256).conv
    assert abs(conv.weight.std().item() - 1e-4) < 1e-6
    assert abs(conv.weight.mean().item()) < 5 * 1e-4 / math.sqrt(294912)
    assert conv.weight.abs().max() > 3e-4
    bound = 1 / math.sqrt(128 * 9)
    assert 0.9 * bound < conv.bias.abs().max() <= bound


def test_under_autocast_to_bfloat16_it_computes_in_that_and_gives_float32():
    torch.manual_seed(0)
    adapter, features = Adapter(8, 16), torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = adapted(adapter, features), adapter(features)
    assert (found.dtype, expected.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found, expected.float())
    found.sum().backward()
    assert adapter.conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_too_small_for_float16_reaches_the_features(dtype):
    """As of a mean over the cells and channels of a large image, whose pull is measured without a loss scaler."""
    torch.manual_seed(0)
    adapter, features = Adapter(8, 16), torch.randn(2, 8, 5, 5, requires_grad=True)
    # Each of the 800 numbers has a gradient of 1e-8; the smallest number of float16 is 6e-8.
    (expected,) = torch.autograd.grad(1e-8 * adapter(features).sum(), features)
    with torch.autocast("cpu", dtype=dtype):
        (found,) = torch.autograd.grad(1e-8 * adapted(adapter, features).sum(), features)
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
