"""defeat: turn a large object detector into a small one by decoupled feature distillation (DeFeat, CVPR 2021).

The Python API, each name imported when it is first used, so that `import defeat_cli` costs nothing:

    load_detector(checkpoint).detector   a detector from a checkpoint of any format
    wrap(model, classes)             a detector of a torchvision model
    FeatureDetector(model, …)        a detector of any module, by three functions
    TERMS                            the distillation terms by name: TERMS["neck"](student, teacher, alpha_bg=8.0)
    Distiller(student, teacher, terms)   one step's losses
    open_split(folder, split, train=True)   images with boxes, in any layout that the tool reads
    evaluate(detector, dataset)      the COCO figures
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Distiller": "distillation.distiller",
    "FeatureDetector": "detectors.contract",
    "TERMS": "distillation.terms",
    "evaluate": "engine.evaluation",
    "load_detector": "detectors.loading",
    "open_split": "data.opening",
    "wrap": "detectors.zoo",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
