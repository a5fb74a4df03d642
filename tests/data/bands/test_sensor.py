"""Bands, bits and ranges: from files of any sensor to crops, and what a run decides about them."""

import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import encoded, raster, shared_data, small_config, write_scenes
from PIL import Image
from rasterio.io import MemoryFile

from pera_fast import cli
from pera_fast.config import Config
from pera_fast.data.bands.sensor import BandPlan, adopt, band_plan, describe, is_deep, probe_settings, scaling_of
from pera_fast.data.decoding.band_numbers import band_numbers
from pera_fast.data.decoding.decode import read, read_header
from pera_fast.data.decoding.scaling import Raster, Scaling
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index import build as index_module
from pera_fast.data.index.build import open_or_build
from pera_fast.data.loading.loader import Loader
from pera_fast.errors import UserError
from pera_kernels.visible_patches import visible_patches

CPU = torch.device("cpu")
NAMES = ("blue", "green", "red", "red edge", "nir", "swir")


def geotiff(bands: np.ndarray, names=(), **profile) -> bytes:
    """A TIFF of [C, H, W] with band descriptions."""
    with MemoryFile() as memory:
        count, height, width = bands.shape
        with memory.open(driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **profile) as out:
            out.write(bands)
            for number, name in enumerate(names, 1):
                out.set_band_description(number, name)
        return bytes(memory.read())


def scene(key: int, bands: int = 6, side: int = 64) -> np.ndarray:
    """12-bit bands of unlike ranges, uint16 [bands, side, side]."""
    rng = np.random.default_rng(key)
    y, x = np.mgrid[0:side, 0:side]
    waves = [np.sin(x * rng.uniform(0.05, 0.2) + y * rng.uniform(0.05, 0.2)) for _ in range(bands)]
    low, high = np.arange(bands)[:, None, None] * 100 + 100, np.arange(bands)[:, None, None] * 300 + 1000
    return (low + (np.stack(waves) + 1) / 2 * (high - low)).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight 6-band files, every other one planar."""
    root = tmp_path_factory.mktemp("bands")
    for key in range(8):
        interleave = "band" if key % 2 else "pixel"
        (root / f"{key}.tif").write_bytes(geotiff(scene(key), NAMES, interleave=interleave))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Scaling


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "uint16", "int16", "int32", "float32", "float64"])
def test_ranges_are_linear_and_clamped(dtype, depth):
    values = np.array([0, 10, 20, 60, 110, 120], dtype).reshape(1, 1, -1)
    largest = 2**depth - 1
    found = Scaling(depth, ((10, 110),), keep_8_bit=False)(Raster(values))
    assert found.dtype == (np.uint8 if depth == 8 else np.uint16)
    np.testing.assert_allclose(found.ravel(), np.array([0, 0, 0.1, 0.5, 1, 1]) * largest, atol=0.51)


def test_a_range_for_each_band_and_negative_values():
    values = np.array([[[-25, -20, 0]], [[0, 2, 10]]], np.float32)
    found = Scaling(16, ((-25, 0), (0, 10)))(Raster(values))
    assert found.shape == (1, 3, 2)
    np.testing.assert_array_equal(found[0], [[0, 0], [13107, 13107], [65535, 65535]])
    np.testing.assert_array_equal(
        Scaling(16, ((-25, 0),) * 2)(Raster(values.astype(np.int16)))[0, :, 0][[0, 2]], [0, 65535]
    )


def test_what_is_no_data_becomes_the_low_end():
    values = np.array([[[np.nan, np.inf, -np.inf, -9999, 10]]], np.float32)
    valid = np.asarray(values != -9999)
    assert Scaling(16, ((-20000, 10),))(Raster(values, valid)).ravel().tolist() == [0, 0, 0, 0, 65535]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "bool", "float32"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("ranges", [None, ((0, 9),)])
def test_pixels_lie_as_the_pipeline_takes_them(dtype, depth, ranges):
    """Interleaved and without gaps, whatever the file's layout."""
    for bands in (np.ones((4, 5, 6), dtype), np.moveaxis(np.ones((5, 6, 4), dtype), -1, 0)):
        assert Scaling(depth, ranges)(Raster(bands)).flags.c_contiguous


