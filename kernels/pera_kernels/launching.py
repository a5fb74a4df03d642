"""Launches of Triton kernels on the device of their tensors, which need not be the current one."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def device_of(tensor: Tensor | None) -> AbstractContextManager[object]:
    """A context in which the device of a tensor is the current one; free of charge where it is already."""
    if tensor is None or not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def on_their_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that launches kernels: they run on the device of the first tensor among its arguments.

    Triton launches on the current device, whatever the tensors' own: on a machine with several GPUs a kernel would get
    addresses of another one's memory.
    """

    @wraps(launch)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with device_of(_first_tensor(args)):
            return launch(*args, **kwargs)

    return call


def _first_tensor(values: Iterable[object]) -> Tensor | None:
    """The first tensor of some arguments, which may be tuples of tensors."""
    for value in values:
        found = _first_tensor(value) if isinstance(value, tuple) else value
        if isinstance(found, Tensor):
            return found
    return None
