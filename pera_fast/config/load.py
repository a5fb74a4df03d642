"""Builds a checked Config from a recipe and overrides, and converts it to YAML and back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeGuard

from pera_fast.config.check import check, check_value, fail
from pera_fast.config.keys import KEYS, SECTIONS, did_you_mean, flatten, kind, nearest_key, show, wants
from pera_fast.config.tree import Config, Value
from pera_fast.errors import UserError

Differences = dict[str, tuple[Value, Value]]
_MOST = 2**63  # of a whole number
_RECIPES = Path(__file__).parent.parent / "recipes"
FINETUNE_RECIPES = _RECIPES / "finetune"


def recipe_names() -> list[str]:
    """Names that `load_config` knows."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def load_config(recipe: str | PathLike[str] = "vit_b16", overrides: Sequence[str] = ()) -> Config:
    """The recipe's configuration with `section.key=value` overrides on top, checked.

    Values are YAML: `train.steps=60`, `views.mean=[0.5,0.5,0.5]`, `data.index=null`. The last of equal keys counts.
    Some keys follow others unless they are given: `model.in_chans` the number of `data.bands`, `views.mean/std` the
    number of channels, `data.band_scale` the `data.band_range`, the ratios `model.masking=none`, the warm-ups
    `train.epochs`, the batch `train.total_batch_size` (see `TrainConfig.resolve_batch`).

    Args:
        recipe: a name that `recipe_names` lists, or a YAML file with sections, such as a run's config.yaml. A file's
            top-level `recipe: NAME` says whose values the keys have that it leaves out; without it vit_b16.
        overrides: settings on top of the recipe.

    Raises:
        UserError: one line that names the key, the value, what is allowed, and the nearest key if there is no such key.
    """
    name, defaults = _read_recipe(fspath(recipe))
    given = dict(parse(text) for text in overrides)
    _refuse_finetune(given, "")
    return build(name, {**defaults, **following(defaults, given), **given})


def check_overrides(overrides: Sequence[str]) -> None:
    """Checks settings that are given for a run which is not read yet: keys, types, ranges. Raises UserError."""
    for key, value in (parse(text) for text in overrides):
        check_value(key, value)
        _refuse_finetune({key: value}, "")


def finetune_recipe_names() -> list[str]:
    """Names of recipes that `finetune.load_finetune` knows."""
    return sorted(path.stem for path in FINETUNE_RECIPES.glob("*.yaml"))


def _refuse_finetune(given: Mapping[str, Value], where: str) -> None:
    """Raises UserError for a setting of fine-tuning, which pretraining would pass over."""
    for key, value in given.items():
        if key.startswith("finetune."):
            raise UserError(f"{where}{key}={show(value)}: is of `pera-fast finetune` alone; leave it out")


def _refuse_finetune_recipe(name: str, where: str) -> None:
    if name in finetune_recipe_names():
        known = ", ".join(recipe_names())
        raise UserError(f"{where}{name}: is a recipe of `pera-fast finetune`; recipes of pretraining: {known}")


def _read_recipe(recipe: str) -> tuple[str, dict[str, Value]]:
    """(recipe's name, value of every key) of a recipe or of a file, whose keys come on top of a recipe's."""
    if recipe in recipe_names():
        text = (_RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
        return recipe, {**values_of(Config()), **leaves(read_yaml(text, recipe), recipe)}
    _refuse_finetune_recipe(recipe, "--recipe ")
    tree = read_recipe_file(recipe, recipe_names())
    base = str(tree.pop("recipe", "vit_b16"))
    _refuse_finetune_recipe(base, f"{recipe}: recipe: ")
    if base not in recipe_names():
        hint = did_you_mean(base, recipe_names())
        raise UserError(f"{recipe}: recipe: {show(base)}: no such recipe; known: {', '.join(recipe_names())}{hint}")
    name, defaults = _read_recipe(base)
    own = recipe_leaves(tree, recipe)
    _refuse_finetune({key: value for key, value in own.items() if value != defaults[key]}, f"{recipe}: ")
    return name, {**defaults, **following(defaults, own), **own}


def read_recipe_file(recipe: str, names: Sequence[str]) -> dict[str, Any]:
    """The tree in a recipe file. Raises UserError if there is neither a file nor, by these names, a recipe."""
    if Path(recipe).suffix not in (".yaml", ".yml") and not Path(recipe).exists():
        hint = did_you_mean(recipe, names)
        raise UserError(f"--recipe {show(recipe)}: no such recipe; known: {', '.join(names)}{hint}")
    try:
        return read_yaml(Path(recipe).read_text(encoding="utf-8"), recipe)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"--recipe {recipe}: cannot be read ({why}); give a recipe's name or a YAML file") from None


