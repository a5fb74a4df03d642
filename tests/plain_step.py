"""The training step's loss in plain PyTorch: dense sequences, all logits, autocast or not.

Source: docs/method.md sections 3 to 5.
It reads the parameters of a ``PerA`` by name and uses none of its code but the interpolation of the position embedding
and, for the patches, ``visible_patches``. Under autocast the residual stream stays in float32, as in the published
implementation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pera_fast.model.inputs import GroupInputs, StepInputs, num_kept
from pera_fast.model.pera import PerA
from pera_kernels.koleo.reference import nearest_neighbour_entropy
from pera_kernels.visible_patches import contrast_mean, visible_patches


def plain_gradients(
    model: PerA, inputs: StepInputs, teacher_temp: float, half: torch.dtype | None
) -> dict[str, Tensor]:
    """Gradients of all trained parameters in float32, under autocast to ``half`` where that is given."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.autocast(model.center.device.type, half, enabled=half is not None):
        loss = plain_loss(model, inputs, teacher_temp)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def plain_loss(model: PerA, inputs: StepInputs, teacher_temp: float) -> Tensor:
    """The total of docs/method.md section 5.5."""
    cfg, num_global = model.cfg, inputs.global_.crops.shape[0]
    with torch.no_grad():
        teacher = _logits(model.teacher, _teacher_cls(model, inputs)).float()
    cls, predicted = _student(model, inputs)
    student = _logits(model.student, cls).float()
    target = F.softmax((teacher - model.center) / teacher_temp, 1)
    entropies = -(target * F.log_softmax(student / cfg.loss.student_temp, 1)).sum(1)
    koleo = sum(nearest_neighbour_entropy(part) for part in student[:num_global].chunk(cfg.views.num_global))
    pixel = torch.zeros(())
    if predicted.shape[0]:
        pixels = _linear(_bottleneck(model.pred_head.mlp0.mlp, predicted), model.pred_head.last_layer)
        group = inputs.global_
        rows = _patches(model, group.crops, group.predicted_index, group.student_order, group.student_factors)
        wanted = rows.view(rows.shape[0], cfg.model.in_chans, -1).transpose(1, 2).flatten(1)
        pixel = (pixels.float() - wanted).square().sum(1).mean()
    return entropies.mean() + cfg.loss.koleo_weight * koleo + cfg.loss.pixel_weight * pixel


def _patches(model: PerA, crops: Tensor, index: Tensor, order: Tensor | None, factors: Tensor | None) -> Tensor:
    views = model.cfg.views
    gray = None if order is None or factors is None else contrast_mean(crops, order, factors, model.rgb)
    return visible_patches(
        crops, index, order, factors, gray, views.mean, views.std, model.cfg.model.patch_size, torch.float32, model.rgb
    )


def _tokens(model: PerA, backbone: Any, crops: Tensor, index: Tensor, *colours: Tensor | None) -> Tensor:
    """[N, 1 + n, D] of the visible patches [N, n], cls first."""
    position = backbone.position(crops.shape[2] // model.cfg.model.patch_size)
    proj, rows = backbone.patch_embed.proj, _patches(model, crops, index, *colours)
    x = F.linear(rows, proj.weight.flatten(1), proj.bias).unflatten(0, index.shape).float() + position[1 + index.long()]
    return torch.cat([(backbone.cls_token + position[:1]).expand(len(x), -1, -1), x], 1)


def _norm(layer: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def _attention(block: Any, x: Tensor) -> Tensor:
    qkv = block.attn.qkv(_norm(block.norm1, x)).unflatten(2, (3, block.attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.mlp.fc2(F.gelu(block.mlp.fc1(_norm(block.norm2, x))))


def _blocks(blocks: Any, x: Tensor, keep: Tensor | None) -> Tensor:
    """x [N, L, D] through blocks; keep: [blocks, 2, kept] or None."""
    for number, block in enumerate(blocks):
        for which, branch in enumerate((_attention, _mlp)):
            if keep is None:
                x = x + branch(block, x)
            else:
                chosen = keep[number, which].long()
                x = x.index_add(0, chosen, branch(block, x[chosen]).float(), alpha=len(x) / len(chosen))
    return x


def _teacher_cls(model: PerA, inputs: StepInputs) -> Tensor:
    backbone, rows = model.teacher.backbone, []
    for group in (inputs.global_, inputs.local):
        crops = group.crops if group.teacher_crops is None else group.teacher_crops
        x = _tokens(model, backbone, crops, group.teacher_index, group.teacher_order, group.teacher_factors)
        rows.append(_norm(backbone.norm, _blocks(backbone.blocks, x, None)[:, 0]))
    return torch.cat(rows)


def _student(model: PerA, inputs: StepInputs) -> tuple[Tensor, Tensor]:
    """cls rows of all crops and the predicted rows, after the final norm."""
    backbone, cls, predicted = model.student.backbone, [], []
    middle = len(backbone.blocks) // 2
    kept = [num_kept(group.crops.shape[0], model.cfg.model.drop_path) for group in (inputs.global_, inputs.local)]
    keeps = (None, None) if inputs.keep is None else inputs.keep.split(kept, 2)
    for group, keep in zip((inputs.global_, inputs.local), keeps, strict=True):
        x = _tokens(model, backbone, group.crops, group.student_index, group.student_order, group.student_factors)
        x = _blocks(backbone.blocks[:middle], x, None if keep is None else keep[:middle])
        seen = x.shape[1]
        if group is inputs.global_:
            x = _with_mask_tokens(model, x, group)
        x = _norm(backbone.norm, _blocks(backbone.blocks[middle:], x, None if keep is None else keep[middle:]))
        cls.append(x[:, 0])
        predicted.append(x[:, seen:].flatten(0, 1))
    return torch.cat(cls), torch.cat(predicted)


def _with_mask_tokens(model: PerA, x: Tensor, group: GroupInputs) -> Tensor:
    position = model.student.backbone.pos_embed[0]
    return torch.cat([x, model.s_mask_token + position[1 + group.predicted_index.long()]], 1)


def _bottleneck(mlp: Any, x: Tensor) -> Tensor:
    x = mlp(x)
    return F.normalize(x.float(), dim=1, eps=1e-12 if x.dtype == torch.float32 else 1e-6)


def _linear(x: Tensor, layer: Any) -> Tensor:
    return F.linear(x, layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True))


def _logits(branch: Any, cls: Tensor) -> Tensor:
    return _linear(_bottleneck(branch.cls_head.mlp, cls), branch.cls_head.last_layer)
