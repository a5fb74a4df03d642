"""Paragraphs and headings of tables, for report.py."""

import textwrap

WIDTH = 130


def paragraph(text: str) -> list[str]:
    """Lines of equal length, whatever the line breaks in the text, and an empty one."""
    return [*textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def item(text: str) -> list[str]:
    """Lines of one item of a list, whatever the line breaks in the text; the text begins without a dash."""
    lines = textwrap.wrap(" ".join(text.split()), WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [("  " if i else "- ") + line for i, line in enumerate(lines)]


def heading(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
