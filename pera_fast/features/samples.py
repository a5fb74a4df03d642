"""Labelled samples of the three tasks, from a CSV or from folders: scenes, masks of one image, masks of two.

A CSV's columns are `file,class,split`, `image,mask,split` or `before,after,mask,split`. Folders are one per class, or
`images` and `masks`, or `before`, `after` and `masks`, with files of the same stems; each may lie in folders `train`,
`val` and `test`.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pera_fast.config.keys import did_you_mean
from pera_fast.data.files.companions import hides
from pera_fast.errors import UserError, one_line
from pera_fast.features.images import is_image
from pera_fast.paths import local_path

TASKS = ("scene", "segmentation", "change")
SPLITS = ("train", "val", "test")
SEVERAL = "|"  # between the labels of a scene that has several
_SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_COLUMNS = {"scene": ("file", "class"), "segmentation": ("image", "mask"), "change": ("before", "after", "mask")}
_FOLDERS = {  # names that data sets of the field use, ours first
    "segmentation": (("images", "image", "img"), ("masks", "mask", "labels", "label", "gt")),
    "change": (("before", "A", "im1"), ("after", "B", "im2"), ("masks", "mask", "label", "labels", "OUT")),
}


@dataclass(frozen=True)
class Samples:
    """Labelled samples of one task, in a fixed order.

    Attributes:
        task: one of `TASKS`.
        images: paths of each sample: one image, or before and after.
        labels: of scenes: numbers of the classes of each sample, at least one; else empty.
        masks: of the other tasks: path of each sample's mask; else empty.
        splits: `train`, `val` or `test` of each sample; empty strings where nobody said.
        classes: names of the classes, sorted. Empty for masks, whose values are numbers.
        source: the CSV or folder, for messages.
    """

    task: str
    images: tuple[tuple[Path, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    masks: tuple[Path, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def several(self) -> bool:
        """Whether a scene has several labels."""
        return any(len(labels) > 1 for labels in self.labels)

    def take(self, rows: Iterable[int]) -> "Samples":
        """Some of the samples, in this order."""
        rows = list(rows)

        def some(values: Sequence) -> tuple:
            return tuple(values[row] for row in rows) if values else ()

        return replace(
            self, images=some(self.images), labels=some(self.labels), masks=some(self.masks), splits=some(self.splits)
        )

    def part(self, split: str) -> "Samples":
        """The samples of a split; none where it has none."""
        return self.take(row for row, name in enumerate(self.splits) if name == split)

    def need(self, split: str) -> "Samples":
        """The samples of a split. Raises UserError if it has none."""
        part = self.part(split)
        if not len(part):
            known = ", ".join(f"{name} {count}" for name, count in sorted(Counter(self.splits).items())) or "none"
            raise UserError(f"{self.source}: has no sample of split {split}; splits: {known}")
        return part

    def divided(self, share: float, seed: int = 0) -> tuple["Samples", "Samples"]:
        """Two disjoint parts; the second holds about `share` of the samples, of scenes about that of every class.

        Drawn by seed alone; a class of at least two scenes has one in each part.
        """
        rng = np.random.default_rng(seed)
        groups: dict[object, list[int]] = {}
        for row in range(len(self)):
            groups.setdefault(self.labels[row] if self.labels and not self.several else None, []).append(row)
        second: set[int] = set()
        for rows in groups.values():
            count = round(len(rows) * share)
            count = min(max(count, 1), len(rows) - 1) if len(rows) > 1 else 0
            second.update(rng.permutation(rows)[:count].tolist())
        return self.take(row for row in range(len(self)) if row not in second), self.take(sorted(second))


def read_samples(task: str, data: str | Path, root: str | Path | None = None) -> Samples:
    """The labelled samples of a CSV, or of a folder.

    Args:
        task: one of `TASKS`.
        data: a CSV file, or a folder as the module says.
        root: folder of the paths in a CSV. None: the CSV's own, else the folder of its name without `.csv`.

    Raises:
        UserError: the CSV lacks a column or a value, a file is missing, a class has one sample only, a class of `val`
            or `test` is not in `train`; or the folder has another form.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: no such task; known: {', '.join(TASKS)}{did_you_mean(task, TASKS)}")
    path = local_path("--data", data)
    if path.is_dir():
        if root is not None:
            raise UserError(f"--root {root}: is for a CSV, and --data {path} is a folder; leave it out")
        return _checked(_of_folder(task, path))
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    return _checked(_of_csv(task, path, None if root is None else local_path("--root", root)))


