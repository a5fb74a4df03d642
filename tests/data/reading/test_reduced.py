"""JPEG files decoded at a part of their size: when, where the pixels lie, and that nothing else changes."""

import dataclasses
import io
import shutil

import numpy as np
import pytest
import torch
from data_support import encoded, good_files, scene, small_config, write_scenes
from PIL import Image, ImageOps, JpegImagePlugin

from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading.loader import Loader
from pera_fast.data.reading import reduced as reduced_module
from pera_fast.data.reading.reduced import ReducedDecoder
from pera_fast.data.sampling.views import draw_windows
from pera_fast.data.tools.pack import pack

CPU = torch.device("cpu")
ORIENTATION = 0x0112
COUNT = 8
SIZES = [(640, 480), (401, 523), (700, 333), (480, 640)]  # (height, width)


def waves(height: int, width: int) -> Image.Image:
    """Gray, in long waves from left to right and from top to bottom, of unlike phase at the edges."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray((128 + 60 * np.sin(x / 15) + 60 * np.sin(y / 17)).astype(np.uint8)).convert("RGB")


def turned(image: Image.Image, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95, **options)


@pytest.fixture
def fixed(monkeypatch):
    """Decoders whose factor is what the test says."""

    def make(factor: int, channels: int = 3) -> ReducedDecoder:
        decoder = ReducedDecoder(small_config().views, 0, channels, 1.0)
        monkeypatch.setattr(decoder, "factor", lambda *_: factor)
        return decoder

    return make


@pytest.mark.parametrize("gap", [1.0, 1.5, 2.0])
def test_the_factor_is_the_largest_that_all_windows_allow(gap):
    views = small_config().views
    decoder = ReducedDecoder(views, 7, 3, gap)
    sides, found = np.array([48, 48, 32, 32, 32]), []
    rng = np.random.default_rng(0)
    for sample in range(150):
        height, width = (int(side) for side in rng.integers(40, 1500, 2))
        windows = draw_windows(views, 7, 3, np.array([sample]), np.array([[height, width]]))
        fits = [
            all((windows.height[:, 0] / r >= gap * sides) & (windows.width[:, 0] / r >= gap * sides)) for r in (2, 4, 8)
        ]
        expected = max((r for r, good in zip((2, 4, 8), fits, strict=True) if good), default=1)
        assert decoder.factor(3, sample, height, width) == expected
        found.append(expected)
    assert set(found) == {1, 2, 4, 8}


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_pixels_lie_where_they_belong(fixed, orientation, factor):
    """A pixel covers factor x factor of the upright image's, also where that does not divide the size."""
    picture = waves(397, 525)
    file = turned(picture, orientation) if orientation else encoded(picture, "JPEG", quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    width, height = upright.size
    found = fixed(factor)(file, 0, 0, height, width)
    assert found is not None
    assert found.factor == factor
    assert found.pixels.shape == (-(-height // factor), -(-width // factor), 3)
    assert found.pixels.dtype == np.uint8
    whole = np.asarray(upright).astype(float)
    for axis, length in enumerate((height, width)):
        places = (np.arange(found.pixels.shape[axis])[2:-2] + 0.5 - found.shift[axis]) * factor - 0.5
        line, small = (array[..., 0].mean(1 - axis) for array in (whole, found.pixels.astype(float)))
        error = np.abs(small[2:-2] - np.interp(places, np.arange(length), line)).mean()
        assert error < 0.15 * factor * np.abs(np.diff(line)).mean(), "an eighth of a pixel or so"


@pytest.mark.parametrize("subsampling", [0, 2])
def test_what_is_decoded_is_the_image_averaged(fixed, subsampling):
    picture = Image.fromarray(scene(3, 320, 240))
    file = encoded(picture, "JPEG", quality=95, subsampling=subsampling, progressive=subsampling == 2)
    for factor in (2, 4):
        found = fixed(factor)(file, 0, 0, 320, 240)
        assert found is not None
        mean = np.asarray(Image.open(io.BytesIO(file)).convert("RGB").reduce(factor)).astype(int)
        assert np.abs(found.pixels - mean).mean() < 1.5


def test_gray(fixed):
    picture = Image.fromarray(scene(4, 200, 160))
    for file in (encoded(picture, "JPEG", quality=95), encoded(picture.convert("L"), "JPEG", quality=95)):
        found = fixed(2, channels=1)(file, 0, 0, 200, 160)
        assert found is not None
        assert found.pixels.shape == (100, 80, 1)
        mean = np.asarray(picture.convert("L").reduce(2)).astype(int)
        assert np.abs(found.pixels[..., 0] - mean).mean() < 1.5
    color = fixed(2)(encoded(picture.convert("L"), "JPEG"), 0, 0, 200, 160)
    assert color is not None
    assert (color.pixels == color.pixels[..., :1]).all()


def test_what_is_odd_is_left_to_the_full_decode(fixed, monkeypatch):
    file = encoded(Image.fromarray(scene(5, 200, 160)), "JPEG")
    decoder = fixed(2)
    assert decoder(file, 0, 0, 200, 160) is not None
    assert decoder(file[: len(file) // 2], 0, 0, 200, 160) is None
    assert decoder(file, 0, 0, 160, 200) is None  # not the size that the index has
    assert decoder(encoded(Image.new("CMYK", (160, 200)), "JPEG"), 0, 0, 200, 160) is None
    assert decoder(encoded(Image.new("RGB", (160, 200)), "PNG"), 0, 0, 200, 160) is None
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None)
    assert decoder(file, 0, 0, 200, 160) is None


# In the loader


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """JPEG files whose crops need a part of their pixels only, some turned, some gray, and a PNG file."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(COUNT - 1):
        height, width = SIZES[number % len(SIZES)]
        picture = Image.fromarray(scene(number, height // 8, width // 8)).resize((width, height))
        if number == 2:
            picture = picture.convert("L")
        (folder / f"{number}.jpg").write_bytes(turned(picture, number + 1, subsampling=0))
    Image.fromarray(scene(COUNT, 500, 500)).save(folder / f"{COUNT - 1}.png")
    return build_index(folder, out=tmp_path_factory.mktemp("index") / "i.parquet", workers=1, progress=False)


@pytest.fixture
def load(tmp_path):
    opened = []

    def open_(manifest, *overrides, batch_size=4, **options):
        skipped = SkippedFiles(tmp_path / "skipped.csv")
        loader = Loader(
            small_config(*overrides), manifest, batch_size=batch_size, device=CPU, skipped=skipped, **options
        )
        opened.append(loader)
        return loader

    yield open_
    for loader in opened:
        loader.close()


@pytest.fixture
def factors(monkeypatch):
    """Of the images that were decoded at a part of their size."""
    seen = []
    decode = reduced_module.decode_reduced
    monkeypatch.setattr(reduced_module, "decode_reduced", lambda *args: seen.append(args[3]) or decode(*args))
    return seen


def take(loader, count):
    return [next(loader) for _ in range(count)]


def pixels(batch):
    return torch.cat([batch.global_.pixels.flatten(), batch.local.pixels.flatten()])


def same(a, b):
    return np.array_equal(a.samples, b.samples) and torch.equal(pixels(a), pixels(b))


def alike(a, b):
    """Crops of the same windows, up to what a decoder at another size makes different."""
    assert np.array_equal(a.samples, b.samples)
    for one, other in zip(a.global_.pixels.float(), b.global_.pixels.float(), strict=True):
        assert (one - other).abs().mean() < 6
        assert ((one - one.mean()) * (other - other.mean())).mean() > 0.97 * one.std() * other.std()


def test_crops_are_those_of_the_full_decode(large, load, factors):
    full = take(load(large, "data.reduced_decoding=null"), 6)
    assert not factors
    small = take(load(large), 6)
    assert {2, 4} <= set(factors)
    for a, b in zip(small, full, strict=True):
        alike(a, b)
        assert torch.equal(a.global_.student.order, b.global_.student.order)


def test_folder_shards_threads_and_restarts_give_the_same_bits(large, load, tmp_path, factors):
    reference = take(load(large), 5)
    assert all(map(same, reference, take(load(large, "data.loader_threads=1", "data.prefetch=1"), 5)))
    assert same(next(load(large, start_micro_step=3)), reference[3])
    pack(large.root, tmp_path / "shards", progress=False)
    shards = build_index(tmp_path / "shards", out=tmp_path / "shards.parquet", workers=1, progress=False)
    assert all(map(same, reference, take(load(shards), 5)))
    assert factors


def test_small_images_are_not_touched(tmp_path, load, monkeypatch):
    """No draw is made, and no bit changes."""
    folder = tmp_path / "small"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(encoded(Image.fromarray(scene(number, 118, 110)), "JPEG"))
    write_scenes(folder, 2, 600, 600)  # other formats are not reduced
    (folder / "plain.jpg").write_bytes(good_files()["plain.jpg"])
    manifest = build_index(folder, out=tmp_path / "i.parquet", workers=1, progress=False)
    full = take(load(manifest, "data.reduced_decoding=null"), 3)
    monkeypatch.setattr(reduced_module, "draw_windows", None)
    assert all(map(same, full, take(load(manifest), 3)))


def test_a_substitute_is_reduced_by_its_own_windows(large, load, tmp_path, factors):
    own = dataclasses.replace(large, root=tmp_path / "own")
    shutil.copytree(large.root, own.root)
    (own.root / "1.jpg").write_bytes(b"garbage now")
    before, after = take(load(large), 6), take(load(own), 6)
    full = take(load(own, "data.reduced_decoding=null"), 6)
    assert any(1 in batch.samples for batch in before)
    for a, b, c in zip(before, after, full, strict=True):
        assert 1 not in b.samples
        kept = torch.from_numpy(np.tile(a.samples == b.samples, 2))
        assert torch.equal(a.global_.pixels[kept], b.global_.pixels[kept])
        alike(b, c)


def test_the_full_decode_stands_in_for_a_reduced_one_that_fails(large, load, monkeypatch):
    def fail(*_):
        raise OSError("broken data stream")

    full = take(load(large, "data.reduced_decoding=null"), 3)
    monkeypatch.setattr(reduced_module, "decode_reduced", fail)
    assert all(map(same, full, take(load(large), 3)))
