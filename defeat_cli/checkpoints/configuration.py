"""What readers of other libraries' configurations share: sections that know every setting that they understand.

A section lists its settings as fields, with the other library's own defaults, and by name those that change no
detection. Whatever else a configuration says is refused by name, so that no setting is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from defeat_cli.config.types import Finite, Positive
from defeat_cli.errors import CheckpointError

SHOWN = 80
"""Characters of a value that a message shows."""


class Section(BaseModel):
    """A part of a configuration.

    without_effect: settings that matter in training only, or that show in the names and shapes of the weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
    without_effect: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _without_those_that_change_nothing(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if key not in cls.without_effect.split()}


SomeSection = TypeVar("SomeSection", bound=Section)


def read_section(kind: type[SomeSection], values: Any, name: str) -> SomeSection:
    """The settings of a section.

    Args:
        name: dotted name of the section, which messages begin with.

    Raises:
        CheckpointError: one line for each setting that is not understood.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # Of a section that is of another type, nothing else is worth saying.
        others = [item["loc"][:-1] for item in errors if item["loc"][-1:] == ("type",)]
        lines = [_spoken(e, name) for e in errors if e["loc"][-1:] == ("type",) or not _is_within(e["loc"], others)]
        raise CheckpointError("\n  ".join(lines)) from None


def _is_within(place: tuple[Any, ...], sections: list[tuple[Any, ...]]) -> bool:
    return any(place[: len(section)] == section for section in sections)


def _spoken(error: Mapping[str, Any], name: str) -> str:
    where = ".".join([name, *(str(part) for part in error["loc"])]).removeprefix(".")
    if error["type"] == "missing":
        return f"{where} is missing"
    shown = repr(error["input"])
    value = shown if len(shown) <= SHOWN else shown[:SHOWN] + "…"
    if error["type"] == "model_type":
        return f"{where} = {value}: expected one section of settings"
    if error["type"] == "extra_forbidden":
        return f"{where} = {value}: this setting is not supported"
    return f"{where} = {value}: {error['msg'].removeprefix('Value error, ')}"


def only(*allowed: Any) -> Any:
    """The type of a setting that can have these values only."""

    def check(value: Any) -> Any:
        if not any(_same(value, other) for other in allowed):
            raise ValueError(f"only {' or '.join(map(repr, allowed))} is supported")
        return value

    return Annotated[Any, AfterValidator(check)]


def _same(value: Any, other: Any) -> bool:
    """Equality of plain values, where a tuple is a list and True is not 1."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    plain = (bool, int, float, str, type(None))
    return isinstance(value, plain) and isinstance(value, bool) == isinstance(other, bool) and value == other


def numbers(count: int, kind: Any = Finite) -> Any:
    """The type of a setting that is a list of so many numbers."""
    as_list = BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value)
    return Annotated[list[kind], as_list, Field(min_length=count, max_length=count)]


Sides = Annotated[list[Positive], Field(min_length=1)]
