"""The terms that `--distillation` shows side by side: variants of the neck term, and a recipe's others on the neck."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from defeat_cli.config.schema import Distillation
from defeat_cli.config.terms import NeckSettings
from defeat_cli.config.variants import VARIANTS
from defeat_cli.detectors.contract import Detector
from defeat_cli.distillation.terms import TERMS, Term
from defeat_cli.distillation.terms.levels import LevelTerm
from defeat_cli.errors import CheckpointError, TermError

NECK_VARIANTS = ("full", "fg-only", "bg-only", "neck")
"""Variants of the neck term, of `defeat ablate`'s, that show what decoupling changes."""


def panel_terms(
    distillation: Distillation, student: Detector, teacher: Detector, trained: Mapping[str, Tensor], checkpoint: str
) -> dict[str, Term]:
    """Terms on the neck's features as training left them, by the name of the row that shows each.

    Args:
        distillation: the recipe's terms and their settings. The neck term is shown as its variants, with its default
            settings where the recipe has no term on the neck.
        trained: state of the terms in a checkpoint of a distilled run; empty where it holds none.
        checkpoint: what a message calls it.

    Raises:
        TermError: the detectors share no level.
        CheckpointError: the state is of terms between other detectors, or there is none and it is needed.
    """
    at_neck = {name: kind for name, kind in TERMS.items() if issubclass(kind, LevelTerm) and kind.place == "neck"}
    shown = {name: (name, vars(settings)) for name, settings in distillation.terms.items() if name in at_neck}
    if "neck" in shown or not shown:
        _, settings = shown.pop("neck", ("neck", vars(NeckSettings())))
        shown = {name: ("neck", settings | _overrides(name)) for name in NECK_VARIANTS} | shown
    terms = {}
    for row, (name, settings) in shown.items():
        try:
            term = TERMS[name](student, teacher, class_map=distillation.class_map, **settings)
        except TermError as reason:
            raise TermError(f"--distillation: {name}: {reason}") from None
        own = {key.removeprefix(f"{name}."): value for key, value in trained.items() if key.startswith(f"{name}.")}
        _load(term, own, f"{checkpoint}: its {name} term")
        terms[row] = term.eval().to(next(student.parameters()).device)
    return terms


def _overrides(variant: str) -> dict[str, object]:
    """What a variant changes of the neck's settings."""
    prefix = "distillation.neck."
    overrides = VARIANTS[variant].overrides
    return {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}


def _load(term: LevelTerm, state: dict[str, Tensor], name: str) -> None:
    """Give a term what it has learned; untrained adapters are left out where channels agree without them."""
    if state:
        try:
            term.load_state_dict(state)
        except RuntimeError:
            raise CheckpointError(f"{name} was trained with another teacher than this one, or otherwise") from None
        return
    parts = {parameter.split(".")[0] for parameter, _ in term.named_parameters()}
    pairs = [(level.student, level.teacher) for level in term.pairings() if level.teacher is not None]
    missing = sorted(parts - {"adapters"})
    if "adapters" in parts and any(inner != outer for inner, outer in pairs):
        ours, theirs = map(list, zip(*pairs, strict=True))
        missing.append(f"adapters from the student's {ours} channels to the teacher's {theirs}")
    if missing:
        needed = "give best.pt or last.pt of a run that was distilled from this teacher"
        raise CheckpointError(f"{name} holds no {', '.join(missing)}; {needed}")
    if "adapters" in parts:
        term.adapters = nn.ModuleList(nn.Identity() for _ in pairs)
