"""All that changes during training, as one object that is saved and restored whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from defeat_cli.config.schema import Recipe
from defeat_cli.detectors.compiling import compile_networks
from defeat_cli.detectors.contract import Detector
from defeat_cli.detectors.modes import lay_out
from defeat_cli.distillation.distiller import Distiller
from defeat_cli.engine.distributed import ALONE, World
from defeat_cli.engine.faults import Health
from defeat_cli.engine.optimization import build_optimizer
from defeat_cli.precision import AUTOCAST


@dataclass
class Training:
    """All that changes during training, saved and restored as one.

    step: optimizer steps done; epochs: epochs done and evaluated; best_ap: best AP so far.
    judged_at: step of the last evaluation; stale: evaluations since the best one.
    seconds: time spent training, evaluation left out; spared: what it would have taken beyond that, had the run not
        found the teacher's features where others of its study keep them.
    seen: how many labelled and how many unlabelled images the student was trained on, one that is seen twice as two.
    sums: running sums of the logged values since the last log line, on the device; counts: how many are in each.
    health: what is remembered of steps that went wrong.
    parallel: what a step calls for the distiller's losses: the distiller, or what averages its gradients over
        processes.

    Where several processes train, `seen`, `sums` and `counts` are this process's own, and those of all are saved.
    `seconds`, `spared` and the losses in `health` are its own too, and those of the main one are saved. All else is the
    same on every process.
    """

    distiller: Distiller
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None = None
    step: int = 0
    epochs: int = 0
    best_ap: float = -math.inf
    judged_at: int = 0
    stale: int = 0
    seconds: float = 0.0
    spared: float = 0.0
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("labelled", "unlabelled"), 0))
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    health: Health = field(default_factory=Health)

    @property
    def evaluated(self) -> Detector:
        """The student as it is evaluated and exported: averaged where there is an average."""
        return self.ema.module if self.ema is not None else self.distiller.student

    def state_dict(self, world: World = ALONE) -> dict[str, Any]:
        """Tensors and plain values only, for `torch.load(weights_only=True)`; all processes have to ask for it."""
        return {
            "student": self.distiller.student.model.state_dict(),
            "terms": self.distiller.terms.state_dict(),
            "balance": self.distiller.balance.state_dict() if self.distiller.balance is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "step": self.step,
            "epochs": self.epochs,
            "best_ap": self.best_ap,
            "judged_at": self.judged_at,
            "stale": self.stale,
            "seconds": self.seconds,
            "spared": self.spared,
            "processes": world.gather({"seen": self.seen, "sums": _on_cpu(self.sums), "counts": self.counts}),
            "health": self.health.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], world: World = ALONE) -> int:
        """Go on from a saved state; it must come from the same recipe, and name all that trains.

        Returns:
            How many processes have saved it. Where they are not as many now, the main one takes over all counts.
        """
        self.distiller.student.model.load_state_dict(state["student"])
        self.distiller.terms.load_state_dict(state["terms"])
        if self.distiller.balance is not None:
            self.distiller.balance.load_state_dict(state["balance"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.epochs, self.best_ap = state["step"], state["epochs"], state["best_ap"]
        self.seconds, self.spared = state["seconds"], state.get("spared", 0.0)
        # Older states have no list of processes, and the oldest no `seen`.
        every = state.get("processes") or [{"seen": self.seen, **state}]
        mine = every[world.rank : world.rank + 1] if len(every) == world.size else every if world.is_main else []
        device = next(self.distiller.parameters()).device
        self.seen = _added([own["seen"] for own in mine]) or self.seen
        self.sums = {name: value.to(device) for name, value in _added([own["sums"] for own in mine]).items()}
        self.counts = _added([own["counts"] for own in mine])
        self.judged_at, self.stale = state.get("judged_at", self.step), state.get("stale", 0)
        self.health.load_state_dict(state.get("health", {}))
        return len(every)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _added(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums by name over tables that may lack names."""
    return {
        name: sum(table[name] for table in tables if name in table)
        for name in dict.fromkeys(chain.from_iterable(tables))
    }


def make_ema(student: Detector, decay: float) -> AveragedModel:
    """An exponential moving average of the student's parameters and buffers."""
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def begin(recipe: Recipe, distiller: Distiller, device: torch.device, world: World = ALONE) -> Training:
    """The distiller on its device, with optimizer, loss scaler and, where asked for, an average of the student.

    The recipe's precision is chosen already (`choose_precision`): `auto` is none.
    """
    distiller.to(device)
    lay_out(distiller, AUTOCAST[recipe.run.precision])
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.run.precision == "fp16")
    ema = make_ema(distiller.student, recipe.optimizer.ema) if recipe.optimizer.ema is not None else None
    if recipe.run.compile:
        compile_networks(distiller.student, distiller.teacher)
    return Training(distiller, world.parallel(distiller), build_optimizer(recipe.optimizer, distiller), scaler, ema)
