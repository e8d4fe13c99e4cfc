"""`defeat convert`: a checkpoint of any format as a plain torchvision state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from defeat_cli.checkpoints.meaning import with_meaning
from defeat_cli.checkpoints.native import write_atomically
from defeat_cli.config.architecture import TRAINING, changed_settings
from defeat_cli.config.given import understood
from defeat_cli.console import Reporter
from defeat_cli.detectors.loading import load_detector
from defeat_cli.errors import CheckpointError
from defeat_cli.export.loader import loader_name, write_loader
from defeat_cli.files import replacing, require_place_for_file
from defeat_cli.jobs.asked import DETECTOR
from defeat_cli.text import counted, listed

SUFFIXES = (".pth", ".pt")


def convert(
    source: str,
    target: Path,
    recipe_name: str | None = None,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `target`, a plain state dict that says what it is, and beside it a recipe (`.yaml`) that says it to people
    and a script that loads it in plain torchvision.

    Prints a line on each thing that was recognised, converted, dropped, assumed or written.

    Args:
        recipe_name: recipe with settings in place of the checkpoint's own.
        changes: dotted recipe overrides.

    Raises:
        DefeatError: `source` cannot be read or represented, settings do not go with it, or `target` is no name for a
            PyTorch file or is there already.
    """
    if target.suffix not in SUFFIXES:
        raise CheckpointError(f"{target}: a PyTorch state dict is written; name it {' or '.join(SUFFIXES)}")
    recipe, loader = target.with_suffix(".yaml"), target.with_name(loader_name(target.name))
    for path in (target, recipe, loader):
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path}: is there already; add --overwrite, or name another file")
        require_place_for_file(path)
    effective = (*DETECTOR, *(f"student.{name}" for name in TRAINING))
    _, given = understood(recipe_name, changes or {}, "convert", effective)
    loaded = load_detector(source, given, ignored=())
    meaning, state_dict = loaded.meaning, loaded.detector.model.state_dict()
    write_atomically(target, with_meaning(state_dict, meaning))
    content = {
        "student": changed_settings(meaning.architecture),
        "data": {"short_side": [meaning.short_side], "long_side": meaning.long_side},
    }
    with replacing(recipe) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    write_loader(target, meaning.architecture, loaded.detector.classes, meaning.short_side, meaning.long_side)
    reporter = Reporter("convert")
    loaded.tell(reporter)
    named = f" ({listed(meaning.classes, 5)})" if meaning.classes else ", not named in the source"
    reporter.note(
        f"{target}: {len(state_dict)} tensors, {counted(len(loaded.detector.classes), 'class')}{named}; it says itself "
        "what it is, and loads in plain torchvision"
    )
    reporter.note(f"{recipe}: the same settings as a recipe")
    reporter.note(f"{loader}: loads it in plain torchvision")
