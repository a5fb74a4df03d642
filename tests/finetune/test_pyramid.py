"""Feature pyramid and the backbone for detectors: sizes, strides, gradients, images that are no squares."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from finetune_support import small_config, small_weights

from pera_fast.finetune.detection import DetectionBackbone
from pera_fast.finetune.pyramid import SimpleFeaturePyramid, as_map
from pera_fast.model.transformer import VisionTransformer
from pera_fast.weights.backbone import new_transformer


@pytest.mark.parametrize(("grid", "coarse"), [((14, 14), (7, 7)), ((3, 5), (2, 3)), ((1, 1), (1, 1))])
def test_levels_double_and_halve_the_grid(grid: tuple[int, int], coarse: tuple[int, int]) -> None:
    x = torch.randn(2, 12, *grid, requires_grad=True)
    maps = SimpleFeaturePyramid(12, 5)(x)
    h, w = grid
    assert [tuple(m.shape) for m in maps] == [
        (2, 5, 4 * h, 4 * w), (2, 5, 2 * h, 2 * w), (2, 5, h, w), (2, 5, *coarse)
    ]  # fmt: skip
    torch.stack([m.square().sum() for m in maps]).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_map_keeps_raster_order() -> None:
    patches = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 2)
    assert as_map(patches, 2, 3)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("patch", "strides"), [(16, (4, 8, 16, 32)), (8, (2, 4, 8, 16))])
def test_strides_are_those_of_the_maps(patch: int, strides: tuple[int, ...]) -> None:
    backbone = DetectionBackbone(VisionTransformer(4, patch, 3, 8, 1, 2), width=6)
    found = backbone(torch.randn(1, 3, 2 * patch * 2, 3 * patch * 2))
    assert isinstance(found, OrderedDict)
    assert list(found) == ["0", "1", "2", "3"]
    assert backbone.strides == strides
    assert backbone.out_channels == 6
    for stride, one in zip(strides, found.values(), strict=True):
        assert tuple(one.shape) == (1, 6, 4 * patch // stride, 6 * patch // stride)


def test_detectors_see_what_the_backbone_sees(tmp_path: Path) -> None:
    backbone, mean, std = DetectionBackbone.from_weights(small_weights(tmp_path / "w.safetensors"), width=4)
    cfg = small_config()
    assert (mean, std) == (list(cfg.views.mean), list(cfg.views.std))
    from pera_fast.features.dense import features

    image = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8)
    _, patches = features(backbone.backbone, image, mean, std)
    normed = ((image.permute(0, 3, 1, 2) / 255) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(backbone._tokens(normed, 6, 6, 6), patches.clone(), rtol=1e-4, atol=1e-4)
    # Padding to whole patches, and patches beyond the image, are not seen: one row of patches alone gives the same.
    wide = backbone(normed[:, :, :6])
    again = backbone(torch.nn.functional.pad(normed[:, :, :6], (0, 0, 0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(wide.values(), again.values(), strict=True))


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    backbone = DetectionBackbone(new_transformer(small_config()), width=4)
    found = backbone(torch.randn(2, 3, 16, 8))
    torch.stack([(one * torch.randn_like(one)).sum() for one in found.values()]).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert {one.dtype for one in backbone(torch.randn(1, 3, 16, 16)).values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="names must be 4"):
        DetectionBackbone(new_transformer(small_config()), names=["0"])
