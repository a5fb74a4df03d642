"""`data stack`: scenes of one-band files as GeoTIFFs of all bands, on one grid."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.control
from affine import Affine
from data_support import small_config

from pera_fast import cli
from pera_fast.data.files.band_files import PATTERN, band_file, scenes_of
from pera_fast.data.index.build import open_or_build
from pera_fast.data.tools.stack import StackSettings, stack
from pera_fast.errors import UserError

IMAGES = "S2A.SAFE/GRANULE/L2A_T32/IMG_DATA"
CORNER = Affine.translation(500_000, 5_000_000)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ramp(side: int, band: int) -> np.ndarray:
    """uint16 [side, side], the same ground at any number of pixels a side: linear from left to right."""
    across = (np.arange(side) + 0.5) / side
    return np.broadcast_to(1000 * band + 800 * across, (side, side)).astype(np.uint16)


def write(path: Path, pixels: np.ndarray, metres: float, **profile) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    form = (
        {"driver": "JP2OpenJPEG", "REVERSIBLE": "YES", "QUALITY": "100"}
        if path.suffix == ".jp2"
        else {"driver": "GTiff"}
    )
    size = {"height": pixels.shape[0], "width": pixels.shape[1], "count": 1, "dtype": pixels.dtype}
    place = {"crs": "EPSG:32632", "transform": CORNER @ Affine.scale(metres, -metres)}
    with rasterio.open(path, "w", **{**form, **size, **place, **profile}) as out:
        out.write(pixels, 1)
    return path


def safe(root: Path, tile: str = "T32TQM_20200101T101031") -> None:
    """A scene as Sentinel-2 L2A lays it out: bands of 10, 20 and 60 m, one of them at two, and a picture."""
    for band, metres in (("B02", 10), ("B03", 10), ("B02", 20), ("B8A", 20), ("B11", 20), ("B01", 60), ("TCI", 10)):
        side = {10: 120, 20: 60, 60: 20}[metres]
        number = int(re.sub(r"\D", "", band) or 99)
        write(root / IMAGES / f"R{metres}m" / f"{tile}_{band}_{metres}m.jp2", ramp(side, number), metres)


def test_bands_lie_on_the_grid_of_the_finest(tmp_path):
    safe(tmp_path / "in")
    told = stack(tmp_path / "in", tmp_path / "out", progress=False)
    assert told.endswith("1 scenes of bands B01,B02,B03,B8A,B11; 1 file(s) name no band")
    (path,) = (tmp_path / "out").glob("*.tif")
    with rasterio.open(path) as scene:
        assert scene.descriptions == ("B01", "B02", "B03", "B8A", "B11")
        assert (scene.width, scene.height, scene.crs.to_epsg()) == (120, 120, 32632)
        assert scene.transform == CORNER @ Affine.scale(10, -10)
        pixels = scene.read()
    assert pixels.dtype == np.uint16
    for band, number in zip(pixels, (1, 2, 3, 8, 11), strict=True):
        inner = slice(4, -4)  # at its border a coarse band has no neighbour to interpolate with
        assert np.abs(band[inner, inner].astype(int) - ramp(120, number)[inner, inner]).max() <= 1, number
    assert (pixels[1] == ramp(120, 2)).all()  # the finest of a band's resolutions


def test_a_stack_trains_and_its_bands_have_names(tmp_path):
    safe(tmp_path / "in")
    stack(tmp_path / "in", tmp_path / "out", StackSettings(bands=("B03", "B02")), progress=False)
    manifest = open_or_build(tmp_path / "out", small_config("data.bands=[B03,B02]"))
    assert len(manifest.readable) == 1
    assert manifest.readable.decoder.to_pylist() == ["rasterio"]


def test_single_bands_are_not_taken_for_pictures(tmp_path, capsys):
    safe(tmp_path / "in")
    with pytest.raises(UserError) as error:
        open_or_build(tmp_path / "in", small_config())
    assert "its files are single bands (B01, B02, B03, B8A, ... of" in str(error.value)
    assert f"pera-fast data stack {tmp_path / 'in'} --out STACKED" in str(error.value)
    assert len(open_or_build(tmp_path / "in", small_config("model.in_chans=1")).readable) == 7
    assert cli.run(["data", "index", str(tmp_path / "in")]) == 0
    assert "pera-fast data stack" in capsys.readouterr().out
    assert cli.run(["data", "stack", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--bands", "B02, B03"]) == 0
    assert "1 scenes of bands B02,B03; left out: band B01, B8A, B11" in capsys.readouterr().out


def test_it_goes_on_and_a_changed_file_makes_its_scene_anew(tmp_path):
    for tile in ("T1_a", "T2_b"):
        safe(tmp_path / "in" / tile, tile)
    stack(tmp_path / "in", tmp_path / "out", progress=False)
    first, second = sorted((tmp_path / "out").glob("*.tif"))
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    stack(tmp_path / "in", tmp_path / "out", progress=False)
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == before
    band = next((tmp_path / "in" / "T2_b").rglob("*B03_10m.jp2"))
    write(band, ramp(120, 5), 10)
    os.utime(band, (1, 1))
    stack(tmp_path / "in", tmp_path / "out", progress=False)
    assert first.stat().st_mtime_ns == before[0]
    with rasterio.open(second) as scene:
        assert (scene.read(3) == ramp(120, 5)).all()


def test_what_cannot_be_stacked_is_named(tmp_path):
    safe(tmp_path / "in" / "good", "T1_a")
    write(tmp_path / "in" / "LC08_B1.tif", ramp(40, 1), 30)
    write(
        tmp_path / "in" / "LC08_B2.tif", ramp(40, 2), 30, transform=Affine.translation(1e6, 1e6) @ Affine.scale(30, -30)
    )
    for name, side in (("B1", 40), ("B2", 20)):
        write(tmp_path / "in" / f"plain_{name}.tif", ramp(side, 1), 1, crs=None, transform=None)
    (tmp_path / "in" / "broken_B1.tif").write_bytes(b"II*\0" + bytes(100))
    write(tmp_path / "in" / "broken_B2.tif", ramp(20, 1), 30)
    with pytest.raises(UserError, match="have no band in common; give --bands"):
        stack(tmp_path / "in", tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"none of the 3 scene\(s\) in .* can be stacked: LC08: B2 lies elsewhere"):
        stack(tmp_path / "in", tmp_path / "out", StackSettings(bands=("B1", "B2")), progress=False)
    skipped = (tmp_path / "out" / "skipped.csv").read_text()
    assert "B2 has another size, and no place that says where its pixels lie" in skipped
    assert "broken" in skipped
    assert not list((tmp_path / "out").glob("*.tif"))


def test_masks_of_bands_are_no_scenes(tmp_path):
    """A .SAFE folder holds a mask of each band, in files that are named as bands are."""
    safe(tmp_path / "in")
    quality = (tmp_path / "in" / IMAGES).parent / "QI_DATA"
    for mask in ("DETFOO_B01", "DETFOO_B02", "DETFOO_B03", "CLASSI_B00", "CLDPRB_20m"):
        write(quality / f"MSK_{mask}.jp2", np.ones((20, 20), np.uint8), 60)
    with pytest.raises(UserError, match=r"its files are single bands \(B01, B02, B03, B8A, ... of S2A.SAFE"):
        open_or_build(tmp_path / "in", small_config())
    told = stack(tmp_path / "in", tmp_path / "out", progress=False)
    assert told.endswith("1 scenes of bands B01,B02,B03,B8A,B11; 6 file(s) name no band")


def test_bands_in_another_order_are_another_stack(tmp_path):
    safe(tmp_path / "in")
    for bands in (("B02", "B03"), ("B03", "B02")):
        stack(tmp_path / "in", tmp_path / "out", StackSettings(bands), progress=False)
        with rasterio.open(next((tmp_path / "out").glob("*.tif"))) as scene:
            assert scene.descriptions == bands


@pytest.mark.parametrize(("first", "second", "kept"), [(0, 0, "0.0"), ("nan", "nan", "nan"), (None, None, "None")])
def test_nodata_is_kept(first, second, kept, tmp_path):
    for band, value in (("B1", first), ("B2", second)):
        nodata = None if value is None else float(value)
        write(tmp_path / "in" / f"x_{band}.tif", ramp(40, 1).astype(np.float32), 30, nodata=nodata)
    stack(tmp_path / "in", tmp_path / "out", progress=False)
    with rasterio.open(tmp_path / "out" / "x.tif") as scene:
        assert str(scene.nodata) == kept


def test_what_would_be_lost_is_refused(tmp_path):
    for scene, nodata in (("x", 0), ("y", None)):
        write(tmp_path / scene / "s_B1.tif", ramp(40, 1), 30, nodata=nodata)
        write(tmp_path / scene / "s_B2.tif", ramp(40, 2), 30)
    with rasterio.open(tmp_path / "y" / "s_B2.tif", "r+") as file:
        file.write_mask(np.eye(40, dtype=np.uint8) * 255)
    corners = [rasterio.control.GroundControlPoint(r, c, 5e5 + c, 5e6 - r) for r, c in ((0, 0), (0, 40), (40, 0))]
    write(tmp_path / "z" / "s_B1.tif", ramp(40, 1), 30, transform=None, gcps=corners)
    for scene, told in (
        ("x", "B1 declares nodata 0.0 and B2 None; a GeoTIFF has one"),
        ("y", "B2 has a mask, which would be lost; declare a nodata value instead"),
        ("z", "B1 lies by control points, which would be lost; warp it first"),
    ):
        with pytest.raises(UserError, match=told):
            stack(tmp_path / scene, tmp_path / "out" / scene, progress=False)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"bands": ("B02", "B99")}, "--bands B02,B99: no scene in {t} has B99; there are B01, B02, B03, B8A, B11"),
        ({"pattern": "B02"}, "--pattern B02: has no group (?P<band>...)"),
        ({"pattern": "(?P<band>none)"}, "folder {t}: none of its 7 image file(s) names a band; give --pattern"),
        ({"pattern": "("}, "--pattern (: no regular expression (missing ), unterminated subpattern at position 0)"),
    ],
)
def test_wrong_use_is_one_line(settings, line, tmp_path):
    safe(tmp_path / "in")
    with pytest.raises(UserError) as error:
        stack(tmp_path / "in", tmp_path / "out", StackSettings(**settings), progress=False)
    assert str(error.value) == line.format(t=tmp_path / "in")


def test_names_of_bands():
    def parts(path: str) -> tuple[str, str, float] | None:
        file = band_file(path, re.compile(PATTERN))
        return None if file is None else (file.scene, file.band, file.metres)

    assert parts("R20m/T32TQM_20200101T101031_B8A_20m.jp2") == ("T32TQM_20200101T101031", "B8A", 20)
    assert parts("T32TQM_20200101T101031_B02.jp2") == ("T32TQM_20200101T101031", "B02", float("inf"))
    assert parts("a/LC08_L2SP_193024_SR_B7.TIF") == ("a/LC08_L2SP_193024", "B7", float("inf"))
    assert parts("a/LC08_L2SP_193024_ST_B10.TIF") == ("a/LC08_L2SP_193024", "B10", float("inf"))
    assert parts("S2A.SAFE/GRANULE/L2A_T32/QI_DATA/MSK_DETFOO_B02.jp2") is None
    assert parts("MSK_CLASSI_B00.jp2") is None
    assert parts("a/B4.tif") == ("a/scene", "B4", float("inf"))
    assert parts("IMG_0012.jpg") is None
    assert parts("SUB02_x.tif") is None
    assert list(scenes_of(["x_B9.tif", "x_B8A.tif", "x_B10.tif", "x_B8.tif"], re.compile(PATTERN))[0]["x"]) == [
        "B8", "B8A", "B9", "B10"
    ]  # fmt: skip
