"""`pera-fast similar`: the images most alike an image, a folder or a place, as a contact sheet."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pera_fast.config import Config
from pera_fast.data.bands.sensor import probe_settings, scaling_of
from pera_fast.data.decoding import decode
from pera_fast.data.decoding.probe import read_file
from pera_fast.data.decoding.scaling import by_type
from pera_fast.data.decoding.tar import Member, TarDamageError, list_members
from pera_fast.data.files.shard_index import read_index
from pera_fast.data.files.shards import SUFFIX, split_path
from pera_fast.durable import whole_file
from pera_fast.embed.contact import CELL, Cell, draw, page
from pera_fast.embed.nearest import nearest
from pera_fast.embed.query import Query, resolve
from pera_fast.embed.stored import Embeddings
from pera_fast.errors import UserError
from pera_fast.paths import local_path, new_file

SUFFIXES = (".png", ".html")
_SHOWN = 5  # images of a query, of a folder
_MOST = 500  # images of a sheet


@dataclass(frozen=True)
class Found:
    """One of the images most alike the query."""

    path: str
    score: float  # cosine similarity
    lon: float | None
    lat: float | None


def similar(
    query: str,
    embeddings: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    k: int = 20,
    weights: str | None = None,
    images: str | os.PathLike[str] | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> list[Found]:
    """Finds the images most alike a query, and draws them.

    Args:
        query: an image, a folder (the mean of its images), or a point "lon,lat" (the image whose centre is nearest).
        embeddings: a Parquet file of `embed`.
        out: a .png or .html file for the sheet.
        k: how many images; the query's own do not count.
        weights: for a query that is not among the embedded images; None: those that the table names.
        images: the folder of the embedded images; None: where it was.
        device: of the network, for such a query.
        overwrite: replace a sheet.

    Raises:
        UserError: wrong arguments; the message says which.
    """
    target = new_file("--out", out, overwrite)
    if target.suffix not in SUFFIXES or not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: wants a name that ends in {' or '.join(SUFFIXES)}, in a folder that exists")
    if not 1 <= k <= _MOST:
        raise UserError(f"-k {k}: wants 1 to {_MOST} images")
    table = Embeddings(embeddings)
    root = local_path("--images", images) if images is not None else Path(table.about.root)
    if images is not None and not root.is_dir():
        raise UserError(f"--images {images}: no such folder")
    wanted = resolve(query, table, weights, root, device)
    rows, scores = nearest(table.vectors(), wanted.vector, k, wanted.rows)
    if not len(rows):
        raise UserError(f"--embeddings {table.path}: holds no image but the query's")
    columns = table.take(rows.tolist(), ["path", "lon", "lat"]).to_pylist()
    found = [Found(score=float(score), **row) for score, row in zip(scores, columns, strict=True)]
    cfg = table.cfg()
    cells = [
        Cell(
            picture(_locate(root, each.path), cfg), f"{number}. {each.score:.4f}", _named(each.path, each.lon, each.lat)
        )
        for number, each in enumerate(found, 1)
    ]
    head = f"{len(found)} of {len(table)} images most alike {wanted.text}"
    _save(target, head, _query_cells(wanted, table, root, cfg), cells)
    return found


def picture(location: str | Member | None, cfg: Config) -> Image.Image | None:
    """An image to look at: red, green and blue if they are known, else its first channels; None: it cannot be read."""
    if location is None:
        return None
    settings = probe_settings(cfg)
    try:
        data, _ = read_file(location)
        pixels = scaling_of(cfg)(decode.read_any(data, settings.channels, settings.bands))
    except (OSError, ValueError):
        return None
    rgb = cfg.rgb_channels() or ([0, 1, 2] if pixels.shape[2] >= 3 else [0, 0, 0])
    shown = Image.fromarray(np.ascontiguousarray(by_type(pixels[..., rgb])))
    scale = CELL / max(shown.size)
    width, height = (max(1, round(side * scale)) for side in shown.size)
    return shown.resize((width, height), Image.Resampling.BICUBIC)


def _query_cells(query: Query, table: Embeddings, root: Path, cfg: Config) -> list[Cell]:
    shown, more = query.images[:_SHOWN], len(query.images) - _SHOWN
    cells = []
    for image in shown:
        if isinstance(image, Path):
            cells.append(Cell(picture(os.fspath(image), cfg), "query", image.name))
        else:
            (row,) = table.take([image], ["path", "lon", "lat"]).to_pylist()
            cells.append(Cell(picture(_locate(root, row["path"]), cfg), "query", _named(**row)))
    if more > 0:
        last = cells[-1]
        cells[-1] = Cell(last.picture, f"query, and {more} more", last.text)
    return cells


def _locate(root: Path, path: str) -> str | Member | None:
    """Place of an embedded image now; None: its shard holds no such member."""
    if f"{SUFFIX}/" not in path or (root / path).exists():
        return os.fspath(root / path)
    shard, name = split_path(path)
    tar = os.fspath(root / shard)
    try:
        member = next((found for found in read_index(tar) or list_members(tar) if found.name == name), None)
    except (OSError, TarDamageError):
        return None
    return member and Member(tar, name, member.offset, member.size)


def _named(path: str, lon: float | None, lat: float | None) -> str:
    return path if lon is None or lat is None else f"{path} ({lon:.5f}, {lat:.5f})"


def _save(target: Path, head: str, query: list[Cell], found: list[Cell]) -> None:
    try:
        with whole_file(target) as partial:
            if target.suffix == ".html":
                partial.write_text(page(head, query, found), encoding="utf-8")
            else:
                draw(head, query, found).save(partial, "PNG")
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written ({error.strerror or error})") from error
