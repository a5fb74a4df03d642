"""Curves of a run's metrics over steps, epochs or hours."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pera_fast.durable import read_object
from pera_fast.errors import UserError
from pera_fast.plot.curves import Smoother, Thinned
from pera_fast.plot.read import read_columns

X = Literal["step", "epoch", "hours"]
UNITS: tuple[X, ...] = ("step", "epoch", "hours")
SPARSE = 0.5  # of the steps: a key that fewer have is measured now and then, such as probe_knn


@dataclass
class Curve:
    """One key of one run; thinned.

    Attributes:
        points: x, mean, least and most of successive points, float64 [4, M].
        smooth: x and mean of the smoothed values, [2, M]; None: it is not smoothed.
        count: points that there are in the file.
        last: value of the last one.
        sparse: fewer than half of the steps have it.
    """

    points: np.ndarray
    smooth: np.ndarray | None
    count: int
    last: float
    sparse: bool


@dataclass
class RunCurves:
    """All curves of a run."""

    name: str
    path: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    steps: int = 0  # the greatest step


class _Growing:
    def __init__(self, smooth: int):
        self.raw, self.smoothed, self.smoother = Thinned(), Thinned(), Smoother(smooth)
        self.smooth, self.count, self.last = smooth, 0, float("nan")

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        self.raw.add(x, y)
        if self.smooth > 1:
            self.smoothed.add(x, self.smoother(y))
        self.count += len(y)
        self.last = float(y[-1])


def metrics_file(run: Path) -> Path:
    """The metrics of a run's folder, or of the file itself. Raises UserError if there are none."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give run folders (--out of `pera-fast pretrain`)")
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run}: holds no metrics.jsonl, so no run; give run folders (--out of `pera-fast pretrain`)")
    return run / "metrics.jsonl"


def read_run(run: Path, name: str, unit: X = "step", smooth: int = 1) -> RunCurves:
    """Curves of every key of a run.

    Args:
        run: its folder, or its metrics.jsonl.
        name: for the legend.
        unit: of x. Epochs are counted from 0 with fractions; hours are the steps' own time, without pauses.
        smooth: points that are averaged.

    Raises:
        UserError: there is no run, it cannot be read, or it does not have what the unit wants.
    """
    path, growing, axis = metrics_file(run), {}, _Axis(unit)
    try:
        for columns in read_columns(path):
            x = axis.add(columns)
            for key, values in columns.items():
                if key == "step" or (key == "epoch" and unit == "epoch"):
                    continue
                there = np.isfinite(values)
                growing.setdefault(key, _Growing(smooth)).add(x[there], values[there])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    place = axis.places(path)
    found = RunCurves(name, path, steps=int(axis.last))
    for key, grown in growing.items():
        points, sparse = grown.raw.points(), grown.count < SPARSE * axis.count
        smoothed = grown.smoothed.points()[:2] if smooth > 1 and not sparse else None
        for curve in (points, smoothed):
            if curve is not None:
                curve[0] = place(curve[0])
        found.curves[key] = Curve(points, smoothed, grown.count, grown.last, sparse)
    return found


class _Axis:
    """Turns steps into the unit of x: hours at once; epochs when all is read, and the last one's length is known."""

    def __init__(self, unit: X):
        self.unit = unit
        self.count = 0  # lines with the numbers of a step
        self.last = 0.0  # step
        self._hours, self._timed = 0.0, False
        self._epochs: dict[int, float] = {}  # first step of each

    def add(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """x of the next lines: hours, else steps."""
        steps = columns["step"]
        if not len(steps):
            return steps
        self.count += int(np.count_nonzero(np.diff(steps, prepend=self.last)))  # a step may have several lines
        self.last = float(steps[-1])
        if "epoch" in columns and self.unit == "epoch":
            numbers, first = np.unique(columns["epoch"], return_index=True)
            for number, at in zip(numbers[np.isfinite(numbers)], first, strict=False):
                self._epochs.setdefault(int(number), float(steps[at]))
        if self.unit != "hours":
            return steps
        self._timed |= "seconds" in columns
        hours = self._hours + np.cumsum(np.nan_to_num(columns.get("seconds", np.zeros_like(steps)))) / 3600
        self._hours = float(hours[-1])
        return hours

    def places(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        """A function from what `add` returned to x. Raises UserError if the unit cannot be had."""
        if not self.count or self.unit == "step":
            return lambda x: x
        if self.unit == "hours":
            if not self._timed:
                raise UserError(f"--x hours: {path} does not tell the seconds of its steps; give --x step")
            return lambda x: x
        return self._by_epoch(path)

    def _by_epoch(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        known = sorted(self._epochs.items())
        if not known:
            raise UserError(f"--x epoch: {path} does not tell the epochs of its steps; give --x step")
        numbers, firsts = (np.array(values, dtype=float) for values in zip(*known, strict=True))
        length = _steps_per_epoch(path)
        if length is None and len(known) > 1:
            length = float((firsts[-1] - firsts[0]) / (numbers[-1] - numbers[0]))
        if length is None:
            raise UserError(f"--x epoch: {path} ends within its first epoch, whose length is not known; give --x step")
        # The step with number s is done at place s; the first of an epoch begins one step earlier.
        begins = np.append(firsts - 1, firsts[-1] - 1 + length)
        ends = np.append(numbers, numbers[-1] + 1)
        return lambda x: np.interp(x, begins, ends)


def _steps_per_epoch(path: Path) -> float | None:
    """The length of an epoch in a run that is done."""
    try:
        told = read_object(path.with_name("finished.json")).get("steps_per_epoch")
    except (OSError, ValueError):
        return None
    return float(told) if isinstance(told, int) and told > 0 else None
