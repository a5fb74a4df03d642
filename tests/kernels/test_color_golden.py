"""Colours against the numbers of torchvision in `color_jitter.safetensors`, for every implementation."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from implementations import each_on_cpu
from safetensors import safe_open
from torch import Tensor

from pera_kernels.visible_patches import contrast_mean, visible_patches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FOLDER = Path(os.environ.get("PERA_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")


implementation = each_on_cpu("visible_patches", ["reference", "eager", "native", *(["triton"] if INTERPRETED else [])])


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(FOLDER / "color_jitter.safetensors", "pt") as file:
        assert json.loads(json.dumps(file.metadata()))["layout"] == "NHWC"
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return {name: tensor[::6] for name, tensor in tensors.items()} if INTERPRETED else tensors


def colored(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """All pixels of uint8 [N, H, W, C] images, through `visible_patches` without normalisation: float32, same shape."""
    n, h, w, c = images.shape
    size = math.gcd(h, w) // 2 or 1 if math.gcd(h, w) % 2 == 0 else math.gcd(h, w)
    rows, columns = h // size, w // size
    index = torch.arange(rows * columns, dtype=torch.int32).expand(n, -1)
    means = contrast_mean(images, order, factors)
    patches = visible_patches(images, index, order, factors, means, [0.0] * c, [1.0] * c, size, torch.float32)
    return patches.view(n, rows, columns, c, size, size).permute(0, 1, 4, 2, 5, 3).reshape(n, h, w, c)


def test_jitter_matches_torchvision_on_floats(implementation: str, golden: dict[str, Tensor]) -> None:
    result = colored(golden["input"], golden["order"], golden["factors"])
    error = (result - golden["output_float"]).abs().max()
    assert error <= 1e-5  # 2e-3 is asked for; both sides compute in float32, so rounding is all that may differ


def test_jitter_matches_torchvision_on_pil_images(implementation: str, golden: dict[str, Tensor]) -> None:
    result = colored(golden["input"], golden["order"], golden["factors"])
    levels = (result * 255 - golden["output_pil"]).abs()
    assert levels.max() <= 16  # PIL rounds to bytes after every operation
    assert levels.mean() <= 1.5


@pytest.mark.parametrize("place", range(4))
def test_grayscale_matches_pil(implementation: str, golden: dict[str, Tensor], place: int) -> None:
    order = torch.full_like(golden["order"], -1)
    order[:, place] = 4
    result = colored(golden["input"], order, torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(len(order), 4))
    assert (result * 255 - golden["grayscale"]).abs().max() <= 1  # a rounding to bytes
    assert torch.equal(result[..., 0], result[..., 1])
    assert torch.equal(result[..., 0], result[..., 2])


def test_golden_orders_are_a_real_test(golden: dict[str, Tensor]) -> None:
    """Another order or no contrast mean would be noticed: the tolerance is far below what these change."""
    right = golden["output_float"]
    flipped = colored(golden["input"], golden["order"].flip(1), golden["factors"])
    assert (flipped - right).abs().amax((1, 2, 3)).min() > 1e-3
