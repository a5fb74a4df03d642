"""Folders of images, good and bad, for the tests of pera_fast.data."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rasterio.io import MemoryFile

from pera_fast.config import load_config

SMALL = ("views.global_size=48", "views.local_size=32", "views.num_local=3", "data.loader_threads=2")


def small_config(*overrides):
    """The tiny recipe with small crops: 2 of 48 px, 3 of 32 px."""
    return load_config("tiny", [*SMALL, *overrides])


def shared_data() -> Path:
    """The folder of real images, or a skip."""
    folder = Path(os.environ.get("PERA_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (folder / "odd.csv").is_file():
        pytest.skip(f"no real images at {folder}: set PERA_SHARED_DATA to the folder that holds odd.csv")
    return folder


def scene(key: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture with edges, uint8 [height, width, 3], another one for each key."""
    rng = np.random.default_rng(key)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * rng.uniform(0.02, 0.3) + y * rng.uniform(0.02, 0.3) + rng.uniform(0, 6)) for _ in range(3)]
    picture = np.stack(waves, -1) * 90 + 128
    picture[height // 4 : height // 2, width // 3 : width // 2] = rng.uniform(0, 255, 3)
    return picture.clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def raster(bands: np.ndarray, **profile) -> bytes:
    """A TIFF of [bands, H, W]."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=bands.shape[0],
            height=bands.shape[1],
            width=bands.shape[2],
            dtype=bands.dtype,
            **profile,
        ) as out:
            out.write(bands)
        return bytes(memory.read())


def write_scenes(folder: Path, count: int, height: int = 48, width: int = 64, suffix: str = ".png") -> list[str]:
    """`count` files 000.png, 001.png ...; returns their names. JPEG ones have all colours at full resolution."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}{suffix}" for number in range(count)]
    options = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
    for number, name in enumerate(names):
        Image.fromarray(scene(number, height, width)).save(folder / name, **options)
    return names


def good_files() -> dict[str, bytes]:
    """Unusual files that must be used, whatever decodes them."""
    rgb = Image.fromarray(scene(1))
    deep = scene(2)[..., 0].astype(np.uint16) * 257
    planes = np.moveaxis(scene(3), -1, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    return {
        "plain.jpg": encoded(rgb, "JPEG", quality=95),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif, quality=95),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "gray.jpg": encoded(rgb.convert("L"), "JPEG"),
        "palette.png": encoded(rgb.convert("P"), "PNG"),
        "alpha.png": encoded(rgb.convert("RGBA"), "PNG"),
        "gray-alpha.png": encoded(rgb.convert("LA"), "PNG"),
        "bilevel.png": encoded(rgb.convert("1"), "PNG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "deep.tif": encoded(Image.fromarray(deep), "TIFF"),
        "planar.tif": raster(planes, interleave="band"),
        "planar16.tif": raster(planes.astype(np.uint16) * 257, interleave="band"),
        "int16.tif": raster(planes.astype(np.int16) - 100),
        "float.tif": raster((planes / 255).astype(np.float32)),
        "double.tif": raster(planes.astype(np.float64)),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "plain.bmp": encoded(rgb, "BMP"),
        "lossless.jp2": encoded(rgb, "JPEG2000"),
        "first-frame.gif": encoded(rgb.convert("P"), "GIF"),
        "plain.ppm": encoded(rgb, "PPM"),
        "wrong-suffix.jpg": encoded(rgb, "PNG"),
        "wrong-suffix.txt": encoded(rgb, "PNG"),
        "no-suffix": encoded(rgb, "JPEG"),
        "one-pixel.png": encoded(rgb.crop((0, 0, 1, 1)), "PNG"),
        "sliver.png": encoded(rgb.resize((300, 2)), "PNG"),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that nothing can decode, and what the reason must contain."""
    rgb = Image.fromarray(scene(1))
    jpeg, png, tiff = (encoded(rgb, kind) for kind in ("JPEG", "PNG", "TIFF"))
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"these are not the pixels you are looking for\n", "not an image"),
        "zeros.png": (bytes(5000), "not an image"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "Pillow"),
        "truncated.tif": (tiff[: len(tiff) // 2], "Pillow"),
        "header-only.jpg": (jpeg[:20], "Pillow"),
        "noise-after-header.png": (png[:40] + np.random.default_rng(0).bytes(900), "Pillow"),
    }


IGNORED = {
    "labels.csv": b"file,class\n",
    "notes.txt": b"BMPs are to be avoided\n",
    "meta.json": b"{}",
    "P6-notes": b"P6 is a portable format",
}
