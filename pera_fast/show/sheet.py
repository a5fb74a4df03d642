"""Draws a contact sheet of the networks' inputs for some samples of an epoch, with Pillow."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pera_fast.config import Config
from pera_fast.data.bands.sensor import probe_settings, scaling_of
from pera_fast.data.decoding import decode
from pera_fast.data.decoding.probe import read_file
from pera_fast.data.decoding.scaling import by_type
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.files.shards import locate, place_of
from pera_fast.data.sampling.views import draw_windows
from pera_fast.model.inputs import GroupInputs
from pera_fast.show.panels import HIDDEN, PREDICTED, STUDENT, TEACHER, colored_view
from pera_fast.storage import Storage
from pera_fast.train.redraw import Redrawn

_CELL, _GAP, _TEXT, _HEAD = 256, 8, 22, 58  # pixels
_INK, _PALE, _PAPER = "#222222", "#777777", "#ffffff"
_GLOBAL = ("#00c2d1", "#ff7f0e", "#b07cff", "#7fd34e")  # windows of the global crops, on the image
_FADED = 0.68  # how far what is not seen goes towards the paper
_EXPLANATION = (
    "what a network does not see is faded; each pair is one crop in two colourings; windows: 1, 2 global"
    " (h, v: flipped), white: local"
)


def draw_sheet(cfg: Config, manifest: Manifest, epoch: int, wanted: Sequence[int], drawn: Redrawn) -> Image.Image:
    """A row for each sample: the image with its windows, the global crops and the local ones as both networks see them.

    Args:
        cfg: the configuration.
        manifest: numbers the samples.
        epoch: of the draws.
        wanted: the samples that were asked for; those of `drawn` stand in for what cannot be read.
        drawn: what they give.
    """
    sheet = _Sheet(cfg, drawn)
    rows = []
    for slot, sample in enumerate(drawn.batch.samples.tolist()):
        path = manifest.readable.paths[sample].as_py()
        label = f"sample {sample}, epoch {epoch}: {_printable(path)}"
        if sample != wanted[slot]:
            label += f" (stands in for {wanted[slot]}, which cannot be read)"
        rows.append(sheet.row(slot, label, _whole(cfg, manifest, epoch, sample)))
    width = max(row.width for row in rows)
    page = Image.new("RGB", (width + 2 * _GAP, _HEAD + sum(row.height + _GAP for row in rows)), _PAPER)
    sheet.head(page)
    top = _HEAD
    for row in rows:
        page.paste(row, (_GAP, top))
        top += row.height + _GAP
    return page


@dataclass
class _Views:
    """One group's crops as both networks see them."""

    group: GroupInputs
    student: np.ndarray  # float [N, S, S, 3]
    teacher: np.ndarray


