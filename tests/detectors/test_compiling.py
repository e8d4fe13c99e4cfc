"""Compiled backbones and necks: the same networks by the same keys, compiled a bounded number of times."""

import pytest
import torch
from runs import metrics, setting
from tiny import batch, build

from defeat_cli.detectors import compiling
from defeat_cli.errors import RunError


@pytest.fixture
def graphs(monkeypatch):
    """A compiler that keeps count and compiles nothing, which takes seconds less."""
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", count)
    yield compiled
    torch._dynamo.reset()


def test_features_and_gradients_are_those_of_the_plain_network_at_every_shape(graphs):
    plain, compiled = build(norm="frozen"), build(norm="frozen")
    compiling.compile_networks(compiled, None)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    images, targets = batch()
    for count in (3, 1, 2):
        for height in (64, 96, 160) if count == 3 else (128,):
            resized = [torch.nn.functional.pad(image, (0, 0, 0, height - 64)) for image in images[:count]]
            outputs = []
            for detector in (plain, compiled):
                features = detector.features(detector.prepare(resized, targets[:count]))
                sum(feature.square().mean() for feature in features).backward()
                outputs.append(features)
            assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    # Body and neck: the first shape, any size, one image, any number of images.
    assert len(graphs) == 8


def test_a_compiled_run_is_the_plain_one(defeat, tiny, teacher, tmp_path, graphs):
    options = ["-r", tiny, "-t", teacher, *setting(schedule__epochs=1, run__log_every=1)]
    defeat("train", *options, "-o", tmp_path / "compiled", *setting(run__compile="true"))
    assert len(graphs) >= 4  # bodies and necks of both
    defeat("train", *options, "-o", tmp_path / "plain")
    assert metrics(tmp_path / "compiled") == metrics(tmp_path / "plain")
    states = [torch.load(tmp_path / run / "student.pth", weights_only=True) for run in ("compiled", "plain")]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    def fail(graph, inputs):
        raise FileNotFoundError("no g++")

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", fail)
    with pytest.raises(RunError, match=r"cannot compile for cpu here .*no g\+\+"):
        compiling.require_compiler(torch.device("cpu"))
