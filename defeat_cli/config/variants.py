"""Variants: named changes of the distillation settings, the paper's comparisons among them.

Each is a few settings of the one distillation code (design: a mask, a weight, a switch); none has code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defeat_cli.config.schema import ONLY, nearest
from defeat_cli.config.yaml import read_yaml
from defeat_cli.errors import RecipeError


@dataclass(frozen=True)
class Variant:
    """summary: one line for users; overrides: dotted recipe keys and their values."""

    summary: str
    overrides: dict[str, Any] = field(default_factory=dict)


def _only(*terms: str, **settings: Any) -> dict[str, Any]:
    """Overrides that switch on these terms and no others; `neck__mask` is `distillation.neck.mask`."""
    changes = {f"distillation.{key.replace('__', '.')}": value for key, value in settings.items()}
    return {ONLY: list(terms), **changes}


VARIANTS = {
    "none": Variant("the student alone, no distillation: what every other variant is compared with", _only()),
    "full": Variant(
        "neck: the whole feature map with one weight (M = 1 everywhere)",
        _only("neck", neck__mask="full", neck__alpha_bg=0.0),
    ),
    "fg-only": Variant("neck: cells inside boxes only", _only("neck", neck__mask="boxes", neck__alpha_bg=0.0)),
    "bg-only": Variant("neck: cells outside boxes only", _only("neck", neck__mask="boxes", neck__alpha_fg=0.0)),
    "neck": Variant("neck: inside and outside, each with its own weight", _only("neck", neck__mask="boxes")),
    "gaussian": Variant(
        "neck: a Gaussian on each box and nothing outside (TADF)",
        _only("neck", neck__mask="gaussian", neck__alpha_bg=0.0),
    ),
    "fine-grained": Variant(
        "neck: cells with an anchor near a box and nothing else (FGFI)",
        _only("neck", neck__mask="fine-grained", neck__alpha_bg=0.0),
    ),
    "head-all": Variant("head: one average over all regions", _only("head", head__decoupled=False)),
    "head-fg": Variant("head: foreground regions only", _only("head", head__decoupled=True, head__beta_bg=0.0)),
    "head-bg": Variant("head: background regions only", _only("head", head__decoupled=True, head__beta_fg=0.0)),
    "head": Variant(
        "head: foreground and background regions, each with its own weight", _only("head", head__decoupled=True)
    ),
    "defeat": Variant(
        "DeFeat: neck + head, both decoupled", _only("neck", "head", neck__mask="boxes", head__decoupled=True)
    ),
    "defeat+backbone": Variant(
        "DeFeat, and backbone stages 2-4 as well",
        _only("neck", "head", "backbone", neck__mask="boxes", head__decoupled=True),
    ),
    "pkd": Variant("PKD: features that correlate with the teacher's", _only("pkd")),
    "cwd": Variant("CWD: channels that look where the teacher's do", _only("cwd")),
    "fgd": Variant("FGD: focal and global imitation of the neck", _only("fgd")),
    "mgd": Variant("MGD: the teacher's features generated from a masked student", _only("mgd")),
    "frs": Variant("FRS: features and scores where the teacher is sure of an object", _only("frs")),
    "fitnets": Variant("FitNets: imitation of every cell of the neck alike", _only("fitnets")),
    "dist": Variant("DIST: class probabilities that correlate with the teacher's", _only("dist")),
    "crosskd": Variant("CrossKD: the teacher's head on the student's features (one-stage pairs)", _only("crosskd")),
    "defeat+pkd": Variant("DeFeat and PKD", _only("neck", "head", "pkd", neck__mask="boxes", head__decoupled=True)),
    "crosskd+pkd": Variant("CrossKD and PKD (one-stage pairs)", _only("crosskd", "pkd")),
}

GROUPS = {
    "--all-masks": ("full", "fg-only", "bg-only", "neck", "gaussian", "fine-grained"),
    "--all-methods": ("neck", "defeat", "pkd", "cwd", "fgd", "mgd", "frs", "fitnets", "dist", "crosskd"),
}
"""Options of `defeat ablate` that stand for several variants."""


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
            raise RecipeError(f"{path}: {name}: expected recipe overrides, e.g. {{distillation.neck.alpha_bg: 8}}")
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
