"""Tiles hold the scene's own pixels, say where they lie, and survive whatever a scene or a kill brings."""

import csv
import itertools
import json
import os
import shutil
import time

import numpy as np
import pytest
import rasterio
from data_support import shared_data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import Affine, from_origin

from pera_fast import cli
from pera_fast.data.index.build import build_index
from pera_fast.data.tools import tile as tile_module
from pera_fast.data.tools import tile_grid
from pera_fast.data.tools.tile import tile
from pera_fast.data.tools.tile_grid import TileSettings, reads, starts
from pera_fast.data.tools.tile_scene import TileCounts, cut
from pera_fast.errors import UserError

PLACE = {"crs": "EPSG:32618", "transform": from_origin(500_000, 4_000_000, 10, 20)}


def picture(bands=3, height=260, width=300, dtype="uint16", seed=0):
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(0, 1, (bands, height, width)).astype(kind)
    return rng.integers(1, 200 if kind.itemsize == 1 else 4000, (bands, height, width)).astype(kind)


def write_scene(path, pixels, mask=None, descriptions=(), **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    shape = {"count": bands, "height": height, "width": width, "dtype": pixels.dtype}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **shape, **{**PLACE, **profile}) as out,
    ):
        out.write(pixels)
        for number, text in enumerate(descriptions, start=1):
            out.set_band_description(number, text)
        if mask is not None:
            out.write_mask(mask)
    return path


def run(scenes, out, workers=1, **settings):
    return tile(scenes, out, TileSettings(**settings), workers=workers, progress=False)


def tiles_of(folder, suffix="tif"):
    found = {}
    for path in sorted(folder.glob(f"*.{suffix}")):
        with rasterio.open(path) as opened:
            about = json.loads(path.with_suffix(".json").read_text())
            found[path.name] = (opened.read(), about, opened.profile, opened.descriptions, opened.colorinterp)
    return found


def skipped_rows(out):
    with open(out / "skipped.csv", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


@given(st.integers(1, 400), st.integers(16, 64), st.integers(0, 15))
def test_tiles_cover_every_pixel(length, size, overlap):
    at = starts(length, size, overlap)
    assert at == sorted(set(at))
    covered = np.zeros(length, bool)
    for start in at:
        assert start + min(size, length) <= length
        covered[start : start + size] = True
    assert covered.all()
    assert all(b - a <= size - overlap for a, b in itertools.pairwise(at))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10), st.integers(1, 200))
def test_reads_are_bounded_and_hold_every_tile_once(width, height, overlap, kib):
    settings = TileSettings(32, overlap)
    before, tile_grid._READ_BYTES = tile_grid._READ_BYTES, kib * 1024
    try:
        groups = list(reads(width, height, 3, settings))
    finally:
        tile_grid._READ_BYTES = before
    boxes = [box for group in groups for box in group]
    assert len(set(boxes)) == len(boxes) == len(starts(width, 32, overlap)) * len(starts(height, 32, overlap))
    for group in groups:
        lefts, tops, rights, bottoms = zip(*group, strict=True)
        size = (max(rights) - min(lefts)) * (max(bottoms) - min(tops)) * 3
        assert size <= kib * 1024 or len(group) == 1


