"""Draws a contact sheet: the query, and the images most alike it with their scores, as PNG or as an HTML page."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pera_fast.page import STYLE

CELL = 224  # pixels a side of a picture
_COLUMNS, _GAP, _LINE = 5, 10, 18
_INK, _PALE, _PAPER, _MARK = "#222222", "#777777", "#ffffff", "#00c2d1"
_GRID = """
.sheet { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.sheet figure { margin: 0; padding: .6rem; }
.sheet figcaption { margin-top: .4rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Cell:
    """A picture with two lines of text.

    Attributes:
        picture: None where the image cannot be read any more.
        title: the score.
        text: the path, and the place where there is one.
    """

    picture: Image.Image | None
    title: str
    text: str


def draw(head: str, query: Sequence[Cell], found: Sequence[Cell]) -> Image.Image:
    """The sheet as one picture: the query's images in a row of their own above the others."""
    rows = [list(query)] + [list(found[start : start + _COLUMNS]) for start in range(0, len(found), _COLUMNS)]
    width = _GAP + _COLUMNS * (CELL + _GAP)
    step = CELL + 2 * _LINE + _GAP
    page = Image.new("RGB", (width, 2 * _LINE + _GAP + step * len(rows)), _PAPER)
    pen, font, small = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(12)
    pen.text((_GAP, _GAP), _cut(pen, _printable(head), font, width - 2 * _GAP), _INK, font)
    for line, row in enumerate(rows):
        for column, cell in enumerate(row):
            left, top = _GAP + column * (CELL + _GAP), 2 * _LINE + _GAP + line * step
            page.paste(_square(cell.picture), (left, top))
            if line == 0:
                pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=_MARK, width=4)
            pen.text((left, top + CELL + 2), cell.title, _INK, small)
            path = _cut(pen, _printable(cell.text), small, CELL, from_left=True)
            pen.text((left, top + CELL + 2 + _LINE - 2), path, _PALE, small)
    return page


def page(head: str, query: Sequence[Cell], found: Sequence[Cell]) -> str:
    """The sheet as an HTML page that needs no other file."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escaped(head)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{_GRID}</style></head>'
        f'<body><main><h1>Most alike</h1><p class="lead">{_escaped(head)}</p>'
        f'<h2>Query</h2><div class="sheet">{"".join(map(_figure, query))}</div>'
        f'<h2>Found</h2><div class="sheet">{"".join(map(_figure, found))}</div>'
        "<footer>Written by pera-fast. Scores are cosine similarities.</footer></main></body></html>\n"
    )


def _figure(cell: Cell) -> str:
    picture = "<p>cannot be read</p>"
    if cell.picture is not None:
        buffer = io.BytesIO()
        cell.picture.save(buffer, "JPEG", quality=90)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img alt="{_escaped(cell.text)}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{picture}<figcaption><b>{_escaped(cell.title)}</b><br>{_escaped(cell.text)}</figcaption></figure>"


def _square(picture: Image.Image | None) -> Image.Image:
    """A picture in the middle of a cell."""
    cell = Image.new("RGB", (CELL, CELL), "#eeeeee")
    if picture is None:
        ImageDraw.Draw(cell).text((10, 10), "cannot be read", _PALE)
        return cell
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell


def _cut(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int, from_left: bool = False) -> str:
    """The text, cut to a width in pixels; of a path the end says more than the beginning."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(f"...{text}", font) > width:
        text = text[1:] if from_left else text[:-1]
    return f"...{text}" if from_left else f"{text}..."


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _escaped(text: str) -> str:
    return html.escape(_printable(text))
