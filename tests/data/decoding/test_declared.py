"""Headers: how values are stored, and which decoders give them as they are."""

import struct

import numpy as np
import pytest
from data_support import encoded, good_files, raster, scene
from PIL import Image
from rasterio.io import MemoryFile

from pera_fast.data.decoding.declared import declared
from pera_fast.data.decoding.decode import decode, read
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff

ANY = ("dali", "rasterio", "pillow")
PLANES = np.moveaxis(scene(1), -1, 0)


def about(data: bytes):
    return declared(data, sniff(data[:HEAD_BYTES]))


def png16(count: int) -> bytes:
    with MemoryFile() as memory:
        with memory.open(driver="PNG", count=count, height=48, width=64, dtype="uint16") as out:
            out.write(np.repeat(PLANES[:1], count, 0).astype(np.uint16))
        return bytes(memory.read())


@pytest.mark.parametrize(
    ("file", "decoders"),
    [
        (raster(PLANES), ANY),
        (raster(PLANES, nodata=0), ANY),  # hides what is 0 already
        (raster(PLANES, nodata=255), ("rasterio",)),
        (raster(PLANES, bigtiff="yes", endianness="big"), ANY),
        (raster(PLANES.astype(np.uint16), bigtiff="yes", endianness="big"), ("rasterio",)),
        (raster(PLANES.astype(np.float32)), ("rasterio",)),
        (raster(PLANES.astype(np.int8)), ("rasterio",)),
        (raster(PLANES[:2]), ("rasterio", "pillow")),  # DALI makes other pixels of these
        (raster(PLANES, interleave="band"), ("rasterio", "pillow")),  # DALI remarks on stderr, at each read
        (raster(PLANES[:1], photometric="MINISWHITE"), ("rasterio", "pillow")),
        (encoded(Image.fromarray(scene(1)), "PNG"), ("dali", "pillow")),
        (png16(1), ("pillow",)),
        (png16(3), ("rasterio",)),
        (encoded(Image.fromarray(scene(1)), "PPM"), ("dali", "pillow")),
        (b"P6\n# made by hand\n2 1\n# more\n1023\n" + bytes(12), ("rasterio",)),
        (encoded(Image.fromarray(scene(1)), "JPEG2000"), ANY),
        (encoded(Image.fromarray(scene(1)), "JPEG"), ("dali", "pillow")),
    ],
)
def test_decoders_that_keep_the_values(file, decoders):
    assert about(file).decoders == decoders


def test_other_decoders_refuse():
    with pytest.raises(ValueError, match="left to rasterio, which reads these values as they are stored"):
        read(raster(PLANES.astype(np.float32)), "pillow", 3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_than_8_fill_them(bits):
    """As Pillow has it; GDAL leaves them at 0 to 2**bits - 1, which is nearly black."""
    values = (PLANES[:1] >> (8 - bits)).astype(np.uint8)
    for photometric in ("MINISBLACK", "MINISWHITE"):
        file = raster(values, nbits=bits, photometric=photometric)
        expected = np.asarray(values[0], int) * 255 // (2**bits - 1)
        expected = 255 - expected if photometric == "MINISWHITE" else expected
        np.testing.assert_array_equal(decode(file, "rasterio", 1)[..., 0], expected)


def test_a_header_that_lies_is_no_error():
    """Whatever the bytes, something is answered, and soon."""
    rng = np.random.default_rng(0)
    files = [data for data in good_files().values() if sniff(data[:HEAD_BYTES]) in ("tiff", "png", "jpeg2000", "pnm")]
    for number in range(3000):
        data = bytearray(files[number % len(files)])
        for place in rng.integers(4, min(len(data), 600), 8):
            data[place] = rng.integers(256)
        cut = bytes(data[: rng.integers(1, len(data) + 1)]) if number % 4 == 0 else bytes(data)
        assert about(cut).decoders
    no_image = b"II*\0" + bytes(60)
    assert about(no_image).decoders == ("rasterio",)
    loop = b"II*\0" + struct.pack("<IHI", 8, 0, 8)
    assert about(loop).decoders
