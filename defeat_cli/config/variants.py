"""Variants: named changes of the distillation settings, the paper's comparisons among them.

Each is a few settings of the one distillation code (design: a mask, a weight, a switch); none has code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defeat_cli.config.schema import nearest, read_yaml
from defeat_cli.errors import RecipeError


@dataclass(frozen=True)
class Variant:
    """summary: one line for users; overrides: dotted recipe keys and their values."""

    summary: str
    overrides: dict[str, Any] = field(default_factory=dict)


def _places(neck: bool = False, head: bool = False, backbone: bool = False, **settings: Any) -> dict[str, Any]:
    switches = {"neck": neck, "head": head, "backbone": backbone}
    return {f"distillation.{key}": value for key, value in {**switches, **settings}.items()}


VARIANTS = {
    "none": Variant("the student alone, no distillation: what every other variant is compared with", _places()),
    "full": Variant(
        "neck: the whole feature map with one weight (M = 1 everywhere)", _places(neck=True, mask="full", alpha_bg=0.0)
    ),
    "fg-only": Variant("neck: cells inside boxes only", _places(neck=True, mask="boxes", alpha_bg=0.0)),
    "bg-only": Variant("neck: cells outside boxes only", _places(neck=True, mask="boxes", alpha_fg=0.0)),
    "neck": Variant("neck: inside and outside, each with its own weight", _places(neck=True, mask="boxes")),
    "gaussian": Variant(
        "neck: a Gaussian on each box and nothing outside (TADF)", _places(neck=True, mask="gaussian", alpha_bg=0.0)
    ),
    "fine-grained": Variant(
        "neck: cells with an anchor near a box and nothing else (FGFI)",
        _places(neck=True, mask="fine-grained", alpha_bg=0.0),
    ),
    "head-all": Variant("head: one average over all regions", _places(head=True, decoupled_head=False)),
    "head-fg": Variant("head: foreground regions only", _places(head=True, decoupled_head=True, beta_bg=0.0)),
    "head-bg": Variant("head: background regions only", _places(head=True, decoupled_head=True, beta_fg=0.0)),
    "head": Variant(
        "head: foreground and background regions, each with its own weight", _places(head=True, decoupled_head=True)
    ),
    "defeat": Variant(
        "DeFeat: neck + head, both decoupled", _places(neck=True, head=True, mask="boxes", decoupled_head=True)
    ),
    "defeat+backbone": Variant(
        "DeFeat, and backbone stages 2-4 as well",
        _places(neck=True, head=True, backbone=True, mask="boxes", decoupled_head=True),
    ),
}

GROUPS = {
    "all-masks": ("full", "fg-only", "bg-only", "neck", "gaussian", "fine-grained"),
    "all-methods": ("neck", "head", "defeat", "defeat+backbone"),
}
"""Variants that are compared together: `defeat ablate --all-masks`."""


def read_variants(path: Path | None) -> dict[str, Variant]:
    """The shipped variants and those of a user's YAML file.

    The file maps a name to recipe overrides, dotted or nested, or to `{summary: one line, overrides: {…}}`.

    Raises:
        RecipeError: the file does not parse, redefines a shipped name, or holds something other than overrides.
    """
    if path is None:
        return VARIANTS
    if not path.is_file():
        raise RecipeError(f"no variants file {path}")
    own = {}
    for name, overrides in read_yaml(path).items():
        if name in VARIANTS:
            raise RecipeError(f"{path}: {name} is a shipped variant; choose another name")
        summary = None
        if isinstance(overrides, dict) and set(overrides) == {"summary", "overrides"}:
            summary, overrides = overrides["summary"], overrides["overrides"]
        if not isinstance(overrides, dict) or not overrides:
            raise RecipeError(f"{path}: {name}: expected recipe overrides, e.g. {{distillation.alpha_bg: 8}}")
        flat = dict(_flattened(overrides))
        own[str(name)] = Variant(summary or ", ".join(f"{key}={value}" for key, value in flat.items()), flat)
    return {**VARIANTS, **own}


def _flattened(overrides: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in overrides.items():
        dotted = f"{prefix}{key}"
        pairs += _flattened(value, f"{dotted}.") if isinstance(value, dict) else [(dotted, value)]
    return pairs


def find_variant(name: str, variants: dict[str, Variant]) -> Variant:
    """A variant by name.

    Raises:
        RecipeError: no such variant; names the nearest.
    """
    if name not in variants:
        raise RecipeError(f"no variant {name!r}{nearest(name, variants)}. Known: {', '.join(variants)}")
    return variants[name]