def recipe_leaves(tree: Mapping[str, Any], recipe: str) -> dict[str, Value]:
    """{dotted key: typed value} of a recipe file's sections. Raises UserError, which names the file."""
    try:
        return leaves(tree, recipe)
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(f"{recipe}:") else f"{recipe}: {told}") from None


def from_yaml(text: str) -> Config:
    """The Config that `to_yaml` wrote. Raises UserError for anything else."""
    tree = read_yaml(text, "config.yaml")
    recipe = tree.pop("recipe", "vit_b16")
    return build(str(recipe), leaves(tree, "config.yaml"))


def read_config(path: Path) -> Config:
    """The Config in a file that `to_yaml` wrote. Raises OSError if it cannot be read, UserError for anything else."""
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a configuration: no text in UTF-8") from None


def to_yaml(cfg: Config) -> str:
    """Every key with its value, as YAML in the order of the tree; those of fine-tuning only where it is one."""
    from omegaconf import OmegaConf

    tree = asdict(cfg)
    if cfg.finetune.task is None:
        del tree["finetune"]
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def differences(a: Config, b: Config) -> Differences:
    """{dotted key: (value in a, value in b)} of the keys in which two configurations differ."""
    left, right = flatten(a), flatten(b)
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def parse(text: str) -> tuple[str, Value]:
    """`section.key=value` as (key, value of the key's type)."""
    key, equals, raw = text.partition("=")
    key = show(key.strip())
    if not equals:
        near = nearest_key(key)
        hint = f"; did you mean {near}=...?" if near else ""
        raise UserError(f"{show(text)}: not an override; write section.key=value, such as train.steps=60{hint}")
    _known(key, show(raw))
    if not raw.strip():  # of a shell variable that is not set: YAML would take it for null
        null = f"; for none write {key}=null" if kind(key)[1] else ""
        raise UserError(f"{key}=: has no value{null}; wants {wants(key)}")
    if kind(key)[0] is str:  # verbatim: a path may hold anything that means something in YAML
        value = raw.strip()
        return key, None if value in ("null", "~") and kind(key)[1] else value
    return key, _typed(key, _yaml_value(key, raw))


def _known(key: str, value: str) -> None:
    """Raises UserError unless there is such a key."""
    if key in KEYS:
        return
    if key == "recipe":
        raise UserError(f"recipe={value}: choose a recipe with --recipe {value}")
    if key in SECTIONS:
        names = ", ".join(k for k in KEYS if k.startswith(f"{key}."))
        raise UserError(f"{key}={value}: {key} is a section; set one of its keys: {names}")
    near, key = nearest_key(key), show(key)
    hint = f"; did you mean {near}?" if near else f"; sections: {', '.join(SECTIONS)}"
    raise UserError(f"{key}={value}: no such key{hint}")


