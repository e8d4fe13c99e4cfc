"""One run of a study in a process of its own: `python -m defeat_cli.ablation.worker FOLDER`.

Runs the recipe.yaml in the folder, from wherever the run stands, as `defeat train --resume` would. The process that
started it holds the other end of its stdin: when that closes, whatever the reason, the run stops, saved.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from defeat_cli.config import schema as recipe
from defeat_cli.engine.runs import RECIPE
from defeat_cli.errors import Interrupted
from defeat_cli.jobs import training

STOPPED = 130


def main(folder: Path) -> int:
    """Exit status: 0 finished, STOPPED saved and stopped. Errors leave as tracebacks."""
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        training.train(recipe.load(str(folder / RECIPE)), folder, resume=True)
    except Interrupted as stop:
        print(stop, flush=True)
        return STOPPED
    return 0


def _stop_when_alone() -> None:
    # Not sys.stdin: its lock, held by this thread at exit, would crash the interpreter.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
