"""Files that a decoder of DALI complains of: nothing of that on the terminal, and the pixels that are stored."""

import io
import tarfile

import numpy as np
import pytest
from data_support import SMALL, raster, scene
from PIL import Image

from pera_fast import cli
from pera_fast.data.files.manifest import Manifest

pytest.importorskip("nvidia.dali")


def write(folder, bits: int, count: int = 4):
    """Planar TIFFs, of which every read would cost a coloured line."""
    folder.mkdir()
    for number in range(count):
        planes = np.moveaxis(scene(number), -1, 0)
        deep = planes.astype(np.uint16) * 257
        (folder / f"{number}.tif").write_bytes(raster(planes if bits == 8 else deep, interleave="band"))


def test_a_run_over_planar_files_is_quiet(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(tmp_path / "data", 8)
    run = ["pretrain", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--recipe", "tiny"]
    assert cli.run([*run, *SMALL, "train.batch_size=4", "train.steps=2"]) == 0
    printed = capfd.readouterr()
    assert "ERROR" not in printed.err + printed.out
    assert "libtiff" not in printed.err + printed.out
    assert Manifest.load(tmp_path / "run" / "index.parquet").table["decoder"].to_pylist() == ["rasterio"] * 4


@pytest.mark.parametrize("bits", [8, 16])
def test_planar_files_have_the_pixels_that_are_stored(tmp_path, monkeypatch, capfd, bits):
    """DALI made noise of those of 16 bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(tmp_path / "data", bits)
    assert cli.run(["data", "pack", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--reencode", "png"]) == 0
    assert "ERROR" not in capfd.readouterr().err
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as shard:
        pictures = [shard.extractfile(name).read() for name in sorted(shard.getnames()) if name.endswith(".png")]
    assert len(pictures) == 4
    for number, picture in enumerate(pictures):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), scene(number))
