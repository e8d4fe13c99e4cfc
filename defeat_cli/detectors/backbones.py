"""Backbones with an FPN, made of torchvision's own modules, and their ImageNet weights.

Nothing here has a module of its own, so a state dict loads into what a user builds in plain torchvision, e.g. for
`regnet`:

    net = RegNet(BlockParams(depths, widths, widths, [1.0] * 4, [2] * 4), stem_width=widths[0])
    body = nn.Sequential(OrderedDict([("stem", net.stem), *net.trunk_output.named_children()]))
    backbone = BackboneWithFPN(body, {f"block{i + 1}": str(i) for i in range(4)}, widths, fpn_channels)
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from defeat_cli.checkpoints.reading import described, read
from defeat_cli.checkpoints.weights import is_state_dict, load_strict
from defeat_cli.config.architecture import Architecture, backbone_name
from defeat_cli.detectors.conventions import PlainP6P7
from defeat_cli.errors import CheckpointError

STEM_AND_STAGES = 5
"""What `frozen_stages` counts: the stem, then the stages of strides 4, 8, 16 and 32."""

CLASSIFIERS = ("fc.", "classifier.")
"""Keys of an ImageNet checkpoint that a backbone has no use for."""

PREFIXES = ("features.", "trunk_output.")
"""Containers of torchvision's classifiers that a backbone's own keys leave out."""


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's frozen BatchNorm, which leaves half precision as it is.

    torchvision multiplies by float32 constants, so that under autocast all that follows up to the next convolution is
    float32: twice the memory, and a pass over the map for each of scale, shift and cast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@dataclass(frozen=True)
class Trunk:
    """A classification network without its classifier, as a backbone needs it.

    body: its children run in order.
    last: name of the last child of each stage, strides 4, 8, 16 and 32.
    channels: output channels of each stage.
    """

    body: nn.Module
    last: list[str]
    channels: list[int]


def build_backbone(architecture: Architecture, *, one_stage: bool) -> BackboneWithFPN:
    """Backbone and FPN of an architecture.

    Args:
        one_stage: strides 8, 16, 32 and two convolutions on top (P3 to P7); else 4, 8, 16, 32 and a subsampled
            last level (P2 to P6), as Faster R-CNN wants it.
    """
    trunk = _build_trunk(architecture)
    first = 1 if one_stage else 0
    returned = {name: str(index) for index, name in enumerate(trunk.last[first:])}
    channels = trunk.channels[first:]
    extra = _p6_p7(architecture, channels[-1]) if one_stage else None
    backbone = BackboneWithFPN(trunk.body, returned, channels, architecture.fpn_channels, extra_blocks=extra)
    finish_body(backbone.body, trunk.last, architecture)
    return backbone


def finish_body(body: nn.Module, last: list[str], architecture: Architecture) -> None:
    """Give a backbone's body the norms, frozen stages and conventions of an architecture. Keeps its keys.

    Args:
        last: names of the last child of each of the four stages.
    """
    children = list(body.named_children())
    names = [name for name, _ in children]
    # The stem is what comes before the first child of the first stage, that is before the first stride past 2.
    ends = [_stem_end(body, names), *(names.index(name) + 1 for name in last)]
    frozen = ends[architecture.frozen_stages - 1] if architecture.frozen_stages else 0
    for index, (name, child) in enumerate(children):
        if index < frozen:
            child.requires_grad_(False)
        if index < frozen or architecture.norm == "frozen":
            setattr(body, name, _with_frozen_norms(child))
    conventions = architecture.conventions
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) and conventions.batch_norm_eps is not None:
            module.eps = conventions.batch_norm_eps
        elif isinstance(module, Bottleneck) and conventions.stride_in_1x1:
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def _build_trunk(architecture: Architecture) -> Trunk:
    name = architecture.backbone
    if name == "regnet":
        widths = architecture.widths
        depths = architecture.depths or [1] * len(widths)
        net = RegNet(BlockParams(depths, widths, widths, [1.0] * 4, [2] * 4), stem_width=widths[0])
        body = nn.Sequential(OrderedDict([("stem", net.stem), *net.trunk_output.named_children()]))
        return Trunk(body, [f"block{stage}" for stage in range(1, 5)], widths)
    if name == "resnext101_32x4d":  # mmdetection's most common one, for which torchvision has no builder
        net = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    else:
        net = torchvision.models.get_model(name, weights=None)
    if isinstance(net, ResNet):
        widths = [net.inplanes // 8, net.inplanes // 4, net.inplanes // 2, net.inplanes]
        return Trunk(net, [f"layer{stage}" for stage in range(1, 5)], widths)
    blocks = net.features
    last = mobilenet_stage_ends(blocks)
    return Trunk(blocks, [str(index) for index in last], [blocks[index].out_channels for index in last])


def mobilenet_stage_ends(blocks: nn.Module) -> list[int]:
    """Index of the last block of strides 4, 8, 16 and 32; the closing 1x1 convolution is that of stride 32."""
    strided = [index for index, (_, block) in enumerate(blocks.named_children()) if getattr(block, "_is_cn", False)]
    return [index - 1 for index in strided[1:]] + [len(blocks) - 1]


def _stem_end(body: nn.Module, names: list[str]) -> int:
    """How many children come before the stage of stride 4 begins."""
    for first in ("layer1", "block1"):
        if first in names:
            return names.index(first)
    return next(index for index, child in enumerate(body.children()) if getattr(child, "_is_cn", False))


def _with_frozen_norms(module: nn.Module) -> nn.Module:
    """The module with each BatchNorm replaced by one whose statistics and affine parameters are constants."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenNorm(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _with_frozen_norms(child))
    return module


