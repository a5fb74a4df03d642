"""Data parallelism under torchrun: process group, DDP, the few collectives of a step. A single process needs none."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_fast.train.meeting import meet

T = TypeVar("T")
MAIN_SPEAKS_SECONDS = 5.0
BUCKET_BYTES = 64 << 20  # of gradients in one all-reduce
# A step's collective waits for the slowest rank. One may wait for its storage, and rank 0 write a checkpoint and probe.
# NCCL's own limit, 10 minutes, is the whole of data.storage_timeout's default.
LEAST_TIMEOUT, BESIDE_STORAGE = timedelta(minutes=30), timedelta(minutes=20)
LONGEST_WAIT = timedelta(days=365)  # for the storage: "for ever" may be asked for by any number
HOST_TIMEOUT = timedelta(days=1)  # rank 0 may index millions of images while the others wait


@dataclass(frozen=True)
class World:
    """This process's place among those that train together."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = (
        None  # gloo group for the host's own agreements, also where tensors go over NCCL
    )

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def mean_gradients(self, gradients: list[Tensor]) -> None:
        """Mean of gradients over the ranks, in place, in buckets of about BUCKET_BYTES; for a model without DDP."""
        if self.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    def share_parameters(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0; DDP does the same for a model that it wraps."""
        if self.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def on_main(self, function: Callable[[], T]) -> T | None:
        """Runs the function on rank 0 while the others wait. Its UserError is raised on all; the others get None."""
        value, failure, crash = None, None, None
        if self.main:
            try:
                value = function()
            except UserError as error:
                failure = str(error)
            except BaseException as error:  # the others must not wait a day for a process that is gone
                failure, crash = f"rank 0 failed: {error}", error
        if self.size > 1:
            box = [failure]
            dist.broadcast_object_list(box, src=0, group=self.host_group, device=torch.device("cpu"))
            failure = box[0]
        if crash is not None:
            raise crash
        if failure is not None:
            raise UserError(failure)
        return value

    def wrap(self, model: nn.Module, *, unused: bool) -> nn.Module:
        """The model, in DDP if there are several processes.

        Args:
            unused: some trained parameters get no gradient in this recipe (no predicted patches: no pixel head).
        """
        if self.size == 1:
            return model
        with warnings.catch_warnings():  # torch 2.13 has a newer name, which does not mean the same
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused
            )


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in their order, in lists of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Around a micro-batch: gradients stay on this rank until the last one of a step."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`train.device`: auto takes CUDA where it works. Raises UserError for CUDA without a device.

    PyTorch for AMD's GPUs (ROCm) calls them cuda too, but neither the Triton kernels nor DALI were made for them.
    """
    if torch.version.hip is not None:
        if name == "cuda":
            why = "this PyTorch is for AMD's GPUs (ROCm), and the kernels and the loader are for NVIDIA's"
            raise UserError(f"train.device=cuda: {why}; give train.device=cpu")
        name = "cpu"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise UserError(
            f"train.device={name}: process {local_rank} of this machine wants a GPU of its own, and"
            f" {count} can be used; start fewer processes or give train.device=cpu"
        )
    return torch.device("cuda", local_rank)


def collective_timeout(cfg: Config) -> timedelta:
    """Time after which a step's collective fails: `data.storage_timeout` and 20 minutes, at least 30 in all.

    Then the ranks that wait are ended, without a checkpoint: it must be longer than any rank takes rightly.
    """
    storage = timedelta(seconds=min(cfg.data.storage_timeout, LONGEST_WAIT.total_seconds()))
    return max(LEAST_TIMEOUT, storage + BESIDE_STORAGE)


@contextmanager
def world(device_name: str, timeout: timedelta = LEAST_TIMEOUT) -> Iterator[World]:
    """The processes that torchrun started (its environment says so), joined inside the block; else just this one.

    Args:
        device_name: `train.device`.
        timeout: see `collective_timeout`.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        device = choose_device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield World(0, 1, device)
        return
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # as the step's stream: not to wait behind it
        store, rank, size = meet()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        assert not isinstance(host_group, int), "this process is in the group"
        yield World(dist.get_rank(), dist.get_world_size(), device, host_group)
    finally:
        if ours:
            dist.destroy_process_group()
