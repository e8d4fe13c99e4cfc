"""Peak memory of a piece of work: the allocator's own count on a GPU, elsewhere that of the tensors alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """Measures inside a `with`; afterwards `bytes` is the most that was taken at once by `resident` and what was made.

    What an operation needs within itself (cuDNN's workspaces, say) is counted on a GPU only.

    Args:
        resident: tensors that are there from the start, and belong to the work.
    """

    def __init__(self, device: torch.device, resident: Iterable[Tensor] = ()) -> None:
        self.device, self.bytes = device, 0
        self._resident = list(resident)
        self._alive = _Alive(self._resident)

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._alive.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            made = torch.cuda.max_memory_allocated(self.device) - self._before
            self.bytes = size_of(self._resident) + made
        else:
            self._alive.__exit__(*error)
            self.bytes = self._alive.most


class _Alive(TorchDispatchMode):
    """Follows storages from the operation that made them until they are freed."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0
        for tensor in resident:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, counts=False)  # it was there before, if it is new here
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # not data_ptr(), which not every kind of tensor has
        if key not in self._sizes:
            size = self._sizes[key] = storage.nbytes() if counts else 0
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share storage count once."""
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())
