"""CUDA streams of the loader, so that batches are made beside the training's work and not behind it.

A batch comes with an event, for which the stream that uses it waits on the device: no thread waits for a copy. The
stream has the lowest priority, as DALI's have, and training one above it (`step_stream`), so that the loader's kernels
take what the step leaves of the GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

LOWEST, STEP = 0, -1  # priorities: the lower number goes first
_ALIGNED = 256  # bytes; as the allocator aligns tensors of their own


@dataclass
class Shipped:
    """An item on its way to the GPU."""

    item: Any
    arrives: torch.cuda.Event


def with_index(device: torch.device) -> torch.device:
    """The device by its number: "cuda" alone is the calling thread's current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def own_stream(device: torch.device) -> AbstractContextManager:
    """While the block runs, this thread's work on a GPU goes to a new stream of low priority. Nothing on a CPU."""
    if device.type != "cuda":
        return nullcontext()
    device = with_index(device)
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device, priority=LOWEST))


def step_stream(device: torch.device) -> AbstractContextManager:
    """While the block runs, this thread's work on a GPU goes before the loader's. Nothing on a CPU.

    A CUDA graph keeps the priority of the stream that it is captured on (`torch.cuda.graph(..., stream=...)`).
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(with_index(device), priority=STEP))


def wait(device: torch.device) -> None:
    """Waits, asleep, until this thread's work on the GPU is done."""
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def host_empty(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """A tensor on the CPU. Pinned ones are copied to a GPU while this thread does something else; they are kept and
    used again by PyTorch, not before such a copy has ended.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=pinned)


def ship(item: Any, device: torch.device) -> Any:
    """Starts the copies of an item's tensors to the device, in the thread's current stream; on a CPU the item itself.

    Pinned tensors are copied from where they are. All others are put together into one pinned buffer and one copy.

    Args:
        item: a tensor, or a dataclass, list, tuple or dict of such.
        device: the step's.

    Returns:
        For `receive`.
    """
    if device.type != "cuda":
        return item
    moved: dict[int, Tensor] = {}
    loose: list[Tensor] = []
    for tensor in {id(tensor): tensor for tensor in tensors(item)}.values():
        if tensor.device.type != "cpu":
            moved[id(tensor)] = tensor
        elif tensor.is_pinned():
            moved[id(tensor)] = upload(tensor, device)
        else:
            loose.append(tensor)
    for tensor, there in zip(loose, _ship_together(loose, device), strict=True):
        moved[id(tensor)] = there
    arrives = torch.cuda.Event()
    arrives.record(torch.cuda.current_stream(device))
    return Shipped(rebuilt(item, lambda tensor: moved[id(tensor)]), arrives)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A pinned tensor's copy on the device; this thread does not wait for it."""
    return tensor.to(device, non_blocking=True)


def _ship_together(loose: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on the device of tensors that are not pinned."""
    if not loose:
        return []
    starts, size = [], 0
    for tensor in loose:
        starts.append(size)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    host = host_empty((size,), torch.uint8, pinned=True)
    for tensor, here in zip(loose, _pieces(host, loose, starts), strict=True):
        here.copy_(tensor)
    return _pieces(upload(host, device), loose, starts)


def _pieces(buffer: Tensor, like: list[Tensor], starts: list[int]) -> list[Tensor]:
    """Views into a buffer of bytes, of the types and shapes of other tensors."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in like]
    return [
        buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        for tensor, start, size in zip(like, starts, sizes, strict=True)
    ]


def receive(made: Any, device: torch.device) -> Any:
    """Return what was shipped, for the caller's stream, which waits for the copies on the device.

    The stream becomes a user of the tensors: without that, memory that the caller lets go of could be given to the next
    batch while kernels that read it are still waiting in the caller's stream.

    Args:
        made: what `ship` gave.
        device: the step's.
    """
    if not isinstance(made, Shipped):
        return made
    stream = torch.cuda.current_stream(device)
    stream.wait_event(made.arrives)
    for tensor in tensors(made.item):
        if tensor.device.type == "cuda":
            tensor.record_stream(stream)
    return made.item


def tensors(item: Any) -> Iterator[Tensor]:
    """All tensors of an item, see `ship`."""
    if isinstance(item, Tensor):
        yield item
    elif is_dataclass(item):
        for field in fields(item):
            yield from tensors(getattr(item, field.name))
    elif isinstance(item, (list, tuple, dict)):
        for part in item.values() if isinstance(item, dict) else item:
            yield from tensors(part)


def rebuilt(item: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an item, see `ship`, with other tensors in it."""
    if isinstance(item, Tensor):
        return new(item)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{field.name: rebuilt(getattr(item, field.name), new) for field in fields(item)})
    if isinstance(item, dict):
        return {key: rebuilt(part, new) for key, part in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(rebuilt(part, new) for part in item)
    return item
