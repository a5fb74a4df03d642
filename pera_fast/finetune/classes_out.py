"""Writes predicted classes of scenes to a CSV, which is there under its name once it is whole."""

import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pera_fast.durable import partial_path
from pera_fast.errors import UserError
from pera_fast.features.samples import SEVERAL

_ALL = 32  # classes that have a column each
_BEST = 5  # of more


class ClassesFile:
    """Context manager: rows file, class and probabilities; what an interrupted call has written stays.

    Up to 32 classes have a column each, of more the five most probable are named. A scene with several labels has those
    with a probability above one half, joined by `|`.

    Attributes:
        done: files that have a row.
    """

    def __init__(self, path: Path, classes: tuple[str, ...], several: bool):
        self._path, self._classes, self._several = path, classes, several
        self.done: set[str] = set()
        if len(classes) <= _ALL:
            self._columns = ["file", "class", *(f"p({name})" for name in classes)]
        else:
            best = [(f"class_{n}", f"p_{n}") for n in range(1, _BEST + 1)]
            self._columns = ["file", "class", *(name for pair in best for name in pair)]

    def __enter__(self) -> "ClassesFile":
        partial = partial_path(self._path)
        if self._path.exists() and not partial.exists():
            shutil.copyfile(self._path, partial)
        self._take_up(partial)
        self._file: IO[str] = open(partial, "a", newline="", encoding="utf-8", errors="surrogateescape")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not self._file.tell():
            self._writer.writerow(self._columns)
        return self

    def _take_up(self, partial: Path) -> None:
        """Read what an earlier call has written, without a last line that it did not finish."""
        if not partial.exists():
            return
        text = partial.read_bytes()
        text = text[: text.rfind(b"\n") + 1]
        rows = list(csv.reader(text.decode("utf-8", "surrogateescape").splitlines()))
        if rows and rows[0] != self._columns:
            raise UserError(f"{self._path}: has other columns, of another network; give another --out")
        partial.write_bytes(text)
        self.done = {row[0] for row in rows[1:] if row}

    def add(self, files: Sequence[str], logits: Tensor) -> None:
        """Rows of files, with logits float32 [n, K]."""
        shares = logits.sigmoid() if self._several else logits.softmax(1)
        for file, row in zip(files, shares, strict=True):
            self._writer.writerow([file, self._named(row), *self._numbers(row)])
        self._file.flush()

    def _named(self, shares: Tensor) -> str:
        if not self._several:
            return self._classes[int(shares.argmax())]
        return SEVERAL.join(name for name, share in zip(self._classes, shares.tolist(), strict=True) if share > 0.5)

    def _numbers(self, shares: Tensor) -> list[Any]:
        if len(self._classes) <= _ALL:
            return [f"{share:.6g}" for share in shares.tolist()]
        best = torch.topk(shares, _BEST)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [value for number, share in pairs for value in (self._classes[number], f"{share:.6g}")]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()
        if kind is None and (self.done or partial_path(self._path).stat().st_size):
            os.replace(partial_path(self._path), self._path)
