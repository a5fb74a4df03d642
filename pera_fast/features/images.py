"""Reads whole images for evaluation, by the same decoders, bands and ranges as a training run."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pera_fast.config import Config
from pera_fast.data.bands.sensor import probe_settings, scaling_of
from pera_fast.data.decoding import decode, formats, with_gdal
from pera_fast.data.decoding.probe import read_file
from pera_fast.data.files.companions import path_companion
from pera_fast.errors import UserError, one_line
from pera_fast.storage import MachineError, Storage

_ALPHA = 4  # bands of a picture with alpha; files with more are no pictures
SUFFIXES = frozenset(f".{suffix}" for suffix in formats.SUFFIXES)


def is_image(path: Path, root: Path) -> bool:
    """Whether a file below a folder is an image by its name, and no companion of one."""
    return path.suffix.lower() in SUFFIXES and path_companion(path.relative_to(root).as_posix()) is None


class ImageReader:
    """Reads images as a run of a configuration does: its bands, bits and ranges. Thread-safe.

    Args:
        cfg: read are `model.in_chans` and `data`.
    """

    def __init__(self, cfg: Config):
        self.settings, self._scaling = probe_settings(cfg), scaling_of(cfg)
        self._chosen = bool(cfg.data.bands) or cfg.model.in_chans not in (1, 3)
        self.dtype = torch.uint16 if self._scaling.depth == 16 else torch.uint8
        self._storage = Storage(os.sep, cfg.data.storage_timeout)

    def __call__(self, file: str | os.PathLike[str]) -> np.ndarray:
        """uint8 or uint16 [H, W, C], upright.

        Raises:
            UserError: the file cannot be read, or has not these bands.
            MachineError: the storage did not answer in time.
        """
        name, data = os.fspath(file), b""
        try:
            data, _ = self._storage(lambda: read_file(name), name, 0)
            return self._scaling(decode.read_any(data, self.settings.channels, self.settings.bands))
        except MachineError:
            raise
        except Exception as error:  # a library may raise anything
            told = one_line(error) or type(error).__name__
            if data and formats.sniff(bytes(data[: formats.HEAD_BYTES])) is None:
                told = f"not an image (begins with {bytes(data[:12])!r})"
            raise UserError(f"{file}: cannot be read as an image for evaluation ({told})") from error

    def check_bands(self, file: str | os.PathLike[str]) -> None:
        """Raises UserError for a file of a sensor's bands of which nobody chose some.

        Three of them would be read as colours: right for a picture with alpha, never meant for a sensor's bands.
        """
        if self._chosen:
            return
        name = os.fspath(file)
        data, _ = self._storage(lambda: read_file(name), name, 0)
        kind = formats.sniff(bytes(data[: formats.HEAD_BYTES]))
        if kind not in ("tiff", "jpeg2000"):  # other formats have at most four
            return
        with with_gdal.open_raster(data, kind) as raster:
            bands = raster.count
        if bands > _ALPHA:
            raise UserError(
                f"{file}: has {bands} bands, and the weights are of {self.settings.channels} channels without"
                " data.bands, which would say which; take weights trained on these bands, or files of"
                f" {self.settings.channels}"
            )


def resize(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 or uint16 [H, W, C] -> [size, size, C], bilinear with antialias."""
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        return _resized_8_bit(pixels, size)
    return _resized(pixels, size)


def load_images(files: Sequence[Path], size: int, cfg: Config | None = None) -> Tensor:
    """Whole images, resized to a square.

    Args:
        files: images.
        size: pixels a side; bilinear with antialias.
        cfg: of a run: the bands, bits and ranges that it was trained with. None: 8-bit RGB.

    Returns:
        uint8 or uint16 [N, size, size, C].

    Raises:
        UserError: a file cannot be read, or not so.
    """
    reader = ImageReader(cfg or Config())
    pictures = [resize(reader(file), size) for file in files]
    if pictures:
        return torch.stack(pictures)
    return torch.empty(0, size, size, reader.settings.channels, dtype=reader.dtype)


def _resized_8_bit(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3 or 1] -> [size, size, 3 or 1], as Pillow resizes."""
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    array = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(array.reshape(size, size, pixels.shape[2]).copy())


def _resized(pixels: np.ndarray, size: int) -> Tensor:
    """uint8 or uint16 [H, W, C] -> [size, size, C]."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(torch.float32)
    small = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0].round()
    dtype = torch.uint16 if pixels.dtype == np.uint16 else torch.uint8
    return small.clamp(0, np.iinfo(pixels.dtype).max).permute(1, 2, 0).to(dtype).contiguous()
