"""Cuts one scene into tiles in a process of its own (`python -m pera_fast.data.tools.tile_scene SOCKET`); no torch."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pera_fast.data.tools.tile_grid import Box, TileSettings, reads
from pera_fast.data.tools.tile_place import Place, PlaceError
from pera_fast.durable import whole_file

_GDAL_CACHE_MIB = 64
_QUALITY = 95
_PROGRESS = "progress.json"
_MEANING: dict[str, Any] = {"scales": 1.0, "offsets": 0.0, "units": None}  # and the value that says nothing


@dataclass
class TileCounts:
    """Counts of a scene's tiles."""

    written: int = 0
    left_out: int = 0  # for want of data
    next: int = 0  # read that comes next, where it was stopped


class SceneError(Exception):
    """The scene cannot be cut; the message says why."""


class _FolderError(Exception):
    """A tile cannot be written."""

    def __init__(self, cause: OSError):
        super().__init__(str(cause))
        self.cause = OSError(cause.errno, cause.strerror)


def cut(
    path: str, name: str, folder: str, settings: TileSettings, say: Callable[[str], None] = lambda stage: None
) -> TileCounts | str | OSError:
    """Writes the tiles of a scene and a JSON file beside each; goes on where it was stopped.

    Args:
        path: the scene, anything that GDAL reads.
        name: what the tiles' JSON calls the scene.
        folder: where the tiles go; it exists, and is this scene's alone.
        settings: how it is cut.
        say: told the number of tiles that are done, now and then.

    Returns:
        The counts, or why the scene cannot be cut, or what keeps `folder` from being written.
    """
    import rasterio

    try:
        # Files beside the scene are not looked for in folders of thousands; the cache is for blocks across two reads.
        with (
            rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_MIB, GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(path) as scene,
        ):
            return _Cutter(scene, name, Path(folder), settings).run(say)
    except _FolderError as error:
        return error.cause
    except (SceneError, MemoryError) as error:
        return str(error) or "out of memory"
    except Exception as error:  # hostile bytes: a library may raise anything
        while error.__cause__ is not None:  # "see previous exception for details"
            error = error.__cause__
        told = " ".join(str(error).replace(path, "").split()).strip(" :'")
        return f"rasterio: {told[:200] or type(error).__name__}"


