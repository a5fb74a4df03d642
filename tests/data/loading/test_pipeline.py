"""The pipeline's crops against Pillow."""

import io

import numpy as np
import pytest
import torch
from data_support import encoded, good_files, scene, small_config
from PIL import Image, ImageOps

from pera_fast.data.loading.pipeline import CropPipeline
from pera_fast.data.sampling.views import Windows, draw_windows

CPU = torch.device("cpu")


def make_crops(views, images, windows, channels=3, threads=1, raw=None):
    pipeline = CropPipeline(views, channels, len(images), threads, CPU, depth=1, raw=raw)
    arrays = [np.frombuffer(image, np.uint8) if isinstance(image, bytes) else image for image in images]
    pipeline.submit(arrays, *windows.roi())
    return [group.numpy() for group in pipeline.collect()]


def whole(size, flips=(False, False), crops=5):
    """The window that is the whole image, for each crop."""
    full = [np.full((crops, 1), value) for value in (0, 0, *size)]
    return Windows(*full, *(np.full((crops, 1), flip) for flip in flips))


def by_pillow(image, windows, crop, slot, side):
    top, left, height, width = (
        int(values[crop, slot]) for values in (windows.top, windows.left, windows.height, windows.width)
    )
    window = image.crop((left, top, left + width, top + height))
    out = window.resize((side, side), Image.Resampling.BILINEAR)
    if windows.hflip[crop, slot]:
        out = ImageOps.mirror(out)
    if windows.vflip[crop, slot]:
        out = ImageOps.flip(out)
    return np.asarray(out)


@pytest.mark.parametrize(("kind", "size"), [("PNG", (211, 157)), ("JPEG", (96, 240)), ("BMP", (17, 33))])
def test_crops_are_pillows_crops_resized(kind, size):
    """What the published pipeline does. Decoders differ by 1 or 2 in a JPEG; the resize rounds as Pillow does."""
    views = small_config().views
    pictures = [Image.fromarray(scene(key, *size)) for key in range(6)]
    files = [encoded(picture, kind) for picture in pictures]
    decoded = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    windows = draw_windows(views, 3, 0, np.arange(6), np.tile(size, (6, 1)))
    groups = make_crops(views, files, windows)
    assert [group.shape for group in groups] == [(12, 48, 48, 3), (18, 32, 32, 3)]
    assert windows.hflip.any()
    assert windows.vflip.any()
    for crop in range(5):
        group, side, first = (groups[0], 48, 0) if crop < 2 else (groups[1], 32, 2)
        for slot in range(6):
            found = group[(crop - first) * 6 + slot].astype(int)  # crop-major
            difference = np.abs(found - by_pillow(decoded[slot], windows, crop, slot, side))
            assert difference.mean() < (0.5 if kind == "JPEG" else 0.02)
            assert difference.max() <= (3 if kind == "JPEG" else 1)


def test_flips_mirror_the_unflipped_crop():
    views = small_config().views
    file = encoded(Image.fromarray(scene(4, 130, 90)), "PNG")
    plain = make_crops(views, [file], whole((130, 90)))[0][0]
    for hflip, vflip in ((True, False), (False, True), (True, True)):
        flipped = make_crops(views, [file], whole((130, 90), (hflip, vflip)))[0][0]
        np.testing.assert_array_equal(flipped, plain[:: -1 if vflip else 1, :: -1 if hflip else 1])
        assert np.abs(flipped - plain.astype(int)).mean() > 1  # it did flip


