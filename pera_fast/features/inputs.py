"""Finds the images of a prediction: one file, a folder, or a CSV; for changes pairs of them."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pera_fast.data.files.companions import hides
from pera_fast.errors import UserError
from pera_fast.features.images import is_image
from pera_fast.features.samples import csv_base, pair_folders, read_csv
from pera_fast.paths import local_path

_COLUMNS = (("file",), ("image",))


@dataclass(frozen=True)
class Input:
    """One image or pair.

    Attributes:
        name: relative path, without the suffix where that makes no two equal; names what results.
        file: path of the (first) image as the CSV has it, or from the folder on.
        paths: one image, or before and after.
    """

    name: str
    file: str
    paths: tuple[Path, ...]


_Found = tuple[str, tuple[Path, ...]]  # what the user calls it, and its images


def find_inputs(data: str | os.PathLike[str], pairs: bool, root: str | os.PathLike[str] | None = None) -> list[Input]:
    """Images in the order of their paths, or of a CSV's rows.

    Args:
        data: an image, a folder that is searched recursively, or a CSV with a column `file` or `image`. For pairs a
            folder with `before` and `after` of files of the same stems, or a CSV with these columns.
        pairs: whether an input is a pair.
        root: folder of the paths in a CSV. None: the CSV's own, else the folder of its name without `.csv`.

    Raises:
        UserError: there is no such file, or nothing in it; a CSV lacks a column or a value.
    """
    path = local_path("--data", data)
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    if root is not None and (path.suffix.lower() != ".csv" or path.is_dir()):
        raise UserError(f"--root {root}: is for a CSV, and --data {path} is none; leave it out")
    if path.is_dir():
        found = _of_pairs(path) if pairs else _of_folder(path)
    elif path.suffix.lower() == ".csv":
        found = _of_csv(path, pairs, None if root is None else local_path("--root", root))
    elif pairs:
        raise UserError(f"--data {path}: is one file, and changes want pairs: a folder with before and after, or a CSV")
    else:
        found = [(path.name, (path,))]
    return _named(found)


def _of_folder(root: Path) -> list[_Found]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not hides(name))
        found += [Path(folder, name) for name in files if is_image(Path(folder, name), root)]
    if not found:
        raise UserError(f"--data {root}: holds no images")
    return [(str(path.relative_to(root)), (path,)) for path in sorted(found)]


def _of_pairs(root: Path) -> list[_Found]:
    return [(paths[0].name, paths) for paths in pair_folders(root)]


def _of_csv(path: Path, pairs: bool, root: Path | None) -> list[_Found]:
    columns = ("before", "after") if pairs else None
    if columns is None:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            head = [name.strip() for name in file.readline().split(",")]
        columns = next((columns for columns in _COLUMNS if columns[0] in head), _COLUMNS[0])
    rows = read_csv(path, columns)
    base = root or csv_base(path, rows[0][columns[0]])
    return [(row[columns[0]], tuple(base / row[name] for name in columns)) for row in rows]


def _relative(text: str) -> Path:
    """A path that stays below any folder that it is joined to."""
    return Path(*(part for part in Path(text).parts if part not in (os.sep, "..")))


def _named(found: list[_Found]) -> list[Input]:
    places = [_relative(file) for file, _ in found]
    stems = Counter(place.with_suffix("") for place in places)
    names = [str(place.with_suffix("") if stems[place.with_suffix("")] == 1 else place) for place in places]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"--data: {twice[0]} is there twice; results would overwrite each other")
    return [Input(name, file, paths) for name, (file, paths) in zip(names, found, strict=True)]
