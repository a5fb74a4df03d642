"""A drawing surface for overhead scenes: rotated coordinates, polygons and smooth noise, on NumPy and Pillow."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]
Color = tuple[float, float, float]

# One narrow pool of grounds for all classes, as one sensor sees one region: colour says little about the class of a
# scene, and little about which scene of the class it is, so that neither is what a network learns to match views by.
GROUNDS: tuple[Color, ...] = (
    (0.38, 0.40, 0.28),
    (0.44, 0.42, 0.31),
    (0.34, 0.37, 0.27),
    (0.48, 0.44, 0.34),
)
WATERS: tuple[Color, ...] = ((0.24, 0.31, 0.33), (0.28, 0.34, 0.32), (0.21, 0.27, 0.29))
PAVEMENTS: tuple[Color, ...] = ((0.40, 0.40, 0.39), (0.50, 0.49, 0.47), (0.34, 0.34, 0.34))


class Canvas:
    """A square float32 RGB picture in [0, 1] with a rotated coordinate system.

    `u` and `v` are pixel coordinates turned by a random angle about the centre, both 0 there, so that a scene that is
    drawn along u and v has no preferred direction. Everything random comes from `rng`.
    """

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng = rng
        self.size = size
        self.unit = size / 256  # lengths below are in units of a 256 px scene
        self.angle = float(rng.uniform(0, 2 * np.pi))
        grid = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) / self.unit
        x, y = np.meshgrid(grid, grid)
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        self.u: Array = x * cos + y * sin
        self.v: Array = y * cos - x * sin
        self.pixels: Array = np.zeros((size, size, 3), np.float32)

    def pick(self, pool: tuple[Color, ...], spread: float = 0.02) -> Array:
        """A colour of the pool, moved a little."""
        return np.asarray(pool[self.rng.integers(len(pool))], np.float32) + self.rng.normal(0, spread, 3).astype("f4")

    def noise(self, cells: float, octaves: int = 1) -> Array:
        """Smooth noise [size, size] of about unit variance, with `cells` random cells across the picture."""
        total = np.zeros((self.size, self.size), np.float32)
        weight = 0.0
        for octave in range(octaves):
            count = max(int(cells * 2**octave), 1) + 3
            values = self.rng.normal(0, 1.4, (count, count)).astype("f4")
            box = (1.0, 1.0, count - 1.0, count - 1.0)
            smooth = Image.fromarray(values).resize((self.size, self.size), Image.Resampling.BICUBIC, box)
            total += np.asarray(smooth) * 0.55**octave
            weight += 0.55 ** (2 * octave)
        return total / np.float32(np.sqrt(weight))

    def fill(self, color: Array, texture: float = 0.03, cells: float = 12) -> None:
        """Covers everything with one ground and its texture."""
        self.pixels[:] = color
        self.pixels += (self.noise(cells, 3) * texture)[..., None]

    def blend(self, mask: Array, color: Array) -> None:
        """Paints `color` (one colour, or a picture) with opacity `mask` [size, size] in [0, 1]."""
        self.pixels += mask[..., None] * (color - self.pixels)

    def corners(self, u: float, v: float, width: float, height: float, turn: float = 0.0) -> list[tuple[float, float]]:
        """Pixel corners of a rectangle centred at (u, v), turned by `turn` against the scene's own angle."""
        angle = self.angle + turn
        half = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))
        cx, cy = self.place(u, v)
        cos, sin = np.cos(angle) * self.unit, np.sin(angle) * self.unit
        return [(cx + a * width * cos - b * height * sin, cy + a * width * sin + b * height * cos) for a, b in half]

    def place(self, u: float, v: float) -> tuple[float, float]:
        """Pixel coordinates of the point (u, v)."""
        cos, sin = np.cos(self.angle) * self.unit, np.sin(self.angle) * self.unit
        return u * cos - v * sin + self.size / 2, u * sin + v * cos + self.size / 2

    def pen(self) -> "Pen":
        """A pen for sharp shapes; call its `done` to put them on the canvas."""
        return Pen(self)

    def finish(self) -> NDArray[np.uint8]:
        """The picture under a random light; uint8 [size, size, 3].

        Brightness and contrast differ widely, as the student's jitter does: they are no cue to match views by, and they
        mislead a network that has not learned to look past them. Tint and haze hardly differ.
        """
        rng = self.rng
        picture = np.clip(self.pixels, 0, 1) ** np.float32(rng.uniform(0.8, 1.3))
        mean = picture.mean()
        picture = mean + (picture - mean) * np.float32(rng.uniform(0.4, 1.25))
        picture = picture * np.float32(rng.uniform(0.6, 1.5)) * rng.uniform(0.97, 1.03, 3).astype("f4")
        haze = np.float32(rng.uniform(0, 0.08))
        picture = picture * (1 - haze) + haze * np.float32(0.66)
        picture += rng.normal(0, 0.012, picture.shape).astype("f4")
        return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


class Pen:
    """Sharp antialiased shapes: drawn at twice the size, reduced onto the canvas."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        size = (canvas.size * 2, canvas.size * 2)
        self.layer = Image.new("RGBA", size)
        self.draw = ImageDraw.Draw(self.layer)

    def polygon(self, points: list[tuple[float, float]], color: Array) -> None:
        """A filled polygon with corners in pixels."""
        self.draw.polygon([(2 * x, 2 * y) for x, y in points], fill=_rgba(color))

    def rectangle(self, u: float, v: float, width: float, height: float, color: Array, turn: float = 0.0) -> None:
        """A filled rectangle in scene coordinates."""
        self.polygon(self.canvas.corners(u, v, width, height, turn), color)

    def disc(self, u: float, v: float, radius: float, color: Array, shift: tuple[float, float] = (0, 0)) -> None:
        """A filled disc in scene coordinates; `shift` moves it in the picture's own directions (for shadows)."""
        x, y = self.canvas.place(u, v)
        r = radius * self.canvas.unit
        x, y = x + shift[0] * self.canvas.unit, y + shift[1] * self.canvas.unit
        self.draw.ellipse((2 * (x - r), 2 * (y - r), 2 * (x + r), 2 * (y + r)), fill=_rgba(color))

    def done(self) -> None:
        """Puts the shapes on the canvas."""
        reduced = np.asarray(self.layer.convert("RGBa").reduce(2), np.float32) / 255  # premultiplied, so edges blend
        self.canvas.pixels *= 1 - reduced[..., 3:]
        self.canvas.pixels += reduced[..., :3]


def _rgba(color: Array) -> tuple[int, int, int, int]:
    red, green, blue = (int(np.clip(c, 0, 1) * 255) for c in color)
    return red, green, blue, 255