def _p6_p7(architecture: Architecture, c5_channels: int) -> ExtraFPNBlock:
    conventions = architecture.conventions
    kind = LastLevelP6P7 if conventions.p7_relu else PlainP6P7
    from_p5 = conventions.p6_from == "p5"
    block = kind(architecture.fpn_channels if from_p5 else c5_channels, architecture.fpn_channels)
    # torchvision tells P5 from C5 by their channels, which may be the same.
    block.use_P5 = from_p5
    return block


def load_backbone_weights(model: nn.Module, weights: str, architecture: Architecture) -> None:
    """Load ImageNet weights into a detector's backbone; its FPN and heads stay as they are.

    Args:
        model: a torchvision detector, changed in place.
        weights: `imagenet` (torchvision's first set, downloaded once) or the file of a torchvision classifier, which
            may be in half precision.
        architecture: what `model` was built from.

    Raises:
        CheckpointError: no network, no such weights, or weights of another network.
    """
    if weights == "imagenet":
        content, origin = _download(backbone_name(architecture)), f"ImageNet weights of {backbone_name(architecture)}"
    else:
        content, origin = read(Path(weights)), weights
        if not is_state_dict(content):
            raise CheckpointError(
                f"{weights}: expected the state dict of a torchvision classifier, found {described(content)}"
            )
    state_dict = {
        _without_prefix(key): _within_range(value) if key.endswith("running_var") else value
        for key, value in content.items()
        if not key.startswith(CLASSIFIERS)
    }
    load_strict(model.backbone.body, state_dict, origin)


def _download(name: str) -> dict:
    weights = _imagenet(name)
    if weights is None:
        raise CheckpointError(f"backbone_weights: torchvision has no ImageNet weights for {name}; give a file, or null")
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise CheckpointError(
            f"backbone_weights: the ImageNet weights of {name} could not be downloaded ({error}); "
            "without a network give a file"
        ) from None


def can_have_imagenet(name: str) -> bool:
    """Whether torchvision's ImageNet weights of a backbone were downloaded before, or can be now (asked for 5 s)."""
    weights = _imagenet(name)
    if weights is None:
        return False
    if (Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]).is_file():
        return True
    try:
        with urlopen(Request(weights.url, method="HEAD"), timeout=5):
            return True
    except OSError:
        return False


def _imagenet(name: str) -> WeightsEnum | None:
    """torchvision's first set for a backbone; None where it has none."""
    if name in ("regnet", "resnext101_32x4d"):
        return None
    weights = torchvision.models.get_model_weights(name).__members__
    return weights.get("IMAGENET1K_V1")


def _without_prefix(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _within_range(variance: Tensor) -> Tensor:
    """Variances with those that overflowed when they were saved in half precision at the largest that fits."""
    return variance.clamp(max=torch.finfo(torch.float16).max) if variance.dtype == torch.float16 else variance