class _Cutter:
    def __init__(self, scene: Any, name: str, folder: Path, settings: TileSettings):
        from rasterio.enums import ColorInterp

        self._scene, self._name, self._folder, self._settings = scene, name, folder, settings
        meanings = scene.colorinterp
        self._indexes = [i for i, meaning in zip(scene.indexes, meanings, strict=True) if meaning != ColorInterp.alpha]
        self._meanings = [meanings[i - 1] for i in self._indexes]
        self._descriptions = [scene.descriptions[i - 1] for i in self._indexes]
        self._colors = None
        if self._meanings == [ColorInterp.palette]:  # becomes RGB
            table = scene.colormap(self._indexes[0])
            self._colors = np.array([table.get(i, (0, 0, 0))[:3] for i in range(max(table) + 1)], np.uint8)
            self._meanings = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
            self._descriptions = [None] * 3
        self._dtype = np.result_type(*(scene.dtypes[i - 1] for i in self._indexes)) if self._indexes else None
        self._check()
        try:
            self._place = Place(scene)
        except PlaceError as error:
            raise SceneError(str(error)) from None
        self._tags = _kept(scene.tags())
        self._meaning = self._read_meaning()
        nodata = scene.nodata if scene.nodata is not None else settings.nodata
        self._nodata = None if self._colors is not None or not _fits(nodata, self._dtype) else nodata

    def _check(self) -> None:
        if self._dtype is None:
            raise SceneError("has no band")
        if self._dtype.kind == "c":
            raise SceneError("complex values")
        nodata = {str(self._scene.nodatavals[i - 1]) for i in self._indexes}
        if len(nodata) > 1:
            told = ", ".join(sorted(nodata))
            raise SceneError(f"its bands have different values for no data ({told}); a tile has one: give it one")
        if self._colors is not None:
            self._dtype = self._colors.dtype
        if self._settings.format == "tif":
            return
        kinds = ("uint8",) if self._settings.format == "jpg" else ("uint8", "uint16")
        if len(self._meanings) not in (1, 3) or self._dtype.name not in kinds:
            raise SceneError(
                f"{len(self._meanings)} band(s) of {self._dtype.name} do not go into {self._settings.format}"
                f" (1 or 3 of {' or '.join(kinds)} do): use --format tif"
            )

    def _read_meaning(self) -> dict[str, list[Any]]:
        """Scale, offset, unit and tags of each band, of those that say anything: a value means `v * scale + offset`."""
        if self._colors is not None:  # numbers of a palette
            return {}
        scene, at = self._scene, [i - 1 for i in self._indexes]
        meaning = {name: [getattr(scene, name)[i] for i in at] for name in _MEANING}
        found = {name: values for name, values in meaning.items() if any(v != _MEANING[name] for v in values)}
        tags = [_kept(scene.tags(i)) for i in self._indexes]
        return {**found, "band_tags": tags} if any(tags) else found

    def run(self, say: Callable[[str], None]) -> TileCounts:
        assert self._dtype is not None
        scene, progress = self._scene, self._folder / _PROGRESS
        counts = TileCounts()
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            found = TileCounts(**json.loads(progress.read_bytes()))
            if all(type(count) is int and count >= 0 for count in vars(found).values()):
                counts = found
        pixel_bytes = len(self._meanings) * (self._dtype.itemsize + 1)  # and its mask
        for number, boxes in enumerate(reads(scene.width, scene.height, pixel_bytes, self._settings)):
            if number < counts.next:
                continue
            self._read(boxes, counts)
            counts.next = number + 1
            _replace(progress, json.dumps(vars(counts)).encode())
            say(str(counts.written + counts.left_out))
        progress.unlink(missing_ok=True)
        return counts

    def _read(self, boxes: list[Box], counts: TileCounts) -> None:
        from rasterio.windows import Window

        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
        window = Window.from_slices((top, bottom), (left, right))
        pixels = self._scene.read(self._indexes, window=window)
        valid = self._valid(pixels, window)
        if self._colors is not None:
            pixels = np.moveaxis(self._colors[pixels[0].clip(max=len(self._colors) - 1)], -1, 0)
        for box in boxes:
            at = np.s_[..., box[1] - top : box[3] - top, box[0] - left : box[2] - left]
            missing = 1.0 - float(valid[at].mean())
            if missing > self._settings.nodata_max:
                counts.left_out += 1
            else:
                self._write(box, pixels[at], valid[at], missing)
                counts.written += 1

    def _valid(self, pixels: np.ndarray, window: Any) -> np.ndarray:
        """bool [H, W]: where any band has data."""
        valid = self._scene.read_masks(self._indexes, window=window).any(axis=0)
        for alpha in set(self._scene.indexes) - set(self._indexes):  # GDAL does not take every alpha band for a mask
            valid &= self._scene.read(alpha, window=window) != 0
        if pixels.dtype.kind == "f":
            valid &= np.isfinite(pixels).any(axis=0)
        if self._scene.nodata is None and self._settings.nodata is not None:
            valid &= (pixels != self._settings.nodata).any(axis=0)
        return valid

    def _write(self, box: Box, pixels: np.ndarray, valid: np.ndarray, missing: float) -> None:
        stem = f"y{box[1]:06d}_x{box[0]:06d}"
        about = self._about(box, missing)
        _replace(self._folder / f"{stem}.{self._settings.format}", self._encoded(pixels, valid, box))
        _replace(self._folder / f"{stem}.json", json.dumps(about, indent=1).encode() + b"\n")

    def _about(self, box: Box, missing: float) -> dict[str, Any]:
        left, top, right, bottom = box
        return {
            "scene": self._name,
            "left": left,
            "top": top,
            "width": right - left,
            "height": bottom - top,
            "bands": self._descriptions,
            "dtype": str(self._dtype),
            "nodata": _json_number(self._nodata),
            "nodata_fraction": round(missing, 6),
            **self._place.told(box),
            **self._meaning,
            "tags": {key: value for key, value in self._tags.items() if key != "AREA_OR_POINT"},
        }

    def _encoded(self, pixels: np.ndarray, valid: np.ndarray, box: Box) -> bytes:
        from rasterio.io import MemoryFile

        bands, height, width = pixels.shape
        if self._settings.format == "jpg":
            buffer = io.BytesIO()
            Image.fromarray(pixels[0] if bands == 1 else np.moveaxis(pixels, 0, -1)).save(
                buffer, "JPEG", quality=_QUALITY
            )
            return buffer.getvalue()
        shape = {"count": bands, "height": height, "width": width, "dtype": self._dtype}
        if self._settings.format == "png":
            with MemoryFile() as memory:
                with memory.open(driver="PNG", **shape) as out:
                    out.write(pixels)
                return bytes(memory.read())
        assert self._dtype is not None
        place = {**self._place.written(box), "nodata": self._nodata}
        predictor = 3 if self._dtype.kind == "f" else 2
        packing = {"compress": "deflate", "predictor": predictor if self._dtype.itemsize <= 4 else 1}
        with MemoryFile() as memory:
            with memory.open(driver="GTiff", interleave="pixel", **shape, **place, **packing) as out:
                out.write(pixels)
                out.colorinterp = self._meanings
                self._describe(out)
                if self._nodata is None and not valid.all():
                    out.write_mask(valid)
            return bytes(memory.read())

    def _describe(self, out: Any) -> None:
        """Give a GeoTIFF what the scene says of its bands."""
        for name in _MEANING.keys() & self._meaning.keys():
            setattr(out, name, tuple(value or "" if name == "units" else value for value in self._meaning[name]))
        out.update_tags(**self._tags)
        for band, description in enumerate(self._descriptions, start=1):
            if description:
                out.set_band_description(band, description)
            if tags := self._meaning.get("band_tags"):
                out.update_tags(band, **tags[band - 1])


def _kept(tags: dict[str, str]) -> dict[str, str]:
    """Tags that are true of a part of the scene too."""
    return {key: value for key, value in tags.items() if not key.startswith(("STATISTICS_", "OVR_"))}


def _replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    try:
        with whole_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise _FolderError(error) from error


def _fits(value: float | None, dtype: Any) -> bool:
    """Whether a type has a value."""
    if value is None or dtype.kind == "f":
        return value is not None
    info = np.iinfo(dtype)
    return info.min <= value <= info.max and float(value).is_integer()


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or np.isfinite(value) else str(value)


if __name__ == "__main__":
    from pera_fast.data.decoding.worker import serve
    from pera_fast.data.tools import tile_scene  # under its own name, which the other end knows too

    serve(int(sys.argv[1]), tile_scene.cut)