@pytest.mark.parametrize(
    "layout",
    [
        {"tiled": True, "blockxsize": 64, "blockysize": 48, "compress": "deflate"},
        {"interleave": "band"},
        {"interleave": "pixel", "compress": "lzw"},
    ],
    ids=["tiled", "planar", "striped"],
)
@pytest.mark.parametrize("read_bytes", [2**27, 100_000])
def test_tiles_are_the_scenes_pixels_with_their_place(tmp_path, monkeypatch, layout, read_bytes):
    monkeypatch.setattr(tile_grid, "_READ_BYTES", read_bytes)
    pixels = picture()
    path = write_scene(tmp_path / "a.tif", pixels, descriptions=("blue", "green", "nir"), **layout)
    out = tmp_path / "out"
    out.mkdir()
    assert cut(str(path), "a.tif", str(out), TileSettings(128, 16)) == TileCounts(9, 0, 1 if read_bytes > 1e6 else 9)
    found = tiles_of(out)
    assert len(found) == 9
    for name, (tile_pixels, about, profile, descriptions, _) in found.items():
        top, left = int(name[1:7]), int(name[9:15])
        assert np.array_equal(tile_pixels, pixels[:, top : top + 128, left : left + 128])
        assert tile_pixels.shape == (3, 128, 128)
        assert (about["top"], about["left"], about["scene"]) == (top, left, "a.tif")
        assert profile["crs"].to_epsg() == 32618
        assert about["crs"] == "EPSG:32618"
        assert list(profile["transform"])[:6] == about["transform"]
        west, north = 500_000 + 10 * left, 4_000_000 - 20 * top
        assert about["bounds"] == pytest.approx([west, north - 20 * 128, west + 10 * 128, north])
        assert -75.1 < about["bounds_wgs84"][0] < -74.9
        assert about["bands"] == list(descriptions) == ["blue", "green", "nir"]
        assert (about["nodata_fraction"], about["dtype"]) == (0, "uint16")
    assert sorted(path.suffix for path in out.iterdir()) == [".json"] * 9 + [".tif"] * 9


def test_ground_control_points_keep_their_place(tmp_path):
    at = [(r, c) for r in (0, 48, 96) for c in (0, 32, 64)]
    points = [GroundControlPoint(r, c, 10 + c * 1e-4 + r * 2e-5, 50 - r * 1e-4 + c * 1e-5, 7) for r, c in at]
    path = write_scene(tmp_path / "a.tif", picture(1, 96, 64), crs=None, transform=None)
    with rasterio.open(path, "r+") as scene:
        scene.gcps = points, CRS.from_epsg(4326)
    assert cli.run(["data", "tile", str(path), "--out", str(tmp_path / "out"), "--size", "32"]) == 0
    with rasterio.open(tmp_path / "out" / "a" / "y000064_x000032.tif") as opened:
        found, crs = opened.gcps
    assert crs == CRS.from_epsg(4326)
    assert [(p.row, p.col, p.x, p.y, p.z) for p in found] == [(p.row - 64, p.col - 32, p.x, p.y, p.z) for p in points]
    about = json.loads((tmp_path / "out" / "a" / "y000064_x000032.json").read_text())
    assert (about["crs"], about["transform"], about["gcps"][0]["row"]) == ("EPSG:4326", None, -64)
    corners = [(10 + c * 1e-4 + r * 2e-5, 50 - r * 1e-4 + c * 1e-5) for r in (64, 96) for c in (32, 64)]
    xs, ys = zip(*corners, strict=True)
    assert about["bounds"] == pytest.approx([min(xs), min(ys), max(xs), max(ys)], abs=1e-9)


def test_rational_polynomials_keep_their_place(tmp_path):
    numbers = {"line_off": 48.0, "samp_off": 32.0, "line_scale": 48.0, "samp_scale": 32.0}
    numbers |= {"lat_off": 50.0, "long_off": 10.0, "height_off": 100.0, "lat_scale": 0.01, "long_scale": 0.01}
    line = [0.0, 0.0, -1.0, *[0.0] * 17]  # the line follows the latitude, the sample the longitude
    one = [1.0, *[0.0] * 19]
    rpcs = RPC(
        **numbers, height_scale=500.0, line_num_coeff=line, line_den_coeff=one,
        samp_num_coeff=[0.0, 1.0, *[0.0] * 18], samp_den_coeff=one,
    )  # fmt: skip
    write_scene(tmp_path / "a.tif", picture(1, 96, 64), crs=None, transform=None, rpcs=rpcs)
    run(tmp_path / "a.tif", tmp_path / "out", size=32)
    with rasterio.open(tmp_path / "out" / "a" / "y000064_x000032.tif") as opened:
        assert (opened.rpcs.line_off, opened.rpcs.samp_off) == (48 - 64, 32 - 32)
        assert opened.rpcs.lat_off == 50
    about = json.loads((tmp_path / "out" / "a" / "y000064_x000032.json").read_text())
    # A polynomial counts from the middle of the first pixel.
    xs = [10 + (column - 0.5 - 32) / 32 * 0.01 for column in (32, 64)]
    ys = [50 - (row - 0.5 - 48) / 48 * 0.01 for row in (96, 64)]
    assert about["bounds_wgs84"] == pytest.approx([xs[0], ys[0], xs[1], ys[1]], abs=1e-9)


