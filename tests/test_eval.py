"""kNN and labelled images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image

from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.features.images import load_images
from pera_fast.features.knn import knn_accuracy, knn_predict
from pera_fast.features.labels import class_folders, from_csv


def clusters(spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Five classes of 40 points around directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(5, 16).repeat_interleave(40, 0)
    return centres + spread * torch.randn(200, 16, generator=generator), torch.arange(5).repeat_interleave(40)


def test_separable_classes_are_told_apart() -> None:
    train, labels = clusters(0.1)
    test, _ = clusters(0.1, seed=1)
    assert knn_accuracy(train, labels, test, labels) == 1.0


def test_noise_is_told_apart_by_chance_only() -> None:
    train, test = (torch.randn(1000, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    labels = torch.arange(1000) % 5
    assert abs(knn_accuracy(train, labels, test, labels) - 0.2) < 0.06


def test_length_of_a_feature_does_not_matter_and_near_neighbours_weigh_more() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[50.0, 1.0], [0.0, 0.02]])
    assert knn_predict(train, labels, test, 2, k=4).tolist() == [0, 1]


def picture(path: Path, value: int, size: tuple[int, int] = (20, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def test_class_folders_and_split(tmp_path: Path) -> None:
    for name in ("b", "a"):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", 10 * i)
    picture(tmp_path / "single" / "0.png", 0)
    found = class_folders(tmp_path)
    assert found is not None
    assert found.classes == ("a", "b")
    train, test = found.split(0.3)
    assert (len(train.files), len(test.files)) == (14, 6)
    assert set(train.files) | set(test.files) == set(found.files)
    assert sorted(test.labels) == [0, 0, 0, 1, 1, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "0.png", 0)
    assert class_folders(tmp_path) is None


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


def test_csv(tmp_path: Path) -> None:
    picture(tmp_path / "scenes" / "x" / "0.png", 7)
    table = tmp_path / "scenes.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["file", "class", "split"], ["x/0.png", "x", "train"], ["y/0.png", "y", "test"]])
    found = from_csv(table, "train")
    assert found.classes == ("x",)
    images = load_images(found.files, 16)
    assert (images.shape, images.dtype) == ((1, 16, 16, 3), torch.uint8)
    assert torch.all(images == 7)
    for path, split, message in ((table, "val", "no row"), (tmp_path / "none.csv", None, "cannot be read")):
        with pytest.raises(UserError, match=message):
            from_csv(path, split)
    table.write_text("path,class\na,b\n")
    with pytest.raises(UserError, match="no column file"):
        from_csv(table)
