"""Makes the samples of a shard from one image file: its own bytes, or resized, tiled and encoded anew."""

import io
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pera_fast.data.decoding import decode
from pera_fast.data.decoding.dali import DaliDecoder
from pera_fast.data.decoding.formats import HEAD_BYTES, sniff

_EXTENSIONS = {"jpeg": "jpg", "tiff": "tif", "jpeg2000": "jp2", "pnm": "ppm"}  # others: the format's name
_PNG_LEVEL = 4


@dataclass(frozen=True)
class PackSettings:
    """Options of packing images."""

    size_mib: float = 1024  # most of one shard; an image that is larger gets a shard of its own
    tile: int | None = None  # pixels a side
    resize: int | None = None  # pixels of the shorter side; never enlarges
    reencode: str | None = None  # jpeg, png; None: images that are not changed keep their bytes
    quality: int = 95  # of JPEG
    channels: int = 3  # model.in_chans of the training that it is for

    @property
    def copies(self) -> bool:
        """Whether all images keep their bytes."""
        return self.tile is None and self.resize is None and self.reencode is None


@dataclass
class Sample:
    """One entry of a shard."""

    key: str
    members: dict[str, bytes]  # by extension


class ImagePacker:
    """Makes samples of files that were checked. Thread-safe."""

    def __init__(self, settings: PackSettings):
        self._settings = settings
        self._local = threading.local()

    def __call__(self, number: int, path: str, data: bytes, decoder: str, size: tuple[int, int]) -> list[Sample]:
        """The samples of one file.

        Args:
            number: of the file; begins the keys.
            path: kept in the JSON.
            data: its bytes.
            decoder: what decodes it (manifest).
            size: (height, width) upright (manifest).

        Raises:
            Exception: whatever a decoder or encoder raises.
        """
        key, kind = f"{number:09d}", sniff(data[:HEAD_BYTES]) or "bin"
        about: dict[str, Any] = {"path": path, "height": size[0], "width": size[1]}
        if self._settings.copies or not self._changes(size):
            return [_sample(key, _EXTENSIONS.get(kind, kind), data, about)]
        image = self._resized(Image.fromarray(_squeezed(self._decode(data, decoder))))
        target = self._settings.reencode or ("jpeg" if kind == "jpeg" else "png")
        if self._settings.tile is None:
            return [_sample(key, _EXTENSIONS.get(target, target), self._encode(image, target), about | _size(image))]
        samples = []
        for name, box in _tiles(image.size, self._settings.tile):
            tile = image.crop(box)
            told = about | _size(tile) | {"left": box[0], "top": box[1]}
            samples.append(_sample(key + name, _EXTENSIONS.get(target, target), self._encode(tile, target), told))
        return samples

    def _changes(self, size: tuple[int, int]) -> bool:
        settings = self._settings
        return (
            settings.reencode is not None
            or (settings.resize is not None and min(size) > settings.resize)
            or (settings.tile is not None and max(size) > settings.tile)
        )

    def _decode(self, data: bytes, decoder: str) -> np.ndarray:
        channels = self._settings.channels
        if decoder != "dali":
            return decode.decode(data, decoder, channels)
        if not hasattr(self._local, "dali"):
            self._local.dali = DaliDecoder(channels, 1)
        return self._local.dali.decode(data)

    def _resized(self, image: Image.Image) -> Image.Image:
        short = self._settings.resize
        if short is None or min(image.size) <= short:
            return image
        width, height = (max(1, round(side * short / min(image.size))) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _encode(self, image: Image.Image, kind: str) -> bytes:
        buffer = io.BytesIO()
        if kind == "jpeg":
            image.save(buffer, "JPEG", quality=self._settings.quality)
        else:
            image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
        return buffer.getvalue()


def _sample(key: str, extension: str, data: bytes, about: dict[str, Any]) -> Sample:
    return Sample(key, {extension: data, "json": json.dumps(about, sort_keys=True).encode() + b"\n"})


def _size(image: Image.Image) -> dict[str, int]:
    return {"height": image.height, "width": image.width}


def _squeezed(image: np.ndarray) -> np.ndarray:
    """[H, W, 1] as Pillow takes it."""
    return image[..., 0] if image.shape[2] == 1 else image


def _tiles(size: tuple[int, int], tile: int) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """(_ROW_COLUMN, (left, top, right, bottom)): full tiles that cover the image, overlapping where they must."""
    width, height = size
    for row, top in enumerate(_starts(height, tile)):
        for column, left in enumerate(_starts(width, tile)):
            yield f"_{row:03d}_{column:03d}", (left, top, min(left + tile, width), min(top + tile, height))


def _starts(length: int, tile: int) -> list[int]:
    if length <= tile:
        return [0]
    last = math.ceil(length / tile) - 1
    return [round(i * (length - tile) / last) for i in range(last + 1)]
