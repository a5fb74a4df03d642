"""Labelled images for probes: a folder per class, or a CSV that names file, class and split."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pera_fast.data.files.companions import hides
from pera_fast.errors import UserError
from pera_fast.features.images import is_image


@dataclass(frozen=True)
class LabelledFiles:
    """Image files with their class numbers.

    Attributes:
        files: one path an image.
        labels: class number of each, an index into classes.
        classes: names, sorted.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def split(self, share: float, seed: int = 0) -> tuple["LabelledFiles", "LabelledFiles"]:
        """Two disjoint parts; the second holds about ``share`` of every class."""
        rng = np.random.default_rng(seed)
        second: set[int] = set()
        for label in range(len(self.classes)):
            members = [i for i, other in enumerate(self.labels) if other == label]
            second.update(rng.permutation(members)[: round(len(members) * share)].tolist())
        return self._take([i for i in range(len(self.files)) if i not in second]), self._take(sorted(second))

    def _take(self, rows: Sequence[int]) -> "LabelledFiles":
        files, labels = tuple(self.files[i] for i in rows), tuple(self.labels[i] for i in rows)
        return LabelledFiles(files, labels, self.classes)


def class_folders(root: Path) -> LabelledFiles | None:
    """Images of ``root/CLASS/...``; None unless there are at least two classes with at least two images each."""
    found = {
        folder.name: sorted(p for p in folder.rglob("*") if is_image(p, root) and p.is_file())
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not hides(folder.name)
    }
    found = {name: files for name, files in found.items() if len(files) >= 2}
    if len(found) < 2:
        return None
    pairs = [(file, label) for label, files in enumerate(found.values()) for file in files]
    return LabelledFiles(tuple(f for f, _ in pairs), tuple(n for _, n in pairs), tuple(found))


def from_csv(path: Path, split: str | None = None) -> LabelledFiles:
    """Images that a CSV lists: columns ``file``, ``class`` and, where a split is asked for, ``split``.

    Files are relative to the folder of the CSV's name if there is one (scenes.csv: scenes/), else to the CSV's folder.

    Raises:
        UserError: the file is missing, a column is, or no row is left.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else f"no CSV file in UTF-8: {error}"
        raise UserError(f"{path}: cannot be read ({why})") from None
    wanted = ["file", "class", *(["split"] if split else [])]
    missing = [name for name in wanted if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; columns must be {', '.join(wanted)}")
    for number, row in enumerate(rows, 2):
        if not all(row[name] for name in wanted) or "\0" in row["file"]:
            raise UserError(f"{path}: line {number} of {', '.join(wanted)} lacks a value")
    rows = [row for row in rows if split is None or row["split"] == split]
    if not rows:
        raise UserError(f"{path}: no row of split {split}")
    base = path.with_suffix("") if path.with_suffix("").is_dir() else path.parent
    classes = tuple(sorted({row["class"] for row in rows}))
    numbers = {name: i for i, name in enumerate(classes)}
    return LabelledFiles(
        tuple(base / row["file"] for row in rows), tuple(numbers[row["class"]] for row in rows), classes
    )