def test_scale_offset_unit_and_tags_of_bands_are_kept(tmp_path):
    path = write_scene(tmp_path / "a.tif", picture(2, 40, 40))
    with rasterio.open(path, "r+") as scene:
        scene.scales, scene.offsets, scene.units = (1e-4, 1.0), (-0.1, 0.0), ("reflectance", "m")
        scene.update_tags(2, WAVELENGTH="665", STATISTICS_MEAN="12")
        scene.update_tags(PRODUCT="L2A", AREA_OR_POINT="Point")
    run(path, tmp_path / "out", size=32)
    with rasterio.open(tmp_path / "out" / "a" / "y000000_x000008.tif") as opened:
        assert (opened.scales, opened.offsets, opened.units) == ((1e-4, 1.0), (-0.1, 0.0), ("reflectance", "m"))
        assert (opened.tags(1), opened.tags(2)) == ({}, {"WAVELENGTH": "665"})
        assert opened.tags() == {"PRODUCT": "L2A", "AREA_OR_POINT": "Point"}
        assert opened.transform == rasterio.open(path).transform * Affine.translation(8, 0)
    about = json.loads((tmp_path / "out" / "a" / "y000000_x000008.json").read_text())
    assert (about["scales"], about["offsets"], about["units"]) == ([1e-4, 1.0], [-0.1, 0.0], ["reflectance", "m"])
    assert (about["tags"], about["band_tags"]) == ({"PRODUCT": "L2A"}, [{}, {"WAVELENGTH": "665"}])


@pytest.mark.parametrize(
    "transform",
    [Affine(10, 0, 5e5, 0, 10, 4e6), Affine(-10, 0, 5e5, 0, -10, 4e6), Affine(7, 7, 5e5, 7, -7, 4e6)],
    ids=["south up", "east left", "rotated"],
)
def test_bounds_rise(tmp_path, transform):
    path = write_scene(tmp_path / "a.tif", picture(1, 40, 40), transform=transform)
    run(path, tmp_path / "out", size=32)
    about = json.loads((tmp_path / "out" / "a" / "y000008_x000000.json").read_text())
    corners = [transform * (column, row) for column in (0, 32) for row in (8, 40)]
    xs, ys = zip(*corners, strict=True)
    assert about["bounds"] == pytest.approx([min(xs), min(ys), max(xs), max(ys)])
    assert about["bounds_wgs84"][0] < about["bounds_wgs84"][2]
    assert about["bounds_wgs84"][1] < about["bounds_wgs84"][3]


def test_what_a_tile_cannot_keep_is_refused_by_name(tmp_path):
    scenes = tmp_path / "scenes"
    path = write_scene(scenes / "swath.tif", picture(1, 40, 40), crs=None, transform=None)
    with rasterio.open(path, "r+") as scene:
        scene.update_tags(ns="GEOLOCATION", X_DATASET="lon.tif", Y_DATASET="lat.tif", X_BAND="1", Y_BAND="1")
    write_scene(scenes / "good.tif", picture(1, 40, 40))
    source = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{n}"><NoDataValue>{value}</NoDataValue><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">good.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
        f"</VRTRasterBand>"
        for n, value in ((1, 0), (2, 255))
    )
    mixed = scenes / "mixed.vrt"
    mixed.write_text(f'<VRTDataset rasterXSize="40" rasterYSize="40">{source}</VRTDataset>')
    run(scenes, tmp_path / "out", size=32)
    reason = "its place is a geolocation array, which tiles cannot keep: warp it first (gdalwarp)"
    assert skipped_rows(tmp_path / "out")["swath.tif"] == reason
    reason = r"mixed.vrt: its bands have different values for no data \(0.0, 255.0\); a tile has one: give it one"
    with pytest.raises(UserError, match=reason):
        run(mixed, tmp_path / "mixed", size=32)


