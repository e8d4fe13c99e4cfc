"""Checkpoint files are read without running what they carry, and files that are no checkpoint are told apart."""

from __future__ import annotations

import collections
import contextlib
import datetime
import enum
import functools
import io
import logging
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from defeat_cli.checkpoints import unpickling
from defeat_cli.checkpoints.loading import load_weights
from defeat_cli.checkpoints.reading import read
from defeat_cli.checkpoints.unpickling import Placeholder
from defeat_cli.errors import CheckpointError

# --- hostile files


class Call:
    """Pickles as a call of `function`, which an ordinary unpickler makes; with `state`, as its result's state too."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "zip": save_zip,
    "legacy": save_legacy,
    **{f"pickle {p}": (lambda content, path, p=p: path.write_bytes(pickle.dumps(content, p))) for p in range(6)},
}


def attacks(victim: Path) -> dict[str, object]:
    """Objects whose unpickling would create the file `victim`, each on a way of its own."""
    code = f"open({str(victim)!r}, 'w').close()"
    shell = Call(os.system, f"touch {victim}")
    buffer = io.BytesIO()
    torch.save(shell, buffer, _use_new_zipfile_serialization=False)
    return {
        "os.system": shell,
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(victim), "w"),
        "a method": Call(Path.touch, victim),
        "reduce over partial": Call(functools.reduce, Call(functools.partial, eval), [code]),
        "list of a map": Call(list, Call(map, eval, [code])),
        "inside a set": Call(frozenset, [shell]),
        "torch's nested load": Call(torch.storage._load_from_bytes, buffer.getvalue()),
        "a nested pickle": Call(pickle.loads, pickle.dumps(shell)),
        "as a tensor's storage": Call(torch._utils._rebuild_tensor_v2, shell, 0, (1,), (1,), False, None),
        "as a parameter's data": Call(torch._utils._rebuild_parameter, shell, False, None),
        "as a tensor subclass": Call(torch._tensor._rebuild_from_type_v2, eval, str, (code,), {}),
        "as a numpy dtype": Call(np._core.multiarray.scalar, shell, b"1234"),
        "as a numpy array's class": Call(np._core.multiarray._reconstruct, shell, (0,), b"b"),
        "as a state": Call(collections.OrderedDict, state={"x": shell}),
    }


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("attack", attacks(Path("victim")))
def test_code_in_a_checkpoint_is_not_run(tmp_path, writer, attack):
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    WRITERS[writer]({"weight": np.ones(2), "evil": attacks(victim)[attack]}, path)
    try:
        content = read(path)
        assert torch.equal(content["weight"], torch.ones(2, dtype=torch.float64))  # the honest rest is read
    except CheckpointError:
        pass
    assert not victim.exists()
    # The attack is real: an ordinary unpickler falls for it.
    if attack == "os.system" and writer == "pickle 2":
        pickle.loads(path.read_bytes())  # noqa: S301
        assert victim.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch VICTIM'\ntR.",
        b"(S'touch VICTIM'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch VICTIM\x85R.",
        b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch VICTIM\x85\x81.",  # NEWOBJ
        b"\x80\x02cbuiltins\ngetattr\ncos\nX\x06\x00\x00\x00system\x86RX\x0c\x00\x00\x00touch VICTIM\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",  # BUILD on a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__call__cos\nsystem\nsb.",  # BUILD on a function
        b"\x80\x02X\x06\x00\x00\x00VICTIMQ.",  # a reference to something outside
    ],
)
def test_handmade_pickles_are_harmless(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(program)
    with contextlib.suppress(CheckpointError):
        read(path)
    assert not (tmp_path / "VICTIM").exists()


def test_a_pickle_cannot_change_what_its_names_stand_for():
    known = dict(unpickling.KNOWN)
    function = known["torch._utils._rebuild_tensor_v2"]
    inner = dict(vars(function))
    for name in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "numpy\ndtype", "numpy\nndarray"):
        program = b"\x80\x02c" + name.encode() + b"\nN}X\x09\x00\x00\x00_functionK\x01s\x86b."  # BUILD, slot state
        with contextlib.suppress(TypeError, pickle.UnpicklingError):
            unpickling.Unpickler(io.BytesIO(program)).load()
    assert dict(unpickling.KNOWN) == known
    assert vars(function) == inner


def test_names_stand_for_our_own_objects_and_plain_containers_only():
    plain = {set, frozenset, list, dict, tuple, complex}
    for name, known in unpickling.KNOWN.items():
        ours = known in plain or isinstance(known, torch.dtype | unpickling.Function)
        assert ours or known.__module__ == unpickling.__name__, name


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((2,), (1,), 3),
        ((2, 3), (3, 1), 0),
        ((2,), (-1,), 3),
        ((2,), (1,), -1),
        ((1 << 62, 4), (1, 1), 0),
    ],
)
def test_a_tensor_cannot_reach_outside_its_storage(tmp_path, size, stride, offset):
    path = tmp_path / "evil.pth"
    torch.save({"w": torch.ones(4)}, path)
    storage = torch.ones(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    forged = Call(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, None)
    torch.save({"w": forged, "logger": logging.Formatter()}, path)  # the logger leads it to our own unpickler
    with pytest.raises(CheckpointError, match="damaged or hostile"):
        read(path)


# --- honest files with objects of other libraries in them


@pytest.fixture
def foreign(monkeypatch):
    """Objects of the kinds that training frameworks leave in their checkpoints; their module is gone when reading."""
    module = types.ModuleType("mmengine_logging")
    source = """
