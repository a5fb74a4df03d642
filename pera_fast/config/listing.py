"""Every setting with its value, meaning and range, as YAML that is a recipe file itself."""

import ast
import io
import json
import re
import textwrap
import tokenize
from pathlib import Path
from typing import Any

from pera_fast.config import tree
from pera_fast.config.finetune import USED
from pera_fast.config.keys import KEYS, SECTIONS, flatten, wants
from pera_fast.config.load import finetune_recipe_names
from pera_fast.config.tree import Config

_WIDTH = 110


def listing(cfg: Config) -> str:
    """The configuration as a recipe file, with a comment above each key: what it is, and what it may be.

    Of a recipe of pretraining every key but those of fine-tuning; of one of fine-tuning the keys that it has.
    """
    values, told, keys = flatten(cfg), meanings(), listed(cfg.recipe)
    lines = [f"recipe: {cfg.recipe}"]
    for section in (name for name in SECTIONS if any(key.startswith(f"{name}.") for key in keys)):
        lines += ["", f"# {section_title(section)}", f"{section}:"]
        for key in (key for key in keys if key.startswith(f"{section}.")):
            text = ". ".join(filter(None, (told[key].rstrip("."), f"Allowed: {wants(key)}")))
            lines += [f"  # {line}" for line in textwrap.wrap(text, _WIDTH)]
            lines.append(f"  {key.partition('.')[2]}: {_yaml(values[key])}")
    return "\n".join(lines) + "\n"


def listed(recipe: str) -> list[str]:
    """Keys that a recipe of this kind has, in the order of the tree."""
    if recipe in finetune_recipe_names():
        return [key for key in KEYS if key in USED]
    return [key for key in KEYS if not key.startswith("finetune.")]


def section_title(section: str) -> str:
    """Subject of the keys of a section, without its citation."""
    return re.sub(r" \(docs/[^)]*\)", "", (SECTIONS[section].__doc__ or "").split("\n")[0])


def meanings() -> dict[str, str]:
    """{dotted key: what it is}: the comments of the configuration tree."""
    comments = _attribute_comments(Path(tree.__file__).read_text(encoding="utf-8"))
    return {key: comments.get((SECTIONS[section].__name__, name), "") for key, section, name in _split(KEYS)}


def _split(keys: Any) -> list[tuple[str, str, str]]:
    return [(key, *key.split(".", 1)) for key in keys]


def _yaml(value: Any) -> str:
    """A value on one line; numbers so that YAML 1.1 reads them as numbers, words that it would read as such quoted."""
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][\w./-]*", value):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.casefold() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n"):
        return json.dumps(value)
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, (str, float)) else str(value)


def _attribute_comments(source: str) -> dict[tuple[str, str], str]:
    """{(class, attribute): comment} of the classes' annotated attributes.

    Args:
        source: Python. An attribute's comment stands behind it, or in whole lines directly above.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    marks = (token for token in tokens if token.type == tokenize.COMMENT)
    comments = {mark.start[0]: (mark.string.lstrip("# "), not mark.line[: mark.start[1]].strip()) for mark in marks}
    found = {}
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                behind = comments.get(item.end_lineno or 0, ("", False))[0]
                found[node.name, item.target.id] = " ".join([*_above(comments, item.lineno), behind]).strip()
    return {key: text for key, text in found.items() if text}


def _above(comments: dict[int, tuple[str, bool]], line: int) -> list[str]:
    lines = []
    while comments.get(line - 1, ("", False))[1]:
        line -= 1
        lines.insert(0, comments[line][0])
    return lines
