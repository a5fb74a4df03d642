"""The same values on every path: training, statistics, evaluation and sheets, from files and from shards."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import encoded, raster, small_config
from PIL import Image
from rasterio import Env
from rasterio.io import MemoryFile

from pera_fast.data.bands.sensor import adopt
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import open_or_build
from pera_fast.data.loading.loader import Loader
from pera_fast.data.tools.measure import measure_data
from pera_fast.data.tools.pack import pack
from pera_fast.data.tools.pack_images import PackSettings
from pera_fast.data.tools.tile import tile
from pera_fast.data.tools.tile_grid import TileSettings
from pera_fast.errors import UserError
from pera_fast.features.images import load_images
from pera_fast.show.run import show

SIDE = 48
WHOLE = (  # the one global crop is the image itself
    "views.global_scale=[1,1]", "views.aspect=[1,1]", "views.hflip=0", "views.vflip=0", "views.num_global=1",
    "views.num_local=0",
)  # fmt: skip
Y, X = np.mgrid[:SIDE, :SIDE]
RAMP = (X * 50 + Y * 3).astype(np.float64)  # 0 to 2491
LOW, HIGH = 600, 600 + RAMP.max()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def trained_on(root: Path, *overrides: str) -> dict[str, np.ndarray]:
    """Pixels [H, W, C] of each file as a run's step gets them."""
    cfg = small_config(*WHOLE, *overrides)
    manifest = open_or_build(root, cfg, progress=False)
    count = len(manifest.readable)
    with Loader(cfg, manifest, batch_size=count, device=torch.device("cpu"), skipped=SkippedFiles("/dev/null")) as run:
        batch = next(run)
    paths = [manifest.readable.paths[sample].as_py() for sample in batch.samples.tolist()]
    return dict(zip(paths, batch.global_.pixels.numpy(), strict=True))


def evaluated_on(root: Path, *overrides: str) -> dict[str, np.ndarray]:
    """The same as an evaluation of that run reads them."""
    cfg = small_config(*WHOLE, *overrides)
    cfg = adopt(cfg, open_or_build(root, cfg, progress=False))
    files = sorted(path for path in root.iterdir() if path.is_file())
    return {file.name: image.numpy() for file, image in zip(files, load_images(files, SIDE, cfg), strict=True)}


def means(root: Path, *overrides: str) -> list[float]:
    """Mean pixel of each channel over all that is data, as `data stats` gives it."""
    return [band.moments.mean for band in measure_data(root, overrides=overrides, progress=False).pixels]


def agree(root: Path, *overrides: str) -> dict[str, np.ndarray]:
    """The pixels of the run, after a look at whether evaluation and statistics see the same."""
    pixels, evaluated = trained_on(root, *overrides), evaluated_on(root, *overrides)
    for name in pixels:
        np.testing.assert_array_equal(pixels[name], evaluated[name], name)
    return pixels


def plain_pngs(count: int) -> dict[str, bytes]:
    rgb = np.stack([X * 5, Y * 5, X + Y], -1).astype(np.uint8)
    return {f"plain{number}.png": encoded(Image.fromarray(rgb), "PNG") for number in range(count)}


def heights(nodata: float | None = None, left: int = 12) -> np.ndarray:
    """float32 [1, H, W]; the left columns are no data if that has a value."""
    values = (600 + RAMP)[None].astype(np.float32)
    if nodata is not None:
        values[:, :, :left] = nodata
    return values


def linear(values: np.ndarray, low: float, high: float, largest: int = 255) -> np.ndarray:
    return np.rint(((values - low) / (high - low) * largest).clip(0, largest))


# Types


@pytest.mark.parametrize("others", [3, 0])
def test_float_rasters_are_not_clamped_to_white(tmp_path, others):
    """DALI made 255 of every value, while `data stats` saw .5."""
    root = folder_of(tmp_path / "data", {"dem.tif": raster(heights())} | plain_pngs(others))
    pixels = agree(root, "data.depth=8")
    expected = linear(heights()[0], LOW, HIGH)
    for channel in range(3):
        np.testing.assert_array_equal(pixels["dem.tif"][..., channel], expected)
    if not others:
        assert means(root, "data.depth=8") == pytest.approx([expected.mean()] * 3)