def _yaml_value(key: str, raw: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:  # OmegaConf's YAML reads 1e-3 as a number, which plain YAML 1.1 does not
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
        return parsed["value"]
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        raise fail(key, raw, f"wants {wants(key)}") from None


def _typed(key: str, value: Any) -> Value:
    """The value, if it has the key's type; whole floats are not taken for integers, nor booleans for numbers."""
    base, optional = kind(key)
    if value is None and optional:
        return None
    if base is str and isinstance(value, bool) and "true" in KEYS[key].metadata.get("choices", ()):
        return "true" if value else "false"  # YAML reads the words as booleans
    if base is str and isinstance(value, int) and str(value) in KEYS[key].metadata.get("choices", ()):
        return str(value)  # and the digits as numbers
    if base == list[str]:
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return value
    elif base == list[float]:
        if isinstance(value, list) and value and all(_number(v) for v in value):
            return [float(v) for v in value]
    elif base == list[list[float]]:
        if isinstance(value, list) and value and all(_is_pair(v) for v in value):
            return [[float(v) for v in pair] for pair in value]
    elif base == list[int | str]:
        if isinstance(value, list) and all(_is_band(v) for v in value):
            return value
    elif base is float:
        if _number(value):
            return float(value)
    elif base is int:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST:
            return value
    elif isinstance(value, base):
        return value
    raise fail(key, value, f"wants {wants(key)}")


def _number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1000  # else it is no float
    return isinstance(value, float)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_number(v) for v in value)


def _is_band(value: object) -> bool:
    """A number from 1, or a name."""
    return (isinstance(value, int) and not isinstance(value, bool) and value > 0) or (
        isinstance(value, str) and bool(value.strip())
    )


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """The tree in a text of YAML. Raises UserError, which names it, for anything else."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except RecursionError:
        raise UserError(f"{name}: not a configuration: too many brackets within brackets") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{name}: not a configuration: {show(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: not a configuration: wants sections {', '.join(SECTIONS)}")
    return {str(key): value for key, value in tree.items()}


def leaves(tree: Mapping[str, Any], name: str) -> dict[str, Value]:
    """{dotted key: typed value} of sections read from YAML."""
    flat: dict[str, Value] = {}
    for section, values in tree.items():
        if section not in SECTIONS or not isinstance(values, Mapping):
            raise UserError(f"{name}: {show(section)}: no such section{did_you_mean(section, SECTIONS)}")
        for leaf, value in values.items():
            key = f"{section}.{leaf}"
            _known(key, show(value))
            flat[key] = _typed(key, value)
    return flat


def following(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Value]:
    """Keys that follow what was given, unless they were given themselves (their entries are then overwritten).

    Args:
        before: every key's value without what was given.
        given: the keys that were given.
    """
    follow: dict[str, Value] = {}
    bands = given.get("data.bands")
    channels = given.get("model.in_chans", len(bands) if bands else before["model.in_chans"])
    if bands:
        follow["model.in_chans"] = channels
    if given.get("data.band_range") is not None:
        follow["data.band_scale"] = "given"
    if channels != before["model.in_chans"]:
        rgb = values_of(Config())
        follow["views.mean"] = rgb["views.mean"] if channels == 3 else [0.5] * channels
        follow["views.std"] = rgb["views.std"] if channels == 3 else [0.25] * channels
    if given.get("model.masking") == "none":
        follow["model.student_ratio"] = follow["model.teacher_ratio"] = 1.0
    if given.get("train.total_batch_size") is not None:
        follow["train.accumulate" if "train.batch_size" in given else "train.batch_size"] = None
    if "train.epochs" in given:  # a shorter run is the long one in small, as with train.steps
        stretched = max(given["train.epochs"], 1) / max(before["train.epochs"], 1)
        for key in ("optim.warmup_epochs", "optim.teacher_temp_warmup_epochs"):
            follow[key] = round(before[key] * stretched, 9)
    return follow


def values_of(cfg: Config) -> dict[str, Value]:
    """{dotted key: value} of a Config."""
    return {key: value for key, value in flatten(cfg).items() if key in KEYS}


def build(recipe: str, values: Mapping[str, Value]) -> Config:
    """The checked configuration of these values."""
    cfg = Config(recipe=recipe).with_values(values)
    check(cfg)
    return cfg
