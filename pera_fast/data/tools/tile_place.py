"""Place of a tile on the ground: its scene's transform, ground control points or RPCs, moved to the tile's corner."""

import contextlib
import copy
from typing import Any

import numpy as np

from pera_fast.data.tools.tile_grid import Box

_EDGE = 21  # points of each edge that bounds are taken over: a place that is no plain transform bends edges


class PlaceError(Exception):
    """A place that no tile can keep; the message says why, and what helps."""


class Place:
    """Place of a scene.

    Args:
        scene: an open rasterio dataset.

    Raises:
        PlaceError: tiles cannot keep it.
    """

    def __init__(self, scene: Any):
        points, points_crs = scene.gcps
        self._transform, self._rpcs = scene.transform, scene.rpcs
        self._points = list(points) if scene.transform.is_identity else []  # a file has one of the two
        self._crs = points_crs if self._points else scene.crs
        if scene.transform.is_identity and not self._points and self._rpcs is None and scene.tags(ns="GEOLOCATION"):
            raise PlaceError("its place is a geolocation array, which tiles cannot keep: warp it first (gdalwarp)")

    def written(self, box: Box) -> dict[str, Any]:
        """Keywords for rasterio that give a tile its place."""
        place: dict[str, Any] = {"crs": self._crs}
        if self._points:
            place["gcps"] = self._moved_points(box)
        else:
            place["transform"] = self._moved_transform(box)
        if self._rpcs is not None:
            place["rpcs"] = self._moved_rpcs(box)
        return place

    def told(self, box: Box) -> dict[str, Any]:
        """The same for the tile's JSON file, with bounds: (left, bottom, right, top), bottom < top."""
        about: dict[str, Any] = {"crs": None, "transform": None}
        if self._points:
            keys = ("row", "col", "x", "y", "z")
            about["gcps"] = [{key: getattr(point, key) for key in keys} for point in self._moved_points(box)]
        else:
            about["transform"] = list(self._moved_transform(box))[:6]
        if self._rpcs is not None:
            about["rpcs"] = self._moved_rpcs(box).to_gdal()
        about |= {"crs": self.crs(), "bounds": self.bounds(box), "bounds_wgs84": None}
        if about["bounds"] is not None:
            from rasterio.warp import transform_bounds

            with contextlib.suppress(Exception):  # no way to longitude and latitude
                about["bounds_wgs84"] = transform_bounds(self._crs, "EPSG:4326", *about["bounds"])
        elif self._crs is None and self._rpcs is not None:  # these lead to longitude and latitude
            from rasterio.transform import RPCTransformer

            with contextlib.suppress(Exception), RPCTransformer(self._rpcs, rpc_height=self._rpcs.height_off) as way:
                about["bounds_wgs84"] = _around(*way.xy(*_edges(box), offset="ul"))
        return about

    def center(self, box: Box) -> tuple[float, float] | None:
        """(longitude, latitude) of a box's centre, degrees; None where it has no place on the ground."""
        from rasterio.transform import AffineTransformer, GCPTransformer, RPCTransformer
        from rasterio.warp import transform

        row, column = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
        if self._crs is not None and (self._points or not self._transform.is_identity):
            with GCPTransformer(self._points) if self._points else AffineTransformer(self._transform) as way:
                x, y = way.xy(row, column, offset="ul")
            found = transform(self._crs, "EPSG:4326", [x], [y])
        elif self._rpcs is not None:  # these lead to longitude and latitude
            with RPCTransformer(self._rpcs, rpc_height=self._rpcs.height_off) as way:
                found = way.xy([row], [column], offset="ul")
        else:
            return None
        lon, lat = float(found[0][0]), float(found[1][0])
        return (lon, lat) if np.isfinite([lon, lat]).all() else None

    def crs(self) -> str | None:
        """EPSG:CODE, or WKT; None where there is none."""
        if self._crs is None:
            return None
        code = self._crs.to_epsg()
        return f"EPSG:{code}" if code else self._crs.to_wkt()

    def bounds(self, box: Box) -> tuple[float, float, float, float] | None:
        """(left, bottom, right, top) of a box in the scene's CRS; None where it has none."""
        from rasterio.transform import AffineTransformer, GCPTransformer

        if self._crs is None:
            return None
        try:
            with GCPTransformer(self._points) if self._points else AffineTransformer(self._transform) as way:
                return _around(*way.xy(*_edges(box), offset="ul"))
        except Exception:  # points of which no map can be made
            return None

    def _moved_transform(self, box: Box) -> Any:
        return self._transform * self._transform.translation(box[0], box[1])

    def _moved_points(self, box: Box) -> list[Any]:
        from rasterio.control import GroundControlPoint

        return [
            GroundControlPoint(point.row - box[1], point.col - box[0], point.x, point.y, point.z or 0.0)
            for point in self._points
        ]

    def _moved_rpcs(self, box: Box) -> Any:
        moved = copy.copy(self._rpcs)
        moved.samp_off, moved.line_off = moved.samp_off - box[0], moved.line_off - box[1]
        return moved


def _edges(box: Box) -> tuple[list[float], list[float]]:
    """(rows, columns) of points along a box's edges."""
    left, top, right, bottom = box
    across, down = np.linspace(left, right, _EDGE), np.linspace(top, bottom, _EDGE)
    rows = [np.full(_EDGE, top), np.full(_EDGE, bottom), down, down]
    columns = [across, across, np.full(_EDGE, left), np.full(_EDGE, right)]
    return np.concatenate(rows).tolist(), np.concatenate(columns).tolist()


def _around(xs: Any, ys: Any) -> tuple[float, float, float, float] | None:
    """(left, bottom, right, top) around points; None where one of them has no place."""
    bounds = float(np.min(xs)), float(np.min(ys)), float(np.max(xs)), float(np.max(ys))
    return bounds if np.isfinite(bounds).all() else None
