"""Dotted keys of the configuration, and the words that messages use for them."""

import difflib
from collections.abc import Iterable
from dataclasses import Field, fields
from typing import Any

from pera_fast.config.tree import Config, Value
from pera_fast.errors import one_line

SECTIONS: dict[str, type] = {f.name: type(getattr(Config(), f.name)) for f in fields(Config) if f.name != "recipe"}
KEYS: dict[str, Field[Any]] = {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}

_WANTS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of names such as [a,b]",
    list[float]: "a list of numbers such as [0.5,0.5]",
    list[int | str]: "a list of band numbers from 1 and names such as [4,3,red]",
    list[list[float]]: "a list of pairs [low,high] such as [[0,3000],[0,4000]]",
}


def kind(key: str) -> tuple[Any, bool]:
    """(type without None, whether null is allowed) of a key."""
    annotation: Any = KEYS[key].type
    for base in _WANTS:
        if annotation == base:
            return base, False
        if annotation == base | None:
            return base, True
    raise TypeError(f"{key}: no rule for the type {annotation}")


def wants(key: str) -> str:
    """Values that a key takes, in words."""
    base, optional = kind(key)
    rule = KEYS[key].metadata
    text = " | ".join(rule["choices"]) if "choices" in rule else _WANTS[base]
    if "choices" in rule and base == list[str]:
        text = f"a list of {text}, such as {show(rule['choices'][:2])}"
    ends = [
        f"{word} {show(rule[name])}"
        for name, word in (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
        if name in rule
    ]
    return text + (f" ({', '.join(ends)})" if ends else "") + (" or null" if optional else "")


def show(value: object) -> str:
    """A value as it would be typed, for a message: cut where it is very long."""
    return one_line(written(value))


def written(value: object) -> str:
    """A value as it would be typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(written(v) for v in value) + "]"
    return " ".join(str(value).split()) or "''"  # messages stay on one line


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None if none is like it."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return match[0] if match else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not among the known ones: `; did you mean ...?`, or nothing."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def nearest_key(key: str) -> str | None:
    """The key most like `key`: by its own name wherever that stands, else by the whole dotted name."""
    section, _, name = key.rpartition(".")
    leaves = {k.partition(".")[2]: k for k in KEYS}
    if name in leaves:
        return leaves[name]
    section = nearest(section, SECTIONS) or ""
    names = [f.name for f in fields(SECTIONS[section])] if section else []
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if found:
        return f"{section}.{found[0]}"
    found = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
    return leaves[found[0]] if found else nearest(key, KEYS)


def flatten(cfg: Config) -> dict[str, Value]:
    """{dotted key: value} of a Config, and its recipe."""
    flat: dict[str, Value] = {"recipe": cfg.recipe}
    for key in KEYS:
        section, _, name = key.partition(".")
        flat[key] = getattr(getattr(cfg, section), name)
    return flat


def option_hint(option: str) -> str | None:
    """For an option that does not exist, such as --train.steps or --batch-size: the override that it may stand for."""
    name = option.lstrip("-").replace("-", "_")
    key = name if name in KEYS else nearest_key(name)
    return f"settings are given without dashes: {key}=..." if key else None
