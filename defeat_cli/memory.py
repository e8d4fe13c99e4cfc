"""Memory that runs out: recognised on every device, and told as what it is, with what to turn."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from defeat_cli.errors import OutOfMemoryError

SIGNS = re.compile(
    r"out of memory|can(?:'t|not) allocate memory|not enough memory|failed to allocate|bad_alloc|unable to allocate"
    r"|ALLOC_FAILED|DataLoader worker .* killed by signal: (Killed|Bus error)"
    r"|insufficient shared memory",
    re.IGNORECASE,
)
"""What torch, its libraries and numpy write where they do not get the memory that they ask for. A loader process that
was killed was so by the system, which does it where memory runs out."""


def shortage(error: BaseException) -> str | None:
    """What an error says of memory that ran out, in one line; None where it is about something else."""
    # By name, as this is asked before torch is imported; onnxruntime's errors are no RuntimeErrors.
    of_kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    can_say = isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith("onnxruntime")
    if not of_kind and not (can_say and SIGNS.search(str(error))):
        return None
    lines = [line.strip() for line in str(error).splitlines() if SIGNS.search(line)] or str(error).splitlines()
    return lines[0][:300] if lines else "no memory is left"


@contextmanager
def told(doing: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out inside, say what was done and what can be turned.

    Args:
        doing: asked only then, once what was held inside is free again.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
        return
    except Exception as error:
        reason = shortage(error)
        if reason is None or isinstance(error, OutOfMemoryError):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemoryError(f"out of memory: {doing()}\n  ({reason})")
