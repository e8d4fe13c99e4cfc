"""Damage each file that a run leaves, in several ways, and see what `train --resume`, `eval` and `ablate` make of it.

    PYTHONPATH=.:tests python tests/faults/damage.py [--flips 10] [--seed 0]

Nothing may end with a traceback, and a command that says nothing must give what it gives with whole files. Prints a
line for each file; the exit status is 1 where that is not so.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from forked import prepare, run, same


def flip(content: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
    "emptied": lambda content, rng: b"",
    "zeros": lambda content, rng: bytes(len(content)),
    "zeros at the end": lambda content, rng: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "noise": lambda content, rng: rng.randbytes(len(content)),
    "longer": lambda content, rng: content + rng.randbytes(64),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10, help="bits that are changed, one at a time, in each file")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    damages = [*DAMAGES.items(), *((f"bit {i + 1}", flip) for i in range(asked.flips))]
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        recipe, _ = prepare(place)
        train = ["train", "-r", recipe, "--set", "run.save_every=1", "--set", "run.log_every=1", "-o"]
        whole, half = place / "whole", place / "half"
        assert run([*train, whole], place / "whole.txt") == 0
        half_way(train, half, place)
        for run_folder in (half, whole):
            for file in sorted(run_folder.iterdir()):
                found = Counter()
                for name, damage in damages:
                    faults += look(file, name, damage, rng, train, whole, place, found)
                told = ", ".join(f"{count} {what}" for what, count in found.most_common())
                print(f"{run_folder.name}/{file.name}: {len(damages)} damages: {told}", flush=True)
    print(f"{faults} faults")
    return 1 if faults else 0


def half_way(train: list[object], folder: Path, place: Path) -> None:
    """A run that was killed half way, with a last.pt and one before it."""
    after = 0.3
    while not all((folder / name).exists() for name in ("last.pt", "previous.pt", "best.pt")):
        shutil.rmtree(folder, ignore_errors=True)
        run([*train, folder], place / "half.txt", kill_after=after)
        after += 0.1
    (folder / ".lock").unlink(missing_ok=True)


def look(
    file: Path,
    name: str,
    damage: Callable,
    rng: random.Random,
    train: list[object],
    whole: Path,
    place: Path,
    found: Counter,
) -> int:
    """Damage a copy; count what the commands made of it, and return how many of them went wrong."""
    copy, log, faults = place / "copy", place / "log.txt", 0
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(file.parent, copy)
    damaged = copy / file.name
    damaged.write_bytes(damage(file.read_bytes(), rng))
    commands = [[*train, copy, "--resume"]]
    if file.suffix in (".pt", ".pth"):
        commands.insert(0, ["eval", damaged, "-r", train[2]])
    for command in commands:
        log.write_bytes(b"")
        status = run(command, log)
        output = log.read_text()
        said = "warning:" in output or "error:" in output
        differs = command[0] == "train" and status == 0 and same(copy, whole)
        if file.parent == whole and differs == [file.name] and file.name in ("last.pt", "metrics.jsonl"):
            differs = []  # a finished run has no use for them
        if status not in (0, 2) or "Traceback" in output or (differs and not said):
            faults += 1
            print(
                f"FAULT {file.parent.name}/{file.name}, {name}: {command[0]}: status {status}, {differs}\n",
                output[-1500:],
            )
        kind = "refused" if status == 2 else "told" if said else "as if whole"
        found[f"{command[0]} {kind}"] += 1
    return faults


if __name__ == "__main__":
    sys.exit(main())
