"""The network of a fine-tuning: a backbone with gradients and a head, on pixels as they are read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pera_fast.config import Config
from pera_fast.config.finetune import head_name, input_size
from pera_fast.features.dense import embed_images
from pera_fast.finetune.heads import DenseHead, SceneHead, change_channels, change_features
from pera_fast.model.pera import PRECISIONS
from pera_fast.model.transformer import VisionTransformer
from pera_kernels.packing import with_places


@dataclass(frozen=True)
class HeadPlan:
    """Classes and kind of a head: with the backbone's sizes enough to build the network.

    Attributes:
        task: scene, segmentation or change.
        classes: names of the K classes.
        several: whether a scene may have several of them.
        head: linear, mlp, fpn or uper.
        pooling: features of a scene: cls, mean or both.
        width: channels of pyramid and decoder, or of an mlp's hidden layer.
        change_features: difference or all.
        size: pixels a side of the network's input.
    """

    task: str
    classes: tuple[str, ...]
    several: bool
    head: str
    pooling: str
    width: int
    change_features: str
    size: int

    @property
    def views(self) -> int:
        """Images of a sample."""
        return 2 if self.task == "change" else 1

    @property
    def dense(self) -> bool:
        """Whether every pixel has a class."""
        return self.task != "scene"

    def told(self) -> dict[str, Any]:
        """As JSON has it, for metadata."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "HeadPlan":
        """The plan that `told` gave. Raises TypeError or KeyError for anything else."""
        return cls(**{**told, "classes": tuple(told["classes"])})


def plan_head(cfg: Config, classes: tuple[str, ...], several: bool = False) -> HeadPlan:
    """The head that a configuration asks for."""
    f = cfg.finetune
    assert f.task is not None
    return HeadPlan(f.task, classes, several, head_name(cfg), f.pooling, f.width, f.change_features, input_size(cfg))


class FineTuner(nn.Module):
    """A backbone and a head. The state dict's names begin with `backbone.` and `head.`.

    Args:
        backbone: with or without gradients; trained as it is.
        plan: of the head, whose weights PyTorch's global generator gives.
        cfg: read are views.mean, views.std, train.precision, model.recompute.
    """

    def __init__(self, backbone: VisionTransformer, plan: HeadPlan, cfg: Config):
        super().__init__()
        self.plan, self.mean, self.std = plan, cfg.views.mean, cfg.views.std
        self.dtype = PRECISIONS[cfg.train.precision]
        self.recompute = "cheap" if cfg.model.recompute == "auto" else cfg.model.recompute
        self.backbone = backbone
        self.grid = plan.size // backbone.patch_size
        backbone.keep_grid(self.grid)
        width, classes = backbone.embed_dim, len(plan.classes)
        self.head: SceneHead | DenseHead
        if plan.dense:
            inputs = change_channels(width, plan.change_features) if plan.task == "change" else width
            self.head = DenseHead(inputs, classes, plan.head, plan.width)
        else:
            self.head = SceneHead(width, classes, plan.pooling, plan.width if plan.head == "mlp" else None)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            images: uint8 or uint16 [B, V, S, S, C], V = 2 for a change (before, after), else 1.
            keep: int32 [depth, 2, kept], the sequences of B * V that go through each residual branch of each block
                (docs/method.md section 4.4); None: all.

        Returns:
            Logits in the compute dtype [B, K], or of masks [B, K, S, S].
        """
        patches, cls = self._features(images.flatten(0, 1), keep)
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if isinstance(self.head, SceneHead):
                return self.head(cls, patches)
            if self.plan.task == "change":
                before, after = patches.unflatten(0, (-1, 2)).unbind(1)
                patches = change_features(before, after, self.plan.change_features)
            return self.head(patches, self.grid, self.plan.size)

    def _features(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised patches [N, L, D] and cls [N, D] of the last block."""
        tokens, groups = embed_images(self.backbone, images, self.mean, self.std, self.dtype)
        kept = [] if keep is None else [keep.shape[-1]]
        subsets = None if keep is None else with_places(keep, groups, kept)
        tokens = self.backbone.forward_blocks(
            tokens, groups, subsets=subsets, kept_counts=kept, recompute=self.recompute
        )
        found = self.backbone.final_norm(tokens).view(groups[0], groups[1], -1)
        return found[:, 1:], found[:, 0]


def parameter_groups(model: FineTuner, layer_decay: float, head_lr: float) -> list[dict[str, Any]]:
    """AdamW's groups: the learning rate falls by a factor from each block to the one before, from the last on.

    Bao et al. 2022, arXiv 2106.08254. Biases, norms, cls token and positions do not decay.

    Returns:
        Groups with `params`, `lr_scale` and `decay_scale`; from the input to the head.
    """
    depth = len(model.backbone.blocks)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
        groups.setdefault((_layer(name, depth), decays), []).append(parameter)
    return [
        {
            "params": groups[layer, decays],
            "lr_scale": head_lr if layer > depth + 1 else layer_decay ** (depth + 1 - layer),
            "decay_scale": float(decays),
        }
        for layer, decays in sorted(groups)
    ]


def _layer(name: str, depth: int) -> int:
    """Number of a parameter's layer: 0 the embedding, then the blocks, depth + 1 the final norm, then the head."""
    if not name.startswith("backbone."):
        return depth + 2
    words = name.split(".")
    if words[1] == "blocks":
        return int(words[2]) + 1
    return depth + 1 if words[1] == "norm" else 0
