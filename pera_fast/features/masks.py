"""Reads masks, images of class numbers, by one mapping from stored values to classes for a whole data set.

A palette PNG gives its index, not its colour. Nothing is scaled or inverted: the stored number is the class.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pera_fast.data.decoding import formats, png, with_gdal, with_pillow
from pera_fast.data.decoding.declared import declared
from pera_fast.data.decoding.probe import read_file
from pera_fast.data.decoding.upright import upright
from pera_fast.errors import UserError, one_line
from pera_fast.features.extract import ahead
from pera_fast.features.samples import Samples
from pera_fast.storage import MachineError, Storage

IGNORED = -1  # of a pixel that counts for nothing
MOST_CLASSES = 1000  # a greater number is no class: it marks something, or the mask is another kind of image
_UNLABELLED = 255  # of 8-bit masks, by the field's habit
_WAIT = 600.0  # seconds for storage that does not answer


@dataclass(frozen=True)
class Masks:
    """Classes of a data set's masks, and how to read them.

    Attributes:
        classes: name of each class number.
        ignore: stored value of pixels that count for nothing; None: no value does.
        binary: stored are 0 and 255, read are 0 and 1.
        notes: what was assumed, a line each.
    """

    classes: tuple[str, ...]
    ignore: int | None = None
    binary: bool = False
    notes: tuple[str, ...] = ()

    def read(self, file: Path, shape: tuple[int, int] | None = None, image: Path | None = None) -> np.ndarray:
        """A mask as int16 [H, W], upright: class numbers, and `IGNORED`.

        Args:
            file: the mask.
            shape: (H, W) that it must have: its image's. None: any.
            image: its image, for the message.

        Raises:
            UserError: it cannot be read, has another size, or a value that is no class.
        """
        values = read_mask(file, self.ignore)
        if shape is not None and values.shape != tuple(shape):
            (height, width), (high, wide) = values.shape, shape
            raise UserError(
                f"{file}: is {width} x {height} px, and its image{f' {image}' if image else ''} is {wide} x {high} px;"
                " a mask has one value for each pixel of its image"
            )
        if self.binary:
            values = np.where(values == 255, np.int16(1), values)
        if values.max(initial=0) >= len(self.classes):
            raise UserError(_beyond(file, int(values.max()), self.classes))
        return values


def masks_of(
    train: Samples,
    others: Samples | None = None,
    ignore: int | None = None,
    names: Sequence[str] = (),
) -> Masks:
    """Classes of a data set's masks, each of which is read for it.

    Args:
        train: samples to learn from, which decide on the classes.
        others: samples to measure on.
        ignore: stored value of pixels that count for nothing.
        names: of the classes 0, 1, ...; empty: their numbers, as many as the training masks have.

    Returns:
        How to read them. Values 0 and 255 alone become 0 and 1, with a note.

    Raises:
        UserError: a mask cannot be read; a value is beyond the names, or only in `others`, or no class by its size;
            the training masks hold one class only.
    """
    found = _values_of(train.masks, ignore)
    if not found:
        raise UserError(f"{train.source}: all pixels of the training masks have the ignore value {ignore}")
    measured = _values_of(() if others is None else others.masks, ignore)
    both = measured | found  # a mask of the training part stands for a value that both have
    notes: list[str] = []
    binary = both.keys() <= {0, 255} and 255 in both and len(names) in (0, 2)
    if binary:
        notes.append("masks hold 0 and 255, which are taken as classes 0 and 1")
        found, measured = ({min(value, 1): file for value, file in those.items()} for those in (found, measured))
        both = measured | found
    greatest = max(both)
    if names and greatest >= len(names):
        raise UserError(_beyond(both[greatest], greatest, names))
    if not names and (greatest >= MOST_CLASSES or (_UNLABELLED in both and _UNLABELLED - 1 not in both)):
        value = greatest if greatest >= MOST_CLASSES else _UNLABELLED
        raise UserError(
            f"{both[value]}: has the value {value} beside {_short(sorted(both.keys() - {value}))}; give"
            f" --ignore {value} if it marks pixels without a label, or --classes with a name for each class"
        )
    classes = tuple(names) or tuple(str(number) for number in range(max(found) + 1))
    _check_learnable(train, found, measured, classes, bool(names), notes)
    return Masks(classes, ignore, binary, tuple(notes))


def _check_learnable(
    train: Samples,
    found: dict[int, Path],
    measured: dict[int, Path],
    classes: Sequence[str],
    named: bool,
    notes: list[str],
) -> None:
    """Raises UserError for one class only, or one that only measured masks have, unless names say that it exists."""
    unknown = sorted(measured.keys() - found.keys())
    if unknown and not named:
        raise UserError(
            f"{measured[unknown[0]]}: has class {unknown[0]}, which no training mask has; give --ignore {unknown[0]} if"
            " it marks pixels without a label, or name all classes with --classes"
        )
    if len(found) < 2:
        raise UserError(f"{train.source}: the training masks hold class {classes[min(found)]} only; they want two")
    if unknown:
        those = ", ".join(classes[number] for number in unknown)
        notes.append(f"no training mask has {those}, which test masks have: nothing can predict it")


def _values_of(files: Iterable[Path], ignore: int | None) -> dict[int, Path]:
    """Stored values of masks, but the ignored, each with the first file that has it."""
    files, found = list(files), {}
    for file, values in zip(files, ahead(lambda file: np.unique(read_mask(file, ignore)), files, 32), strict=True):
        for value in values.tolist():
            if value != IGNORED:
                found.setdefault(value, file)
    return found


def _beyond(file: Path, value: int, names: Sequence[str]) -> str:
    return (
        f"{file}: has the value {value}, and the classes are 0 to {len(names) - 1} ({_short(names)}); name all of them"
        f" with --classes, or leave the value out with --ignore {value}"
    )


def _short(values: Iterable[object], most: int = 6) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "") if texts else "no other"


def read_mask(file: str | os.PathLike[str], ignore: int | None = None) -> np.ndarray:
    """Stored values of a mask, upright.

    Args:
        file: PNG, TIFF or another format without loss.
        ignore: stored value of pixels that count for nothing. A TIFF that declares 255, 65535 or a negative number as
            nodata ignores these as well: 0 is a class in most masks.

    Returns:
        int16 [H, W], with `IGNORED` where pixels count for nothing.

    Raises:
        UserError: it cannot be read, is a JPEG, a colour picture, or holds values that are no class numbers.
        MachineError: the storage did not answer in time.
    """
    name = os.fspath(file)
    try:
        data, _ = _storage()(lambda: read_file(name), name, 0)
        values, nodata = _stored(data)
    except MachineError:
        raise
    except Exception as error:  # a library may raise anything
        raise UserError(f"{file}: cannot be read as a mask ({one_line(error) or type(error).__name__})") from error
    kept = np.ones(values.shape, bool)
    if values.dtype.kind == "f":
        kept &= ~np.isnan(values)
    if nodata is not None and (nodata < 0 or nodata in (255, 65535)):
        kept &= values != nodata
    if ignore is not None:
        kept &= values != ignore
    classes = values[kept]
    low, high = (classes.min(), classes.max()) if classes.size else (0, 0)
    if low < 0 or high > np.iinfo(np.int16).max:
        wrong = low if low < 0 else high
        raise UserError(
            f"{file}: has the value {wrong:g}, which is no class number; give --ignore {wrong:g} if it marks pixels"
            " without a label"
        )
    if values.dtype.kind == "f" and (classes != np.rint(classes)).any():
        raise UserError(f"{file}: holds fractions ({values.dtype}); a mask holds class numbers")
    out = np.full(values.shape, IGNORED, np.int16)
    out[kept] = classes
    return out


@functools.cache
def _storage() -> Storage:
    return Storage(os.sep, _WAIT)


def _stored(data: bytes) -> tuple[np.ndarray, float | None]:
    """Values [H, W] as they are stored, and the nodata value that the file declares."""
    kind = formats.sniff(data[: formats.HEAD_BYTES])
    if kind == "jpeg":
        raise ValueError("JPEG changes values, and with them classes; give PNG or TIFF")
    if kind in ("tiff", "jpeg2000", "pnm"):
        orientation = declared(data, kind).orientation
        with with_gdal.open_raster(data, kind) as raster:
            alpha = [place for place, meaning in enumerate(raster.colorinterp) if meaning.name == "alpha"]
            bands, nodata = np.delete(raster.read(), alpha, axis=0), raster.nodata
        return upright(_one(bands), orientation), nodata
    if kind == "png" and (told := png.damage(data)):
        raise ValueError(told)
    with with_pillow.open_image(data) as image:
        image.load()
        orientation = with_pillow.orientation_of(image)
        array = np.asarray(image)
        bands = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        if image.mode[-1:] in "Aa" and len(bands) > 1:
            bands = bands[:-1]
    values = _one(bands)
    if kind == "png" and data[25] == 0 and data[24] in (2, 4):  # Pillow spreads gray of few bits over 8
        values = values // (255 // (2 ** data[24] - 1))
    return upright(values, orientation), None


def _one(bands: np.ndarray) -> np.ndarray:
    """The one band of bands [C, H, W] that are all equal."""
    if (bands[1:] != bands[:1]).any():
        raise ValueError(
            f"has {len(bands)} bands that differ, as a colour picture has; a mask has one band of class numbers"
        )
    return bands[0].astype(np.uint8) if bands.dtype == bool else bands[0]
