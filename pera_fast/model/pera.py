"""Student and teacher on disjoint masks, and the loss between them (docs/method.md sections 3 to 5)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.init import normal_

from pera_fast.config import Config
from pera_fast.ranges import span
from pera_kernels.distillation_loss import prototype_logits_mean, sinkhorn_center
from pera_kernels.koleo import koleo_rows
from pera_kernels.mask_tokens import mask_tokens
from pera_kernels.packing import with_places
from pera_kernels.pixel_loss import pixel_loss
from pera_kernels.prototype_losses import prototype_losses
from pera_kernels.visible_patches import contrast_mean, visible_patches

from .fp8 import Fp8Copies
from .heads import ClsHead, PixelHead
from .inputs import GroupInputs, StepInputs, num_kept
from .rows import row_groups, split_rows
from .transformer import VisionTransformer

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Branch(nn.Module):
    """A backbone with its cls head: the pair that student and teacher both are."""

    def __init__(self, cfg: Config):
        super().__init__()
        model, views = cfg.model, cfg.views
        self.backbone = VisionTransformer(
            grid=views.global_size // model.patch_size,
            patch_size=model.patch_size,
            in_chans=model.in_chans,
            embed_dim=model.embed_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            mlp_ratio=model.mlp_ratio,
            other_grids=[views.local_size // model.patch_size],
        )
        self.cls_head = ClsHead(model.embed_dim, model.head_hidden, model.bottleneck, model.prototypes)


class _Total(torch.autograd.Function):
    """The weighted sum of the losses, in a few launches rather than one for each number.

    Arguments are the entropies [N], of which the first ``num_global`` are those of global crops, KoLeo's sum and the
    pixel loss (scalars) with their weights. Returns the total and, without a gradient, the parts of the mean entropy.
    """

    @staticmethod
    def forward(ctx, entropies, koleo, pixel, num_global, koleo_weight, pixel_weight):
        rows = entropies.shape[0]
        ctx.set_materialize_grads(False)  # no zeros for the parts
        ctx.rows, ctx.weights = rows, (1 / rows, koleo_weight, pixel_weight)
        sums = entropies[:num_global].sum(), entropies[num_global:].sum()
        parts = torch._foreach_mul([*sums, koleo, pixel], [1 / rows, 1 / rows, koleo_weight, pixel_weight])
        ctx.mark_non_differentiable(*parts[:2])
        return torch.stack(parts).sum(), *parts[:2]

    @staticmethod
    def backward(ctx, grad, *_):
        entropy, koleo, pixel = torch._foreach_mul([grad] * 3, ctx.weights)
        return entropy.expand(ctx.rows), koleo, pixel, None, None, None


class PerA(nn.Module):
    """The training model. Parameters carry the names of the published checkpoints.

    Args:
        cfg: resolved configuration.

    Attributes:
        compute_dtype: dtype of activations and matrix products; parameters stay float32.
        center: float32 [1, prototypes], running mean of the teacher's logits, used by the next step.
        recompute: policy of ``model.recompute``; "auto" is "cheap" until ``train.memory_plan`` chooses.
        fp8_teacher: whether the teacher's blocks run in FP8, in ``teacher_rows`` alone.
        fp8_copies: of the teacher's blocks with ``model.teacher_precision=fp8``; None: weights are quantised where they
            are read.
    """

    center: Tensor  # a buffer, which a checker would take for Tensor | Module

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.rgb = cfg.rgb_channels()
        self.compute_dtype = PRECISIONS[cfg.train.precision]
        self.recompute = "cheap" if cfg.model.recompute == "auto" else cfg.model.recompute
        self.student = Branch(cfg)
        self.teacher = Branch(cfg)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.fp8_teacher = cfg.model.teacher_precision == "fp8"
        self.fp8_copies: Fp8Copies | None = None
        patch_values = cfg.model.patch_size**2 * cfg.model.in_chans
        self.pred_head = PixelHead(cfg.model.embed_dim, cfg.model.head_hidden, cfg.model.bottleneck, patch_values)
        self.s_mask_token = nn.Parameter(normal_(torch.empty(1, 1, cfg.model.embed_dim), std=0.02))
        self.register_buffer("center", torch.zeros(1, cfg.model.prototypes))

    def forward(self, inputs: StepInputs, teacher_temp: float | Tensor) -> dict[str, Tensor]:
        """One micro-batch through both networks.

        Args:
            inputs: crops, colours, indices and kept sequences, on the model's device.
            teacher_temp: the teacher's temperature at this step; a float32 [] tensor in a CUDA graph, whose numbers
                are fixed (with centering=center only).

        Returns:
            ``loss``, the differentiable total (docs/method.md section 5.5), and, detached: ``global_cls_loss``,
            ``local_cls_loss``, ``koleo_loss`` and ``pixel_loss`` (the logged values: koleo_sum / num_global and
            pixel / (100 * num_global)), ``teacher_mean`` (float32 [bottleneck], mean teacher row for the center).
        """
        with span("teacher"):
            teacher_rows = self.teacher_rows(inputs)
        with span("student"):
            student_rows, pixel = self.student_rows(inputs)
        with span("loss"):
            return self._loss(student_rows, teacher_rows, pixel, inputs.global_.crops.shape[0], teacher_temp)

    def _loss(
        self, student_rows: Tensor, teacher_rows: Tensor, pixel: Tensor, num_global: int, teacher_temp: float | Tensor
    ) -> dict[str, Tensor]:
        """Compute the result of ``forward`` from both networks' rows [crops * B, bottleneck] and the pixel loss."""
        cfg, center = self.cfg, self.center[0]
        prototypes = self.teacher.cls_head.last_layer
        if cfg.loss.centering == "sinkhorn":
            center = sinkhorn_center(_all_ranks(teacher_rows), prototypes.weight_v, prototypes.weight_g, teacher_temp)
        teacher_g = prototypes.weight_g
        if isinstance(teacher_temp, Tensor):  # a number that the ops cannot take goes into what they multiply
            center, teacher_g, teacher_temp = center / teacher_temp, teacher_g / teacher_temp, 1.0
        student = self.student.cls_head.last_layer
        spread = cfg.loss.koleo_on if cfg.loss.koleo_weight else "nothing"
        entropies, koleo_sum = prototype_losses(
            *(student_rows, student.weight_v, student.weight_g),
            *(teacher_rows, prototypes.weight_v, teacher_g),
            *(center, cfg.loss.student_temp, teacher_temp),
            *((num_global, cfg.views.num_global) if spread == "logits" else (0, 1)),
        )
        if spread == "bottleneck":
            koleo_sum = koleo_rows(student_rows[:num_global], cfg.views.num_global)
        # The sum over pairs of batch means, over the number of pairs, is the mean over all rows.
        weights = cfg.loss.koleo_weight, cfg.loss.pixel_weight
        total, global_cls, local_cls = _Total.apply(entropies, koleo_sum, pixel, num_global, *weights)
        crops = cfg.views.num_global
        koleo, pixel = torch._foreach_mul([koleo_sum.detach(), pixel.detach()], [1 / crops, 1 / (100 * crops)])
        return {
            "loss": total,
            "global_cls_loss": global_cls,
            "local_cls_loss": local_cls,
            "koleo_loss": koleo,
            "pixel_loss": pixel,
            "teacher_mean": teacher_rows.mean(0, dtype=torch.promote_types(teacher_rows.dtype, torch.float32)),
        }

    @torch.no_grad()
    def teacher_rows(self, inputs: StepInputs) -> Tensor:
        """Unit bottleneck rows [crops * B, bottleneck] of the teacher, global crops first."""
        backbone = self.teacher.backbone
        parts = inputs.global_, inputs.local
        index = [part.teacher_index for part in parts]
        with span("embed"):
            rows = map(self._teacher_patches, parts)
            tokens = backbone.embed(list(rows), index, [self._grid(part) for part in parts])
        rows = backbone.forward_rows(tokens, _groups(index), [0, 0], fp8=self.fp8_teacher)
        with span("cls head"):
            return self.teacher.cls_head(rows)

    def student_rows(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Unit bottleneck rows of the student [crops * B, bottleneck], and the pixel loss (scalar)."""
        backbone, recompute = self.student.backbone, self.recompute
        parts = inputs.global_, inputs.local
        index = [part.student_index for part in parts]
        groups = _groups(index)
        with span("embed"):
            patches = [self._patches(p.crops, p.student_index, p.student_order, p.student_factors) for p in parts]
            x = backbone.embed([rows for rows, _ in patches], index, [self._grid(part) for part in parts])
        drop_path = self.cfg.model.drop_path
        kept_counts = [] if inputs.keep is None else [num_kept(groups[0], drop_path), num_kept(groups[2], drop_path)]
        subsets = inputs.keep
        if subsets is not None:
            places = inputs.places
            subsets = with_places(subsets, groups, kept_counts) if places is None else torch.cat([subsets, places], -1)
        middle = len(backbone.blocks) // 2
        x = backbone.forward_blocks(x, groups, 0, middle, subsets, kept_counts, recompute)
        x, groups = self._grow(x, groups, inputs.global_.predicted_index)
        tails = [inputs.global_.predicted_index.shape[1], 0]
        rows = backbone.forward_rows(x, groups, tails, middle, subsets, kept_counts, recompute)
        cls, predicted = split_rows(rows, row_groups(groups, tails))
        with span("cls head"):
            cls = self.student.cls_head(cls)
        with span("pixel head"):
            return cls, self._pixel_loss(predicted, inputs.global_, patches[0][1])

    def _patches(
        self, crops: Tensor, index: Tensor, order: Tensor | None, factors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Coloured, normalised rows of the visible patches, and the mean gray that contrast blends with."""
        gray = None if order is None or factors is None else contrast_mean(crops, order, factors, self.rgb)
        mean, std, patch = self.cfg.views.mean, self.cfg.views.std, self.cfg.model.patch_size
        rows = visible_patches(crops, index, order, factors, gray, mean, std, patch, self.compute_dtype, self.rgb)
        return rows, gray

    def _teacher_patches(self, group: GroupInputs) -> Tensor:
        crops = group.crops if group.teacher_crops is None else group.teacher_crops
        return self._patches(crops, group.teacher_index, group.teacher_order, group.teacher_factors)[0]

    def _grid(self, group: GroupInputs) -> int:
        """Patches a side of a group's crops."""
        return group.crops.shape[2] // self.cfg.model.patch_size  # [N, H, W, C] or [N, C, H, W], and square

    def _grow(self, x: Tensor, groups: Sequence[int], predicted: Tensor) -> tuple[Tensor, list[int]]:
        """Mid-depth: the global sequences get a mask token for each predicted patch."""
        if predicted.shape[1] == 0:
            return x, list(groups)
        backbone = self.student.backbone
        num, length = groups[:2]
        position = backbone.position(backbone.grid)
        x = mask_tokens(x, self.s_mask_token.view(-1), position, predicted, rest=x.shape[0] - num * length)
        return x, [num, length + predicted.shape[1], *groups[2:]]

    def _pixel_loss(self, predicted: Tensor, group: GroupInputs, gray: Tensor | None) -> Tensor:
        """The pixel loss (scalar) of the predicted tokens [n * predicted, D] after the final norm."""
        if predicted.shape[0] == 0:
            return predicted.new_zeros((), dtype=torch.float32)
        pred = self.pred_head(predicted)
        colour = group.student_order, group.student_factors, gray
        mean, std = self.cfg.views.mean, self.cfg.views.std
        patch = self.cfg.model.patch_size
        return pixel_loss(pred, group.crops, group.predicted_index, *colour, mean, std, patch, self.rgb)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the transformer blocks of both networks, each as one graph, with the ops as its opaque parts.

        What is between the blocks is a few ops that have their own kernels. Blocks share their code, so there is one
        graph for each kind of block: first, middle and last of the teacher; first and middle of the student before and
        after the mask tokens, and its last.

        Args:
            backend: of ``torch.compile``.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
        for branch in (self.student, self.teacher):
            for block in branch.backbone.blocks:
                block.compile(fullgraph=True, dynamic=False, backend=backend)

    @torch.no_grad()
    def update_center(self, teacher_mean: Tensor, ok: Tensor | None = None) -> None:
        """Move the center towards the mean teacher logits; call before update_teacher.

        Args:
            ok: bool [] on the model's device: the center stays where it is False. None: it moves.
            teacher_mean: float32 [bottleneck], mean unit row over all crops, samples, micro-batches and ranks. The mean
                of the logits is the prototypes times this: 384 numbers to reduce instead of 131072.
        """
        layer = self.teacher.cls_head.last_layer
        logits = prototype_logits_mean(teacher_mean, layer.weight_v, layer.weight_g).to(self.center).unsqueeze(0)
        if ok is not None:  # selected: a lerp of weight 0 would keep a NaN
            logits = torch.where(ok, logits, self.center)
        self.center.lerp_(logits, 1 - self.cfg.loss.center_momentum)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, over backbone and cls head."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)  # one pass
        self.refresh_fp8()

    def make_fp8(self) -> None:
        """Make the FP8 copies that the configuration asks for; call it when the model is on its device."""
        if self.fp8_teacher:
            self.fp8_copies = Fp8Copies(self.teacher.backbone.blocks[:-1])

    def refresh_fp8(self) -> None:
        """Write the FP8 copies anew, if there are any; call it when the teacher's weights have changed."""
        if self.fp8_copies is not None:
            self.fp8_copies.refresh()


def _groups(index: Sequence[Tensor]) -> list[int]:
    """[n0, len0, n1, len1]: sequences and their tokens, cls among them, for patch numbers [N, n] of each group."""
    return [size for part in index for size in (part.shape[0], 1 + part.shape[1])]


def _all_ranks(rows: Tensor) -> Tensor:
    """Rows of all ranks, so that each rank computes the same assignment; rows themselves in one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
