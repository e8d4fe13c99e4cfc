"""A GPU made of CPU tensors, for tests on machines without one.

    with simulated_device.installed() as meter:      # every command runs on it, whatever `run.device` says
        defeat("train", ...)
    meter.launches, meter.waits, meter.peak

What it holds code to, as CUDA would: tensors of two devices do not meet in one operation, and nothing of the device
gets to numpy without `.cpu()`. What it counts: operations that would be launched (views are free), the places where the
host would wait for the device, and the bytes alive on it at most. Numbers are the CPU's own, so a run on it equals one
on the CPU bit for bit. It says nothing about time.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "simulated"
DEVICE = torch.device("cpu")  # becomes the simulated one when it is first installed

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "nms"}
"""Operations whose result, or its size, the host has to know."""

INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations that take indices, which may lie on the CPU; those that are bool are counted first, which waits."""

PACKAGES = ("defeat_cli", "torchvision", "torch/optim", "torch/amp", "torch/nn/utils")
"""Whose lines a wait is put down to: the innermost one."""


def supported() -> bool:
    """Whether this torch can have a device that is written in Python (2.9 and later)."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class Meter:
    """What happened on the device since the last `reset`.

    Attributes:
        launches: operations, by their name.
        waits: occasions on which the host waits, by reason and line.
        uploads: copies of CPU tensors to the device.
        peak: bytes alive at once, at most.
    """

    def __init__(self) -> None:
        self.alive = 0
        self._sharing: Counter[int] = Counter()
        self.reset()

    def reset(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads, self.peak = 0, self.alive

    def wait(self, reason: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back and not any(package in frame.f_code.co_filename for package in PACKAGES):
            frame = frame.f_back
        self.waits[f"{reason} at {'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"] += 1

    def hold(self, tensor: OnDevice) -> None:
        """Count the memory of a tensor until it, and all that share its storage, are gone."""
        storage = tensor.held.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._sharing[place]:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._sharing[place] += 1
        weakref.finalize(tensor, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._sharing[place] -= 1
        if not self._sharing[place]:
            del self._sharing[place]
            self.alive -= size


METER = Meter()


class OnDevice(Tensor):
    """A tensor of the simulated device; `held` is the CPU tensor that it is made of."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        tensor.held = held
        METER.hold(tensor)
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _launch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.held!r})"

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_on_device(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_on_device(index), value)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        METER.wait("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert a tensor of the {NAME} device to numpy; use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = OnDevice(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy


def _on_device(index: Any) -> Any:
    """An index in which lists have become tensors, as torch makes them on the tensor's own device."""
    if isinstance(index, list):
        return torch.tensor(index, device=DEVICE)
    return tuple(map(_on_device, index)) if isinstance(index, tuple) else index


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _launch(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation with the device's tensors, or that makes one."""
    name = func.name().split("::")[1].split(".")[0]
    if name == "copy_":
        return _copy(func, *args, **kwargs)
    to = kwargs.get("device")
    to_cpu = to is not None and torch.device(to).type == "cpu"
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    if name == "_to_copy":
        if to_cpu:
            METER.wait("copy to the CPU")
        elif not here:
            METER.uploads += 1
    elif here:
        _refuse_strangers(func, name, args, kwargs)
    if name in WAITING:
        METER.wait(name)
    if name in INDEXED and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        METER.wait("index by a mask")
    if not func.is_view:
        METER.launches[name] += 1
    settings = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if to is not None:
        settings["device"] = "cpu"
    out = func(*tree_map(_held, args), **tree_map(_held, settings))
    if to_cpu or name == "_local_scalar_dense" or not func._schema.returns:
        return out
    return _wrapped(func, args, kwargs, out, bool(here))


def _copy(func: Any, into: Tensor, source: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """`into.copy_(source)`, which alone goes from one device to another."""
    if not isinstance(into, OnDevice):
        METER.wait("copy to the CPU")
    elif not isinstance(source, OnDevice):
        METER.uploads += 1
    else:
        METER.launches["copy_"] += 1
    func(_held(into), _held(source), *rest, **kwargs)
    return into


def _refuse_strangers(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse CPU tensors beside the device's. Indices may be, and numbers that are not in a list and not written to."""
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        listed = isinstance(value, list | tuple)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in value if listed else [value]:
            if not isinstance(tensor, Tensor) or isinstance(tensor, OnDevice) or tensor.device.type == "meta":
                continue
            if name in INDEXED and argument.name == "indices":
                METER.wait("index on the CPU")
            elif listed or written or tensor.dim() > 0:
                raise RuntimeError(
                    f"{func.name()}: expected all tensors on one device, but found one of shape {tuple(tensor.shape)} "
                    f"on the CPU beside those on the {NAME} device"
                )


def _wrapped(func: Any, args: tuple, kwargs: dict[str, Any], out: Any, aliasing: bool) -> Any:
    """Results as tensors of the device; one that is an argument, written to, is that argument."""
    written: dict[int, Tensor] = {}
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, OnDevice):
                    written[id(tensor.held)] = tensor

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnDevice):
            return value
        return written[id(value)] if id(value) in written else OnDevice(value)

    out = tree_map(wrap, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if func.is_view and aliasing else out


def register() -> None:
    """Make the device known to torch, once a process and before its first backward pass, which counts the devices."""
    global DEVICE
    if DEVICE.type == NAME or not supported():
        return
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

        def is_autocast_enabled(self) -> bool:
            return False

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    DEVICE = torch.device(NAME, 0)
    register.library = torch.library.Library("_", "IMPL")
    register.library.fallback(lambda op, *args, **kwargs: _launch(op, args, kwargs), "PrivateUse1")


def _names_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _stored(value: Any) -> Any:
    """What `torch.save` can write: tensors of the device as those that they are made of."""
    if isinstance(value, OnDevice):
        return value.held.detach()
    if isinstance(value, dict):
        return type(value)((key, _stored(item)) for key, item in value.items())
    return type(value)(map(_stored, value)) if type(value) in (list, tuple) else value


@contextmanager
def installed() -> Iterator[Meter]:
    """Inside, `defeat_cli` chooses the simulated device, and torch's functions that bypass dispatch know it.

    Only for a torch that is `supported`.
    """
    register()
    make, adopt, save = torch.tensor, torch.as_tensor, torch.save

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **settings: Any) -> Tensor:
        if not _names_device(device):
            return make(data, device=device, requires_grad=requires_grad, **settings)
        METER.wait("torch.tensor on the device")
        return make(data, **settings).to(DEVICE).requires_grad_(requires_grad)

    def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        if not _names_device(device):
            return adopt(data, dtype=dtype, device=device)
        if not isinstance(data, Tensor):
            return tensor(data, dtype=dtype, device=device)
        return data.to(device=DEVICE, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "as_tensor", as_tensor)
        patch.setattr(torch, "save", lambda content, *args, **kwargs: save(_stored(content), *args, **kwargs))
        for name, module in list(sys.modules.items()):
            if name.startswith("defeat_cli") and hasattr(module, "choose_device"):
                patch.setattr(module, "choose_device", lambda *_, **__: DEVICE)
        METER.reset()
        yield METER