def _of_csv(task: str, path: Path, root: Path | None) -> Samples:
    columns = _COLUMNS[task]
    rows = read_csv(path, columns)
    base = root or csv_base(path, rows[0][columns[0]])
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    splits = []
    for number, row in enumerate(rows, 2):
        split = (row.get("split") or "").strip().lower()
        split = _SPLIT_NAMES.get(split, split)
        if split and split not in SPLITS:
            raise UserError(f"{path}: line {number}: split {one_line(row['split'])}: wants one of {', '.join(SPLITS)}")
        splits.append(split)
    if any(splits) and not all(splits):
        raise UserError(f"{path}: line {splits.index('') + 2} has no split, while others have; give all or none")
    files = columns[:1] if task == "scene" else columns[:-1]
    images = tuple(tuple(base / row[name] for name in files) for row in rows)
    if task == "scene":
        return _scenes(images, [row["class"].split(SEVERAL) for row in rows], splits, str(path))
    masks = tuple(base / row["mask"] for row in rows)
    return Samples(task, images, (), masks, tuple(splits), (), str(path))


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV, each with a value in these columns. Raises UserError for anything else."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, known = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else f"no CSV file in UTF-8: {error}"
        raise UserError(f"{path}: cannot be read ({why})") from None
    wanted = ",".join([*columns, "split"] if "mask" in columns or "class" in columns else columns)
    missing = [name for name in columns if name not in known]
    if missing:
        raise UserError(f"{path}: has no column {missing[0]}; columns must be {wanted}")
    if not rows:
        raise UserError(f"{path}: has no rows below its header")
    for number, row in enumerate(rows, 2):
        lacking = [name for name in columns if not (row[name] or "").strip() or "\0" in row[name]]
        if lacking:
            raise UserError(f"{path}: line {number} has no {lacking[0]}")
    return rows


def csv_base(path: Path, first: str) -> Path:
    """The CSV's folder, or else the folder of its name beside it, whichever holds the first file."""
    named = path.with_suffix("")
    return named if not os.path.exists(path.parent / first) and named.is_dir() else path.parent


def _scenes(
    images: tuple[tuple[Path, ...], ...], names: Sequence[Sequence[str]], splits: Sequence[str], source: str
) -> Samples:
    names = [[name.strip() for name in labels if name.strip()] for labels in names]
    classes = tuple(sorted({name for labels in names for name in labels}))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(tuple(sorted({numbers[name] for name in of_one})) for of_one in names)
    return Samples("scene", images, labels, (), tuple(splits), classes, source)


def _of_folder(task: str, root: Path) -> Samples:
    below = {name: root / name for name in SPLITS if (root / name).is_dir()}
    parts: Mapping[str, Path] = below if "train" in below else {"": root}
    read = _class_folders if task == "scene" else _stem_folders
    found = [(split, *row) for split, folder in parts.items() for row in read(task, folder)]
    splits, images, targets = zip(*found, strict=True)
    if task == "scene":
        return _scenes(images, [[name] for name in targets], splits, str(root))
    return Samples(task, images, (), targets, splits, (), str(root))


def _class_folders(task: str, root: Path) -> list[tuple[tuple[Path, ...], str]]:
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not hides(folder.name)]
    found = [
        ((path,), folder.name)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if is_image(path, root) and path.is_file()
    ]
    if len({name for _, name in found}) < 2:
        raise UserError(f"{root}: wants one folder a class, with images in at least two of them, or a CSV")
    return found


def pair_folders(root: Path) -> list[tuple[Path, ...]]:
    """Pairs (before, after) of files of the same stems in a folder. Raises UserError if it has another form."""
    return _same_stems("change", root, _FOLDERS["change"][:2])


def _stem_folders(task: str, root: Path) -> list[tuple[tuple[Path, ...], Path]]:
    return [(paths[:-1], paths[-1]) for paths in _same_stems(task, root, _FOLDERS[task])]


def _same_stems(task: str, root: Path, wanted_folders: Sequence[Sequence[str]]) -> list[tuple[Path, ...]]:
    """Files of the same stems, one of each folder, of which one of its names must be there."""
    folders: list[dict[str, Path]] = []
    for names in wanted_folders:
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            wanted = ", ".join(known[0] for known in wanted_folders)
            raise UserError(f"{root}: has no folder {names[0]}; for --task {task} it wants {wanted}, or a CSV")
        folders.append({path.stem: path for path in sorted(folder.iterdir()) if is_image(path, root)})
    first = folders[0]
    if not first:
        raise UserError(f"{root}: has no images in {wanted_folders[0][0]}")
    for stem, path in first.items():
        for other, names in zip(folders[1:], wanted_folders[1:], strict=True):
            if stem not in other:
                raise UserError(f"{path}: has no file of the same stem in {names[0]}")
    return [tuple(files[stem] for files in folders) for stem in first]


def _checked(samples: Samples) -> Samples:
    for paths in (*samples.images, *((mask,) for mask in samples.masks)):
        for path in paths:
            if not os.path.isfile(path):  # unlike Path.is_file it takes names of any length
                raise UserError(f"{samples.source}: {one_line(path)}: no such file; is --root right?")
    if samples.task == "scene":
        _check_classes(samples)
    return samples


def _check_classes(samples: Samples) -> None:
    """Raises UserError for classes that nothing can be learned of or measured on."""
    source, names = samples.source, [one_line(name) for name in samples.classes]
    if len(names) < 2:
        raise UserError(f"{source}: has one class only, {names[0]}; a classification wants two")
    counts = Counter(label for labels in samples.labels for label in labels)
    single = [names[label] for label, count in counts.items() if count == 1]
    if single:
        raise UserError(f"{source}: class {single[0]} has one image; it wants one to learn from and one to test on")
    known = {label for labels in samples.part("train").labels for label in labels}
    for split in SPLITS[1:] if known else ():
        unknown = [label for labels in samples.part(split).labels for label in labels if label not in known]
        if unknown:
            name = names[unknown[0]]
            hint = did_you_mean(name, [names[label] for label in known])
            raise UserError(f"{source}: class {name} of split {split} is not in split train{hint}")
