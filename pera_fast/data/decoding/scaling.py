"""Scales stored values of any type to the pipeline's integers, band by band: the one place that does.

The largest integer (255 or 65535) stands for 1. With a range [low, high] for each channel, values map linearly, low to
0 and high to the largest; beyond that they are clamped. A declared offset is added before that, in units of the
declared scale, to files of more than 8 bits. What is not finite, and what a file declares to be no data, becomes 0,
which is the band's low end. Under alpha 0 pixels keep their colour, but no range is taken from them. Without a range:

- uint8 as it is (times 257 for 16 bits), bool 0 or the largest;
- uint16 as it is (divided by 257 for 8 bits);
- any other type: values that lie in [0, 1] if it is a float type times the largest, else min to max of the file's
  finite values that are data becomes 0 to the largest.
"""

from dataclasses import dataclass

import numpy as np

LARGEST = {8: 255, 16: 65535}
DTYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
_BYTES = (np.uint8, np.bool_)


@dataclass
class Raster:
    """Stored values of an image.

    Attributes:
        bands: [C, H, W], any real type, any strides.
        valid: bool [C, H, W], where there is data: no declared nodata, no NaN, inside the mask. None: everywhere.
        opaque: bool [H, W], where alpha is not 0. None: everywhere.
        shift: float64 [C], declared offset divided by the declared scale, which is added to the values. None: none, as
            always where there are 8 bits.
        scale: float64 [C], declared scale, which is not applied: ranges are in its steps. None: as of shift.
    """

    bands: np.ndarray
    valid: np.ndarray | None = None
    opaque: np.ndarray | None = None
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None

    def pick(self, channels: list[int]) -> "Raster":
        """Some of its channels, which may repeat."""
        valid, shift, scale = (
            None if each is None else each[channels] for each in (self.valid, self.shift, self.scale)
        )
        return Raster(self.bands[channels], valid, self.opaque, shift, scale)

    def values(self, channel: int) -> np.ndarray:
        """Values of a channel [H, W] as ranges count them, with the declared offset."""
        band = self.bands[channel]
        if self.shift is None or not self.shift[channel]:
            return band
        shift = float(self.shift[channel])
        if band.dtype.kind == "f" or not shift.is_integer() or band.dtype.itemsize > 2:
            return band.astype(np.float64) + shift
        shifted = band.astype(np.int32) + int(shift)
        narrow = np.uint16 if shifted.min(initial=0) >= 0 else np.int16  # statistics are exact in 16 bits
        limits = np.iinfo(narrow)
        fits = limits.min <= shifted.min(initial=0) and shifted.max(initial=0) <= limits.max
        return shifted.astype(narrow) if fits else shifted

    def counted(self, channel: int) -> np.ndarray | None:
        """Pixels of a channel that ranges and statistics are taken from, bool [H, W]; None: all."""
        if self.valid is None or self.opaque is None:
            return self.opaque if self.valid is None else self.valid[channel]
        return self.valid[channel] & self.opaque


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
        if self.ranges is None or (self.keep_8_bit and bands.dtype in _BYTES):
            out = self._by_type(raster)
        else:
            ranges = self.ranges * len(bands) if len(self.ranges) == 1 else self.ranges
            out = np.empty((*bands.shape[1:], len(bands)), DTYPES[self.depth])
            for channel, (band, (low, high)) in enumerate(zip(bands, ranges, strict=True)):
                shift = 0.0 if raster.shift is None else float(raster.shift[channel])
                _linear(band, low - shift, high - shift, self.depth, out[..., channel])
        if raster.valid is not None:
            out = out * np.moveaxis(raster.valid, 0, -1)  # not in place: it may be the raster's own memory
        return out

    def _by_type(self, raster: Raster) -> np.ndarray:
        bands = raster.bands
        if raster.shift is not None:
            bands = _shifted(bands, raster.shift)
        counted = raster.valid
        if raster.opaque is not None:
            counted = np.broadcast_to(raster.opaque, bands.shape) if counted is None else counted & raster.opaque
        interleaved = np.moveaxis(bands, 0, -1)
        if interleaved.flags.c_contiguous:
            return by_type(interleaved, self.depth, None if counted is None else np.moveaxis(counted, 0, -1))
        return np.stack(list(by_type(bands, self.depth, counted)), axis=-1)  # twice as fast as pixel after pixel


def by_type(image: np.ndarray, depth: int = 8, counted: np.ndarray | None = None) -> np.ndarray:
    """Any numeric type [...] to uint8 or uint16, by the rules at the top of this file; counted: where there is data."""
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
    measured = values[finite if counted is None else finite & counted]
    low, high = (measured.min(), measured.max()) if measured.size else (0.0, 0.0)
    if np.issubdtype(image.dtype, np.floating) and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (values - low) / (high - low) * largest if high > low else np.zeros_like(values)
    return np.rint(np.where(finite, scaled, 0).clip(0, largest)).astype(dtype)


def _shifted(bands: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Bands [C, H, W] with their offsets added. uint16 stays so, clamped: without ranges the type's range counts."""
    moved = bands + shift[:, None, None]
    return np.rint(moved.clip(0, 65535)).astype(np.uint16) if bands.dtype.newbyteorder("=") == np.uint16 else moved


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
