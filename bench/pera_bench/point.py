"""The setting of a benchmark: a recipe's shapes, a number of images, a precision, a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pera_fast.config import Config, load_config
from pera_fast.model.inputs import num_kept
from pera_fast.model.pera import PRECISIONS


@dataclass(frozen=True)
class Point:
    """One training step's sizes.

    Attributes:
        recipe: its crops, ratios and network.
        images: of a step.
        precision: of activations and matrix products: bf16, fp16 or fp32.
        device: where the tensors are.
    """

    recipe: str
    images: int
    precision: str
    device: torch.device

    @cached_property
    def cfg(self) -> Config:
        """The recipe, resolved, with this batch and precision."""
        settings = [f"train.batch_size={self.images}", f"train.precision={self.precision}"]
        return load_config(self.recipe, settings)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return PRECISIONS[self.precision]

    @property
    def dim(self) -> int:
        """Width of the transformer."""
        return self.cfg.model.embed_dim

    def crops(self, view: str) -> tuple[int, int]:
        """(crops of all images, pixels a side) of the view "global" or "local"."""
        v = self.cfg.views
        count, side = (v.num_global, v.global_size) if view == "global" else (v.num_local, v.local_size)
        return count * self.images, side

    def patches(self, view: str) -> int:
        """Patches of a whole crop."""
        return (self.crops(view)[1] // self.cfg.model.patch_size) ** 2

    def seen(self, view: str, who: str) -> int:
        """Patches of a crop that "student" or "teacher" sees, or that are "predicted"."""
        student, predicted, teacher = self.cfg.model.patch_counts(self.patches(view))
        return {"student": student, "predicted": predicted, "teacher": teacher}[who]

    def groups(self, case: str) -> list[int]:
        """[crops, tokens, ...] of the packed stream: "teacher", "student", or "student_late" with its mask tokens.

        A case that ends in "_local" has the local crops alone.
        """
        result = []
        for view in ("local",) if case.endswith("_local") else ("global", "local"):
            length = 1 + self.seen(view, case.split("_")[0])
            if case == "student_late" and view == "global":
                length += self.seen(view, "predicted")
            result += [self.crops(view)[0], length]
        return result

    def keep(self, groups: list[int]) -> tuple[Tensor, list[int]]:
        """Stochastic depth's subset: int32 [sum(kept)] sequence numbers, and how many of each group are kept."""
        draw = torch.Generator().manual_seed(0)
        counts = groups[::2]
        kept = [num_kept(n, self.cfg.model.drop_path) for n in counts]
        subsets = [torch.randperm(n, generator=draw)[:k].sort().values for n, k in zip(counts, kept, strict=True)]
        return torch.cat(subsets).int().to(self.device), kept

    def index(self, view: str, who: str) -> Tensor:
        """int32 [crops, seen] patch numbers, ascending."""
        draw = torch.Generator().manual_seed(0)
        ranks = torch.rand(self.crops(view)[0], self.patches(view), generator=draw).argsort(1)
        return ranks[:, : self.seen(view, who)].sort(1).values.int().to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        """Standard normal values; of the activations' dtype if none is given."""
        draw = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=draw, device=self.device).to(dtype or self.dtype)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)
