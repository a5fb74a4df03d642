"""Docstrings of modules: there is one, and its first line stands alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path
    for folder in ("pera_fast", "kernels", "bench", "tests", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
RIDDLE = re.compile(r"(What|Which|From|Where|Of|Whether|Whom|How)\b")  # says no subject, verb or object


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines(path: Path) -> None:
    first, *rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")
    assert first, "the module has no docstring"
    assert not RIDDLE.match(first), first
    assert not rest or not rest[0], "the first line goes on in the second"


def test_riddles_are_found() -> None:
    assert RIDDLE.match("What a suite gives: an op")
    assert not RIDDLE.match("Whatever comes")
    assert len(FILES) > 300
