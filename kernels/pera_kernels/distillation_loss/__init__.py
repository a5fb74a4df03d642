"""Distillation over prototypes without [N, K] logits: loss, center, optional Sinkhorn centering."""

from .op import distillation_loss
from .sinkhorn import sinkhorn_center
from .weight_norm import prototype_logits_mean, prototypes

__all__ = ["distillation_loss", "prototype_logits_mean", "prototypes", "sinkhorn_center"]
