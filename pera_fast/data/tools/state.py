"""Loads and saves the small JSON files by which a stopped command goes on."""

import json
from pathlib import Path
from typing import Any

from pera_fast.durable import read_object, whole_file


def load(path: Path) -> dict[str, Any]:
    """The object that was saved; empty if there is none, or none that can be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def save(path: Path, about: dict[str, Any]) -> None:
    """Saves it whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
