"""The decoders beside DALI: conversions to 8 bit, colours, headers."""

import numpy as np
import pytest
from data_support import encoded, raster, scene
from PIL import Image

from pera_fast.data.decoding.dali import DaliDecoder
from pera_fast.data.decoding.decode import as_pnm, decode, read_header
from pera_fast.data.decoding.formats import HEAD_BYTES, has_image_suffix, sniff
from pera_fast.data.decoding.scaling import by_type


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 7, 255], "uint8", [0, 7, 255]),
        ([0, 1], "bool", [0, 255]),
        ([0, 257, 300, 65535], "uint16", [0, 1, 1, 255]),
        ([0, 257, 65535], ">u2", [0, 1, 255]),
        ([-100, 0, 100], "int16", [0, 128, 255]),
        ([5, 10], "uint32", [0, 255]),
        ([0.0, 0.5, 1.0], "float32", [0, 128, 255]),
        ([0.25, 0.5], "float64", [64, 128]),
        ([-1.0, 0.0, 3.0], "float32", [0, 64, 255]),
        ([np.nan, 0.0, 2.0, np.inf], "float32", [0, 0, 255, 0]),
        ([np.nan, np.nan], "float32", [0, 0]),
        ([7, 7], "int32", [0, 0]),
    ],
)
def test_scaling_to_8_bit(values, dtype, expected):
    found = by_type(np.array(values, dtype).reshape(1, -1, 1))
    assert found.dtype == np.uint8
    assert found.reshape(-1).tolist() == expected


def test_complex_values_are_refused():
    with pytest.raises(ValueError, match="complex"):
        by_type(np.ones((1, 1, 1), np.complex64))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1"])
def test_pillow_modes_become_rgb_and_gray(mode):
    picture = Image.fromarray(scene(1)).convert(mode)
    file = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    color, gray = decode(file, "pillow", 3), decode(file, "pillow", 1)
    assert color.shape == (48, 64, 3)
    assert gray.shape == (48, 64, 1)
    reference = picture.convert("RGB")
    np.testing.assert_array_equal(color, np.asarray(reference))
    np.testing.assert_array_equal(gray[..., 0], np.asarray(reference.convert("L")))


def test_alpha_is_dropped_not_blended():
    pixels = np.dstack([scene(2), np.zeros((48, 64), np.uint8)])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels, "RGBA"), "PNG"), "pillow", 3), pixels[..., :3])


@pytest.mark.parametrize("name", ["RGB", "CMYK", "palette"])
def test_rasterio_reads_what_pillow_reads(name):
    """Where both can, they agree: colour tables and inks mean the same."""
    picture = Image.fromarray(scene(3)).convert({"palette": "P"}.get(name, name))
    file = encoded(picture, "TIFF")
    difference = np.abs(decode(file, "rasterio", 3).astype(int) - decode(file, "pillow", 3))
    assert difference.max() <= 1


def test_other_band_counts_keep_all_bands_or_say_why_not():
    bands = np.random.default_rng(0).integers(0, 65536, (8, 20, 30), dtype=np.uint16)
    file = raster(bands)
    np.testing.assert_array_equal(decode(file, "rasterio", 8), by_type(np.moveaxis(bands, 0, -1)))
    with pytest.raises(ValueError, match=r"has 8 band\(s\), model.in_chans is 4"):
        decode(file, "rasterio", 4)
    assert decode(file, "rasterio", 3).shape == (20, 30, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_pnm_passes_dali_unchanged(channels):
    image = np.ascontiguousarray(scene(4)[..., :channels])
    assert DaliDecoder(channels, 1).shapes([as_pnm(image)]) == [(48, 64)]
    head, _, body = as_pnm(image).tobytes().partition(b"255\n")
    assert head == b"P%d\n64 48\n" % (6 if channels == 3 else 5)
    assert body == image.tobytes()


def test_headers():
    bands = np.zeros((5, 6, 7), np.int16)
    header = read_header(raster(bands), "tiff")
    assert (header.width, header.height, header.channels, header.dtype) == (7, 6, 5, "int16")
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = encoded(Image.fromarray(scene(1)), "JPEG", exif=exif)
    for codec in (True, False):
        header = read_header(turned, "jpeg", codec=codec, upright=True)
        assert (header.width, header.height, header.channels, header.dtype) == (48, 64, 3, "uint8")
    assert read_header(b"nothing of the kind", None) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "JPEG2000", "GIF"])
def test_formats_are_told_by_their_first_bytes(kind):
    assert sniff(encoded(Image.fromarray(scene(1)), kind)[:HEAD_BYTES]) == kind.lower()


@pytest.mark.parametrize("head", [b"", b"P", b"P6 is", b"BMPs are to be avoided", b"RIFF....WAVE", b"\xff\xd8", b"GIF"])
def test_what_only_resembles_a_format_is_none(head):
    assert sniff(head) == ("pnm" if head == b"P6 is" else None)


def test_suffixes():
    assert has_image_suffix("a.b/c.JPeG")
    assert has_image_suffix("x.tiff")
    assert not has_image_suffix("tiff")
    assert not has_image_suffix("x.tiff.aux.xml")
