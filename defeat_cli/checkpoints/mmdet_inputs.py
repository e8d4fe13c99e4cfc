"""What mmdetection does to an image at test time, as far as it is understood: resizing, normalising, padding.

2.x does it all in the steps of a pipeline, within `MultiScaleFlipAug`; 3.x resizes there and normalises in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from defeat_cli.checkpoints.configuration import Section, numbers, only, read_section
from defeat_cli.checkpoints.conversion import Inputs
from defeat_cli.checkpoints.mmdet_settings import named, short_name
from defeat_cli.config.types import Count, Flag, Positive
from defeat_cli.errors import CheckpointError


class Preprocessor(Section):
    """3.x normalises in the model."""

    type: named("DetDataPreprocessor") = "DetDataPreprocessor"
    mean: numbers(3) | None = None
    std: numbers(3, Positive) | None = None
    bgr_to_rgb: Flag = False
    rgb_to_bgr: Flag = False
    pad_size_divisor: only(32) = 1
    pad_value: only(0) = 0
    without_effect = "pad_mask mask_pad_value pad_seg seg_pad_value boxtype2tensor non_blocking batch_augments"


class LoadImageFromFile(Section):
    color_type: only("color") = "color"
    channel_order: only("bgr") = "bgr"
    imdecode_backend: only(None, "cv2", "pillow", "turbojpeg") = "cv2"
    without_effect = "to_float32 backend_args file_client_args ignore_empty"


def _single(value: Any) -> Any:
    """A list of one scale as that scale."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


Scale = Annotated[numbers(2, Count), BeforeValidator(_single)]


class Resize(Section):
    """3.x: stretches unless it is told to keep the ratio."""

    scale: Scale
    keep_ratio: Flag = False
    scale_factor: only(None) = None
    interpolation: only("bilinear") = "bilinear"
    without_effect = "clip_object_border backend"


class OldResize(Section):
    """2.x: keeps the ratio unless it is told not to. The scale is that of the `MultiScaleFlipAug` around it."""

    keep_ratio: Flag = True
    ratio_range: only(None) = None
    interpolation: only("bilinear") = "bilinear"
    without_effect = "multiscale_mode bbox_clip_border backend override"


class Normalize(Section):
    """2.x normalises in the pipeline."""

    mean: numbers(3)
    std: numbers(3, Positive)
    to_rgb: Flag = True


class Pad(Section):
    size_divisor: only(32) = None
    size: only(None) = None
    pad_to_square: only(False) = False
    pad_val: only(0, {"img": 0}, {"img": 0, "masks": 0, "seg": 255}) = 0


class FlipAug(Section):
    img_scale: Scale
    transforms: list[dict]
    flip: only(False) = False
    scale_factor: only(None) = None
    without_effect = "flip_direction"


WITHOUT_EFFECT = ("LoadAnnotations", "PackDetInputs", "ImageToTensor", "DefaultFormatBundle", "Collect", "RandomFlip")
"""Steps that leave the image as it is; 2.x flips in `MultiScaleFlipAug` only, and only if told to."""

OLD_STEPS = {"Resize": OldResize, "Normalize": Normalize, "Pad": Pad}


def read_inputs(config: Mapping[str, Any]) -> Inputs:
    """What a configuration does to an image at test time.

    Raises:
        CheckpointError: names the step or setting that is not understood.
    """
    steps, name = _pipeline(config)
    scale, keep_ratio, normalize = _read_steps(steps, name) if steps is not None else (None, True, None)
    preprocessor = _preprocessor(config)
    if preprocessor is None and steps is None and config.get("img_norm_cfg") is not None:
        normalize = read_section(Normalize, config["img_norm_cfg"], "img_norm_cfg")
    if (preprocessor is None) == (normalize is None):
        twice = (
            "both model.data_preprocessor and" if preprocessor is not None else "neither model.data_preprocessor nor"
        )
        raise CheckpointError(f"{twice} a Normalize step of {name}: expected one of them to normalise images")
    if normalize is not None:
        return Inputs(normalize.mean, normalize.std, normalize.to_rgb, scale, keep_ratio)
    settings = read_section(Preprocessor, preprocessor, "model.data_preprocessor")
    swapped = settings.bgr_to_rgb or settings.rgb_to_bgr
    return Inputs(settings.mean or [0.0] * 3, settings.std or [1.0] * 3, swapped, scale, keep_ratio)


def says_how_to_normalize(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says anything of what becomes of an image."""
    said = (_preprocessor(config), _pipeline(config)[0], config.get("img_norm_cfg"))
    return any(value is not None for value in said)


def _preprocessor(config: Mapping[str, Any]) -> Any:
    inner = config["model"].get("data_preprocessor")
    return config.get("data_preprocessor") if inner is None else inner


def _pipeline(config: Mapping[str, Any]) -> tuple[Any, str]:
    """The steps of the test data set, and where they are; None where they are not said."""
    for path in (("test_dataloader", "dataset"), ("data", "test")):
        inner: Any = config
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        name = ".".join(path)
        while isinstance(inner, Mapping) and inner.get("pipeline") is None:
            inner, name = inner.get("dataset"), f"{name}.dataset"
        if isinstance(inner, Mapping):
            return inner["pipeline"], f"{name}.pipeline"
    return config.get("test_pipeline"), "test_pipeline"


def _read_steps(steps: Any, name: str) -> tuple[tuple[int, int], bool, Normalize | None]:
    """(width, height) that images are resized to, whether into it at their own ratio, and 2.x's normalisation."""
    known = {"LoadImageFromFile": LoadImageFromFile, "Resize": Resize, "MultiScaleFlipAug": FlipAug}
    found: dict[str, Any] = {}
    queue = [(step, name) for step in _listed(steps, name)]
    while queue:
        step, place = queue.pop(0)
        kind = short_name(step.get("type")) if isinstance(step, Mapping) else None
        harmless = kind in WITHOUT_EFFECT and (kind != "RandomFlip" or "MultiScaleFlipAug" in found)
        if harmless:
            continue
        if (
            not isinstance(kind, str)
            or kind not in known
            or kind in found
            or (kind == "Pad" and "Normalize" not in found)
        ):
            raise CheckpointError(f"{place}: the step {step if kind is None else kind} is not supported there")
        values = {key: value for key, value in step.items() if key != "type"}
        found[kind] = read_section(known[kind], values, f"{place}.{kind}")
        if kind == "MultiScaleFlipAug":
            known = OLD_STEPS
            place = f"{place}.{kind}.transforms"
            queue = [(inner, place) for inner in found[kind].transforms] + queue
    if "Resize" not in found or ("MultiScaleFlipAug" in found) != ("Pad" in found):
        raise CheckpointError(f"{name}: expected a Resize step, and in MultiScaleFlipAug a Pad step to multiples of 32")
    resize = found["Resize"]
    width, height = found["MultiScaleFlipAug"].img_scale if "MultiScaleFlipAug" in found else resize.scale
    if not resize.keep_ratio and width < height:
        raise CheckpointError(f"{name}.Resize: stretching to {width} x {height}, higher than wide, is not supported")
    return (width, height), resize.keep_ratio, found.get("Normalize")


def _listed(steps: Any, name: str) -> list[Any]:
    if not isinstance(steps, list | tuple):
        raise CheckpointError(f"{name} = {steps!r}: expected a list of steps")
    return list(steps)
