"""The in-order pass over whole images: pixels, order, files that cannot be used, and a pipeline that fails."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import bad_files, encoded, raster, scene, small_config, write_scenes
from loader_support import index, skipped_rows
from PIL import Image

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.loading import pipeline
from pera_fast.data.loading.whole import WholeImages
from pera_fast.features.images import ImageReader, resize

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")


def whole(cfg, manifest, tmp_path, size=32, batch_size=4):
    return WholeImages(
        cfg, manifest, size=size, batch_size=batch_size, device=CPU, skipped=SkippedFiles(tmp_path / "skipped.csv")
    )


def expected(cfg, folder: Path, names, size=32):
    read = ImageReader(cfg)
    return torch.stack([resize(read(folder / name), size) for name in names])


def nearly(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and (a.int() - b.int()).abs().max() <= 1


def test_images_come_in_order_as_evaluations_see_them(tmp_path):
    folder, cfg = tmp_path / "images", small_config("data.depth=8")
    names = write_scenes(folder, 10)
    (folder / "004.jpg").write_bytes(encoded(Image.fromarray(scene(7, 90, 50)), "JPEG", quality=95))
    names = sorted([*names, "004.jpg"])
    manifest = index(folder, tmp_path)
    batches = list(whole(cfg, manifest, tmp_path).batches())
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [batch.stop for batch in batches] == [4, 8, 11]
    assert nearly(torch.cat([batch.pixels for batch in batches]), expected(cfg, folder, names))
    later = list(whole(cfg, manifest, tmp_path).batches(8))
    assert [batch.stop for batch in later] == [11]
    assert torch.equal(later[0].pixels, batches[2].pixels)
    assert list(whole(cfg, manifest, tmp_path).batches(11)) == []


def test_bands_bits_and_ranges_are_those_of_the_configuration(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        (folder / f"{number}.tif").write_bytes(raster(rng.integers(0, 4000, (5, 40, 30)).astype(np.uint16)))
    cfg = small_config("data.bands=[5,2,1,4]", "data.depth=16", "data.band_range=[[0,4000]]")
    manifest = index(folder, tmp_path, channels=4, bands=(5, 2, 1, 4))
    (batch,) = whole(cfg, manifest, tmp_path).batches()
    assert batch.pixels.dtype == torch.uint16
    assert batch.pixels.shape == (3, 32, 32, 4)
    assert nearly(batch.pixels, expected(cfg, folder, ["0.tif", "1.tif", "2.tif"]))


def test_files_that_changed_for_the_worse_are_left_out(tmp_path):
    """Also where no image of a batch is left, and where that is the last one."""
    folder, cfg = tmp_path / "images", small_config("data.depth=8")
    names = write_scenes(folder, 8)
    manifest = index(folder, tmp_path)
    truncated = bad_files()["truncated.jpg"][0]
    for number in (1, 4, 5):
        (folder / names[number]).write_bytes(truncated)
    for number in (6, 7):
        (folder / names[number]).unlink()
    batches = list(whole(cfg, manifest, tmp_path).batches())
    assert [batch.rows.tolist() for batch in batches] == [[0, 2, 3], []]
    assert batches[1].pixels.shape == (0, 32, 32, 3)
    assert nearly(batches[0].pixels, expected(cfg, folder, ["000.png", "002.png", "003.png"]))
    assert sorted(skipped_rows(tmp_path)) == [names[number] for number in (1, 4, 5, 6, 7)]


@pytest.mark.parametrize("refused", [(), (2,), (0, 1, 2, 3)])
def test_a_file_that_the_pipeline_refuses_is_read_by_another_decoder(tmp_path, monkeypatch, refused):
    """DALI fails on a batch though its files had passed the check; `refused`: on these alone too."""
    folder, cfg = tmp_path / "images", small_config("data.depth=8")
    names = write_scenes(folder, 9)
    manifest = index(folder, tmp_path)
    contents = {(folder / names[number]).read_bytes() for number in refused}
    submit, failed = pipeline.CropPipeline.submit, []

    def fail(self, images, start, end):
        given = [image.tobytes() for image in images]
        if (len(images) == 4 and not failed) or any(data in contents for data in given):
            failed.append(len(images))
            raise RuntimeError("nvJPEG is in a bad mood")
        submit(self, images, start, end)

    monkeypatch.setattr(pipeline.CropPipeline, "submit", fail)
    batches = list(whole(cfg, manifest, tmp_path).batches())
    assert failed[0] == 4
    assert failed.count(1) == len(refused)
    assert [batch.rows.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert nearly(torch.cat([batch.pixels for batch in batches]), expected(cfg, folder, names))


def test_a_device_that_fails_on_every_image_ends_the_pass(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    write_scenes(folder, 3)
    manifest = index(folder, tmp_path)

    def fail(self, images, start, end):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(pipeline.CropPipeline, "submit", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(whole(small_config("data.depth=8"), manifest, tmp_path).batches())
    assert not (tmp_path / "skipped.csv").exists()


def test_a_pass_that_is_left_early_ends_its_threads(tmp_path):
    folder = tmp_path / "images"
    write_scenes(folder, 20)
    manifest = index(folder, tmp_path)
    before = set(threading.enumerate())  # of other tests of this process, which may still be ending theirs
    batches = whole(small_config("data.depth=8"), manifest, tmp_path, batch_size=2).batches()
    next(batches)
    assert any(thread.name.startswith("pera-") for thread in set(threading.enumerate()) - before)
    batches.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("pera-")]