def test_8_bit_files_keep_their_range_unless_told_otherwise():
    bytes_ = np.array([[[0, 7, 255]]], np.uint8)
    assert Scaling(16, ((100, 2000),))(Raster(bytes_)).ravel().tolist() == [0, 7 * 257, 65535]
    assert Scaling(8, ((100, 2000),))(Raster(bytes_)).ravel().tolist() == [0, 7, 255]
    assert Scaling(16, ((0, 510),), keep_8_bit=False)(Raster(bytes_)).ravel().tolist() == [0, 900, 32768]


# Files


def test_planar_and_interleaved_files_are_the_same_to_the_bit():
    bands = scene(3)
    planar, interleaved = (geotiff(bands, interleave=way) for way in ("band", "pixel"))
    assert planar != interleaved
    for chosen in ((), (2, 5, 6)):
        channels = len(chosen) or 6
        one, other = (read(file, "rasterio", channels, chosen).bands for file in (planar, interleaved))
        assert one.dtype == np.uint16
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, bands[[number - 1 for number in chosen]] if chosen else bands)


def test_bands_by_name_and_number():
    bands = scene(4)
    file = geotiff(bands, NAMES)
    found = read(file, "rasterio", 3, ("NIR", 1, " red edge ")).bands
    np.testing.assert_array_equal(found, bands[[4, 0, 3]])
    with pytest.raises(ValueError, match=r"has no band cirrus: its bands are blue, green, red, red edge, nir, swir"):
        read(file, "rasterio", 1, ("cirrus",))
    with pytest.raises(ValueError, match=r"has no band 7: it has 6 band\(s\)"):
        read(file, "rasterio", 1, (7,))
    with pytest.raises(ValueError, match="its bands have no names"):
        read(geotiff(bands), "rasterio", 1, ("nir",))
    assert band_numbers(("a", "b"), 3, ("a", "b", "a")) == [1, 2]
    png = encoded(Image.fromarray(np.dstack([np.full((4, 4), value, np.uint8) for value in (1, 2, 3, 4)])), "PNG")
    np.testing.assert_array_equal(read(png, "pillow", 2, (4, 2)).bands[:, 0, 0], [4, 2])


def test_no_data_of_a_file_is_masked_band_by_band():
    bands = scene(5, bands=4).astype(np.float32)
    bands[0, :8] = -9999
    bands[2, :, 5] = np.nan
    found = read(geotiff(bands, nodata=-9999), "rasterio", 4)
    assert found.valid is not None
    assert not found.valid[0, :8].any()
    assert found.valid[1].all()
    pixels = Scaling(16, ((0, 4000),))(found)
    assert (pixels[:8, :, 0] == 0).all()
    assert (pixels[:, 5, 2] == 0).all()
    assert (pixels[8:, :5] > 0).all()


def test_gray_and_colour_of_deep_files():
    deep = scene(6, bands=3)
    gray = read(geotiff(deep), "rasterio", 1).bands
    assert gray.dtype == np.uint16
    np.testing.assert_allclose(gray[0], np.tensordot((0.299, 0.587, 0.114), deep.astype(float), axes=1), atol=0.51)
    np.testing.assert_array_equal(read(geotiff(deep[:1]), "rasterio", 3).bands, deep[[0, 0, 0]])
    np.testing.assert_array_equal(read(geotiff(scene(6, bands=5)), "rasterio", 3).bands, scene(6, bands=5)[:3])


