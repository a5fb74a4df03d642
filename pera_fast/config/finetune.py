"""Builds the configuration of a fine-tuning: settings of the weights, then a recipe of fine-tuning, then overrides."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath

from pera_fast.config.check import check_value, fail
from pera_fast.config.keys import KEYS, did_you_mean, show
from pera_fast.config.load import (
    FINETUNE_RECIPES,
    build,
    finetune_recipe_names,
    following,
    leaves,
    parse,
    read_recipe_file,
    read_yaml,
    recipe_leaves,
    recipe_names,
    values_of,
)
from pera_fast.config.tree import Config, Value
from pera_fast.errors import UserError

SIZES = tuple(f"model.{name}" for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans"))
# Settings that the weights bring along; those of the first line are fixed with them.
FIXED = (*SIZES, "views.global_size")
OF_WEIGHTS = (
    "views.mean", "views.std", "data.bands", "data.depth", "data.band_scale", "data.band_range", "data.max_pixels",
)  # fmt: skip
USED = (
    "model.drop_path", "model.recompute", "model.attention",
    "views.hflip", "views.vflip",
    "optim.lr", "optim.warmup_lr", "optim.final_lr", "optim.warmup_epochs", "optim.weight_decay",
    "optim.final_weight_decay", "optim.betas", "optim.eps", "optim.clip",
    "train.epochs", "train.steps", "train.batch_size", "train.accumulate", "train.precision", "train.seed",
    "train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.max_nonfinite",
    "train.device", "train.loggers",
    "data.loader_threads", "data.prefetch", "data.storage_timeout",
    *(key for key in KEYS if key.startswith("finetune.") and key != "finetune.task"),
)  # fmt: skip
"""Settings of `pera-fast finetune`, apart from those of the weights, which may be given too."""
# One pass over whole images: what else a configuration says of views must be possible, and is not looked at.
_NEUTRAL: dict[str, Value] = {
    "views.num_local": 0,
    "model.masking": "none",
    "model.student_ratio": 1.0,
    "model.teacher_ratio": 1.0,
    "optim.teacher_temp_warmup_epochs": 0.0,
}
_HEADS = {"scene": ("linear", "mlp"), "segmentation": ("fpn", "uper"), "change": ("fpn", "uper")}


def load_finetune(
    base: Config,
    task: str | None,
    recipe: str | PathLike[str] = "finetune",
    overrides: Sequence[str] = (),
    precision: str = "bf16",
) -> Config:
    """The checked configuration of a fine-tuning.

    Args:
        base: of the weights (`weights.load.load_backbone`): sizes, bands, ranges, mean and std.
        task: scene, segmentation or change; None: not known yet.
        recipe: a name of `finetune_recipe_names()`, or a YAML file with sections, such as a run's config.yaml, of
            which the settings of its weights do not count.
        overrides: `section.key=value` each, on top of the recipe.
        precision: where neither says it.

    Raises:
        UserError: one line about a key, a value, a recipe, or a setting that has no effect in a fine-tuning.
    """
    name, own = _read(fspath(recipe))
    given = _given(overrides)
    values = values_of(Config()) | {key: value for key, value in values_of(base).items() if key in FIXED + OF_WEIGHTS}
    values |= {**_NEUTRAL, "finetune.task": task, "train.precision": precision}
    for more in (own, given):
        values |= {**_followers(values, more), **more}
    channels = base.model.in_chans
    if values["model.in_chans"] != channels:
        raise fail("data.bands", values["data.bands"], f"the weights were trained on {channels} band(s); name as many")
    cfg = build(name, values)
    _check(cfg)
    return cfg


def check_finetune(recipe: str | PathLike[str] | None, overrides: Sequence[str]) -> None:
    """Checks what can be known before the weights are read. Raises UserError."""
    if recipe is not None:
        _read(fspath(recipe))
    for key, value in _given(overrides).items():
        check_value(key, value)


def is_finetune_recipe(recipe: str | PathLike[str]) -> bool:
    """Whether a recipe's name, or a file's `recipe:`, is one of fine-tuning. Raises UserError for no recipe."""
    if fspath(recipe) in finetune_recipe_names() + recipe_names():
        return fspath(recipe) in finetune_recipe_names()
    tree = read_recipe_file(fspath(recipe), recipe_names() + finetune_recipe_names())
    return tree.get("recipe") in finetune_recipe_names()


def _read(recipe: str) -> tuple[str, dict[str, Value]]:
    """(name, values of the keys that it sets) of a recipe of fine-tuning, or of a file based on one."""
    names = finetune_recipe_names()
    if recipe in names:
        path = FINETUNE_RECIPES / f"{recipe}.yaml"
        return recipe, leaves(read_yaml(path.read_text(encoding="utf-8"), recipe), recipe)
    if recipe in recipe_names():
        raise UserError(f"--recipe {recipe}: is a recipe of `pera-fast pretrain`; here: {', '.join(names)}")
    tree = read_recipe_file(recipe, names)
    base = str(tree.pop("recipe", "finetune"))
    if base not in names:
        why = "is a recipe of `pera-fast pretrain`" if base in recipe_names() else "no such recipe"
        hint = did_you_mean(base, names)
        raise UserError(f"{recipe}: recipe: {show(base)}: {why}; known here: {', '.join(names)}{hint}")
    own = recipe_leaves(tree, recipe)
    if own.get("finetune.task"):  # a run's config.yaml, with every key
        own = {key: value for key, value in own.items() if key in USED}
    _refuse_idle(own, f"{recipe}: ")
    _, below = _read(base)
    return base, {**below, **_followers(values_of(Config()) | below, own), **own}


def _given(overrides: Sequence[str]) -> dict[str, Value]:
    given = dict(parse(text) for text in overrides)
    _refuse_idle(given, "")
    return given


def _refuse_idle(given: Mapping[str, Value], where: str) -> None:
    """Raises UserError for settings that would be passed over."""
    for key, value in given.items():
        if key in USED or key in OF_WEIGHTS:
            continue
        why = "has no effect in a fine-tuning"
        if key in FIXED:
            why = "comes from the weights"
        elif key == "finetune.task":
            why = "is given by --task"
        hint = "; finetune.size is the network's input" if key == "views.global_size" else "; leave it out"
        raise UserError(f"{where}{key}={show(value)}: {why}{hint}")


def _followers(before: Mapping[str, Value], given: Mapping[str, Value]) -> dict[str, Value]:
    """Keys that follow what was given, unless they were given themselves."""
    found = following(before, given)
    found.pop("optim.teacher_temp_warmup_epochs", None)
    if "optim.weight_decay" in given:
        found["optim.final_weight_decay"] = given["optim.weight_decay"]
    return found


def _check(cfg: Config) -> None:
    f, patch = cfg.finetune, cfg.model.patch_size
    heads = ("auto", *_HEADS[f.task]) if f.task else (f.head,)
    if f.head not in heads:
        raise fail("finetune.head", f.head, f"does not go with --task {f.task}; allowed: {' | '.join(heads)}")
    if f.size is not None and f.size % patch:
        near = sorted({max(f.size // patch, 1) * patch, (f.size // patch + 1) * patch})
        told = " or ".join(map(str, near))
        raise fail("finetune.size", f.size, f"must be a multiple of the weights' patch size {patch}; nearest: {told}")
    if cfg.train.batch_size is None:
        raise fail("train.batch_size", None, "wants a whole number (at least 1)")


def input_size(cfg: Config) -> int:
    """Pixels a side of the network's input."""
    return cfg.finetune.size or cfg.views.global_size


def head_name(cfg: Config) -> str:
    """The head that `finetune.head` means for the task."""
    assert cfg.finetune.task is not None
    return _HEADS[cfg.finetune.task][0] if cfg.finetune.head == "auto" else cfg.finetune.head
