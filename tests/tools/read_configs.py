"""Sends other libraries' own configurations through the readers, and prints which are taken and why others are not.

    python tests/tools/read_configs.py mmdet FOLDER...        (needs mmengine, which merges the `_base_` files)
    python tests/tools/read_configs.py detectron2 FOLDER...

A folder of mmdetection's is `mmdet/.mim/configs` of its wheel; one of detectron2's is `configs` of its repository.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from defeat_cli.checkpoints import detectron2_config, mmdet, mmdet_config
from defeat_cli.errors import CheckpointError

MMDET_TYPES = {"FasterRCNN": True, "RetinaNet": False}
DETECTRON2_TYPES = {"GeneralizedRCNN": True, "RetinaNet": False}


def mmdet_outcomes(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(file, why it is refused or None) of each Faster R-CNN and RetinaNet."""
    from mmengine.config import Config

    for path in sorted(folder.rglob("*.py")):
        if "_base_" in path.parts:
            continue
        try:
            text = repr(Config.fromfile(path, import_custom_modules=False).to_dict())
            config = mmdet_config.parse(text, path.name)
        except Exception as error:  # it needs a package or a file that is not here, or holds functions
            print(f"{path} cannot be loaded: {type(error).__name__}", file=sys.stderr)
            continue
        two_stage = MMDET_TYPES.get(str(config.get("model", {}).get("type")).rpartition(".")[2])
        if two_stage is not None:
            yield str(path.relative_to(folder)), refusal(mmdet.settings_of, config, two_stage)


def refusal(read: Callable[[Any, bool, str], Any], config: Any, two_stage: bool) -> str | None:
    """Why a configuration cannot be read; None where it can."""
    try:
        read(config, two_stage, "it")
    except CheckpointError as error:
        return str(error)
    return None


def detectron2_outcomes(folder: Path) -> Iterator[tuple[str, str | None]]:
    for path in sorted(folder.rglob("*.yaml")):
        try:
            config = merged(path)
        except (OSError, yaml.YAMLError) as error:
            print(f"{path} cannot be merged: {type(error).__name__}", file=sys.stderr)
            continue
        model = config.get("MODEL", {})
        kind = model.get("META_ARCHITECTURE")
        other = model.get("MASK_ON") or model.get("KEYPOINT_ON") or path.name.startswith("Base")
        if kind in DETECTRON2_TYPES and not other:
            content = detectron2_config.plain(config)
            why = refusal(detectron2_config.read, content, DETECTRON2_TYPES[kind])
            yield str(path.relative_to(folder)), why


def merged(path: Path) -> dict[str, Any]:
    """A configuration with those that it is based on; a list that detectron2 has computed is written out."""
    text = path.read_text().replace("!!python/object/apply:eval", "")
    config = yaml.safe_load(text) or {}
    sizes = config.get("MODEL", {}).get("ANCHOR_GENERATOR", {})
    if "for x in" in str(sizes.get("SIZES")):
        sizes["SIZES"] = [[side * 2 ** (third / 3) for third in range(3)] for side in (32, 64, 128, 256, 512)]
    base = config.pop("_BASE_", None)
    return _over(merged(path.parent / base), config) if base else config


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _over(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def main() -> None:
    library, *folders = sys.argv[1:]
    outcomes_of = {"mmdet": mmdet_outcomes, "detectron2": detectron2_outcomes}[library]
    for folder in map(Path, folders):
        reasons: dict[str, list[str]] = defaultdict(list)
        taken = []
        for name, why in outcomes_of(folder):
            if why is None:
                taken.append(name)
                continue
            for line in why.splitlines()[1:]:
                reasons[re.sub(r"\s+", " ", line).strip()[:150]].append(name)
        refused = {name for names in reasons.values() for name in names}
        print(f"{folder}: {len(taken)} taken, {len(refused)} refused\n")
        for name in taken:
            print(f"  taken    {name}")
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            print(f"  refused  {len(names):3}  {reason}   e.g. {names[0]}")
        print()


if __name__ == "__main__":
    main()
