"""One self-contained HTML file: text, numbers, pictures as inline PNGs. Works offline."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0; }
body { color: #1c2733; background: #f6f7f9; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.08rem; color: #42505e; }
.cards { display: grid; gap: .8rem; margin: 1.6rem 0 .4rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.card, figure, table { background: #fff; border: 1px solid #e2e6ea; border-radius: 10px; }
.card { padding: .8rem 1rem; }
.card b { display: block; font-size: 1.45rem; letter-spacing: -.01em; }
.card span { color: #5b6875; font-size: .86rem; }
figure { margin: .8rem 0 0; padding: .9rem; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: #5b6875; font-size: .9rem; margin-top: .7rem; max-width: 58rem; }
table { border-collapse: collapse; width: 100%; }
td { padding: .38rem .9rem; border-top: 1px solid #eef0f3; font-size: .93rem; vertical-align: top; }
tr:first-child td { border-top: 0; }
td:first-child { color: #5b6875; width: 34%; }
.grid { overflow-x: auto; margin: .8rem 0 0; }
.grid th { text-align: right; padding: .5rem .7rem; font-size: .8rem; color: #5b6875; vertical-align: bottom; }
.grid td { text-align: right; padding: .38rem .7rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.grid th:first-child, .grid td:first-child { text-align: left; width: auto; color: inherit; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .25em; }
footer { margin-top: 3rem; color: #7a8794; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph, then a table (``grid``) and a picture with a caption where there are any."""

    title: str
    text: str
    png: bytes | None = None
    caption: str = ""
    table: str = ""


def png(figure: "Figure") -> bytes:
    """A Matplotlib figure as PNG; closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers with a header; the first column names the rows. Escaped here."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="grid"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def render(
    title: str, lead: str, cards: Mapping[str, str], sections: Sequence[Section], table: Mapping[str, str]
) -> str:
    """The report as HTML.

    Args:
        title, lead: heading and first paragraph.
        cards: the key numbers: label -> value.
        sections: in order; texts may hold HTML that this package wrote.
        table: all numbers: name -> value, escaped here.
    """
    shown = "".join(
        f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in cards.items()
    )
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in table.items())
    body = "".join(_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p><div class="cards">{shown}</div>{body}'
        f'<section id="numbers"><h2>Numbers</h2><table>{rows}</table></section>'
        f"<footer>Written by pera-fast. PerA: arXiv 2505.19447.</footer></main></body></html>\n"
    )


def _section(section: Section) -> str:
    figure = ""
    if section.png is not None:
        data = base64.b64encode(section.png).decode()
        figure = (
            f'<figure><img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{section.caption}</figcaption></figure>"
        )
    return f"<section><h2>{html.escape(section.title)}</h2><p>{section.text}</p>{section.table}{figure}</section>"
