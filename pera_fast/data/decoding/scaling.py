"""Scales stored values of any type to the pipeline's integers, band by band.

The largest integer (255 or 65535) stands for 1. With a range [low, high] for each channel, values map linearly, low to
0 and high to the largest; beyond that they are clamped. What is not finite, and what a file declares to be no data,
becomes 0, which is the band's low end. Without a range:

- uint8 as it is (times 257 for 16 bits), bool 0 or the largest;
- uint16 as it is (divided by 257 for 8 bits);
- any other type: values that lie in [0, 1] if it is a float type times the largest, else min to max of the file's
  finite values becomes 0 to the largest.
"""

from dataclasses import dataclass

import numpy as np

LARGEST = {8: 255, 16: 65535}
DTYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}


@dataclass
class Raster:
    """Stored values of an image."""

    bands: np.ndarray  # [C, H, W], any numeric type, any strides
    valid: np.ndarray | None = None  # bool [C, H, W]; None: everywhere

    def pick(self, channels: list[int]) -> "Raster":
        """Some of its channels, which may repeat."""
        return Raster(self.bands[channels], None if self.valid is None else self.valid[channels])


@dataclass(frozen=True)
class Scaling:
    """Scaling from stored values to pixels, the same for every file of a data set.

    Attributes:
        depth: 8 or 16 bits.
        ranges: (low, high) of each channel, or of all if there is one; None: by type, see the top of this file.
        keep_8_bit: uint8 files keep their full range whatever `ranges` says.
    """

    depth: int = 8
    ranges: tuple[tuple[float, float], ...] | None = None
    keep_8_bit: bool = True

    def __call__(self, raster: Raster) -> np.ndarray:
        """Pixels [H, W, C], uint8 or uint16, contiguous."""
        bands = raster.bands
        if self.ranges is None or (self.keep_8_bit and bands.dtype in (np.uint8, np.bool_)):
            interleaved = np.moveaxis(bands, 0, -1)
            if interleaved.flags.c_contiguous:
                out = by_type(interleaved, self.depth)
            else:  # band after band is twice as fast as pixel after pixel
                out = np.stack(list(by_type(bands, self.depth)), axis=-1)
        else:
            ranges = self.ranges * len(bands) if len(self.ranges) == 1 else self.ranges
            out = np.empty((*bands.shape[1:], len(bands)), DTYPES[self.depth])
            for channel, (band, (low, high)) in enumerate(zip(bands, ranges, strict=True)):
                _linear(band, low, high, self.depth, out[..., channel])
        if raster.valid is not None:
            out *= np.moveaxis(raster.valid, 0, -1)
        return out


def by_type(image: np.ndarray, depth: int = 8) -> np.ndarray:
    """Any numeric type [...] to uint8 or uint16, by the rules at the top of this file."""
    dtype, largest = DTYPES[depth], LARGEST[depth]
    if image.dtype == dtype:
        return np.ascontiguousarray(image)
    if image.dtype == np.bool_:
        return image.astype(dtype) * dtype.type(largest)
    if image.dtype == np.uint8:
        return image.astype(dtype) * dtype.type(257)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:  # of either byte order
        return image.astype(dtype) if depth == 16 else ((image.astype(np.uint32) + 128) // 257).astype(dtype)
    if np.iscomplexobj(image):
        raise ValueError("complex values")
    values = image.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if np.issubdtype(image.dtype, np.floating) and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (values - low) / (high - low) * largest if high > low else np.zeros_like(values)
    return np.rint(np.where(finite, scaled, 0).clip(0, largest)).astype(dtype)


def _linear(band: np.ndarray, low: float, high: float, depth: int, out: np.ndarray) -> None:
    """[H, W] of any real type into `out` [H, W] of any strides; low becomes 0, high the largest."""
    largest = LARGEST[depth]
    values = band.astype(np.float64 if band.dtype.itemsize > 4 else np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        values -= low
        values *= largest / (high - low)
    if band.dtype.kind == "f":
        np.nan_to_num(values, copy=False, nan=0, posinf=0, neginf=0)
    np.clip(values, 0, largest, out=values)
    values += 0.5  # the cast cuts off
    np.copyto(out, values, casting="unsafe")
