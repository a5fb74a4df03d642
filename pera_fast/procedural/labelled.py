"""Procedural pictures with masks: roads through the country, and pairs of one place between which houses came or went.

Roads share their colours with roofs and yards, and the light of a pair's two pictures differs, so that neither a
threshold on the colour nor on the difference answers. Every picture depends on (seed, index) alone.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pera_fast.keyed import Purpose, generator
from pera_fast.procedural.canvas import GROUNDS, PAVEMENTS, Array, Canvas, Pen
from pera_fast.procedural.scenes import REACH, draw

Picture = NDArray[np.uint8]
_COUNTRY = ("farmland", "forest", "dunes")  # that roads lead through


def road_scene(seed: int, index: int, size: int = 256) -> tuple[Picture, Picture]:
    """A picture of the country with one to three roads, houses and yards of the same colours beside them.

    Args:
        seed: of the set.
        index: of the picture.
        size: pixels a side.

    Returns:
        uint8 [size, size, 3], RGB, and its mask [size, size]: 1 on a road, else 0.
    """
    rng = generator(seed, Purpose.ROADS, index)
    canvas = Canvas(rng, size)
    draw(_COUNTRY[rng.integers(len(_COUNTRY))], canvas)
    roads = np.zeros((size, size), np.float32)
    color = canvas.pick(PAVEMENTS)
    for number in range(int(rng.integers(1, 4))):
        roads = np.maximum(roads, _road(canvas, across=bool(number % 2)))
    houses = canvas.pen()
    for _ in range(int(rng.integers(4, 14))):
        u, v = rng.uniform(-120, 120, 2)
        _house(houses, u, v, rng.uniform(10, 24, 2), canvas.pick(PAVEMENTS), rng.normal(0, 0.2))
    houses.done()
    canvas.blend(roads, color + (canvas.noise(60, 1) * 0.012)[..., None])  # a road hides what it is led through
    return canvas.finish(), (roads > 0.5).astype(np.uint8)


def change_pair(seed: int, index: int, size: int = 256) -> tuple[Picture, Picture, Picture]:
    """Two pictures of one place, each in a light of its own; between them some houses were built, others pulled down.

    Args:
        seed, index, size: as of `road_scene`.

    Returns:
        Before and after, uint8 [size, size, 3], RGB, and the mask [size, size]: 1 where a house came or went, else 0.
    """
    pictures, footprints = [], []
    for after in (False, True):
        rng = generator(seed, Purpose.CHANGES, index)
        canvas = Canvas(rng, size)
        draw(_COUNTRY[rng.integers(len(_COUNTRY))], canvas)
        houses, footprint = canvas.pen(), Canvas(generator(seed, Purpose.CHANGES, index), size)
        outline = footprint.pen()
        for _ in range(int(rng.integers(10, 26))):
            u, v = rng.uniform(-125, 125, 2)
            sides, roof, turn = rng.uniform(18, 40, 2), canvas.pick(PAVEMENTS + GROUNDS), rng.normal(0, 0.2)
            first, second = rng.random(2) < (0.7, 0.6)  # whether it stands before, and after
            if second if after else first:
                _house(houses, u, v, sides, roof, turn)
            if first != second:
                outline.rectangle(u, v, *sides, np.ones(3, np.float32), turn)
        houses.done()
        outline.done()
        canvas.rng = generator(seed, Purpose.CHANGES, index, 1 + after)  # the light of the day
        pictures.append(canvas.finish())
        footprints.append((footprint.pixels[..., 0] > 0.5).astype(np.uint8))
    return pictures[0], pictures[1], footprints[0]


def write_roads(folder: Path, train: int, test: int, seed: int = 0, size: int = 256) -> Path:
    """Write pictures and masks of `road_scene`, and return their CSV: columns image, mask, split."""
    return _write(folder, ("image", "mask"), lambda index: road_scene(seed, index, size), (train, test))


def write_changes(folder: Path, train: int, test: int, seed: int = 0, size: int = 256) -> Path:
    """Write pictures and masks of `change_pair`, and return their CSV: columns before, after, mask, split."""
    return _write(folder, ("before", "after", "mask"), lambda index: change_pair(seed, index, size), (train, test))


def _write(
    folder: Path, columns: Sequence[str], make: Callable[[int], Sequence[Picture]], counts: tuple[int, int]
) -> Path:
    for name in columns:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(sum(counts)):
        paths = [f"{name}/{index:04d}.{'png' if name == 'mask' else 'jpg'}" for name in columns]
        if not all((folder / path).exists() for path in paths):
            for path, picture in zip(paths, make(index), strict=True):
                Image.fromarray(picture).save(folder / path, quality=92)
        rows.append([*paths, "train" if index < counts[0] else "test"])
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*columns, "split"], *rows])
    return table


def _road(canvas: Canvas, across: bool) -> Array:
    """Opacity [size, size] of one winding road, along u or across it."""
    rng = canvas.rng
    along, beside = (canvas.v, canvas.u) if across else (canvas.u, canvas.v)
    swing, period = rng.uniform(5, 30), rng.uniform(35, 80)
    phase = along / np.float32(period) + np.float32(rng.uniform(0, 6))
    slope = swing / period * np.cos(phase)
    distance = np.abs(beside - rng.uniform(-0.4, 0.4) * REACH - swing * np.sin(phase)) / np.sqrt(1 + slope**2)
    return np.clip((rng.uniform(4, 8) - distance) * canvas.unit + 0.5, 0, 1).astype("f4")


def _house(pen: Pen, u: float, v: float, sides: NDArray, roof: Array, turn: float) -> None:
    """A roof with two slopes and its shadow."""
    width, depth = sides
    pen.rectangle(u + 2, v + 2, width, depth, np.full(3, 0.1, np.float32), turn)
    pen.rectangle(u, v, width, depth, roof, turn)
    pen.rectangle(u, v, width, depth * 0.45, roof * np.float32(0.82), turn)
