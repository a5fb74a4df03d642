"""What the benches of the packed-token ops share: shapes of a recipe's step, and each implementation in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_kernels import backend, packing

IMPLEMENTATIONS = ("reference", "native", "triton")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@contextmanager
def forced(op: str, name: str, device: torch.device) -> Iterator[None]:
    """Forces the implementation; skips with the reason where it cannot run."""
    with backend.use(name):
        try:
            backend.choose(op, device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield


def views(cfg: Config, images: int) -> dict[str, tuple[int, int, int]]:
    """For global and local: crops, patches of the whole crop, patches that the student sees."""
    result = {}
    for name, size, count in (
        ("global", cfg.views.global_size, cfg.views.num_global),
        ("local", cfg.views.local_size, cfg.views.num_local),
    ):
        patches = (size // cfg.model.patch_size) ** 2
        result[name] = (images * count, patches, round(patches * cfg.model.student_ratio))
    return result


def patch_numbers(crops: int, patches: int, seen: int, device: torch.device) -> Tensor:
    """int32 [crops, seen], ascending."""
    draw = torch.Generator().manual_seed(0)
    return torch.rand(crops, patches, generator=draw).argsort(1)[:, :seen].sort(1).values.int().to(device)


def student_stream(cfg: Config, images: int, device: torch.device) -> tuple[list[int], Tensor, list[int]]:
    """groups, keep and kept of the student's blocks of the second half, where the stream is longest."""
    draw = torch.Generator().manual_seed(0)
    shapes = views(cfg, images)
    (crops, _, seen), (local_crops, _, local_seen) = shapes["global"], shapes["local"]
    groups = [crops, 1 + 2 * seen, local_crops, 1 + local_seen]
    kept = [max(round(n * (1 - cfg.model.drop_path)), 1) for n, _ in packing.pairs(groups)]
    keep = [torch.randperm(n, generator=draw)[:k] for (n, _), k in zip(packing.pairs(groups), kept, strict=True)]
    return groups, torch.cat(keep).int().to(device), kept


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def size(*tensors: Tensor) -> int:
    """Bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
