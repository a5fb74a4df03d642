"""Stacks a scene's bands in a process of its own (`python -m pera_fast.data.tools.stack_scene SOCKET`); no torch."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pera_fast.durable import whole_file

_GDAL_CACHE_MIB = 64
_BLOCK, _WINDOW = 256, 1024  # pixels a side: of the file's blocks, and of what is read at a time


class StackError(Exception):
    """The bands do not fit together; the message says why."""


def stack_scene(
    files: dict[str, str], target: str, resampling: str, say: Callable[[str], None] = lambda stage: None
) -> str | OSError:
    """Writes the bands of a scene into one GeoTIFF on the grid of the finest band.

    Args:
        files: {band: path} of files of one band, anything that GDAL reads.
        target: the GeoTIFF; it is written whole or not at all.
        resampling: of the coarser bands, as GDAL calls it: nearest, bilinear, cubic.
        say: told how far it is, now and then.

    Returns:
        An empty text, why they cannot be stacked, or what keeps `target` from being written.
    """
    import rasterio

    writing = False
    try:
        with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_MIB), ExitStack() as stack:
            sources = {band: stack.enter_context(rasterio.open(path)) for band, path in files.items()}
            grid, profile = _plan(sources)
            views = [stack.enter_context(_on_grid(source, grid, resampling)) for source in sources.values()]
            for view in views:  # a damaged file shows before anything is written
                view.read(1, window=((0, 1), (0, min(_WINDOW, grid.width))))
            writing = True
            with whole_file(Path(target)) as partial, rasterio.open(partial, "w", **profile) as out:
                _describe(out, sources, grid)
                _copy(views, out, say)
    except StackError as error:
        return str(error)
    except MemoryError:
        return "out of memory"
    except OSError as error:
        if writing and error.errno is not None:
            return OSError(error.errno, error.strerror)
        return _told(error)
    except Exception as error:  # hostile bytes: a library may raise anything
        return _told(error)
    return ""


def _plan(sources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The band whose grid all get, and the profile of the GeoTIFF."""
    for band, source in sources.items():
        if source.count != 1:
            raise StackError(f"{band} has {source.count} bands; files of one band are stacked")
    grid = max(sources.values(), key=lambda source: source.width * source.height)
    for band, source in sources.items():
        same = (source.width, source.height, source.transform) == (grid.width, grid.height, grid.transform)
        if not same and (source.crs is None or grid.crs is None):
            raise StackError(f"{band} has another size, and no place that says where its pixels lie")
        if source.crs is not None and not _overlap(source, grid):
            raise StackError(f"{band} lies elsewhere than the others")
    _refuse_what_is_lost(sources)
    dtype = np.result_type(*(source.dtypes[0] for source in sources.values()))
    return grid, {
        "driver": "GTiff", "width": grid.width, "height": grid.height, "count": len(sources), "dtype": dtype,
        "crs": grid.crs, "transform": grid.transform, "nodata": grid.nodata,
        "tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate",
        "predictor": 3 if dtype.kind == "f" else 2, "interleave": "pixel", "bigtiff": "if_safer",
    }  # fmt: skip


def _refuse_what_is_lost(sources: dict[str, Any]) -> None:
    """Raises StackError for what one GeoTIFF of all bands cannot hold: it would be gone without a word."""
    from rasterio.enums import MaskFlags

    (first, *_), nodata = sources, {band: str(source.nodata) for band, source in sources.items()}  # nan != nan
    for band, source in sources.items():
        if nodata[band] != nodata[first]:
            raise StackError(f"{first} declares nodata {nodata[first]} and {band} {nodata[band]}; a GeoTIFF has one")
        if MaskFlags.per_dataset in source.mask_flag_enums[0]:
            raise StackError(f"{band} has a mask, which would be lost; declare a nodata value instead")
        if source.gcps[0] or (source.rpcs and source.crs is None):
            raise StackError(f"{band} lies by control points, which would be lost; warp it first (gdalwarp)")


def _overlap(source: Any, grid: Any) -> bool:
    from rasterio.coords import disjoint_bounds
    from rasterio.warp import transform_bounds

    bounds = source.bounds if source.crs == grid.crs else transform_bounds(source.crs, grid.crs, *source.bounds)
    return not disjoint_bounds(tuple(bounds), tuple(grid.bounds))


def _on_grid(source: Any, grid: Any, resampling: str) -> Any:
    """The source as it would lie on the grid; only what is read is resampled."""
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    if (source.width, source.height, source.transform) == (grid.width, grid.height, grid.transform):
        return _Same(source)
    return WarpedVRT(
        source, crs=grid.crs, transform=grid.transform, width=grid.width, height=grid.height,
        resampling=Resampling[resampling],
    )  # fmt: skip


class _Same:
    """A source that lies on the grid already; leaving it closes nothing."""

    def __init__(self, source: Any):
        self.read = source.read

    def __enter__(self) -> "_Same":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _describe(out: Any, sources: dict[str, Any], grid: Any) -> None:
    out.descriptions = tuple(sources)
    out.scales = tuple(source.scales[0] for source in sources.values())
    out.offsets = tuple(source.offsets[0] for source in sources.values())
    out.units = tuple(source.units[0] or "" for source in sources.values())
    out.update_tags(**{name: value for name, value in grid.tags().items() if name != "AREA_OR_POINT"})
    for number, source in enumerate(sources.values(), 1):
        out.update_tags(number, file=Path(source.name).name)


def _copy(views: list[Any], out: Any, say: Callable[[str], None]) -> None:
    """A window of all bands at a time, so that memory does not grow with the scene."""
    for top in range(0, out.height, _WINDOW):
        say(str(top))
        for left in range(0, out.width, _WINDOW):
            rows, columns = (top, min(top + _WINDOW, out.height)), (left, min(left + _WINDOW, out.width))
            pixels = np.stack([view.read(1, window=(rows, columns)) for view in views])
            out.write(pixels.astype(out.dtypes[0], copy=False), window=(rows, columns))


def _told(error: BaseException) -> str:
    while error.__cause__ is not None:  # "see previous exception for details"
        error = error.__cause__
    return f"rasterio: {' '.join(str(error).split())[:200] or type(error).__name__}"


if __name__ == "__main__":
    from pera_fast.data.decoding.worker import serve
    from pera_fast.data.tools import stack_scene as module  # under its own name, which the other end knows too

    serve(int(sys.argv[1]), module.stack_scene)
