"""Procedural overhead scenes of eight classes, told apart by structure rather than by colour.

Grounds, lights and tints come from pools that the classes share, so the mean colour says little about the class: a
network has to learn layout and texture. Every scene depends on (seed, class, index) alone.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pera_fast.keyed import Purpose, generator
from pera_fast.procedural.canvas import GROUNDS, PAVEMENTS, WATERS, Array, Canvas

REACH = 190.0  # half the diagonal of a 256 px scene, rounded up: covers the picture at any angle


def _cuts(rng: np.random.Generator, low: float, high: float) -> list[float]:
    """Positions from -REACH to REACH at random steps between `low` and `high`."""
    positions = [-REACH - float(rng.uniform(0, high))]
    while positions[-1] < REACH:
        positions.append(positions[-1] + float(rng.uniform(low, high)))
    return positions


def _shade(color: Array, amount: float) -> Array:
    return np.clip(color * np.float32(amount), 0, 1)


def _farmland(c: Canvas) -> None:
    rng = c.rng
    c.fill(c.pick(GROUNDS), 0.02)
    pool = [c.pick(GROUNDS) for _ in range(4)]
    columns = _cuts(rng, 50, 110)
    for left, right in pairwise(columns):
        rows = _cuts(rng, 35, 120)
        for top, bottom in pairwise(rows):
            inside = (c.u > left + 1.5) & (c.u < right - 1.5) & (c.v > top + 1.5) & (c.v < bottom - 1.5)
            if not inside.any():
                continue
            along = c.u if rng.random() < 0.5 else c.v
            period = rng.uniform(4.5, 9)
            rows_of_crop = 0.06 * np.sin(along[inside] * np.float32(2 * np.pi / period) + rng.uniform(0, 6)).astype(
                "f4"
            )
            color = pool[rng.integers(len(pool))] + rng.normal(0, 0.04)
            c.pixels[inside] = color + (rows_of_crop * np.float32(rng.uniform(0.4, 1)))[:, None]
    c.pixels += (c.noise(20, 2) * 0.015)[..., None]


def _forest(c: Canvas) -> None:
    rng = c.rng
    ground = c.pick(GROUNDS)
    c.fill(_shade(ground, 0.55), 0.02)
    crown = c.pick(GROUNDS)
    radius = rng.uniform(6, 11)
    step = radius * rng.uniform(1.25, 1.6)
    light = rng.uniform(0, 2 * np.pi)
    sun = (float(np.cos(light)), float(np.sin(light)))
    pen = c.pen()
    spots = np.arange(-REACH, REACH, step)
    places = (
        np.stack(np.meshgrid(spots, spots), -1).reshape(-1, 2) + rng.uniform(-0.55, 0.55, (len(spots) ** 2, 2)) * step
    )
    places = places[np.abs(places).max(1) < REACH]
    for u, v in places[rng.permutation(len(places))]:
        r = radius * rng.uniform(0.65, 1.35)
        tone = crown * rng.uniform(0.75, 1.25) + rng.normal(0, 0.02, 3)
        pen.disc(u, v, r, _shade(tone, 0.6))
        pen.disc(u, v, r * 0.85, tone, (sun[0] * r * 0.2, sun[1] * r * 0.2))
        pen.disc(u, v, r * 0.45, _shade(tone, 1.2), (sun[0] * r * 0.4, sun[1] * r * 0.4))
    pen.done()
    c.pixels += (c.noise(70, 1) * 0.025)[..., None]


def _residential(c: Canvas) -> None:
    rng = c.rng
    c.fill(c.pick(GROUNDS), 0.04)
    street, roofs = c.pick(PAVEMENTS), [c.pick(GROUNDS) + np.float32(0.1), c.pick(PAVEMENTS), c.pick(PAVEMENTS)]
    tree = _shade(c.pick(GROUNDS), 0.6)
    block, lot = rng.uniform(58, 78), rng.uniform(24, 32)
    first, cross = rng.uniform(-block, 0), rng.uniform(90, 150)
    pen = c.pen()
    for v in np.arange(first - REACH, REACH + block, block):
        pen.rectangle(0, v, 2.4 * REACH, 10, street)
        for side in (-1, 1):
            for u in np.arange(-REACH + rng.uniform(0, lot), REACH, lot):
                width, depth = lot * rng.uniform(0.5, 0.75), block * rng.uniform(0.16, 0.22)
                at = v + side * block * 0.26
                roof = roofs[rng.integers(3)] * rng.uniform(0.85, 1.15)
                turn = rng.normal(0, 0.03)
                pen.rectangle(u + 2, at + 2, width, depth, np.full(3, 0.1, np.float32), turn)
                pen.rectangle(u, at, width, depth, roof, turn)
                pen.rectangle(u, at - depth / 4, width, depth / 2, _shade(roof, 0.78), turn)
                if rng.random() < 0.5:
                    pen.disc(
                        u + lot / 2, at + rng.uniform(-8, 8), rng.uniform(3, 6), _shade(tree, rng.uniform(0.8, 1.3))
                    )
    for u in np.arange(rng.uniform(-REACH - cross, -REACH), REACH, cross):
        pen.rectangle(u, 0, 9, 2.4 * REACH, street)
    pen.done()


def _river(c: Canvas) -> None:
    rng = c.rng
    c.fill(c.pick(GROUNDS), 0.05, 8)
    middle = sum(
        rng.uniform(8, 26) / (k + 1) * np.sin(c.u * np.float32((k + 1) / rng.uniform(34, 60)) + rng.uniform(0, 6))
        for k in range(2)
    )
    distance = np.abs(c.v - middle - rng.uniform(-40, 40)) + c.noise(14, 2) * 1.5
    half = rng.uniform(12, 30) + 4 * np.sin(c.u / 40 + rng.uniform(0, 6))
    bank = np.clip(half + rng.uniform(4, 12) - distance, 0, 1).astype("f4")
    c.blend(bank, c.pick(GROUNDS))
    water = c.pick(WATERS)
    c.blend(np.clip((half - distance) / 1.5, 0, 1).astype("f4"), water + (c.noise(6, 2) * 0.012)[..., None])
    pen = c.pen()
    for u, v in rng.uniform(-128, 128, (int(rng.integers(10, 60)), 2)):  # scattered bushes on the banks
        x, y = (int(np.clip(value, 0, c.size - 1)) for value in c.place(u, v))
        if bank[y, x] == 0:
            pen.disc(u, v, rng.uniform(2, 5), _shade(c.pixels[y, x], 0.6))
    pen.done()


def _parking(c: Canvas) -> None:
    rng = c.rng
    c.fill(c.pick(PAVEMENTS + GROUNDS[5:]), 0.015)
    length, width, aisle = rng.uniform(15, 19), rng.uniform(7.5, 9), rng.uniform(15, 22)
    line = np.full(3, rng.uniform(0.7, 0.95), np.float32)
    full = rng.uniform(0.35, 0.9)
    pen = c.pen()
    for v in np.arange(-REACH + rng.uniform(0, 40), REACH, 2 * length + aisle):
        pen.rectangle(0, v, 2.4 * REACH, 0.9, line)
        for u in np.arange(-REACH, REACH, width):
            pen.rectangle(u, v, 0.8, 2 * length, line)
            for side in (-1, 1):
                if rng.random() < full:
                    paint = np.full(3, rng.uniform(0.08, 0.95)) if rng.random() < 0.7 else rng.uniform(0.1, 0.8, 3)
                    at, turn = v + side * length * 0.52, rng.normal(0, 0.03)
                    across, along = width * 0.62, length * 0.78
                    pen.rectangle(u + width / 2 + 1, at + 1, across, along, np.full(3, 0.08, np.float32), turn)
                    pen.rectangle(u + width / 2, at, across, along, paint, turn)
                    pen.rectangle(
                        u + width / 2, at + along * 0.05, across * 0.85, along * 0.42, _shade(paint, 0.6), turn
                    )
    pen.done()


def _runway(c: Canvas) -> None:
    rng = c.rng
    c.fill(c.pick(GROUNDS), 0.04, 8)
    stripes = np.sin(c.v * np.float32(2 * np.pi / rng.uniform(18, 30)))  # mown grass
    c.pixels += (stripes * np.float32(rng.uniform(0, 0.015)))[..., None]
    asphalt, paint = c.pick(PAVEMENTS), np.full(3, rng.uniform(0.75, 0.95), np.float32)
    at, width = rng.uniform(-45, 45), rng.uniform(30, 48)
    end = rng.uniform(-90, 20) if rng.random() < 0.6 else -2 * REACH  # the threshold, if it is in the picture
    pen = c.pen()
    beside = at + (1 if at < 0 else -1) * rng.uniform(58, 80)
    pen.rectangle(0, beside, 2.4 * REACH, 14, _shade(asphalt, 1.08))
    for u in np.arange(rng.uniform(-REACH, -60), REACH, rng.uniform(90, 140)):
        pen.rectangle(u, (at + beside) / 2, 13, abs(beside - at), _shade(asphalt, 1.08))
    pen.rectangle(0, beside, 2.4 * REACH, 0.9, np.asarray((0.8, 0.7, 0.3), np.float32))
    pen.rectangle(end + 1.5 * REACH, at, 3 * REACH, width, asphalt)
    for side in (-1, 1):
        pen.rectangle(end + 1.5 * REACH, at + side * width * 0.45, 3 * REACH, 1.1, paint)
    for u in np.arange(end + 45, REACH, 24):
        pen.rectangle(u, at, 13, 1.6, paint)
    for v in np.linspace(-0.38, 0.38, 8):
        pen.rectangle(end + 16, at + v * width, 20, width * 0.055, paint)
    for u in np.arange(end + 60, REACH, 3 * 24):
        for side in (-1, 1):
            pen.rectangle(u, at + side * width * 0.25, 14, 2.5, paint)
    pen.done()
    c.pixels += (c.noise(40, 2) * 0.012)[..., None]


def _coast(c: Canvas) -> None:
    rng = c.rng
    c.fill(c.pick(GROUNDS), 0.06, 10)
    shore = c.v + c.noise(3, 3) * rng.uniform(8, 22) + rng.uniform(-50, 50)  # > 0: towards the sea
    beach = rng.uniform(10, 30)
    c.blend(np.clip((shore + beach) / 4, 0, 1).astype("f4"), c.pick(GROUNDS[3:]) + np.float32(0.08))
    period = rng.uniform(7, 16)
    waves = np.sin(shore * np.float32(2 * np.pi / period) + c.noise(7, 2)) * np.exp(-np.clip(shore, 0, None) / 45)
    sea = c.pick(WATERS) + (waves * 0.05 + c.noise(30, 2) * 0.015)[..., None]
    c.blend(np.clip(shore / 2, 0, 1).astype("f4"), sea.astype("f4"))
    for line in (0.0, period, 2 * period)[: int(rng.integers(1, 4))]:  # breakers
        foam = np.exp(-(((shore - line - 2) / 2.2) ** 2)) * np.clip(0.7 + 0.5 * c.noise(25, 1), 0, 1)
        c.blend(foam.astype("f4"), np.full(3, 0.92, np.float32))


def _dunes(c: Canvas) -> None:
    rng = c.rng
    sand = c.pick(GROUNDS)
    wavelength = rng.uniform(16, 42)
    phase = (c.u + c.noise(4, 2) * rng.uniform(6, 15)) / wavelength + c.noise(9, 1) * 0.06
    ramp = (phase - np.floor(phase)).astype("f4")  # a long windward slope, then a short lee in shadow
    lee = rng.uniform(0.18, 0.35)
    height = np.where(ramp < 1 - lee, ramp / (1 - lee), (1 - ramp) / lee)
    shade = np.where(ramp < 1 - lee, 0.05 + 0.16 * height, -0.2 + 0.05 * height) * rng.uniform(0.7, 1.2)
    ripples = 0.02 * np.sin(phase * np.float32(2 * np.pi * rng.integers(5, 8)) + c.noise(12, 1))
    c.pixels[:] = sand
    c.pixels += (shade + ripples + c.noise(50, 1) * 0.012)[..., None].astype("f4")


_DRAW: dict[str, Callable[[Canvas], None]] = {
    "coast": _coast,
    "dunes": _dunes,
    "farmland": _farmland,
    "forest": _forest,
    "parking": _parking,
    "residential": _residential,
    "river": _river,
    "runway": _runway,
}
CLASSES: tuple[str, ...] = tuple(_DRAW)


def draw(name: str, canvas: Canvas) -> None:
    """Draw a scene of a class (`CLASSES`) on a canvas."""
    _DRAW[name](canvas)


def scene(seed: int, label: int, index: int, size: int = 256) -> NDArray[np.uint8]:
    """One scene.

    Args:
        seed: the set's seed.
        label: number of the class in `CLASSES`.
        index: number of the scene within its class.
        size: pixels per side.

    Returns:
        uint8 [size, size, 3], RGB; the same for the same arguments.
    """
    canvas = Canvas(generator(seed, Purpose.SCENE, label, index), size)
    draw(CLASSES[label], canvas)
    return canvas.finish()


def write_scenes(folder: Path, count: int, *, seed: int = 0, first: int = 0, size: int = 256) -> list[Path]:
    """Writes scenes `first` to `first + count - 1` of every class as `folder/CLASS/CLASS_0000.jpg`.

    Files that are there already are left alone: the same seed would give the same picture.
    """
    written = []
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            path = folder / name / f"{name}_{index:04d}.jpg"
            if not path.exists():
                Image.fromarray(scene(seed, label, index, size)).save(path, quality=92)
            written.append(path)
    return written
