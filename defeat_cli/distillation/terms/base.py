"""The seam of distillation: a `Term` is one way in which a teacher supervises a student.

A term is a module. It owns what it trains (adapters), what it matches (levels, classes) and its weights, and it knows
which pairs of detectors can have it. Everything else (the step, checkpoints, curves, `check`, variants) asks the terms
and knows none by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defeat_cli.config.terms import TermSettings
from defeat_cli.detectors.contract import Batch, Detector, Regions, Stages, Target, at_least_float32, scaled
from defeat_cli.distillation.caching import FeatureCache
from defeat_cli.errors import TermError


@dataclass(frozen=True, eq=False)
class View:
    """One detector's look at a batch. What is costly is computed when it is first asked for, and once.

    frozen: no gradients, as for a teacher.
    find: what stands for the targets of a batch that has none, from this view.
    cache: what keeps the detector's features, or its stages, from one batch to another.
    """

    detector: Detector
    batch: Batch
    frozen: bool = False
    find: Callable[[View], list[Target]] | None = None
    cache: FeatureCache | None = None
    _logits: list[tuple[Regions, Tensor]] = field(default_factory=list)

    @classmethod
    def of_features(cls, detector: Detector, batch: Batch, features: list[Tensor], frozen: bool = False) -> View:
        """A view whose features are given, e.g. cut loose from the backbone to ask for gradients at them."""
        view = cls(detector, batch, frozen)
        view.__dict__["features"] = features
        return view

    @cached_property
    def stages(self) -> list[Tensor]:
        """Backbone stages, finest first; for detectors that are `Stages`."""
        if self.cache is not None and self.cache.place == "backbone":
            return self.cache.maps(self.detector, self.batch)
        with self._gradients():
            return self.detector.stages(self.batch)

    @cached_property
    def features(self) -> list[Tensor]:
        """FPN features, finest first."""
        if self.cache is not None and self.cache.place == "neck":
            return self.cache.maps(self.detector, self.batch)
        with self._gradients():
            if isinstance(self.detector, Stages):
                return self.detector.neck(self.stages)
            return self.detector.features(self.batch)

    @cached_property
    def cell_logits(self) -> list[Tensor]:
        """Logits of each level's cells; for detectors that are `CellClassifier`."""
        with self._gradients():
            return [at_least_float32(logits) for logits in self.detector.cell_logits(self.features)]

    @cached_property
    def targets(self) -> list[Target]:
        """Boxes and labels of each image in the pixels of the batch: annotated or, on unlabelled images, found."""
        return self.batch.targets if self.find is None else self.find(self)

    @property
    def looked_at(self) -> list[str]:
        """What of it has been computed so far, in that order; `logits` are those of its own regions."""
        kept = [name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)]
        own = any(regions is self.__dict__.get("regions") for regions, _ in self._logits)
        return [name for name in kept if not name.startswith("_")] + ["logits"] * own

    def look_at(self, names: Sequence[str]) -> View:
        """Compute these, as `looked_at` names them; gives the view itself."""
        for name in names:
            if name == "logits":
                self.classify(self.regions)
            else:
                getattr(self, name)
        return self

    def cut_loose(self) -> View:
        """The same look with its stages and features cut off from what made them: a backward pass ends there."""
        view = replace(self, _logits=[])
        for name in ("stages", "features"):
            if name in self.__dict__:
                view.__dict__[name] = [level.detach().requires_grad_() for level in self.__dict__[name]]
        return view

    def targets_in(self, other: View) -> list[Target]:
        """This view's targets in the pixels of another's batch, in which the images may have another size."""
        if other.batch is self.batch:
            return self.targets
        sizes = zip(self.batch.sizes, other.batch.sizes, strict=True)
        return [{**t, "boxes": scaled(t["boxes"], *pair)} for t, pair in zip(self.targets, sizes, strict=True)]

    @cached_property
    def regions(self) -> Regions:
        """The detector's own regions, labelled; for detectors that are `RegionClassifier`."""
        with torch.no_grad():
            return self.detector.regions(self.features, replace(self.batch, targets=self.targets))

    def classify(self, regions: Regions) -> Tensor:
        """Class logits of regions that are in the pixels of this view's batch."""
        for known, logits in self._logits:
            if known is regions:
                return logits
        with self._gradients():
            logits = self.detector.classify(self.features, regions)
        self._logits.append((regions, logits))
        return logits

    @cached_property
    def _moved(self) -> dict[int, Regions]:
        return {}

    def regions_in(self, other: View) -> Regions:
        """This view's regions in the pixels of another's batch, in which the images may have another size."""
        if other.batch is self.batch:
            return self.regions
        if id(other) not in self._moved:
            boxes = [
                scaled(of_image, here, there)
                for of_image, here, there in zip(self.regions.boxes, self.batch.sizes, other.batch.sizes, strict=True)
            ]
            self._moved[id(other)] = replace(self.regions, boxes=boxes, sizes=other.batch.sizes)
        return self._moved[id(other)]

    def on_grid_of(self, other: View, own: Tensor, stride: int, shape: tuple[int, int], other_stride: int) -> Tensor:
        """A map of this view on the cells of another view's map: itself where both have the same cells.

        A cell takes the value, interpolated bilinearly, at the same point of the image.

        Args:
            own: [N, C, h, w] of this view, `stride` pixels a cell.
            shape: (h, w) of the other view's map, `other_stride` pixels a cell.
        """
        if other.batch is self.batch and own.shape[-2:] == shape and stride == other_stride:
            return own
        axes = []
        for axis, cells in enumerate(shape):
            ratios = [here[axis] / there[axis] for here, there in zip(self.batch.sizes, other.batch.sizes, strict=True)]
            centres = (torch.arange(cells, device=own.device, dtype=own.dtype) + 0.5) * other_stride / stride
            axes.append(
                2 / own.shape[2 + axis] * torch.tensor(ratios, dtype=own.dtype, device=own.device)[:, None] * centres
                - 1
            )
        down, across = axes
        grid = torch.stack(
            [across[:, None, :].expand(-1, shape[0], -1), down[:, :, None].expand(-1, -1, shape[1])], dim=-1
        )
        return F.grid_sample(own, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _gradients(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)


@dataclass(frozen=True)
class Loss:
    """One loss of a term.

    value: unweighted scalar.
    weight: what it is multiplied by in the total; at 0 it is logged only.
    parts: detached scalars for the log, e.g. one a level.
    """

    value: Tensor
    weight: float
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairing:
    """What a term compares on one level, for `check`: `teacher` channels and `adapter` are None without a partner."""

    stride: int
    student: int
    teacher: int | None
    adapter: str | None


class Term(nn.Module, ABC):
    """One way in which a teacher supervises a student.

    Args:
        student, teacher: the pair; nothing of them is kept as a submodule.
        class_map: teacher class to student class, where names differ.
        settings: of `Settings`, by name.

    Attributes:
        settings: as a `Settings`.
        notes: what a user should know of this term on this pair, a sentence each.
        own_size_obstacle: why the teacher must see images at the student's size, in words for a user; None where it may
            see them at its own.

    Raises:
        TermError: the pair cannot have this term; says why.
    """

    Settings: ClassVar[type[TermSettings]] = TermSettings

    place: ClassVar[Literal["neck", "backbone"]] = "neck"
    """Whose maps it works on: FPN features, or backbone stages."""

    dispensable: ClassVar[bool] = False
    """A pair that cannot have this term trains without it, and is told; else it is refused."""

    def __init__(
        self, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self.settings = self.Settings(**settings)
        self.notes: list[str] = []
        self.own_size_obstacle: str | None = None
        reason = self.obstacle(student, teacher, class_map=class_map, **settings)
        if reason is not None:
            raise TermError(reason)

    @classmethod
    @abstractmethod
    def obstacle(
        cls, student: Detector, teacher: Detector, *, class_map: Mapping[str, str] | None = None, **settings: Any
    ) -> str | None:
        """Why this pair cannot have the term, in words for a user; None where it can."""

    @abstractmethod
    def forward(self, student: View, teacher: View) -> dict[str, Loss]:
        """The term's losses of one batch by name.

        In the log a loss is called by the term's name and its own (`neck_fg`), or by the term's alone where its own is
        empty.
        """

    def pairings(self) -> list[Pairing]:
        """The levels that the term compares, for `check`; none where it compares something else."""
        return []
