"""A protocol: how a study chooses settings and reports variants so that its figures do not flatter it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from defeat_cli.config.schema import Section, nearest
from defeat_cli.config.types import Positive, Seed
from defeat_cli.config.yaml import read_yaml
from defeat_cli.errors import RecipeError

TUNING_SEEDS, SEEDS = [0, 1], [10, 11, 12, 13, 14]
"""Where nothing else is said."""

BEST, OFF = "best", "off"
"""What `equal_time` may say beside a variant's name."""


class Protocol(Section):
    """What is compared, and on which seeds."""

    variants: list[str]
    """As on the command line: variants, groups, and sweeps such as `neck:alpha_bg=1,4,16`, the best of which is
    reported as `neck`."""
    tuning_seeds: list[Seed] | None = None
    """Each sweep's best is the value with the highest mean AP on these; null takes 0, 1 where anything is swept."""
    seeds: list[Seed] = SEEDS
    """What is chosen is trained anew on these, none of which has had a say in the choice."""
    budget: Positive | None = None
    """Whole trainings a seed that a sweep may cost; null trains every value to the end."""
    equal_time: str = BEST
    """Variant whose training time a second plain student gets: a name, `best` (by AP), or `off`."""

    @model_validator(mode="after")
    def _seeds_have_one_use(self) -> Protocol:
        for name in ("tuning_seeds", "seeds"):
            seeds = getattr(self, name)
            if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
                raise ValueError(f"{name}: give whole numbers from 0, each once (got {seeds})")
        if both := sorted(set(self.seeds) & set(self.tuning_seeds or [])):
            raise ValueError(
                f"tuning_seeds and seeds both have {', '.join(map(str, both))}: a seed that settings were chosen on "
                "flatters them; report other ones"
            )
        return self


def make(content: dict[str, Any], origin: str) -> Protocol:
    """A protocol of these keys.

    Raises:
        RecipeError: unknown keys, wrong types, or seeds with two uses; all mistakes in one message.
    """
    try:
        return Protocol.model_validate(content)
    except ValidationError as error:
        problems = [_problem(details) for details in error.errors()]
    raise RecipeError("\n  ".join([f"{origin} cannot be used:", *problems]))


def read(path: Path) -> Protocol:
    """The protocol in a YAML file.

    Raises:
        RecipeError: as `make`; or there is no such file, or it does not parse.
    """
    if not path.is_file():
        raise RecipeError(f"no protocol file {path}")
    return make(read_yaml(path), str(path))


def _problem(details: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(key, Protocol.model_fields)}. Known: {', '.join(Protocol.model_fields)}"
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    own = details["type"] == "value_error"
    shown = "" if own or isinstance(details["input"], dict) else f" (got {details['input']!r})"
    # `[neck:alpha_bg=1,4]` is a list of two, the second a number.
    hint = "; put each sweep on a line of its own" if key.startswith("variants.") else ""
    return f"{key}: {message}{shown}{hint}" if key else message
