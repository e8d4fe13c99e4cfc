"""An unpickler that runs nothing: names in a pickle stand for harmless objects of ours, or for nothing at all.

A pickle is a program. It may name any function of the machine and have it called. Here the names of `KNOWN` stand for
what they are listed with, every other one for a `Placeholder` that is never imported and swallows whatever is done with
it. What the pickle builds are stand-ins; only when it has been read to its end does `resolved` turn them into tensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
"""Names of `torch` in a pickle that say of what kind a tensor's numbers are."""


class Inert:
    """What a pickle may build. Setting its state does nothing, so that the pickle cannot change it afterwards."""

    def __setstate__(self, state: Any) -> None:
        pass


class Placeholder(Inert):
    """An object of a class that is not read: it knows the name of its class, and swallows what is done with it."""

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.origin}>"


class PlainDict(dict):
    """Stands for OrderedDict, whose attributes (a state dict's `_metadata`) are not wanted."""

    def __setstate__(self, state: Any) -> None:
        pass


class Storage(Inert):
    """Numbers in the file, fetched when a tensor first needs them."""

    def __init__(self, dtype: torch.dtype, fetch: Callable[[], bytes]) -> None:
        self.dtype, self._fetch, self._flat = dtype, fetch, None

    def flat(self) -> Tensor:
        """All numbers, [n]."""
        if self._flat is None:
            data = bytearray(self._fetch())
            self._flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return self._flat


class Deferred(Inert):
    """A tensor or number that `resolve()` makes, once everything is read."""

    def __init__(self, resolve: Callable[[], Any]) -> None:
        self.resolve = resolve


class Array(Inert):
    """A numpy array, whose content comes as its state: (version, shape, dtype, in Fortran order, data)."""

    state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def resolve(self) -> Any:
        _, shape, dtype, fortran, data = self.state
        return _array(data, dtype, shape, "F" if fortran else "C")


class DType(Inert):
    """A numpy dtype: its code, such as `f4`, and its byte order, which comes as its state."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


class Function(Inert):
    """Something of ours that a pickle may call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
    """`as_strided` checks that the view stays inside the storage."""
    if not isinstance(storage, Storage):
        return Placeholder()
    return Deferred(lambda: storage.flat().as_strided(size, stride, offset))


def _tensor_of_dtype(storage: Any, offset: int, size: tuple, stride: tuple, *more: Any) -> Any:
    """A tensor whose storage is plain bytes: its dtype comes behind two arguments that do not matter here."""
    dtype = more[2]
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        return Placeholder()
    return Deferred(lambda: storage.flat().view(dtype).as_strided(size, stride, offset))


def _subclass(function: Any, kind: Any, args: tuple, state: Any) -> Any:
    """A tensor with attributes, such as `nn.Buffer`: the tensor alone."""
    return function(*args) if isinstance(function, Function) else Placeholder()


def _array(data: Any, dtype: Any, shape: tuple, order: str) -> Any:
    """A numpy array of plain numbers, as a tensor. One of text or objects is not read."""
    if not isinstance(dtype, DType) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", dtype.code):
        return Placeholder()
    raw = data.encode("latin1") if isinstance(data, str) else data
    array = np.frombuffer(raw, dtype=np.dtype(dtype.order + dtype.code)).reshape(shape, order=order)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _scalar(dtype: Any, data: Any) -> Any:
    value = _array(data, dtype, (), "C")
    return value.item() if isinstance(value, Tensor) else value


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": PlainDict,
    "torch._utils._rebuild_tensor": Function(_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_tensor_v3": Function(_tensor_of_dtype),
    "torch._utils._rebuild_parameter": Function(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Function(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": Function(_subclass),
    "torch.Size": tuple,
    "torch.device": Function(lambda kind, *_: kind),
    # How pickle's protocol 2 writes bytes; it never uses another encoding for them.
    "_codecs.encode": Function(lambda text, *_: text.encode("latin1")),
    "numpy.dtype": DType,
    "numpy.ndarray": Placeholder,
}
"""All names that mean something in a pickle, and what they stand for. Nothing is ever imported by name."""

for _kind in (set, frozenset, list, dict, tuple, complex):
    KNOWN[f"builtins.{_kind.__name__}"] = KNOWN[f"__builtin__.{_kind.__name__}"] = _kind
for _core in ("numpy.core", "numpy._core"):
    KNOWN[f"{_core}.multiarray._reconstruct"] = Function(lambda *_: Array())
    KNOWN[f"{_core}.multiarray.scalar"] = Function(lambda dtype, data: Deferred(lambda: _scalar(dtype, data)))
    KNOWN[f"{_core}.numeric._frombuffer"] = Function(lambda *args: Deferred(lambda: _array(*args)))
for _name, _dtype in STORAGES.items():
    KNOWN[f"torch.{_name}"] = KNOWN[f"torch.storage.{_name}"] = _dtype
for _dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
    KNOWN[str(_dtype)] = _dtype


class Unpickler(pickle.Unpickler):
    """Reads one pickle of `file`.

    Args:
        fetch: the bytes of a storage of the file, by its key; None where a pickle has no storages.
    """

    def __init__(self, file: BinaryIO, fetch: Callable[[str], bytes] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self._fetch = fetch

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in KNOWN:
            return KNOWN[full_name]
        return type("Placeholder", (Placeholder,), {"origin": full_name})

    def persistent_load(self, saved: Any) -> Storage:
        """A storage: `("storage", kind, key, location, count)`, in old files with a view into it, which is None."""
        if self._fetch is None or not isinstance(saved, tuple) or saved[:1] != ("storage",):
            raise pickle.UnpicklingError("it refers to something outside of the file")
        _, dtype, key, _, _, *view = saved
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(view):
            raise pickle.UnpicklingError("a tensor's numbers are of an unknown kind")
        fetch = self._fetch
        return self.storages.setdefault(key, Storage(dtype, lambda: fetch(key)))


def resolved(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """`value` with every stand-in replaced by what it stands for, in plain containers; shared parts stay shared."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)][0]
    # The original is kept beside its result, so that its id is not given to another object meanwhile.
    if isinstance(value, Deferred | Array):
        result = value.resolve()
    elif isinstance(value, Storage):
        result = value.flat()
    elif isinstance(value, dict):
        seen[id(value)] = (result := {}, value)
        result.update((resolved(key, seen), resolved(inner, seen)) for key, inner in value.items())
    elif isinstance(value, list):
        seen[id(value)] = (result := [], value)
        result.extend(resolved(inner, seen) for inner in value)
    elif isinstance(value, tuple):
        result = tuple(resolved(inner, seen) for inner in value)
    else:
        return value
    seen[id(value)] = (result, value)
    return result
