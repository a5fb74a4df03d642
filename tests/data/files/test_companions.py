"""Companions of images, and hidden or trash folders: left out, said once with counts, taken where they are wanted."""

import shutil
import tarfile

import numpy as np
import pytest
import rasterio
from data_support import SMALL, scene, write_scenes
from rasterio.enums import Resampling

from pera_fast import cli
from pera_fast.data.files.companions import companion, hides
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.index.build import build_index
from pera_fast.features.samples import read_samples

pytest.importorskip("nvidia.dali")
SCENES = [f"scene{number}.tif" for number in range(4)]
TOLD = (
    "not taken as images: 4 .msk, 8 .ovr, 1 hidden files, 3 hidden or trash folders, 2 thumbnails"
    " (data.companions=true, or --companions, takes them)"
)


@pytest.fixture(scope="module")
def sidecars(tmp_path_factory):
    """Four scenes with masks and overviews beside them, thumbnails, a notebook's copies, deleted files."""
    root = tmp_path_factory.mktemp("sidecars")
    shape = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": 128, "height": 96}
    for number, name in enumerate(SCENES):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
            with rasterio.open(root / name, "w", **shape) as file:
                file.write(np.moveaxis(scene(number, 96, 128), -1, 0))
            with rasterio.open(root / name, "r+") as file:
                file.write_mask(np.full((96, 128), 255, np.uint8))
        with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(root / name, "r+") as file:
            file.build_overviews([2], Resampling.average)
    for folder in (".ipynb_checkpoints", ".Trash-1000/files", "__MACOSX"):
        (root / folder).mkdir(parents=True)
        shutil.copy(root / SCENES[0], root / folder / "copy.tif")
    for name in ("scene0_thumb_small.jpg", "scene1-thumb.jpg", "._scene2.jpg"):
        write_scenes(root / "made", 1, suffix=".jpg")
        shutil.move(root / "made" / "000.jpg", root / name)
    (root / "made").rmdir()
    return root


def paths(manifest):
    return manifest.table["path"].to_pylist()


def test_a_run_takes_the_scenes_and_says_once_what_it_left_out(sidecars, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = ["pretrain", "--data", str(sidecars), "--out", str(tmp_path / "run"), "--recipe", "tiny"]
    assert cli.run([*run, *SMALL, "train.batch_size=4", "train.steps=1"]) == 0
    assert capsys.readouterr().err.count(f"warning: {sidecars}: {TOLD}\n") == 1
    assert paths(Manifest.load(tmp_path / "run" / "index.parquet")) == SCENES


def test_index_and_tile_with_and_without(sidecars, tmp_path, caplog, capsys):
    index = ["data", "index", str(sidecars), "--out", str(tmp_path / "index.parquet"), "--workers", "1"]
    assert cli.run(index) == 0
    assert paths(Manifest.load(tmp_path / "index.parquet")) == SCENES
    assert cli.run([*index, "data.companions=true"]) == 0
    assert len(paths(Manifest.load(tmp_path / "index.parquet"))) == 22
    caplog.clear()
    tile = ["data", "tile", str(sidecars), "--size", "128", "--workers", "1"]
    assert cli.run([*tile, "--out", str(tmp_path / "tiles")]) == 0
    assert f"{sidecars}: {TOLD}" in caplog.text
    assert cli.run([*tile, "--out", str(tmp_path / "all"), "--companions"]) == 0
    told = capsys.readouterr().out
    assert "4 tiles of 4 scenes" in told
    assert "of 22 scenes" in told or "of 21 scenes" in told


def test_shards_beside_a_notebooks_folder_and_with_members_of_other_systems(tmp_path, caplog):
    write_scenes(tmp_path / "images", 3)
    root = tmp_path / "shards"
    (root / ".ipynb_checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "images" / "000.png", root / ".ipynb_checkpoints" / "000.png")
    with tarfile.open(root / "a.tar", "w") as shard:
        for name in ("000.png", "001.png", "002.png"):
            shard.add(tmp_path / "images" / name, name)
        shard.add(tmp_path / "images" / "000.png", "._000.png")
        shard.add(tmp_path / "images" / "000.png", "__MACOSX/000.png")
    options = {"out": tmp_path / "index.parquet", "workers": 1, "progress": False}
    assert paths(build_index(root, **options)) == [f"a.tar/00{number}.png" for number in range(3)]
    assert "not taken as images: 1 hidden files, 2 hidden or trash folders (" in caplog.text


def test_a_folder_of_companions_alone_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_scenes(tmp_path / "data" / ".hidden", 2)
    assert cli.run(["data", "index", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: data folder {tmp_path / 'data'} holds no image; not taken as images: 1 hidden or trash folders"
        " (data.companions=true, or --companions, takes them)\n"
    )


def test_classes_of_a_probe_have_no_companions(tmp_path):
    for name in ("field", "town", ".Trash-1000"):
        write_scenes(tmp_path / name, 3)
        write_scenes(tmp_path / name / ".ipynb_checkpoints", 2)
    found = read_samples("scene", tmp_path)
    assert (found.classes, len(found)) == (("field", "town"), 6)


def test_names_of_images_are_not_taken_for_companions():
    for name in (
        "scene.tif",
        "overview.tif",
        "thumbtack_01.jpg",
        "browser.png",
        "a.ovr.tif",
        "ql5.jpg",
        "previews.jpg",
    ):
        assert companion(name) is None, name
    for name in (
        "s.tif.ovr",
        "s.TIF.MSK",
        "s.tif.aux.xml",
        "LC08_thumb_large.jpg",
        "T32-ql.jpg",
        "preview.jpg",
        ".x.tif",
    ):
        assert companion(name), name
    assert not hides("trash can")
    assert hides("$RECYCLE.BIN")
