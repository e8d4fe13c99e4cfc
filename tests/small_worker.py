"""Stands in for the process that trains a run of a study: `python small_worker.py FOLDER EPOCH`.

Notes itself in STUDY/trained.txt. Has three steps an epoch and, in every epoch, an AP of the length of its name: of a
sweep the longest value is the best. The neck takes 1.6 times as long as others. Fails while STUDY/break-RUN is there,
and stops early, after epoch 2, while STUDY/impatient is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def command(folder: Path, epoch: int, processes: int = 1, features: Path | None = None) -> list[str]:
    if features is not None:
        (features / ("0" * 32)).mkdir(exist_ok=True, parents=True)
    return [sys.executable, __file__, str(folder), str(epoch)]


def main(folder: Path, epoch: int) -> None:
    with (folder.parent / "trained.txt").open("a") as file:
        file.write(f"{folder.name}@{epoch}\n")
    if (folder.parent / f"break-{folder.name}").exists():
        raise RuntimeError("broken")
    early = epoch > 2 and (folder.parent / "impatient").exists()
    metrics = folder / "metrics.jsonl"
    begun = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    figures = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), len(folder.name) / 100)
    with metrics.open("a") as file:
        for e in range(begun + 1, (2 if early else epoch) + 1):
            file.write(json.dumps({"kind": "eval", "step": 3 * e, "epoch": e, **figures}) + "\n")
    if f"epochs: {epoch}\n" in (folder / "recipe.yaml").read_text():
        (folder / "student.pth").touch()
        results = {
            "student": figures,
            "teacher": {"AP": 0.5},
            "training_seconds": 1.6 if folder.name.startswith("neck") else 1.0,
        }
        results |= {"stopped_early_at_step": 6} if early else {}
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