@pytest.mark.parametrize("kind", ["ieee nan", "declared", "mask"])
def test_no_data_takes_no_part_in_a_files_range(tmp_path, kind):
    """28 grays were left to the valid pixels where -9999 was measured."""
    values = heights(np.nan if kind == "ieee nan" else -9999)
    with Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        nodata = -9999.0 if kind == "declared" else None
        with memory.open(driver="GTiff", count=1, height=SIDE, width=SIDE, dtype="float32", nodata=nodata) as out:
            out.write(values)
            if kind == "mask":
                out.write_mask(values[0] > -9999)
        file = bytes(memory.read())
    root = folder_of(tmp_path / "data", {"dem.tif": file} | plain_pngs(3))
    pixels = agree(root)["dem.tif"][..., 0]
    data = 600 + RAMP[:, 12:]
    np.testing.assert_array_equal(pixels[:, 12:], linear(data, data.min(), data.max()))
    assert (pixels[:, :12] == 0).all()
    assert means(root, "data.depth=8")[0] == pytest.approx(
        np.concatenate([linear(data, data.min(), data.max()).ravel(), *[(X * 5).ravel()] * 3]).mean()
    )


def masked_rgb(hidden: np.ndarray) -> bytes:
    rgb = np.stack([X * 5, Y * 5, X + Y]).astype(np.uint8)
    with Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(driver="GTiff", count=3, height=SIDE, width=SIDE, dtype="uint8", photometric="RGB") as out:
            out.write(rgb)
            out.write_mask(~hidden)
        return bytes(memory.read())


def test_8_bit_files_with_hidden_pixels(tmp_path):
    """A mask and a declared value hide pixels as they do in deeper files; 0 need not be looked for."""
    rgb = np.stack([X * 5, Y * 5, X + Y]).astype(np.uint8)
    files = {
        "mask.tif": masked_rgb(X < 12),
        "value.tif": raster(rgb, nodata=40, photometric="RGB"),
        "zero.tif": raster(rgb, nodata=0, photometric="RGB"),
    }
    pixels = agree(folder_of(tmp_path / "data", files))
    whole = np.moveaxis(rgb, 0, -1)
    np.testing.assert_array_equal(pixels["mask.tif"], np.where((X < 12)[..., None], 0, whole))
    np.testing.assert_array_equal(pixels["value.tif"], np.where(whole == 40, 0, whole))
    np.testing.assert_array_equal(pixels["zero.tif"], whole)
    index = open_or_build(tmp_path / "data", small_config(), progress=False).readable
    assert dict(zip(index.paths.to_pylist(), index.decoder.to_pylist(), strict=True))["zero.tif"] == "dali"


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_hidden_by_alpha_is_not_measured(tmp_path, suffix):
    """The colours stay, but no statistics are taken from them."""
    rgb = np.stack([X * 5, Y * 5, X + Y], -1).astype(np.uint8)
    rgba = np.dstack([rgb, np.where(X < 12, 0, 200).astype(np.uint8)])
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    kind = {"png": "PNG", "tif": "TIFF", "webp": "WEBP"}[suffix]
    root = folder_of(tmp_path / "data", {f"a.{suffix}": encoded(Image.fromarray(rgba), kind, **options)})
    np.testing.assert_array_equal(agree(root)[f"a.{suffix}"], rgb)
    assert means(root) == pytest.approx(rgb[:, 12:].reshape(-1, 3).mean(0).tolist())


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "P"])
def test_a_transparent_colour_is_not_measured(tmp_path, mode):
    """A PNG may name one colour that is transparent."""
    gray = (X * 5).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(gray) if mode != "RGB" else Image.fromarray(np.stack([gray] * 3, -1))
    image = image.convert("P") if mode == "P" else image
    key = {"RGB": (100,) * 3, "P": 100}.get(mode, 100)
    root = folder_of(tmp_path / "data", {"a.png": encoded(image, "PNG", transparency=key)})
    given = ["data.band_range=[[0,65535]]"] if mode == "I;16" else []
    np.testing.assert_array_equal(agree(root, *given)["a.png"][..., 0], gray)
    assert means(root, *given)[0] == pytest.approx(gray[gray != 100].mean())


