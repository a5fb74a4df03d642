"""Docstrings: every module has one, and first lines stand alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "pera_fast", "kernels", "bench", "tests", "docs"
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
RIDDLE = re.compile(r"(What|Which|From|Where|Of|Whom|How)\b")  # says no subject, verb or object
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    first, *rest = (ast.get_docstring(tree) or "").split("\n")
    assert first, "the module has no docstring"
    assert not RIDDLE.match(first), first
    assert not rest or not rest[0], "the first line goes on in the second"
    if path.is_relative_to(ROOT / "tests"):
        return
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            assert not RIDDLE.match(ast.get_docstring(node) or ""), f"{node.name}, line {node.lineno}"


def test_riddles_are_found() -> None:
    assert RIDDLE.match("What a suite gives: an op")
    assert not RIDDLE.match("Whatever comes")
    assert len(FILES) > 300