def test_png_of_16_bits_keeps_them():
    """Pillow would drop half of each value, and GDAL would not notice that the file ends early."""
    pixels = scene(7, bands=3)
    with MemoryFile() as memory:
        with memory.open(driver="PNG", count=3, height=64, width=64, dtype="uint16") as out:
            out.write(pixels)
        file = bytes(memory.read())
    header = read_header(file, "png", codec=False)
    assert header is not None
    assert header.dtype == "uint16"
    np.testing.assert_array_equal(read(file, "rasterio", 3).bands, pixels)
    with pytest.raises(ValueError, match="left to rasterio"):
        read(file, "pillow", 3)
    with pytest.raises((OSError, SyntaxError)):
        read(file[: len(file) // 2], "rasterio", 3)
    with pytest.raises(ValueError, match="left to pillow"):
        read(encoded(Image.new("RGB", (4, 4)), "PNG"), "rasterio", 3)


# What a run decides


def config(*overrides: str):
    return small_config("data.bands=[1,2,3,4,5,6]", *overrides)


def plan_of(folder: Path, cfg: Config) -> BandPlan:
    return band_plan(cfg, open_or_build(folder, cfg))


def ranges(plan: BandPlan) -> np.ndarray:
    assert plan.ranges is not None
    return np.array(plan.ranges)


def test_bands_that_nobody_chose_are_refused(folder, tmp_path):
    with pytest.raises(UserError) as error:
        open_or_build(folder, small_config())
    assert str(error.value) == (
        f"data {folder}: 8 of 8 file(s) have 6 bands, and model.in_chans=3 would take the first 3 as a colour picture;"
        " for all of them give model.in_chans=6, for some data.bands=[3,2,1] with model.in_chans to match"
        " (numbers or names)"
    )
    assert open_or_build(folder, small_config("data.bands=[3,2,1]")).readable
    (tmp_path / "sar.tif").write_bytes(raster(scene(0, bands=2)))
    with pytest.raises(UserError, match=r"1 of 1 file\(s\) have 2 bands, and model.in_chans=3 would take the first;"):
        open_or_build(tmp_path, small_config())


def test_pictures_with_alpha_are_pictures(tmp_path, caplog):
    (tmp_path / "gray.png").write_bytes(encoded(Image.fromarray(np.full((40, 40, 2), 200, np.uint8)), "PNG"))
    (tmp_path / "colour.png").write_bytes(encoded(Image.fromarray(np.full((40, 40, 4), 200, np.uint8)), "PNG"))
    with caplog.at_level(logging.WARNING):
        assert len(open_or_build(tmp_path, small_config()).readable) == 2
        assert not caplog.text
        for name in "abc":
            (tmp_path / f"{name}.tif").write_bytes(raster(scene(0, bands=4)))
        open_or_build(tmp_path, small_config())
    assert "3 file(s) have 4 bands, of which the first 3 are taken for red, green and blue" in caplog.text


def test_sixteen_bits_among_eight_are_said_to_come_out_dark(tmp_path, caplog, capsys):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encoded(Image.fromarray(np.full((40, 40, 3), 200, np.uint8)), "PNG"))
    (tmp_path / "deep.tif").write_bytes(raster(scene(1, bands=3, side=40)))
    with caplog.at_level(logging.WARNING):
        open_or_build(tmp_path, small_config())
    told = "1 of 4 file(s) store 16 bits a value (deep.tif) and are read at 8 bits, where 65535 is white"
    assert told in caplog.text
    caplog.clear()
    assert cli.run(["data", "index", str(tmp_path)]) == 0
    assert told in capsys.readouterr().out
    open_or_build(tmp_path, small_config("data.depth=16"))
    assert not caplog.text


def test_most_files_decide_the_depth(tmp_path):
    shallow, deep = np.zeros((3, 40, 40), np.uint8), scene(1, bands=3, side=40)
    for number in range(3):
        (tmp_path / f"{number}.tif").write_bytes(raster(deep))
        (tmp_path / f"{number + 3}.tif").write_bytes(raster(shallow))
    half = open_or_build(tmp_path, cfg := small_config())
    assert band_plan(cfg, half).depth == 8
    assert not is_deep(half)
    assert half.readable.decoder.to_pylist().count("dali") > 0
    (tmp_path / "7.tif").write_bytes(raster(deep))
    most = open_or_build(tmp_path, cfg := small_config())
    assert band_plan(cfg, most).depth == 16
    assert cfg == small_config()
    assert is_deep(most)
    assert set(most.readable.decoder.to_pylist()) == {"rasterio"}
    assert "(7 known, 0 checked" in open_or_build(tmp_path, small_config()).summary  # not checked in turns
    assert plan_of(tmp_path, small_config("data.depth=8")) == BandPlan(3, 8, None)


def test_ranges_are_percentiles_of_the_files(folder):
    manifest = open_or_build(folder, cfg := config("data.band_scale=percentile:2,98"))
    values = np.stack([scene(key) for key in range(8)], 1).reshape(6, -1)
    expected = np.percentile(values, [2, 98], axis=1).T
    plan = band_plan(cfg, manifest)
    np.testing.assert_allclose(ranges(plan), expected, rtol=0.01)
    assert plan.depth == 16
    assert manifest.decided == {"depth": "16", "band_range": ranges(plan).tolist()}
    assert plan_of(folder, config("data.band_scale=percentile:2,98")) == plan
    np.testing.assert_allclose(
        ranges(plan_of(folder, config())), np.percentile(values, [0.5, 99.5], axis=1).T, rtol=0.01
    )


def test_no_data_is_not_measured(tmp_path):
    bands = scene(1, bands=2).astype(np.float32)
    bands[0, :40] = -9999
    bands[1, 3, 3] = np.nan
    (tmp_path / "a.tif").write_bytes(geotiff(bands, nodata=-9999))
    found = ranges(plan_of(tmp_path, small_config("model.in_chans=2")))
    assert found[0][0] > 90
    assert np.isfinite(found).all()
    (tmp_path / "a.tif").write_bytes(geotiff(np.full_like(bands, -9999), nodata=-9999))
    with pytest.raises(UserError, match=r"channel 1 has no value in the 1 file\(s\) that were measured"):
        open_or_build(tmp_path, small_config("model.in_chans=2"))


def test_given_and_divided_ranges_are_not_measured(folder, monkeypatch):
    monkeypatch.setattr(index_module, "measure", measure := index_module.measure)
    monkeypatch.setattr("pera_fast.data.bands.sensor.sample_bands", None)
    plan = plan_of(folder, cfg := config("data.band_range=[[0,4095]]"))
    assert measure
    assert scaling_of(cfg, plan) == Scaling(16, ((0, 4095),), keep_8_bit=False)
    plan = plan_of(folder, cfg := config("data.band_scale=divide:10000"))
    assert scaling_of(cfg, plan) == Scaling(16, ((0, 10000),), keep_8_bit=False)


def test_what_was_decided_is_kept_with_the_index(folder, tmp_path):
    manifest = open_or_build(folder, cfg := config())
    manifest.save(tmp_path / "index.parquet")
    fresh = adopt(config(), Manifest.load(tmp_path / "index.parquet"))
    assert fresh == adopt(cfg, manifest)
    assert (fresh.data.depth, fresh.data.band_range) == ("16", ranges(band_plan(cfg, manifest)).tolist())
    assert band_plan(fresh) == band_plan(cfg, manifest)
    assert describe(fresh).startswith("6 band(s) at 16 bits; auto scale [")
    own = config("data.band_range=[[0,9]]", "data.depth=8")
    assert adopt(own, manifest) == own


def test_8_bit_images_stay_with_dali(tmp_path):
    write_scenes(tmp_path, 4)
    manifest = open_or_build(tmp_path, cfg := small_config())
    plan = band_plan(cfg, manifest)
    assert plan == BandPlan(3, 8, None)
    assert probe_settings(cfg, plan).encoded
    assert set(manifest.readable.decoder.to_pylist()) == {"dali"}
    assert describe(adopt(cfg, manifest)) == ""


def test_files_without_the_bands_are_listed(folder, tmp_path):
    for number, count in enumerate((6, 6, 4)):
        (tmp_path / f"{number}.tif").write_bytes(geotiff(scene(number, bands=count), NAMES[:count]))
    manifest = open_or_build(tmp_path, small_config("data.bands=[red,swir]"))
    ((path, reason),) = manifest.unreadable()
    assert path == "2.tif"
    assert "rasterio: has no band swir: its bands are blue, green, red, red edge" in reason


# To the network


def batch_of(root: Path, tmp_path: Path, cfg, size: int = 4):
    manifest = open_or_build(root, cfg)
    with Loader(cfg, manifest, batch_size=size, device=CPU, skipped=SkippedFiles(tmp_path / "skipped.csv")) as loader:
        return next(loader)


def test_loader_gives_crops_of_16_bits(folder, tmp_path):
    cfg = small_config("data.bands=[nir,red,green,blue]", "views.rgb_bands=[red,green,blue]", "views.student_color=1")
    assert cfg.rgb_channels() == [1, 2, 3]
    batch = batch_of(folder, tmp_path, cfg)
    assert batch.global_.pixels.shape == (8, 48, 48, 4)
    assert batch.global_.pixels.dtype == batch.local.pixels.dtype == torch.uint16
    spread = batch.global_.pixels.float().flatten(0, 2)
    assert (spread.amax(0) > 60000).all()  # no band is dark
    assert (spread.amin(0) < 6000).all()
    assert 3 in batch.global_.student.order  # hue, as there are colours
    plain = batch_of(folder, tmp_path, small_config("data.bands=[4,3,2,1]", "views.student_color=1"))
    assert plain.global_.student.order.max() <= 1


def test_8_bit_bands_stay_at_8_bits(tmp_path):
    for key in range(4):
        (tmp_path / f"{key}.tif").write_bytes(geotiff((scene(key, bands=5) // 16).astype(np.uint8)))
    batch = batch_of(tmp_path, tmp_path, cfg := small_config("model.in_chans=5"))
    assert batch.global_.pixels.dtype == torch.uint8
    assert plan_of(tmp_path, cfg) == BandPlan(5, 8, None)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_a_12_bit_gradient_survives_with_at_least_10_bits(tmp_path, channels):
    """File to crop to normalised patch rows. 4096 levels in, cropped and resized; a straight line must come out."""
    side = 256
    y, x = np.mgrid[0:side, 0:side]
    fine = np.round(x * 16 + y / 16).clip(0, 4095).astype(np.uint16)
    assert len(np.unique(fine)) > 4000
    (tmp_path / "gradient.tif").write_bytes(geotiff(np.repeat(fine[None], channels, 0)))
    follow = [] if channels == 3 else [f"model.in_chans={channels}"]
    cfg = small_config(
        *follow, "data.band_range=[[0,4095]]", "views.global_size=256", "views.num_local=0", "views.num_global=1",
        "views.global_scale=[0.6,0.9]", "views.aspect=[1,1]", "views.hflip=0", "views.vflip=0", "model.patch_size=16",
    )  # fmt: skip
    pixels = batch_of(tmp_path, tmp_path, cfg, size=1).global_.pixels
    assert pixels.shape == (1, side, side, channels)
    index = torch.arange(256, dtype=torch.int32)[None]
    zeros, ones = [0.0] * channels, [1.0] * channels
    rows = visible_patches(pixels, index, None, None, None, zeros, ones, 16, torch.float32)
    image = rows.view(16, 16, channels, 16, 16).permute(2, 0, 3, 1, 4).reshape(channels, side, side).double().numpy()
    for band in image:
        inner = band[8:-8, 8:-8]
        plane = np.stack([x[8:-8, 8:-8].ravel(), y[8:-8, 8:-8].ravel(), np.ones(inner.size)], 1)
        fitted = plane @ np.linalg.lstsq(plane, inner.ravel(), rcond=None)[0]
        rms = np.sqrt(np.mean((inner.ravel() - fitted) ** 2))
        span = inner.max() - inner.min()
        assert span > 0.7
        bits = np.log2(1 / (rms * np.sqrt(12)))  # of a quantiser with this error over [0, 1]
        assert bits >= 10
        assert len(np.unique(inner)) >= 1024 * span


def test_real_sensor_data(tmp_path):
    """4-band WorldView-3 images of 11 bits, stored as float64: each band fills its range."""
    bands = shared_data() / "bands"
    for number in (1, 2, 3):
        (tmp_path / f"{number}.tif").symlink_to(bands / f"solaris__ms{number}.tif")
    batch = batch_of(tmp_path, tmp_path, cfg := small_config("model.in_chans=4"), size=3)
    plan = plan_of(tmp_path, cfg)
    assert plan.depth == 16
    assert all(100 < high < 2047 for _, high in ranges(plan))
    values = batch.global_.pixels.float().flatten(0, 2) / 65535
    assert (values.mean(0) > 0.05).all()  # unscaled: 0.002
    assert (values.amax(0) > 0.9).all()


def test_nothing_is_warned_about(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="pera_fast"):
        open_or_build(folder, config())
    assert not caplog.records


def test_other_threads_go_on_while_a_file_is_read():
    """rasterio and the scaling release the interpreter, so reader threads run side by side."""
    file = geotiff(scene(1, bands=4, side=1024), compress="deflate", predictor=2)
    scaling = Scaling(16, ((100, 2000),))
    stopped, spans = threading.Event(), []

    def work() -> None:
        for _ in range(3):
            start = time.perf_counter()
            scaling(read(file, "rasterio", 4))
            spans.append(time.perf_counter() - start)
        stopped.set()

    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while not stopped.is_set():
        time.sleep(1e-4)
        ticks += 1
    thread.join()
    assert ticks > 10 * len(spans)  # held, the lock would let it in a few times between the two steps
