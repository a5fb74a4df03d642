"""Points of a profile: recipes, their variants, and the batch sizes to run or simulate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pera_fast.config import Config, load_config
from pera_fast.config.keys import did_you_mean
from pera_fast.errors import UserError

POLICIES = ("none", "cheap", "block")
DEVICES = ("simulate", "cuda", "cpu")
# Student and teacher share of the patches for --sweep-ratios, around the published 0.2 and 0.6; the rest is predicted.
RATIOS = ((0.1, 0.4), (0.1, 0.6), (0.1, 0.8), (0.2, 0.4), (0.2, 0.6), (0.2, 0.8), (0.3, 0.4), (0.3, 0.6), (0.4, 0.6))


@dataclass(frozen=True)
class Variant:
    """A recipe with settings on top.

    Attributes:
        recipe: its name.
        overrides: ``section.key=value`` each.
        purpose: "policy" (what is recomputed), "dense" (no masks), "ratios" (a mask ratio of the sweep).
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    purpose: str = "policy"

    def config(self, batch_size: int) -> Config:
        """The configuration at a batch size. Raises UserError for settings that do not go together."""
        return load_config(self.recipe, [*self.overrides, f"train.batch_size={batch_size}"])

    def label(self) -> str:
        """For pictures and sentences, where no header says what the words of `name` are."""
        recipe, masks, recompute = self._words()
        return f"{recipe}, {'no masks' if masks == 'dense' else f'masks {masks}'}, recompute {recompute}"

    def name(self) -> str:
        """For tables: recipe, masks (the student's and the teacher's share of the patches), recomputation."""
        return " ".join(self._words())

    def _words(self) -> tuple[str, str, str]:
        model = self.config(1).model
        masks = "dense" if model.masking == "none" else f"{model.student_ratio:g}/{model.teacher_ratio:g}"
        kind = "" if model.masking in ("random", "none") else f" {model.masking}"
        return self.recipe, f"{masks}{kind}", model.recompute


@dataclass
class Point:
    """A variant at a batch size, and what was found. Bytes, seconds, images per second.

    Attributes:
        status: "ok", "out of memory", "failed", or "" before it was run; ``note`` says why.
        peak: most bytes of tensors alive (simulate), allocated (cuda), or resident (cpu).
        reserved: most bytes that CUDA's allocator held; equals peak elsewhere.
        outside: bytes of the card in use that the allocator does not hold (CUDA context, other processes); cuda only.
        between_steps: bytes that stay between steps; simulate, and cuda (there with the gradients of the last step).
        at_peak: bytes at the peak by what they belong to; simulate only.
        step_seconds: median, least and most of the timed steps; empty for simulate.
        flops_per_image: of the method's matrix products (``pera_fast.train.flops``).
        took: seconds that finding this out took.
        world_size: GPUs that train together, for the prediction; each has the batch.
        launches, bytes, flops: of a step on a GPU of compute capability 9.0 (``work``); simulate only, as what follows.
        work: the same by part (``work.PARTS``): {part: {launches, bytes, flops}}.
        predicted: by a card's name, {ms, images_per_s, mfu} of a step (``predict``).
    """

    variant: Variant
    batch_size: int
    device: str
    steps: int = 10
    status: str = ""
    note: str = ""
    peak: int = 0
    reserved: int = 0
    outside: int = 0
    between_steps: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    images_per_s: float | None = None
    mfu: float | None = None
    flops_per_image: float = 0.0
    took: float = 0.0
    world_size: int = 1
    launches: int = 0
    bytes: int = 0
    flops: float = 0.0
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is something to show."""
        return self.status == "ok"

    def to_json(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Point:
        """The point that ``to_json`` gave."""
        variant = values["variant"]
        return Point(
            **{**values, "variant": Variant(variant["recipe"], tuple(variant["overrides"]), variant["purpose"])}
        )


def plan(
    recipes: Sequence[str],
    overrides: Sequence[str],
    policies: Sequence[str] | None = None,
    dense: bool = True,
    ratios: bool = False,
) -> list[Variant]:
    """The variants to compare.

    Each recipe with each policy of recomputation; with the recipe's own policy (or the first one given) also without
    masks and, if asked for, at other mask ratios. What an override fixes is not varied.

    Args:
        policies: of ``model.recompute``; None: all, or the one that is overridden.

    Raises:
        UserError: an override that cannot be, or the batch size among them.
    """
    keys = {text.partition("=")[0].strip() for text in overrides}
    if fixed := keys & {"train.batch_size", "train.device"}:
        key = fixed.pop()
        raise UserError(f"{key}: give --{'batch-sizes' if key == 'train.batch_size' else 'device'} instead")
    variants = []
    for recipe in recipes:
        given = tuple(overrides)
        cfg = load_config(recipe, given)
        own_policy = "none" if cfg.model.recompute == "auto" else cfg.model.recompute
        compared = policies or ([own_policy] if "model.recompute" in keys else POLICIES)
        variants += [Variant(recipe, (*given, f"model.recompute={policy}")) for policy in compared]
        if cfg.model.masking == "none":
            continue
        given = (*given, f"model.recompute={own_policy if own_policy in compared else compared[0]}")
        if dense and "model.masking" not in keys:
            variants.append(Variant(recipe, (*_without_ratios(given), "model.masking=none"), "dense"))
        own = cfg.model.student_ratio, cfg.model.teacher_ratio
        if ratios:
            for pair in RATIOS:
                if pair != own:
                    shares = f"model.student_ratio={pair[0]}", f"model.teacher_ratio={pair[1]}"
                    variants.append(Variant(recipe, (*given, *shares), "ratios"))
    return variants


def _without_ratios(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if text.partition("=")[0].strip() not in _RATIO_KEYS]


_RATIO_KEYS = ("model.student_ratio", "model.teacher_ratio")


def parse_batch_sizes(text: str) -> list[int]:
    """``8,16,32`` as numbers, ascending. Raises UserError for anything else."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise UserError(f"--batch-sizes {text}: must be whole numbers of at least 1, such as 8,16,32")
    return sizes


def parse_choices(option: str, text: str | None, allowed: Sequence[str]) -> list[str] | None:
    """``a,b`` as a list of allowed words, in that order; None for None. Raises UserError for other words."""
    if text is None:
        return None
    words = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for word in words:
        if word not in allowed:
            hint = did_you_mean(word, allowed)
            raise UserError(f"{option} {text}: no such choice {word!r}; allowed: {', '.join(allowed)}{hint}")
    return words