def test_tiles_without_data_are_left_out(tmp_path):
    pixels = picture(2, 64, 96, "uint8")
    pixels[:, :, :32] = 0  # nothing in the first column
    pixels[:, :16, 32:64] = 0  # half of a tile
    pixels[0, 32:, 64:] = 0  # one band of two
    scenes = tmp_path / "scenes"
    write_scene(scenes / "declared.tif", pixels, nodata=0)
    write_scene(scenes / "undeclared.tif", pixels)
    write_scene(scenes / "masked.tif", pixels, mask=(pixels != 0).any(0))
    alpha = np.concatenate([pixels, pixels[:1], (pixels != 0).any(0, keepdims=True) * np.uint8(255)])
    write_scene(scenes / "alpha.tif", alpha, photometric="rgb", alpha="yes")
    floats = np.where(pixels == 0, np.nan, pixels).astype(np.float32)
    write_scene(scenes / "nan.tif", floats)
    out = tmp_path / "out"
    assert run(scenes, out, size=32, nodata_max=0.4).endswith("18 tiles of 5 scenes, 12 left out for want of data")
    left = ["y000000_x000064.tif", "y000032_x000032.tif", "y000032_x000064.tif"]
    for scene in ("declared", "masked", "alpha", "nan"):
        assert sorted(path.name for path in (out / scene).glob("*.tif")) == [*left[:1], *left[1:]], scene
    assert len(list((out / "undeclared").glob("*.tif"))) == 6
    with rasterio.open(out / "alpha" / left[0]) as opened:
        assert opened.count == 3, "alpha is a mask, not a band"
    again = tmp_path / "again"
    run(scenes, again, size=32, nodata_max=0.5, nodata=0)
    assert len(list((again / "undeclared").glob("*.tif"))) == 4
    with rasterio.open(again / "masked" / "y000000_x000032.tif") as opened:
        assert np.array_equal(opened.dataset_mask() > 0, (pixels[:, :32, 32:64] != 0).any(0)), "the mask is kept"
    about = json.loads((again / "declared" / "y000000_x000032.json").read_text())
    assert about["nodata_fraction"] == 0.5


def test_other_formats(tmp_path):
    scenes = tmp_path / "scenes"
    eight, deep = picture(3, 40, 40, "uint8"), picture(3, 40, 40, "uint16", 1)
    write_scene(scenes / "eight.tif", eight)
    write_scene(scenes / "deep.tif", deep)
    write_scene(scenes / "many.tif", picture(8, 40, 40))
    index = picture(1, 40, 40, "uint8") % 4
    with rasterio.open(write_scene(scenes / "palette.tif", index, photometric="palette"), "r+") as out:
        out.write_colormap(1, {i: (60 * i, 10, 255 - i, 255) for i in range(4)})
    run(scenes, tmp_path / "png", size=32, format="png")
    assert np.array_equal(tiles_of(tmp_path / "png" / "deep", "png")["y000008_x000000.png"][0], deep[:, 8:, :32])
    colors = tiles_of(tmp_path / "png" / "palette", "png")["y000000_x000000.png"][0]
    assert np.array_equal(colors[0], 60 * index[0, :32, :32])
    reason = "8 band(s) of uint16 do not go into png (1 or 3 of uint8 or uint16 do): use --format tif"
    assert skipped_rows(tmp_path / "png") == {"many.tif": reason}
    run(scenes, tmp_path / "jpg", size=32, format="jpg")
    assert set(skipped_rows(tmp_path / "jpg")) == {"deep.tif", "many.tif"}
    with Image.open(tmp_path / "jpg" / "eight" / "y000000_x000008.jpg") as opened:
        assert (opened.mode, opened.size) == ("RGB", (32, 32))
        assert np.abs(np.asarray(opened).mean((0, 1)) - eight[:, :32, 8:].mean((1, 2))).max() < 3


