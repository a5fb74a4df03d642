"""Whole images for evaluation."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.features.images import ImageReader, load_images


def test_images_of_a_run_have_its_bands_bits_and_ranges(tmp_path: Path) -> None:
    bands = np.stack([np.full((40, 60), value, np.uint16) for value in (100, 1000, 2000, 4000)])
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, height=40, width=60, dtype="uint16"
    ) as file:  # fmt: skip
        file.write(bands)
    cfg = load_config("tiny", ["data.bands=[4,2]", "data.depth=16", "data.band_range=[[0,4000]]"])
    images = load_images([tmp_path / "a.tif"], 16, cfg)
    assert (images.shape, images.dtype) == ((1, 16, 16, 2), torch.uint16)
    assert (images.int().flatten(0, 2).unique(dim=0) == torch.tensor([[65535, 16384]])).all()
    plain = load_images([tmp_path / "a.tif"], 16)
    assert (plain.shape, plain.dtype) == ((1, 16, 16, 3), torch.uint8)
    assert plain[0, 0, 0].tolist() == [0, 4, 8]
    assert load_images([], 16, cfg).shape == (0, 16, 16, 2)
    with pytest.raises(UserError, match=r"a.tif: cannot be read as an image for evaluation \(has no band 5: it has 4"):
        load_images([tmp_path / "a.tif"], 16, load_config("tiny", ["data.bands=[5]"]))
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as an image for evaluation"):
        load_images([tmp_path / "b.png"], 16)


def test_bands_that_nobody_chose(tmp_path: Path) -> None:
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=6, height=8, width=8, dtype="uint16"
    ) as file:  # fmt: skip
        file.write(np.ones((6, 8, 8), np.uint16))
    with pytest.raises(UserError, match=r"a\.tif: has 6 bands, and the weights are of 3 channels without data\.bands"):
        ImageReader(load_config("tiny")).check_bands(tmp_path / "a.tif")
    for settings in (["data.bands=[3,2,1]"], ["model.in_chans=6"]):
        ImageReader(load_config("tiny", settings)).check_bands(tmp_path / "a.tif")
