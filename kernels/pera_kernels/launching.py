"""Launches of Triton kernels on the device of their tensors, which need not be the current one."""

from collections.abc import Callable
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
    """Decorates a function that launches kernels: they run on the device of its first tensor argument.

    Triton launches on the current device, whatever the tensors' own: on a machine with several GPUs a kernel would get
    addresses of another one's memory.
    """

    @wraps(launch)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with device_of(next((x for x in args if isinstance(x, Tensor)), None)):
            return launch(*args, **kwargs)

    return call
