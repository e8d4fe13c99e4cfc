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


def _interval(value: Any) -> int | str:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if is_count or (isinstance(value, str) and re.fullmatch(r"[1-9]\d* steps?", value)):
        return value
    raise ValueError("should be a number of epochs, e.g. 2, or of steps, e.g. 500 steps")


Interval = Annotated[int | str, BeforeValidator(_interval)]
"""So many epochs, or `500 steps`."""
