"""Benchmarks the authors' implementation beside ours, from a checkout that PERA_OFFICIAL names.

Nothing of it is in this repository. Its packages import every framework that its other methods need, so the modules of
PerA alone are imported; where xFormers does not run, attention is PyTorch's fused one, per sequence group.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_fast.config import Config
from pera_kernels.attention import xformers

PACKAGES = ("Networks", "Networks.DinoV2", "Networks.PerA", "Utils", "Utils.loss")


class Blocks:
    """Stands in for xFormers' block-diagonal mask: equal sequences of a group, packed in one row."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self._batch_sizes: list[int] = []

    from_seqlens = classmethod(lambda cls, lengths: cls(lengths))

    def groups(self) -> list[tuple[int, int]]:
        """(sequences, length) of each group."""
        result, start = [], 0
        for count in self._batch_sizes:
            result.append((count, self.lengths[start]))
            start += count
        return result

    def split(self, x: Tensor) -> list[Tensor]:
        parts = x[0].split([n * length for n, length in self.groups()])
        return [p.view(n, length, -1) for p, (n, length) in zip(parts, self.groups(), strict=True)]


def _attention(self: Any, x: Tensor, attn_bias: Blocks) -> Tensor:
    parts = []
    for part in attn_bias.split(self.qkv(x)):
        n, length, width = part.shape
        q, k, v = part.view(n, length, 3, self.num_heads, width // (3 * self.num_heads)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        parts.append(y.transpose(1, 2).reshape(1, n * length, -1))
    return self.proj_drop(self.proj(torch.cat(parts, dim=1)))


def find_modules(checkout: Path) -> None:
    """Let the modules of PerA be imported from the checkout, as `Networks...` and `Utils...`; once a process."""
    if PACKAGES[0] in sys.modules:
        return
    sys.path.insert(0, str(checkout))
    for name in PACKAGES:  # namespaces without their __init__, which would import everything else
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package


def _classes() -> tuple[Any, Any]:
    """(model class, loss class) of the checkout."""
    model = importlib.import_module("Networks.PerA.pera").PerA
    loss = importlib.import_module("Utils.loss.pera_loss.pera_loss").PerALoss
    return model, loss


def _use_sdpa() -> None:
    attention = importlib.import_module("Networks.DinoV2.layers.attention")
    block = importlib.import_module("Networks.DinoV2.layers.block")
    attention.MemEffAttention.forward = _attention
    block.XFORMERS_AVAILABLE = True
    block.fmha = types.SimpleNamespace(BlockDiagonalMask=Blocks)
    block.index_select_cat = lambda sources, indices: torch.cat(
        [source[index].flatten() for source, index in zip(sources, indices, strict=True)]
    )


class PublishedStep(nn.Module):
    """One training step of the published implementation: autocast, its loss, AdamW, its EMA.

    Args:
        checkout: folder of the authors' repository.
        cfg: sizes, precision and optimiser settings.
        device: where it runs.
    """

    def __init__(self, checkout: Path, cfg: Config, device: torch.device):
        super().__init__()
        find_modules(checkout)
        model_class, loss_class = _classes()
        if xformers.available(device) is not None:
            _use_sdpa()
        m = cfg.model
        space = types.SimpleNamespace
        dino = space(
            HEAD_OUT_DIM=m.prototypes,
            NUM_HEAD_LAYERS=3,
            HEAD_HIDDEN_DIM=m.head_hidden,
            HEAD_BOTTLENECK_DIM=m.bottleneck,
        )
        net = space(
            PATCH_SIZE=m.patch_size,
            EMBED_DIM=m.embed_dim,
            DEPTH=m.depth,
            NUM_HEADS=m.num_heads,
            MLP_RATIO=m.mlp_ratio,
            DROP_PATH_RATE=m.drop_path,
            DINO=dino,
            PERA=space(S_RATIO=m.student_ratio, T_RATIO=m.teacher_ratio),
        )
        self.cfg = cfg
        # Of the last step: the loss's parts, by the names that the authors log, and the norm before clipping.
        self.parts: dict[str, Tensor] = {}
        self.grad_norm = torch.zeros(())
        self.net = model_class(space(AUG=space(GLOBAL_CROP_SIZE=cfg.views.global_size), NET=net)).to(device).train()
        self.loss = loss_class(cfg.views.num_global, cfg.views.num_local, m.prototypes).to(device)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.04, eps=cfg.optim.eps)

    def views(self, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """Random float views of the shapes that it takes."""
        v, shapes = self.cfg.views, {}
        for name, crops, size in (("global", v.num_global, v.global_size), ("local", v.num_local, v.local_size)):
            for who in "ST":
                shapes[f"{who}_{name}_crops"] = torch.randn(crops * batch_size, 3, size, size, device=device)
        return shapes

    def step(self, views: dict[str, Tensor], dtype: torch.dtype, teacher_temp: float, momentum: float) -> Tensor:
        """Forward, backward, clipping, update, EMA; returns the loss."""
        device = next(iter(views.values())).device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            student, teacher = self.net({name: view.to(dtype) for name, view in views.items()})
            loss, parts = self.loss(student, teacher, teacher_temp)
        self.parts = {name: part.detach() for name, part in parts.items()}
        loss.backward()
        self.grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for q, k in zip(self.net.student.parameters(), self.net.teacher.parameters(), strict=True):
                k.data.mul_(momentum).add_((1 - momentum) * q.detach().data)
        return loss.detach()
