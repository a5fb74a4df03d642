"""Draw method.svg, the picture of docs/method.md: `python docs/images/method.py`.

The masks are drawn as docs/method.md section 3.1 says, with fewer and larger patches than a real crop has.
"""

import random
from pathlib import Path

GRID = 7  # patches a side
CELL = 24  # pixels a side of a patch in the picture
SIDE = GRID * CELL
STUDENT_RATIO, TEACHER_RATIO = 0.2, 0.6
WIDTH, HEIGHT = 1180, 560

INK, MUTED = "#22303c", "#5b6b78"
STUDENT, TEACHER, PREDICTED = "#1f6fb2", "#b5541c", "#7a4fa3"
HIDDEN = "#e9edf0"

# Ground, field, field, water, road, roof: the scene as it is, and as each view colours it.
PLAIN = ("#8fae6b", "#c9b56a", "#6f9a55", "#4d86b0", "#d8d3c8", "#b5613c")
COLOURED = ("#b0a03f", "#e3963f", "#86952f", "#5f5fc0", "#f3d9b4", "#cf3f3f")


def scene(x: float, y: float, colours: tuple[str, ...]) -> str:
    """A place seen from above: fields, a river, a road and a few roofs."""
    ground, field, meadow, water, road, roof = colours
    parts = [
        f'<rect width="{SIDE}" height="{SIDE}" fill="{ground}"/>',
        f'<path d="M0 0H70L58 62L0 74Z" fill="{field}"/>',
        f'<path d="M96 100L168 84V168H84Z" fill="{meadow}"/>',
        f'<path d="M110 0C92 40 128 62 112 92C98 120 66 122 52 168H84C92 134 128 128 138 98C148 66 122 44 138 0Z" '
        f'fill="{water}"/>',
        f'<path d="M0 104L168 44" stroke="{road}" stroke-width="7"/>',
        f'<path d="M30 93L44 168" stroke="{road}" stroke-width="5"/>',
    ]
    for left, top, width, height in ((8, 116, 14, 12), (10, 140, 18, 14), (150, 10, 13, 18), (148, 62, 16, 11)):
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="{roof}"/>')
    return f'<g transform="translate({x} {y})">{"".join(parts)}</g>'


def patches(x: float, y: float, cells: list[int], style: str) -> str:
    """Squares over some patches of the view whose corner is at (x, y)."""
    boxes = (
        f'<rect x="{x + cell % GRID * CELL}" y="{y + cell // GRID * CELL}" width="{CELL}" height="{CELL}"/>'
        for cell in cells
    )
    return f"<g {style}>{''.join(boxes)}</g>"


def view(x: float, y: float, colours: tuple[str, ...], seen: list[int], colour: str) -> str:
    """A coloured crop of which only some patches are visible."""
    hidden = [cell for cell in range(GRID * GRID) if cell not in seen]
    cover = patches(x, y, hidden, f'fill="{HIDDEN}" stroke="#fff"')
    outline = patches(x, y, seen, f'fill="none" stroke="{colour}" stroke-width="2"')
    return scene(x, y, colours) + cover + outline


def text(x: float, y: float, words: str, *, colour: str = INK, size: int = 14, bold: bool = False) -> str:
    """Words centred at x; y is their base line."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="middle"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, lines: list[str], colour: str) -> str:
    """A box with a coloured frame, its lines of text in the middle."""
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    words = "".join(text(x + width / 2, first + 18 * i, line, bold=i == 0) for i, line in enumerate(lines))
    frame = f'rx="6" fill="#fff" stroke="{colour}" stroke-width="2"'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {frame}/>{words}'


def arrow(*points: tuple[float, float], colour: str = INK, dashed: bool = False, both: bool = False) -> str:
    """A line through the points with a head at its end, and one at its beginning if ``both``."""
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    extra = ' stroke-dasharray="6 4"' if dashed else ""
    start = f' marker-start="url(#head{colour[1:]})"' if both else ""
    line = f'fill="none" stroke="{colour}" stroke-width="2"'
    return f'<path d="{path}" {line}{extra}{start} marker-end="url(#head{colour[1:]})"/>'


def bars(x: float, y: float, heights: list[int], colour: str) -> str:
    """A distribution over prototypes as bars on the base line y."""
    return "".join(
        f'<rect x="{x + 13 * i}" y="{y - height}" width="10" height="{height}" fill="{colour}"/>'
        for i, height in enumerate(heights)
    )


def head(colour: str) -> str:
    """The definition of an arrow's head."""
    return (
        f'<marker id="head{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8Z" fill="{colour}"/></marker>'
    )


def masks() -> tuple[list[int], list[int], list[int]]:
    """Patches that the student sees, that it predicts, and that the teacher sees."""
    order = list(range(GRID * GRID))
    random.Random(5).shuffle(order)
    student, before_teacher = round(len(order) * STUDENT_RATIO), round(len(order) * (1 - TEACHER_RATIO))
    return order[:student], order[student:before_teacher], order[before_teacher:]