def test_12_bits_are_stored_values_whatever_the_container(tmp_path):
    """DALI spreads the 12 bits of a TIFF, Pillow those of a PGM and of a JPEG 2000 file."""
    values = RAMP.astype(np.uint16)
    pgm = b"P5\n%d %d\n4095\n" % (SIDE, SIDE) + values.astype(">u2").tobytes()
    files = {"a.tif": raster(values[None], nbits=12), "b.pgm": pgm, "c.jp2": jp2(values[None], NBITS=12)}
    given = "data.band_range=[[0,4095]]"
    for overrides, expected in (((given,), linear(values, 0, 4095, 65535)), ((given, "data.depth=8"), None)):
        pixels = agree(folder_of(tmp_path / "data", files), *overrides)
        wanted = linear(values, 0, 4095) if expected is None else expected
        for name in files:
            np.testing.assert_allclose(pixels[name][..., 0], wanted, atol=1, err_msg=name)
    by_type = agree(tmp_path / "data", "data.depth=8")
    for name in files:
        np.testing.assert_array_equal(by_type[name][..., 0], (values.astype(int) + 128) // 257, name)


# JPEG 2000


def jp2(bands: np.ndarray, **options) -> bytes:
    with MemoryFile() as memory:
        with memory.open(
            driver="JP2OpenJPEG", count=len(bands), height=bands.shape[1], width=bands.shape[2], dtype=bands.dtype,
            QUALITY=100, REVERSIBLE="YES", **options,
        ) as out:  # fmt: skip
            out.write(bands)
        return bytes(memory.read())


def deep_bands(count: int) -> np.ndarray:
    return np.stack([300 + RAMP + number for number in range(count)]).astype(np.uint16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("count", "bits", "wanted"), [(1, 15, 1), (1, 15, 3), (5, 16, 5), (5, 12, 2), (3, 16, 3)])
def test_deep_jpeg_2000_has_its_stored_values(tmp_path, count, bits, wanted, packed):
    """15 bits were read as twice their values, several bands not at all."""
    bands = deep_bands(count)
    root = folder_of(tmp_path / "data", {"a.jp2": jp2(bands, NBITS=bits), "b.jp2": jp2(bands[:, ::-1], NBITS=bits)})
    chosen = ["data.bands=[4,2]", "views.rgb_bands=[]"] if wanted == 2 else []
    overrides = [f"model.in_chans={wanted}"] * (wanted != 3) + ["data.band_range=[[0,4095]]", *chosen]
    if wanted == 2:
        bands = bands[[3, 1]]
    if packed:
        pack(root, tmp_path / "shards", PackSettings(channels=5 if wanted in (2, 5) else wanted), progress=False)
        root = tmp_path / "shards"
        pixels = next(iter(trained_on(root, *overrides).values()))
    else:
        pixels = agree(root, *overrides)["a.jp2"]
    expected = linear(np.moveaxis(np.broadcast_to(bands, (wanted, SIDE, SIDE)), 0, -1), 0, 4095, 65535)
    if pixels[0, 0, 0] != expected[0, 0, 0]:
        expected = expected[::-1]  # the other of the two
    np.testing.assert_allclose(pixels, expected, atol=1)
    stats = measure_data(root, overrides=overrides, progress=False).stored[0].moments
    assert (stats.low, stats.high) == (bands[0].min(), bands[0].max())


def test_damaged_jpeg_2000_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    file = jp2(rng.integers(0, 2**15, (2, 200, 200)).astype(np.uint16), BLOCKXSIZE=64, BLOCKYSIZE=64)
    whole = {"good.jp2": file}
    cut = {f"{part}.jp2": file[: int(len(file) * part)] for part in (0.999, 0.7, 0.1)}
    root = folder_of(tmp_path / "data", whole | cut)
    manifest = open_or_build(root, small_config("model.in_chans=2", "views.rgb_bands=[]"), progress=False)
    assert manifest.readable.paths.to_pylist() == ["good.jp2"]
    assert {path for path, _ in manifest.unreadable()} == set(cut)


# Scale and offset


def reflectance(offset: float, scale: float = 1e-4, dtype: str = "uint16") -> bytes:
    """Three bands of the same ground, 0.1 to 0.35, stored with this scale and offset."""
    ground = 0.1 + RAMP / 1e4
    numbers = np.rint((ground - offset) / scale).astype(dtype)
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", count=3, height=SIDE, width=SIDE, dtype=dtype) as out:
            out.write(np.repeat(numbers[None], 3, 0))
            out.scales, out.offsets = (scale,) * 3, (offset,) * 3
        return bytes(memory.read())


@pytest.mark.parametrize("scaling", ["data.band_scale=divide:10000", "data.band_scale=auto", "data.depth=8"])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_a_declared_offset_is_applied(tmp_path, scaling, dtype, caplog):
    """The same ground came out in two brightnesses."""
    root = folder_of(tmp_path / "data", {f"{n}.tif": reflectance(-0.1 * (n % 2), dtype=dtype) for n in range(4)})
    pixels = agree(root, scaling)
    for number in (1, 2, 3):
        np.testing.assert_array_equal(pixels[f"{number}.tif"], pixels["0.tif"])
    if "divide" in scaling:
        np.testing.assert_allclose(pixels["0.tif"][..., 0], linear(1000 + RAMP, 0, 10000, 65535), atol=1)
    if scaling != "data.depth=8":
        stored = measure_data(root, overrides=[scaling], progress=False).stored[0].moments
        assert (stored.low, stored.high) == pytest.approx((1000, 1000 + RAMP.max()))
    assert "declared scales" not in caplog.text


def test_unlike_scales_are_told(tmp_path, caplog):
    files = {"a.tif": reflectance(0), "b.tif": reflectance(-0.2, 2.75e-5), "c.tif": reflectance(0)}
    open_or_build(folder_of(tmp_path / "data", files), small_config(), progress=False)
    assert (
        f"data {tmp_path / 'data'}: values have 2 declared scales (0.0001 in 2 file(s), 2.75e-05 in 1 file(s)), which"
        " are not converted: the same ground may come out in several brightnesses; train on files of one scale, or"
        " convert the others (gdal_translate -unscale)"
    ) in caplog.messages


# PNG with long texts, orientation


def png_with_text(image: Image.Image, place: int = 33) -> bytes:
    text = b"XML:com.adobe.xmp\0\0" + zlib.compress(bytes(3 << 20))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = encoded(image, "PNG")
    place = place % len(data)
    return data[:place] + chunk + data[place:]


def deep_png(bands: np.ndarray, exif: bytes | None = None) -> bytes:
    with MemoryFile() as memory:
        with memory.open(driver="PNG", count=3, height=bands.shape[1], width=bands.shape[2], dtype="uint16") as out:
            out.write(bands)
        data = bytes(memory.read())
    if exif is None:
        return data
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("place", [33, -12])
def test_a_long_text_in_a_png_is_no_reason_to_refuse_its_pixels(tmp_path, place):
    deep, shallow = RAMP.astype(np.uint16), (X * 5).astype(np.uint8)
    files = {name: png_with_text(Image.fromarray(of), place) for name, of in {"a": deep, "b": shallow}.items()}
    given = "data.band_range=[[0,65535]]"
    pixels = agree(folder_of(tmp_path / "deep", {"a.png": files["a"]}), given)
    np.testing.assert_array_equal(pixels["a.png"][..., 0], deep)
    root = folder_of(tmp_path / "shallow", {"b.png": files["b"]})
    np.testing.assert_array_equal(agree(root)["b.png"][..., 0], shallow)
    assert means(root)[0] == pytest.approx(shallow.mean())


def turned_file(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = np.stack([X * 5, Y * 5, X + Y], -1).astype(np.uint8)[:, :40]
    deep = np.moveaxis(rgb, -1, 0).astype(np.uint16) * 200
    if kind == "png16":
        return deep_png(deep, exif.tobytes().removeprefix(b"Exif\0\0"))
    if kind == "tif16":
        return oriented_tiff(raster(deep, photometric="RGB"), orientation)
    if kind == "tif float":
        return oriented_tiff(raster(deep.astype(np.float32), photometric="RGB"), orientation)
    if kind == "gray tif16":
        return encoded(Image.fromarray(np.ascontiguousarray(deep[0])), "TIFF", exif=exif)
    return encoded(Image.fromarray(np.ascontiguousarray(deep[0])), "PNG", exif=exif)


def oriented_tiff(data: bytes, orientation: int) -> bytes:
    """The file with an Orientation tag, which GDAL does not write: the list of tags is written anew at the end."""
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = [data[at + 2 + 12 * number : at + 14 + 12 * number] for number in range(count)]
    entries.append(struct.pack("<HHIHH", 274, 3, 1, orientation, 0))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    end = len(data) + len(data) % 2
    tags = struct.pack("<H", count + 1) + b"".join(entries) + bytes(4)
    return data[:4] + struct.pack("<I", end) + data[8:].ljust(end - 8, b"\0") + tags


_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: np.swapaxes(image, 0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.swapaxes(image, 0, 1)[::-1, ::-1],
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("kind", ["png16", "tif16", "tif float", "gray tif16", "gray png16"])
def test_deep_files_are_upright(tmp_path, kind):
    """As 8-bit files are, which DALI turns."""
    suffix = "png" if "png" in kind else "tif"
    files = {f"{turn}.{suffix}": turned_file(kind, turn) for turn in (1, *_TURNS)}
    root = folder_of(tmp_path / "data", files)
    given = ["data.band_range=[[0,65535]]"]
    manifest = open_or_build(root, small_config(*given), progress=False)
    sizes = dict(zip(manifest.readable.paths.to_pylist(), manifest.readable.width.tolist(), strict=True))
    assert [sizes[f"{turn}.{suffix}"] for turn in range(1, 9)] == [40] * 4 + [48] * 4
    cfg = adopt(small_config(*given), manifest)
    images = {turn: load_images([root / f"{turn}.{suffix}"], SIDE, cfg)[0].numpy() for turn in (1, *_TURNS)}
    for turn, transform in _TURNS.items():
        np.testing.assert_allclose(images[turn].astype(int), transform(images[1]).astype(int), atol=2)


# Sheets


def test_the_sheet_shows_what_the_run_sees(tmp_path):
    """`data show` draws an image with the run's scaling: here half gray, where clamping gave white."""
    values = np.full((1, SIDE, SIDE), 1500, np.float32)
    values[:, :, ::2], values[:, :4] = 1400, 600
    values[:, -4:] = 2400
    root = folder_of(tmp_path / "data", {"a.tif": raster(values)} | plain_pngs(2))
    plain = ["views.global_size=48", "views.student_color=0", "views.teacher_color=0"]
    show(root, tmp_path / "sheet.png", samples=[0], recipe="tiny", overrides=[*WHOLE, *plain])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"), int)
    left, cell = 8, 256
    image, crop = (sheet[58:, start + 40 : start + 216][40:216] for start in (left, left + cell + 16))
    assert 110 < image.mean() < 130
    gray = crop[(np.ptp(crop, axis=-1) < 3) & (crop[..., 0] < 150)]  # no outlines, nothing faded
    assert len(gray) > 1000  # pixels that the student sees
    assert gray.mean() == pytest.approx(image.mean(), abs=5)


# What only GDAL could open


VRT = """<VRTDataset rasterXSize="48" rasterYSize="48"><VRTRasterBand dataType="Float32" band="1"><SimpleSource>
<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>
</VRTDataset>"""


def test_a_vrt_is_refused_by_name_or_cut_alone(tmp_path):
    """It was passed over in silence among images, and read or not by its suffix among scenes."""
    root = folder_of(tmp_path / "data", {"a.tif": raster(heights()), "mosaic.vrt": VRT.encode(), "b.tif": VRT.encode()})
    manifest = open_or_build(root, small_config(), progress=False)
    told = "VRT: refers to other files, which are not read through it; cut it into tiles: pera-fast data tile FILE.vrt"
    assert manifest.unreadable() == [("b.tif", told), ("mosaic.vrt", told)]
    assert "1 tiles of 1 scenes" in tile(root, tmp_path / "tiles", TileSettings(size=48), progress=False)
    skipped = (tmp_path / "tiles" / "skipped.csv").read_text()
    assert skipped.count("VRT: refers to other files, which may lie here too; name it alone to cut it") == 2
    assert "1 tiles of 1 scenes" in tile(root / "mosaic.vrt", tmp_path / "cut", TileSettings(size=48), progress=False)


@pytest.mark.parametrize("path", ["/vsizip/a.zip", "/vsis3/bucket/scenes"])
def test_virtual_paths_are_refused(tmp_path, path):
    told = f"{path}: is a virtual path of GDAL, which is not read; copy or mount the files, give their folder"
    with pytest.raises(UserError, match=f"data {told}"):
        open_or_build(path, small_config())
    with pytest.raises(UserError, match=f"scenes {told}"):
        tile(path, tmp_path / "tiles")
