"""Batches are made on a CUDA stream of their own, beside the training's work and not behind it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def own_stream(device: torch.device) -> AbstractContextManager:
    """While the block runs, this thread's work on a GPU goes to a new stream. Nothing on a CPU."""
    if device.type != "cuda":
        return nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def finish(device: torch.device) -> None:
    """Waits until this thread's work on the GPU is done: what it made may then be used on any stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def adopt(item: Any, device: torch.device) -> None:
    """Makes the caller's stream a user of all tensors of an item that another stream made.

    Without that, memory that the caller lets go of could be given to the next batch while kernels that read it are
    still waiting in the caller's stream.

    Args:
        item: a tensor, or a dataclass, list, tuple or dict of such.
        device: on a CPU there is nothing to do.
    """
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    for tensor in tensors(item):
        if tensor.device.type == "cuda":
            tensor.record_stream(stream)


def tensors(item: Any) -> Iterator[Tensor]:
    """All tensors of an item, see `adopt`."""
    if isinstance(item, Tensor):
        yield item
    elif is_dataclass(item):
        for field in fields(item):
            yield from tensors(getattr(item, field.name))
    elif isinstance(item, (list, tuple, dict)):
        for part in item.values() if isinstance(item, dict) else item:
            yield from tensors(part)