def test_scenes_without_a_place_smaller_than_a_tile_or_of_one_name(tmp_path):
    scenes = tmp_path / "scenes"
    pixels = picture(1, 20, 30, "float64")
    write_scene(scenes / "a.b.tif", pixels, crs=None, transform=None)
    write_scene(scenes / "a_b.tif", pixels)
    write_scene(scenes / "a" / "b.tiff", pixels)
    write_scene(scenes / "a__b.tif", pixels, nodata=float("nan"))
    out = tmp_path / "out"
    assert "4 tiles of 4 scenes" in run(scenes, out, size=64)
    folders = [path for path in out.iterdir() if path.name != ".tiles"]
    assert len(folders) == 4
    assert not any("." in path.name for path in folders)
    abouts = {}
    for folder in folders:
        ((tile_pixels, about, *_),) = tiles_of(folder).values()
        assert np.array_equal(tile_pixels, pixels)
        abouts[about["scene"]] = about
    assert (abouts["a.b.tif"]["crs"], abouts["a.b.tif"]["bounds"]) == (None, None)
    assert abouts["a__b.tif"]["nodata"] == "nan"
    assert len(build_index(out, out=tmp_path / "i.parquet", channels=1, workers=1, progress=False).readable) == 4


def test_stopped_within_a_scene_it_goes_on_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_grid, "_READ_BYTES", 100_000)
    path = write_scene(tmp_path / "a.tif", picture())
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.mkdir()
    whole.mkdir()

    def stop(done):
        if done == "4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(str(path), "a.tif", str(out), TileSettings(100), stop)
    first = {path.name: path.stat().st_ino for path in out.glob("*.tif")}
    assert len(first) == 4
    assert cut(str(path), "a.tif", str(out), TileSettings(100)).written == 9
    assert {name: (out / name).stat().st_ino for name in first} == first
    cut(str(path), "a.tif", str(whole), TileSettings(100))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_second_call_cuts_what_is_new_changed_or_was_unreadable(tmp_path):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    for name in ("a", "b", "empty"):
        write_scene(scenes / f"{name}.tif", picture(1, 64, 64, "uint8") * (name != "empty"), nodata=0)
    whole = (scenes / "b.tif").read_bytes()
    (scenes / "b.tif").write_bytes(whole[: len(whole) // 2])
    (scenes / "c.tif").write_bytes(b"no scene")
    (scenes / "notes.txt").write_text("x")
    assert "4 tiles of 2 scenes, 4 left out for want of data, 2 could not be read" in run(scenes, out, size=32)
    assert sorted(skipped_rows(out)) == ["b.tif", "c.tif"]
    assert not list(out.glob(".tiles/*.partial"))
    before = {path: path.stat().st_mtime_ns for path in (out / "a").iterdir()}
    (scenes / "b.tif").write_bytes(whole)
    write_scene(scenes / "d.tif", picture(1, 64, 32, "uint8"))
    assert "10 tiles of 4 scenes, 4 left out" in run(scenes, out, size=32)
    assert {path: path.stat().st_mtime_ns for path in (out / "a").iterdir()} == before
    write_scene(scenes / "a.tif", picture(1, 32, 32, "uint8", 5))
    assert "7 tiles of 4 scenes" in run(scenes, out, size=32)
    assert len(list((out / "a").iterdir())) == 2
    shutil.rmtree(out / "d")
    assert "7 tiles of 4 scenes" in run(scenes, out, size=32)
    assert (out / "d").is_dir()


def test_a_scene_that_kills_its_reader_or_hangs_it_costs_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_module, "_MODULE", "dying_tile_scene")
    for name in ("a", "kills", "z"):
        write_scene(tmp_path / "scenes" / f"{name}.tif", picture(1, 32, 32, "uint8"))
    assert "2 tiles of 2 scenes" in run(tmp_path / "scenes", tmp_path / "out", size=32)
    assert skipped_rows(tmp_path / "out") == {"kills.tif": "rasterio: killed by SIGSEGV"}


LINES = {
    "missing": (lambda t: (t / "none", t / "out", {}), "scenes {t}/none do not exist"),
    "no image": (lambda t: (t / "text", t / "out", {}), "scenes {t}/text hold no image file among 1 file(s)"),
    "no scene": (
        lambda t: (t / "bad", t / "out", {}),
        "no readable scene among the 1 file(s) in {t}/bad: bad.tif: rasterio: not recognized as being in a supported"
        " file format.",
    ),
    "small size": (lambda t: (t, t / "out", {"size": 8}), "--size 8: must be at least 16 pixels"),
    "overlap": (
        lambda t: (t, t / "out", {"size": 32, "overlap": 32}),
        "--overlap 32: must be at least 0 and less than --size 32",
    ),
    "fraction": (lambda t: (t, t / "out", {"nodata_max": 50}), "--nodata-max 50: is a fraction, 0 to 1"),
    "inside": (
        lambda t: (t / "scenes", t / "scenes" / "out", {}),
        "--out {t}/scenes/out: lies in the folder of images {t}/scenes, and "
        "what is written there would be taken for images; give a place outside it",
    ),
    "not empty": (
        lambda t: (t / "scenes", t / "text", {}),
        "--out {t}/text: holds other files (notes.txt); give an empty folder",
    ),
    "a file": (
        lambda t: (t / "scenes", t / "text" / "notes.txt", {}),
        "--out {t}/text/notes.txt: is a file; give a folder",
    ),
    "other settings": (
        lambda t: (t / "scenes", t / "begun", {"size": 64}),
        "--out {t}/begun: was begun with --size 32; give the same, or another folder",
    ),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    write_scene(folder / "scenes" / "a.tif", picture(1, 32, 32, "uint8"))
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").write_text("x")
    (folder / "bad").mkdir()
    (folder / "bad" / "bad.tif").write_bytes(b"no scene")
    run(folder / "scenes", folder / "begun", size=32)
    return folder


@pytest.mark.parametrize("case", LINES)
def test_wrong_use_is_one_line(wrong, case):
    make, line = LINES[case]
    scenes, out, settings = make(wrong)
    with pytest.raises(UserError) as caught:
        run(scenes, out, **settings)
    assert str(caught.value) == line.format(t=wrong)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(wrong, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"--out .*: cannot write there \(Permission denied\)"):
        run(wrong / "scenes", tmp_path / "out")


def test_a_full_disk_is_one_line(wrong, tmp_path, monkeypatch):
    result = OSError(28, "No space left on device")
    monkeypatch.setattr(tile_module.WorkerProcess, "call", lambda self, message: result)
    with pytest.raises(UserError, match=r"cannot write there \(No space left on device\); the same command goes on"):
        run(wrong / "scenes", tmp_path / "out")
    path = wrong / "scenes" / "a.tif"
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(result))
    answer = cut(str(path), "a.tif", str(tmp_path), TileSettings(32))
    assert (type(answer), answer.errno) == (OSError, 28)


def test_the_command_passes_everything_on(wrong, tmp_path, capsys):
    line = f"data tile {wrong / 'scenes' / 'a.tif'} --out {tmp_path / 'out'} --size 16 --overlap 2 --format png"
    assert cli.run([*line.split(), "--nodata", "0", "--nodata-max", "0.1", "--workers", "1"]) == 0
    assert "9 tiles of 1 scenes" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / ".tiles" / "settings.json").read_text())
    assert kept == {"size": 16, "overlap": 2, "nodata_max": 0.1, "format": "png", "nodata": 0.0}


def test_real_scenes(tmp_path):
    data = shared_data()
    began = time.monotonic()
    assert "46 tiles of 7 scenes" in run(data / "geo", tmp_path / "geo", size=256, workers=2)
    assert "5 scenes" in run(data / "bands", tmp_path / "bands", size=256)
    assert time.monotonic() - began < 60
    for folder in ("geo", "bands"):
        for path in sorted((tmp_path / folder).glob("*/*.tif")):
            about = json.loads(path.with_suffix(".json").read_text())
            with rasterio.open(path) as cut_out, rasterio.open(data / folder / about["scene"]) as scene:
                window = rasterio.windows.Window(about["left"], about["top"], about["width"], about["height"])
                assert np.array_equal(cut_out.read(), scene.read(window=window), equal_nan=True)
                assert cut_out.crs == scene.crs
                assert cut_out.bounds == pytest.approx(about["bounds"])
                assert cut_out.bounds == pytest.approx(rasterio.windows.bounds(window, scene.transform))
                valid = (scene.dataset_mask(window=window) > 0) & np.isfinite(cut_out.read()).any(0)
                assert about["nodata_fraction"] == pytest.approx(1 - valid.mean(), abs=1e-5)
