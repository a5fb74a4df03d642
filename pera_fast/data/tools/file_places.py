"""Tells where georeferenced images lie on the ground: GeoTIFF, JPEG 2000, and tiles of `data tile` by their JSON files.

GDAL reads the headers in a process of its own, as hostile bytes can end or hang it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from pera_fast.data.decoding.formats import HEAD_BYTES, sniff
from pera_fast.data.decoding.tar import Member
from pera_fast.data.decoding.worker_process import DiedError, WorkerProcess

_MODULE = "pera_fast.data.tools.file_places"
_SECONDS = 60.0  # for the files of one call
_TAGGED = {"tiff": "GTiff", "jpeg2000": "JP2OpenJPEG"}  # formats that hold a place, and GDAL's drivers for them
_PLAIN = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tga", ".ico")
_MOST_JSON = 2**20  # bytes


@dataclass(frozen=True)
class FilePlace:
    """Place of an image.

    Attributes:
        lon, lat: of its centre, degrees, EPSG:4326.
        crs: of the bounds: EPSG:CODE, or WKT; empty where only longitude and latitude are known.
        bounds: (left, bottom, right, top) in the crs; None where there is none.
    """

    lon: float
    lat: float
    crs: str = ""
    bounds: tuple[float, float, float, float] | None = None


class FilePlaces:
    """Looks places up in worker processes. Thread-safe; a context manager, leaving it ends the workers.

    Args:
        workers: processes; as many calls are answered at a time. They are started when they are needed.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = [WorkerProcess(_MODULE, _SECONDS) for _ in range(workers)]
        self._idle: SimpleQueue[WorkerProcess] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> "FilePlaces":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:  # a call that is under way ends
            worker.end()
        for _ in range(len(self._workers)):
            self._idle.get().close()

    def __call__(self, files: Sequence[str | Member]) -> list[FilePlace | None]:
        """Place of each file or member; None where it has none, or none that can be read."""
        asked = [number for number, file in enumerate(files) if _may_have(file)]
        found: list[FilePlace | None] = [None] * len(files)
        if not asked:
            return found
        worker = self._idle.get()
        try:
            places = _look_in(worker, [files[number] for number in asked])
        finally:
            self._idle.put(worker)
        for number, place in zip(asked, places, strict=True):
            found[number] = place
        return found


def _look_in(worker: WorkerProcess, files: list[str | Member]) -> list[FilePlace | None]:
    try:
        return worker.call((files,))
    except DiedError:
        if len(files) == 1:
            return [None]
        return [place for file in files for place in _look_in(worker, [file])]  # which of them was it?


def _may_have(file: str | Member) -> bool:
    """Whether a file is of a format that holds a place, by its name, or has a JSON file beside it."""
    stem, suffix = os.path.splitext(file.name if isinstance(file, Member) else file)
    return suffix.lower() not in _PLAIN or (isinstance(file, str) and os.path.exists(f"{stem}.json"))


def look(files: Sequence[str | Member], say: Callable[[str], None]) -> list[FilePlace | None]:
    """The worker's part of `FilePlaces`."""
    import rasterio

    # Once: entering it takes as long as opening a file. Files beside the image are asked for by name, not listed.
    with rasterio.Env(GDAL_NUM_THREADS="1", GDAL_DISABLE_READDIR_ON_OPEN="TRUE"):
        return [_place(file) for file in files]


def _place(file: str | Member) -> FilePlace | None:
    with contextlib.suppress(Exception):  # hostile bytes: a library may raise anything
        kind = sniff(_head(file))
        if kind in _TAGGED:
            return _tagged(file, _TAGGED[kind])
        if isinstance(file, str):
            return _of_tile(f"{os.path.splitext(file)[0]}.json")
    return None


def _head(file: str | Member) -> bytes:
    path, offset = (file.tar, file.offset) if isinstance(file, Member) else (file, 0)
    with open(path, "rb") as opened:
        opened.seek(offset)
        return opened.read(HEAD_BYTES)


def _tagged(file: str | Member, driver: str) -> FilePlace | None:
    import rasterio

    path = f"/vsisubfile/{file.offset}_{file.size},{file.tar}" if isinstance(file, Member) else file
    with rasterio.open(path, driver=driver) as scene:
        return _of_scene(scene)


def _of_scene(scene: Any) -> FilePlace | None:
    from pera_fast.data.tools.tile_place import Place

    place, box = Place(scene), (0, 0, scene.width, scene.height)
    center = place.center(box)
    return None if center is None else FilePlace(*center, place.crs() or "", place.bounds(box))


def _of_tile(path: str) -> FilePlace | None:
    """Place by the JSON file that `data tile` writes beside a JPEG or PNG tile."""
    with open(path, "rb") as file:
        told = json.loads(file.read(_MOST_JSON))
    left, bottom, right, top = _four(told["bounds_wgs84"])
    if right < left:  # across the date line
        right += 360
    bounds = told["bounds"] and _four(told["bounds"])
    lon = (left + right) / 2
    return FilePlace(lon - 360 if lon > 180 else lon, (bottom + top) / 2, str(told["crs"] or ""), bounds)


def _four(values: Any) -> tuple[float, float, float, float]:
    first, second, third, fourth = (float(value) for value in values)
    return first, second, third, fourth


if __name__ == "__main__":
    from pera_fast.data.decoding.worker import serve
    from pera_fast.data.tools import file_places  # under its own name, which the other end knows too

    serve(int(sys.argv[1]), file_places.look)
