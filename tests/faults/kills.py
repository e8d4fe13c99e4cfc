"""Kill trainings, or a process of theirs, by `kill -9` at random moments, resume them, and compare with one left alone.

    PYTHONPATH=.:tests python tests/faults/kills.py [--kills 50] [--only plain,terms] [--seed 0]

Prints a line for each kind of run; the exit status is 1 where a run did not end as the one that was left alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from forked import TRACEBACK, moment, prepare, run, same

from defeat_cli.engine.runs import LAST, PREVIOUS, RunFolder

EACH_STEP = ["--set", "run.save_every=1", "--set", "run.log_every=1"]
DISTILLED = ["-t", "TEACHER", "--set", "distillation.warmup_steps=2"]
TERMS = "[neck,head,backbone,pkd,cwd,fgd,mgd,frs,fitnets,dist]"
KINDS = {
    "plain": [*EACH_STEP],
    "loader": [*EACH_STEP, "--set", "data.workers=2"],
    "averaged": [
        *EACH_STEP, *DISTILLED, "--set", "optimizer.ema=0.5", "--set", "optimizer.accumulate=2", "--set",
        "distillation.balance=0.3",
    ],
    "terms": [*EACH_STEP, *DISTILLED, "--set", f"distillation.only={TERMS}"],
    "compared": [*EACH_STEP, *DISTILLED, "--compare-plain"],
    "two": [*EACH_STEP, *DISTILLED, "--gpus", "2", "--device", "cpu"],
    "seldom": ["--set", "run.save_every=2", "--set", "run.log_every=1", *DISTILLED],
}  # fmt: skip
"""Options of `defeat train`."""


def kill_often(kind: str, options: list[str], folder: Path, kills: int, rng: random.Random) -> bool:
    """Whether all runs that were killed ended as the one that was not; prints what was found."""
    arguments = ["train", *options]
    begun = time.monotonic()
    assert run([*arguments, "-o", folder / "whole"], folder / "whole.txt") == 0, (folder / "whole.txt").read_text()
    whole = time.monotonic() - begun
    killed = finished = 0
    faults: list[str] = []
    steps: list[int] = []
    while killed < kills or RunFolder(folder / f"run{finished}").exists:
        path = folder / f"run{finished}"
        resume = ["--resume"] if RunFolder(path).exists else []
        kill_after = moment(rng, whole) if killed < kills else None
        status = run([*arguments, "-o", path, *resume], folder / "runs.txt", kill_after, rng.choice)
        if status == -9:
            killed += 1
            lines = (path / "metrics.jsonl").read_bytes().count(b"\n") if (path / "metrics.jsonl").exists() else 0
            steps.append(lines)
            if lines > 1 and not any((path / name).exists() for name in (LAST, PREVIOUS)):
                faults.append(f"run{finished}: no checkpoint")
        elif status == 0:
            faults += [f"run{finished}: {name} differs" for name in same(path, folder / "whole")]
            if left := [p.name for p in path.rglob("*") if "tmp" in p.name or p.name in (".lock", PREVIOUS)]:
                faults.append(f"run{finished}: {left} left over")
            finished += 1
        else:
            faults.append(f"run{finished}: exit status {status}" + (", a traceback" if status == TRACEBACK else ""))
            break
    met = len(set(steps))
    told = "; ".join(faults) or "all the same, bit for bit"
    print(f"{kind}: {killed} kills in {finished} runs, at {met} different lengths of the log: {told}", flush=True)
    if faults:
        print((folder / "runs.txt").read_text()[-3000:])
    return not faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        recipe, teacher = prepare(Path(place))
        well = []
        for kind in asked.only.split(","):
            folder = Path(place) / kind
            folder.mkdir()
            options = ["-r", str(recipe), *(str(teacher) if word == "TEACHER" else word for word in KINDS[kind])]
            well.append(kill_often(kind, options, folder, asked.kills, random.Random(f"{asked.seed} {kind}")))
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
