"""Runs and studies in tests: what they log, how they die, and that they resume exactly."""

from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from defeat_cli.ablation.choice import choose
from defeat_cli.ablation.study import plan
from defeat_cli.config.variants import VARIANTS
from defeat_cli.engine import loop
from defeat_cli.engine.runs import RunFolder


def setting(**values):
    """`--set` options; two underscores stand for the dot of a key."""
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def metrics(folder, kind=None):
    """The lines of metrics.jsonl, all or those of a kind, without what depends on the clock."""
    lines = [line for line in RunFolder(folder).metrics() if kind in (None, line["kind"])]
    assert lines
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gib")} for line in lines]


class Whole(NamedTuple):
    """A run that went through to its end: what it printed, its lines about steps, its last checkpoint."""

    output: str
    steps: list[dict[str, Any]]
    checkpoint: dict[str, Any]


class Killed(BaseException):
    """Stands for `kill -9`: nothing that catches errors sees it, so that nothing is saved."""


@contextmanager
def dying_at(step):
    """A training inside dies before its step `step`, counted from 0, with no time to save anything."""
    make_step = loop.train_step

    def die(state, *positional, **named):
        if state.step == step:
            raise Killed
        return make_step(state, *positional, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", die)
        with pytest.raises(Killed):
            yield


def assert_resumes_bit_for_bit(defeat, arguments, folder, step):
    """A run that dies at a step, and is resumed, equals one that does not, which is returned."""
    whole, parts = folder / "whole", folder / "parts"
    output = defeat("train", *arguments, "-o", whole)
    with dying_at(step):
        defeat("train", *arguments, "-o", parts)
    defeat("train", *arguments, "-o", parts, "--resume")
    expected = assert_same_run(parts, whole)
    return Whole(output, metrics(whole, "train"), expected)


def assert_same_run(run, whole):
    """Metrics and states of two finished runs are the same, bit for bit; returns the last checkpoint's content."""
    assert metrics(run) == metrics(whole)
    found, expected = (torch.load(folder / "last.pt", weights_only=True) for folder in (run, whole))
    for content in (found, expected):
        del content["training"]["seconds"]
    torch.testing.assert_close(found["training"], expected["training"], rtol=0, atol=0)
    assert found["student"].keys() == expected["student"].keys()
    assert all(torch.equal(found["student"][key], value) for key, value in expected["student"].items())
    return expected


def planned(folder, names, base, seeds=(0,), known=VARIANTS, groups=None, budget=None):
    """A study of variants by name."""
    variants, optional = choose(names, known, groups or {}, base)
    return plan(folder, variants, seeds, base, budget, optional)
