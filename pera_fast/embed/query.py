"""Finds the vector of a query: an image, a folder of images, or a point on the ground."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pera_fast.embed.nearest import kilometers
from pera_fast.embed.stored import Embeddings
from pera_fast.embed.table import vectors_of, weights_digest
from pera_fast.errors import UserError
from pera_fast.features.extract import Extractor, choose_device, pool
from pera_fast.features.images import is_image
from pera_fast.paths import local_path
from pera_fast.weights.load import load_backbone

_NUMBER = r"\s*[+-]?\d+(?:\.\d*)?\s*"
_POINT = re.compile(f"({_NUMBER}),({_NUMBER})")
_STORED = 2**14  # images of a folder at most, whose vectors are held at a time


@dataclass(frozen=True)
class Query:
    """A vector to look for, and the images that it is made of.

    Attributes:
        vector: float32 [D].
        text: names it.
        images: files, and rows of the table, that it is made of; some of them, to be looked at.
        rows: rows of the table that are the query itself.
    """

    vector: np.ndarray
    text: str
    images: list[Path | int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def as_point(text: str) -> tuple[float, float] | None:
    """(longitude, latitude) of a text "lon,lat" in degrees; else None. Raises UserError beyond the globe."""
    found = _POINT.fullmatch(text)
    if found is None:
        return None
    lon, lat = float(found[1]), float(found[2])
    if not (-180 <= lon <= 360 and -90 <= lat <= 90):
        raise UserError(f"QUERY {text}: longitude is -180 to 180 and latitude -90 to 90, in this order")
    return lon, lat


def resolve(query: str, table: Embeddings, weights: str | None, root: Path, device: str = "auto") -> Query:
    """The query that a text names.

    Args:
        query: an image, a folder, or "lon,lat". Vectors of images that are in the table are taken from there.
        table: the embeddings.
        weights: for other images; None: those of the table.
        root: where the table's images are now.
        device: of the network, for other images.

    Raises:
        UserError: no such file; images that cannot be read; other weights than the table's; no image with a place.
    """
    path = local_path("QUERY", query)
    if not path.exists():
        point = as_point(query)
        if point is None:
            raise UserError(f"QUERY {query}: no such image or folder, and no point such as 4.35,51.87 (lon,lat)")
        return _at(point, table)
    inside = _inside(path, root)
    if inside is not None:
        below = "" if inside == "." else f"{inside}/"
        rows = table.find([inside], below if path.is_dir() else None)
        if rows:
            return _of_rows(str(path), table, rows)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_image(file, path) and file.is_file())
        if not files:
            raise UserError(f"QUERY {query}: the folder holds no image")
    return _of_files(str(path), table, weights, files, device)


def _inside(path: Path, root: Path) -> str | None:
    """The path below the folder of the embedded images, as the table has it; None: it lies elsewhere."""
    whole, base = path.resolve(), root.resolve()
    return whole.relative_to(base).as_posix() if whole.is_relative_to(base) else None


def _at(point: tuple[float, float], table: Embeddings) -> Query:
    lon = np.concatenate([piece.to_numpy() for piece in table.column("lon")] or [np.empty(0)])
    lat = np.concatenate([piece.to_numpy() for piece in table.column("lat")] or [np.empty(0)])
    away = kilometers(lon, lat, point)
    if not np.isfinite(away).any():
        raise UserError(f"--embeddings {table.path}: none of its images has a place; give an image or a folder")
    row = int(np.nanargmin(away))
    text = f"{point[0]:g},{point[1]:g}: nearest centre {away[row]:.3g} km away"
    return _of_rows(text, table, [row])


def _of_rows(text: str, table: Embeddings, rows: list[int]) -> Query:
    total = np.zeros(table.about.width, np.float64)
    for start in range(0, len(rows), _STORED):
        total += _units(vectors_of(table.take(rows[start : start + _STORED], ["vector"]))).sum(0)
    return Query(_mean(total, text), text, list(rows), rows)


def _of_files(text: str, table: Embeddings, weights: str | None, files: list[Path], device: str) -> Query:
    about = table.about
    backbone = load_backbone(weights or about.weights, about.heads)
    if weights_digest(backbone) != about.digest:
        raise UserError(
            f"--weights {weights or about.weights}: are not those of {table.path}; give the weights that made it, or"
            " embed anew"
        )
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(about.precision, "fp32")
    extractor = Extractor(backbone, choose_device(device), about.size, precision, about.batch_size)
    found = pool(extractor.pooled(files, "query"), about.pooling).numpy()
    return Query(_mean(_units(found).sum(0), text), text, list(files))


def _units(vectors: np.ndarray) -> np.ndarray:
    """Vectors [N, D] at length 1, so that each image of a folder counts alike."""
    values = vectors.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _mean(total: np.ndarray, text: str) -> np.ndarray:
    length = math.sqrt(float(total @ total))
    if not length:
        raise UserError(f"QUERY {text}: its vectors cancel out; give another one")
    return (total / length).astype(np.float32)
