"""Makes a step on fake CPU tensors take its GPU code paths, without a GPU and without CUDA in PyTorch.

Python code that asks a fake tensor for its device is told that it is a GPU. Autograd and the fake tensors' own
machinery, which would want CUDA's libraries, see a CPU. Launches of Triton kernels do nothing but report themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pera_fast.profile.pointers import use

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALIGNED = 1 << 10  # addresses of storages are multiples of this many bytes

Launched = Callable[[str, list[Any], list[Any]], None]
"""Told of a Triton launch: the kernel's name, the arguments that it reads through, those that it writes through."""
Exchanged = Callable[[Tensor], None]
"""Told of an all-reduce of a tensor."""

_inside = 0  # ops that run now: their implementations on fake tensors are told the truth


@contextmanager
def truth() -> Iterator[None]:
    """While open, fake tensors say that they lie on the CPU, as they do."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


@contextmanager
def fiction() -> Iterator[None]:
    """Inside ``truth``: they say again that they lie on a GPU."""
    global _inside
    before, _inside = _inside, 0
    try:
        yield
    finally:
        _inside = before


class _Event:
    """Stands for a CUDA event."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""


def _address(tensor: Tensor) -> int:
    """An address for a tensor that has none; views of one storage have those that they would have."""
    number = tensor.untyped_storage()._cdata
    return number * ALIGNED + tensor.storage_offset() * tensor.element_size()


@contextmanager
def on_gpu(
    capability: tuple[int, int], multiprocessors: int, l2_bytes: int, launched: Launched, exchanged: Exchanged
) -> Iterator[None]:
    """While open, fake tensors seem to lie on a GPU.

    Args:
        capability: compute capability of the GPU.
        multiprocessors: how many it has.
        l2_bytes: size of its second cache.
        launched: called for each launch of a Triton kernel.
        exchanged: called for each all-reduce.
    """
    properties = SimpleNamespace(
        multi_processor_count=multiprocessors, L2_cache_size=l2_bytes, major=capability[0], minor=capability[1]
    )
    make_tensor = torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or CPU).type == GPU.type:
            kwargs["device"] = CPU
        return make_tensor(*args, **kwargs)

    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        replace(FakeTensor, "device", property(_device))
        replace(FakeTensor, "is_cuda", property(lambda _: not _inside))
        replace(FakeTensor, "data_ptr", _address)
        replace(torch, "tensor", tensor)
        replace(torch.cuda, "is_available", lambda: True)
        replace(torch.cuda, "current_device", lambda: GPU.index)
        replace(torch.cuda, "device", lambda *_: nullcontext())
        replace(torch.cuda, "Event", _Event)
        replace(torch.cuda, "get_device_capability", lambda *_: capability)
        replace(torch.cuda, "get_device_name", lambda *_: "a simulated GPU")
        replace(torch.cuda, "get_device_properties", lambda *_: properties)
        replace(torch.backends.cudnn, "is_available", lambda: True)
        replace(torch.distributed, "all_reduce", exchanged)
        for name, module in list(sys.modules.items()):
            if name.startswith("pera_kernels.") and hasattr(module, "is_fake"):
                replace(module, "is_fake", lambda _: False)
        _replace_triton(replace, launched)
        yield


def _device(tensor: FakeTensor) -> torch.device:
    if tensor.fake_mode.in_kernel_invocation:
        return torch.device("meta")
    return tensor.fake_device if _inside or tensor.fake_device.type == "meta" else GPU


def _replace_triton(replace: Callable[[Any, str, Any], None], launched: Launched) -> None:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launched(self.fn.__name__, *([given.get(name) for name in names] for names in use(self, given)))

    replace(JITFunction, "run", run)


def without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an op with the CPU in place of the GPU, and without pinned memory."""
    changed = dict(kwargs)
    if isinstance(device := changed.get("device"), torch.device) and device.type == GPU.type:
        changed["device"] = CPU
    if changed.get("pin_memory"):
        changed["pin_memory"] = False
    return changed