class _Sheet:
    def __init__(self, cfg: Config, drawn: Redrawn):
        self._views, self._patch = cfg.views, cfg.model.patch_size
        self._batch = len(drawn.batch.samples)
        self._groups = [_colored(cfg, group) for group in (drawn.inputs.global_, drawn.inputs.local)]
        self._font, self._small = ImageFont.load_default(17), ImageFont.load_default(14)
        columns = (self._views.num_local + 1) // 2
        self._local_cell = (_CELL - _GAP) // 2
        self._local_columns = columns
        self._global_left = _CELL + 2 * _GAP
        self._local_left = self._global_left + self._views.num_global * (2 * _CELL + 3 * _GAP)

    def head(self, page: Image.Image) -> None:
        """Column titles and what the colours mean."""
        draw = ImageDraw.Draw(page)
        line = _GAP
        x = _GAP
        for color, text in (
            (STUDENT, "student sees"),
            (TEACHER, "teacher sees"),
            (PREDICTED, "student predicts"),
        ):
            draw.rectangle((x, line + 3, x + 14, line + 17), outline=color, width=3)
            draw.text((x + 20, line), text, _INK, self._font)
            x += 36 + int(draw.textlength(text, self._font))
        draw.text((x, line), _EXPLANATION, _PALE, self._font)
        titles = [(0, "image and windows")]
        for crop in range(self._views.num_global):
            left = self._global_left + crop * (2 * _CELL + 3 * _GAP)
            titles += [(left, f"global crop {crop + 1}: student"), (left + _CELL + _GAP, "teacher")]
        if self._views.num_local:
            titles.append((self._local_left, "local crops: student | teacher"))
        for left, text in titles:
            draw.text((_GAP + left, _HEAD - _TEXT), text, _INK, self._small)

    def row(self, slot: int, label: str, whole: Image.Image) -> Image.Image:
        """One sample."""
        local_width = self._local_columns * (2 * self._local_cell + 2 * _GAP) if self._views.num_local else 0
        picture = Image.new("RGB", (self._local_left + local_width, _CELL + _TEXT), _PAPER)
        picture.paste(whole, (0, 0))
        for crop in range(self._views.num_global):
            left = self._global_left + crop * (2 * _CELL + 3 * _GAP)
            self._pair(picture, (left, 0), _CELL, _GAP, self._groups[0], crop * self._batch + slot)
        for crop in range(self._views.num_local):
            column, below = crop % self._local_columns, crop // self._local_columns
            left = self._local_left + column * (2 * self._local_cell + 2 * _GAP)
            at = left, below * (self._local_cell + _GAP)
            self._pair(picture, at, self._local_cell, 2, self._groups[1], crop * self._batch + slot)
        ImageDraw.Draw(picture).text((0, _CELL + 1), label, _INK, self._small)
        return picture

    def _pair(self, picture: Image.Image, at: tuple[int, int], side: int, gap: int, views: _Views, number: int) -> None:
        """A crop as the student and as the teacher see it."""
        group, (left, top) = views.group, at
        marks = [(group.student_index[number].numpy(), STUDENT)]
        if views is self._groups[0]:  # of local crops nothing is predicted
            marks.append((group.predicted_index[number].numpy(), PREDICTED))
        picture.paste(self._seen(views.student[number], marks, side), (left, top))
        marks = [(group.teacher_index[number].numpy(), TEACHER)]
        picture.paste(self._seen(views.teacher[number], marks, side), (left + side + gap, top))

    def _seen(self, view: np.ndarray, marks: list[tuple[np.ndarray, str]], side: int) -> Image.Image:
        """A view with what is not seen faded, and the borders of the regions that the marks make."""
        grid = view.shape[0] // self._patch
        seen = np.zeros(grid * grid, bool)
        seen[marks[0][0]] = True
        full = np.kron(seen.reshape(grid, grid), np.ones((self._patch, self._patch), bool))
        faded = np.where(full[..., None], view, view * (1 - _FADED) + HIDDEN * _FADED)
        pixels = np.rint(faded.clip(0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
        for index, color in marks:
            region = np.zeros(grid * grid, bool)
            region[index] = True
            _outline(image, region.reshape(grid, grid), color)
        return image


def _colored(cfg: Config, group: GroupInputs) -> _Views:
    patch = cfg.model.patch_size
    if not len(group.crops):
        empty = np.empty((0, 0, 0, 3))
        return _Views(group, empty, empty)
    return _Views(
        group, *(_as_rgb(cfg, colored_view(group, who, patch, cfg.rgb_channels())) for who in ("student", "teacher"))
    )


def _as_rgb(cfg: Config, view: np.ndarray) -> np.ndarray:
    """Three channels to look at, [..., C] to [..., 3]: red, green and blue if they are known, else the first ones."""
    return view[..., cfg.rgb_channels() or ([0, 1, 2] if view.shape[-1] >= 3 else [0, 0, 0])]


def _outline(image: Image.Image, region: np.ndarray, color: str) -> None:
    """Draws the border of a region of patches, bool [g, g], inside."""
    draw, grid = ImageDraw.Draw(image), len(region)
    more = 1 if image.width // grid >= 16 else 0  # two pixels wide if there is room
    edges = [round(i * image.width / grid) for i in range(grid + 1)]
    around = np.pad(region, 1)
    for y, x in zip(*np.nonzero(region), strict=True):
        left, right, top, bottom = edges[x], edges[x + 1] - 1, edges[y], edges[y + 1] - 1
        if not around[y, x + 1]:
            draw.rectangle((left, top, right, top + more), color)
        if not around[y + 2, x + 1]:
            draw.rectangle((left, bottom - more, right, bottom), color)
        if not around[y + 1, x]:
            draw.rectangle((left, top, left + more, bottom), color)
        if not around[y + 1, x + 2]:
            draw.rectangle((right - more, top, right, bottom), color)


def _whole(cfg: Config, manifest: Manifest, epoch: int, sample: int) -> Image.Image:
    """The image with the windows of its crops, in a cell."""
    files = manifest.readable
    pixels = _read_whole(cfg, manifest, sample)
    cell = Image.new("RGB", (_CELL, _CELL), _PAPER)
    if pixels is None:
        ImageDraw.Draw(cell).text((8, 8), "cannot be read\nin one piece", _PALE)
        return cell
    height, width = int(files.height[sample]), int(files.width[sample])
    scale = _CELL / max(height, width)
    small = pixels.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    cell.paste(small, (0, 0))
    windows = draw_windows(cfg.views, cfg.train.seed, epoch, np.array([sample]), np.array([[height, width]]))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(14)
    for crop in reversed(range(cfg.views.num_global + cfg.views.num_local)):
        top, left = int(windows.top[crop, 0]), int(windows.left[crop, 0])
        box = [left, top, left + int(windows.width[crop, 0]), top + int(windows.height[crop, 0])]
        box = [round(value * scale) for value in box]
        box = [box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)]
        if crop >= cfg.views.num_global:
            draw.rectangle(box, outline="#ffffff", width=1)
            continue
        color = _GLOBAL[crop % len(_GLOBAL)]
        draw.rectangle(box, outline=color, width=3)
        turned = "".join(text for text, flips in ((" h", windows.hflip), (" v", windows.vflip)) if flips[crop, 0])
        told = f"{crop + 1}{turned}"
        at = box[0] + 5, box[1] + 4 + 18 * crop
        draw.rectangle((at[0] - 2, at[1] - 1, at[0] + draw.textlength(told, font) + 2, at[1] + 16), color)
        draw.text(at, told, "#000000", font)
    return cell


def _read_whole(cfg: Config, manifest: Manifest, sample: int) -> Image.Image | None:
    files, settings = manifest.readable, probe_settings(cfg)
    path, offset, size = files.paths[sample].as_py(), int(files.offset[sample]), int(files.size[sample])
    try:
        location = locate(os.fspath(manifest.root), path, offset, size)
        data, _ = Storage(manifest.root)(lambda: read_file(location), *place_of(location))
    except OSError:
        return None
    try:
        pixels = scaling_of(cfg)(decode.read_any(data, settings.channels, settings.bands))
    except ValueError:
        return None
    return Image.fromarray(np.ascontiguousarray(by_type(_as_rgb(cfg, pixels))))


def _printable(path: str) -> str:
    text = "".join(character if character.isprintable() else "?" for character in path)
    return text if len(text) <= 100 else f"...{text[-97:]}"
