"""Small JSON files with which a command remembers what it has done, so that it goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

from pera_fast.durable import whole_file


def load(path: Path) -> dict[str, Any]:
    """Reads what was saved; empty if there is nothing, or nothing that can be read."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def save(path: Path, about: dict[str, Any]) -> None:
    """Saves it whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(about) + "\n", encoding="utf-8")
