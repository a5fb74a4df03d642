"""`contrast_mean` and `visible_patches`: each implementation on the student's view of a step's crops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_kernels import backend
from pera_kernels.visible_patches import contrast_mean, reference, visible_patches

VIEWS = ("global", "local")
IMPLEMENTATIONS = ("reference", "eager", "native", "triton")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class View:
    """One group of crops as the student sees them.

    crops: uint8 [N, H, W, C]; index: int32 [N, n]; order: int32 [N, 4]; factors: float32 [N, 4].
    """

    crops: Tensor
    index: Tensor
    order: Tensor
    factors: Tensor
    patch_size: int
    mean: list[float]
    std: list[float]
    dtype: torch.dtype


def make_view(cfg: Config, name: str, images: int, device: torch.device) -> View:
    """Random pixels, patches and colours in the recipe's shapes; 72% of the crops jittered, 8% gray, 20% unchanged."""
    draw = torch.Generator().manual_seed(0)
    size = cfg.views.global_size if name == "global" else cfg.views.local_size
    count = images * (cfg.views.num_global if name == "global" else cfg.views.num_local)
    patches = (size // cfg.model.patch_size) ** 2
    seen = round(patches * cfg.model.student_ratio)
    shape = (count, size, size, cfg.model.in_chans)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    index = torch.rand(count, patches, generator=draw).argsort(1)[:, :seen].sort(1).values.int()
    order = torch.rand(count, 4, generator=draw).argsort(1).int()
    kind = torch.rand(count, generator=draw)
    order[(kind >= 0.72) & (kind < 0.8)] = torch.tensor([4, -1, -1, -1], dtype=torch.int32)
    order[kind >= 0.8] = -1
    spread = torch.tensor([cfg.views.brightness, cfg.views.contrast, cfg.views.saturation, cfg.views.hue])
    center = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = center + spread * (2 * torch.rand(count, 4, generator=draw) - 1)
    tensors = [tensor.to(device) for tensor in (crops, index, order, factors)]
    mean, std = list(cfg.views.mean), list(cfg.views.std)
    return View(*tensors, cfg.model.patch_size, mean, std, DTYPES[cfg.train.precision])


@pytest.fixture(scope="module", params=VIEWS)
def view(request, cfg, images, device) -> View:
    return make_view(cfg, request.param, images, device)


@pytest.fixture(scope="module")
def gray_mean(view) -> Tensor:
    with backend.use("reference"):
        return contrast_mean(view.crops, view.order, view.factors)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, device):
    """Forces the implementation; skips with the reason where it cannot run."""
    with backend.use(request.param):
        try:
            backend.choose("visible_patches", device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


def test_contrast_mean(measure, view, implementation):
    has_contrast = (view.order == 1).any(1)
    expected = reference.contrast_mean(view.crops, view.order, view.factors).double()
    measure(
        lambda: contrast_mean(view.crops, view.order, view.factors),
        expected=expected,
        moved=int(has_contrast.sum()) * view.crops[0].numel(),
    )


def test_visible_patches(measure, view, gray_mean, implementation):
    values = view.index.numel() * view.patch_size**2 * view.crops.shape[3]

    def rows(dtype: torch.dtype) -> Tensor:
        colors = (view.order, view.factors, gray_mean)
        return visible_patches(view.crops, view.index, *colors, view.mean, view.std, view.patch_size, dtype)

    with backend.use("reference"):
        expected = rows(torch.float64)
    written = torch.empty((), dtype=view.dtype).element_size()
    measure(
        lambda: rows(view.dtype),
        expected=expected,
        moved=values * (1 + written) + view.index.numel() * view.index.element_size(),
    )