def test_a_window_of_the_crops_size_is_copied():
    views = small_config().views
    picture = scene(5, 60, 70)
    windows = whole((48, 48))
    windows.top[:], windows.left[:] = 3, 7
    crop = make_crops(views, [encoded(Image.fromarray(picture), "PNG")], windows)[0][0]
    np.testing.assert_array_equal(crop, picture[3:51, 7:55])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    views = small_config().views
    picture = Image.fromarray(scene(6, 48, 96))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture, "JPEG", exif=exif, quality=100, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    crop = make_crops(views, [file], whole(upright.size[::-1]))[0][0]
    expected = np.asarray(upright.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(crop - expected).mean() < 1


def test_gray_and_raw_bands():
    views = small_config().views
    picture = scene(7, 64, 64)
    (gray, local) = make_crops(views, [encoded(Image.fromarray(picture), "PNG")], whole((64, 64)), channels=1)
    assert gray.shape == (2, 48, 48, 1)
    assert local.shape == (3, 32, 32, 1)
    luminance = np.asarray(Image.fromarray(picture).convert("L").resize((48, 48), Image.Resampling.BILINEAR))
    assert np.abs(gray[0, ..., 0] - luminance.astype(int)).mean() < 1
    bands = np.concatenate([scene(key, 64, 64) for key in (7, 8)], -1)[..., :5]
    (raw, _) = make_crops(views, [np.ascontiguousarray(bands)], whole((64, 64), (True, False)), channels=5)
    for band in range(5):
        expected = np.asarray(Image.fromarray(bands[..., band]).resize((48, 48), Image.Resampling.BILINEAR))[:, ::-1]
        assert np.abs(raw[0, ..., band] - expected.astype(int)).max() <= 2


@pytest.mark.parametrize(("bits", "channels"), [(16, 1), (16, 3), (16, 6), (8, 3), (8, 4), (8, 8)])
def test_arrays_are_resized_band_by_band(bits, channels):
    """Within 1 of what float64 gives; crops, flips and order as with encoded files."""
    views = small_config().views
    dtype = np.uint16 if bits == 16 else np.uint8
    sizes = np.array([[157, 211], [48, 64], [30, 90]])
    rng = np.random.default_rng(bits + channels)
    images = [rng.integers(0, 2**bits, (*size, channels)).astype(dtype) for size in sizes]
    windows = draw_windows(views, 3, 1, np.arange(3), sizes)
    assert windows.hflip.any()
    assert windows.vflip.any()
    groups = make_crops(views, images, windows, channels, threads=2, raw=bits)
    assert [group.shape for group in groups] == [(6, 48, 48, channels), (9, 32, 32, channels)]
    assert all(group.dtype == dtype for group in groups)
    for crop in range(5):
        group, side, first = (groups[0], 48, 0) if crop < 2 else (groups[1], 32, 2)
        for slot, image in enumerate(images):
            found = group[(crop - first) * 3 + slot]
            for band in range(channels):
                pixels = Image.fromarray(image[..., band].astype(np.float32))
                expected = by_pillow(pixels, windows, crop, slot, side)
                assert np.abs(found[..., band] - expected.astype(np.float64)).max() <= 1.1


def test_arrays_among_encoded_files():
    """Batches with some, with nothing else and with none of them, two under way."""
    views = small_config().views
    pictures = [scene(key, 50, 60) for key in range(6)]
    files = [np.frombuffer(encoded(Image.fromarray(picture), "PNG"), np.uint8) for picture in pictures]
    batches = [[0, 1], [2, 3], [4, 5], [0, 5]]
    arrays = [{1}, {2, 3}, {4, 5}, set()]
    windows = draw_windows(views, 1, 0, np.arange(2), np.tile([50, 60], (2, 1)))
    pipeline = CropPipeline(views, 3, 2, 1, CPU)

    def submit(number):
        pipeline.submit([pictures[k] if k in arrays[number] else files[k] for k in batches[number]], *windows.roi())

    submit(0)
    submit(1)
    for number, batch in enumerate(batches):
        found = pipeline.collect()
        if number + 2 < len(batches):
            submit(number + 2)
        expected = make_crops(views, [files[key].tobytes() for key in batch], windows)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.numpy(), other)


def test_batches_of_arrays_come_back_in_order():
    views = small_config().views
    windows = whole((40, 40))
    images = [np.full((40, 40, 5), value, np.uint8) for value in range(4)]
    pipeline = CropPipeline(views, 5, 1, 1, CPU)
    for image in images[:2]:
        pipeline.submit([image], *windows.roi())
    for value in range(4):
        crops = pipeline.collect()[0]
        assert (crops == value).all()
        if value < 2:
            pipeline.submit([images[value + 2]], *windows.roi())


def test_threads_do_not_change_a_bit_and_crops_outlive_the_pipeline():
    views = small_config().views
    files = [encoded(Image.fromarray(scene(key, 80, 70)), "JPEG") for key in range(8)]
    windows = draw_windows(views, 1, 2, np.arange(8), np.tile([80, 70], (8, 1)))
    one, three = (make_crops(views, files, windows, threads=threads) for threads in (1, 3))
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = one[0].copy()
    make_crops(views, files[::-1], windows)
    np.testing.assert_array_equal(one[0], kept)


def test_two_batches_under_way_come_back_in_order():
    views = small_config().views
    files = [encoded(Image.fromarray(scene(key, 40, 40)), "PNG") for key in range(5)]
    pipeline = CropPipeline(views, 3, 1, 1, CPU)
    windows = whole((40, 40))
    alone = [make_crops(views, [file], windows)[0] for file in files]
    for file in files[:2]:
        pipeline.submit([np.frombuffer(file, np.uint8)], *windows.roi())
    for number in range(3):
        np.testing.assert_array_equal(pipeline.collect()[0], alone[number])
        pipeline.submit([np.frombuffer(files[number + 2], np.uint8)], *windows.roi())


def test_no_local_crops():
    views = small_config("views.num_local=0").views
    groups = make_crops(views, [good_files()["plain.jpg"]], whole((48, 64), crops=2))
    assert groups[0].shape == (2, 48, 48, 3)
    assert groups[1].shape == (0, 32, 32, 3)