def views() -> list[str]:
    """The crop and its two views, with the arrows between them."""
    student, predicted, teacher = masks()
    top, bottom = 70, 330
    return [
        scene(20, 200, PLAIN),
        text(104, 180, "One crop", bold=True),
        text(104, 390, "same window and", size=13, colour=MUTED),
        text(104, 408, "flips for both views", size=13, colour=MUTED),
        arrow((194, 260), (222, 260), (222, 154), (248, 154), colour=STUDENT),
        arrow((194, 308), (222, 308), (222, 414), (248, 414), colour=TEACHER),
        view(256, top, COLOURED, student, STUDENT),
        patches(256, top, predicted, f'fill="url(#hatch)" stroke="{PREDICTED}" stroke-width="1.5"'),
        text(340, 32, "Student view", bold=True),
        text(340, 54, "coloured with p = 0.8; sees 20 %", size=13, colour=MUTED),
        text(340, 258, "hatched: 20 % to be predicted", size=13, colour=PREDICTED),
        view(256, bottom, PLAIN, teacher, TEACHER),
        text(340, 294, "Teacher view", bold=True),
        text(340, 316, "coloured with p = 0.1; sees 60 %", size=13, colour=MUTED),
        text(340, 518, "no patch is seen by both", size=13, colour=MUTED),
    ]


def networks() -> list[str]:
    """Both networks with their heads, and the moving average between them."""
    tokens = "".join(
        f'<rect x="{592 + 18 * i}" y="52" width="14" height="14" fill="url(#hatch)" stroke="{PREDICTED}"/>'
        for i in range(3)
    )
    return [
        arrow((430, 170), (462, 170), colour=STUDENT),
        box(468, 122, 120, 96, ["Student", "first half", "of the blocks"], STUDENT),
        arrow((590, 170), (646, 170), colour=STUDENT),
        box(652, 122, 120, 96, ["Student", "second half", "of the blocks"], STUDENT),
        text(618, 32, "mask tokens", colour=PREDICTED, bold=True),
        tokens,
        arrow((618, 72), (618, 162), colour=PREDICTED),
        arrow((430, 414), (462, 414), colour=TEACHER),
        box(468, 366, 304, 96, ["Teacher", "all blocks, no gradient"], TEACHER),
        arrow((528, 222), (528, 360), dashed=True),
        text(610, 288, "moving average", size=13),
        text(610, 306, "of the weights", size=13),
        arrow((774, 140), (800, 140), (800, 98), (822, 98), colour=PREDICTED),
        box(828, 70, 110, 56, ["Pixel head"], PREDICTED),
        arrow((774, 196), (822, 196), colour=STUDENT),
        box(828, 168, 110, 56, ["Cls head"], STUDENT),
        arrow((774, 414), (822, 414), colour=TEACHER),
        box(828, 386, 110, 56, ["Cls head"], TEACHER),
    ]


def losses() -> list[str]:
    """Results of the heads, and the losses on them."""
    return [
        arrow((940, 98), (972, 98), colour=PREDICTED),
        text(1070, 78, "Pixel loss", bold=True),
        text(1070, 98, "squared error against the", size=13, colour=MUTED),
        text(1070, 116, "hatched patches' pixels", size=13, colour=MUTED),
        arrow((940, 196), (972, 196), colour=STUDENT),
        bars(982, 218, [18, 10, 28, 14, 34, 16, 22, 9, 12, 26, 15, 11, 20], STUDENT),
        text(1066, 152, "distribution over prototypes;", size=13, colour=MUTED),
        text(1066, 170, "KoLeo spreads the samples", size=13, colour=MUTED),
        arrow((940, 414), (972, 414), colour=TEACHER),
        bars(982, 436, [3, 2, 12, 4, 58, 6, 8, 2, 3, 18, 4, 2, 5], TEACHER),
        text(1066, 458, "centered and sharpened", size=13, colour=MUTED),
        arrow((1066, 228), (1066, 278)),
        text(1066, 300, "Cross entropy", bold=True),
        text(1066, 320, "of cls tokens, same crop", size=13, colour=MUTED),
        arrow((1066, 370), (1066, 330)),
    ]


def draw() -> str:
    """The whole picture."""
    hatch = (
        '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="#f3eef8"/><path d="M0 0V6" stroke="{PREDICTED}" stroke-width="2"/></pattern>'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        "<title>PerA: one crop, two views through disjoint masks, student and teacher</title>",
        f"<defs>{''.join(head(colour) for colour in (INK, STUDENT, TEACHER, PREDICTED))}{hatch}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *views(),
        *networks(),
        *losses(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(draw(), encoding="utf-8")