import enum
class History:
    def __init__(self): self.values, self.window = [1.0], 10
class Slotted:
    __slots__ = ("a",)
    def __getstate__(self): return (None, {"a": 1})
class Config(dict): pass
class Lines(list): pass
class Names(set): pass
class Stage(enum.Enum):
    TRAIN = 1
class Made:
    def __reduce__(self): return (make, (1, 2))
def make(*args): return Made()
"""
    exec(source, module.__dict__)
    for value in vars(module).values():
        if isinstance(value, type) or callable(value):
            value.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    slotted = module.Slotted()
    return {
        "history": module.History(),
        "slotted": slotted,
        "config": module.Config(a=1, b=module.Config(c=2)),
        "lines": module.Lines([1, 2]),
        "names": module.Names({"x"}),
        "stage": module.Stage.TRAIN,
        "made": module.Made(),
        "logger": logging.getLogger("x"),
        "when": datetime.datetime(2024, 1, 1),
        "path": Path("x"),
        "partial": functools.partial(print, 1),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "deque": collections.deque([1], maxlen=3),
        "namespace": types.SimpleNamespace(lr=0.1),
    }


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_objects_of_other_libraries_are_left_out(tmp_path, monkeypatch, foreign, writer):
    path = tmp_path / "checkpoint.pth"
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "whole": shared,
        "transposed": shared.T,
        "half": torch.ones(2, dtype=torch.float16),
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    arrays = {
        "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">f4"),
        "f2": np.ones(2, np.float16),
        "bool": np.array([True, False]),
        "scalar": np.float64(0.5),
    }
    content = {"arrays": arrays, "foreign": foreign, "list": [1, (2, "x"), None, b"raw", {3}, 1 + 2j]}
    if not writer.startswith("pickle"):
        content["state_dict"] = collections.OrderedDict(tensors)
        content["state_dict"]._metadata = {"": {"version": 1}}
    WRITERS[writer](content, path)
    monkeypatch.delitem(sys.modules, "mmengine_logging")

    found = read(path)

    assert found["list"] == content["list"]
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(found["arrays"][name]), np.asarray(array)), name
    assert isinstance(found["arrays"]["scalar"], float)
    assert all(isinstance(value, Placeholder) for value in found["foreign"].values())
    assert found["foreign"]["history"].origin == "mmengine_logging.History"
    if "state_dict" in content:
        assert type(found["state_dict"]) is dict
        for name, tensor in tensors.items():
            assert found["state_dict"][name].dtype == tensor.dtype, name
            assert torch.equal(found["state_dict"][name], tensor.detach()), name
        assert found["state_dict"]["whole"].data_ptr() == found["state_dict"]["transposed"].data_ptr()


EVERY_KIND = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32),
]


@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_tensors_of_every_kind_are_as_torch_reads_them(tmp_path, writer):
    path = tmp_path / "x.pth"
    base = torch.arange(24).reshape(2, 3, 4) % 5
    kinds = EVERY_KIND if writer == "zip" else EVERY_KIND[:-2]  # the old format has no unsigned kinds but bytes
    content = {str(dtype): base.to(dtype) for dtype in kinds}
    content |= {
        "view": base.float()[1:, ::2].transpose(0, 2),
        "buffer": torch.nn.Buffer(base.float()),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(),
        "rng": torch.get_rng_state(),
        "size": base.size(),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    WRITERS[writer]({**content, "f": functools.partial(print)}, path)  # what leads it to our own unpickler
    found, expected = read(path), torch.load(path, weights_only=False)
    assert found.keys() == expected.keys()
    for key in content:
        value = expected[key]
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert found[key].stride() == value.stride()
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == (str(value) if key == "device" else value)


def test_a_list_that_holds_itself_is_read(tmp_path):
    content = {"a": [1], "f": functools.partial(print)}
    content["a"].append(content["a"])
    save_zip(content, tmp_path / "x.pth")
    found = read(tmp_path / "x.pth")
    assert found["a"][1] is found["a"]


# --- files that are no checkpoint


def zip_like(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html><title>404 Not Found</title>", r"an HTML page \('404 Not Found'\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (b'{"model": 1}', "begins with '{\"model\": 1}'"),
        (b"\x1f\x8b\x08\x00", "an archive: unpack it first"),
        (zip_like("word/document.xml", "[Content_Types].xml"), "a zip archive with word/document.xml"),
        (zip_like("m/data.pkl", "m/constants.pkl"), "a TorchScript program"),
        (b"epoch,loss\n1,0.5\n", "begins with 'epoch,loss"),
        (b"\x00\x01\x02\x03\xff\xfe", "begins with '00 01 02 03 ff fe"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, data, said):
    path = tmp_path / "teacher.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"teacher.pth.*{said}"):
        load_weights(path)


def test_missing_file_and_folder_are_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "none.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").touch()
    with pytest.raises(CheckpointError, match=r"a folder.*best.pt"):
        read(tmp_path / "run")


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 2"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_said_to_be_cut_short(tmp_path, writer, share):
    path = tmp_path / "teacher.pth"
    arrays = {f"layer{i}.weight": np.ones(50) for i in range(20)}
    WRITERS[writer]({"model": arrays, "f": functools.partial(print)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="cut short"):
        read(path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.find(bytes(1000)) + 500] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


class DetectionModel(torch.nn.Module):
    """Stands for a whole model that was pickled, as YOLO's trainers do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def test_unrelated_checkpoints_are_described(tmp_path):
    path = tmp_path / "yolo.pt"
    torch.save({"epoch": 3, "model": DetectionModel(), "ema": None}, path)
    with pytest.raises(CheckpointError, match=r"epoch: int, model: an object of class .*DetectionModel"):
        load_weights(path)
    torch.save(DetectionModel(), path)
    with pytest.raises(CheckpointError, match=r"a whole object of class .*DetectionModel.*save its state dict"):
        load_weights(path)
    torch.save({"encoder.weight": torch.ones(1), "decoder.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"2 tensors \(encoder.weight, decoder.weight\)"):
        load_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="a list of 2"):
        load_weights(path)


class Level(enum.Enum):
    LOW = 1


def test_an_enum_of_this_module_is_a_placeholder_too(tmp_path):
    torch.save({"level": Level.LOW}, tmp_path / "x.pth")
    assert isinstance(read(tmp_path / "x.pth")["level"], Placeholder)
