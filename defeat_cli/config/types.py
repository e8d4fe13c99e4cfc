"""Kinds of numbers that settings are made of. All are strict: a word or a truth value is no number."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]
"""A step's seed is made of it and the step's number, and must fit into 64 bits."""


def _interval(value: Any) -> int | str:
    steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if steps or (isinstance(value, str) and re.fullmatch(r"0*[1-9]\d*[smhd]", value)):
        return value
    raise ValueError("should be a number of steps, e.g. 500, or a time, e.g. 90s, 30m or 2h")


Interval = Annotated[int | str, BeforeValidator(_interval)]
"""Steps, or a time: seconds, minutes, hours or days."""


def _epochs_or_steps(value: Any) -> int | str:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if is_count or (isinstance(value, str) and re.fullmatch(r"[1-9]\d* steps?", value)):
        return value
    raise ValueError("should be a number of epochs, e.g. 2, or of steps, e.g. 500 steps")


EpochsOrSteps = Annotated[int | str, BeforeValidator(_epochs_or_steps)]
"""So many epochs, or `500 steps`."""
