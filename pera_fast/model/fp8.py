"""Branches of a transformer block in FP8, without gradients, for the teacher (``model.teacher_precision``).

The four products of a block take e4m3 with a scale a row (``pera_kernels.fp8``). Attention, the stream, the last block,
of which few rows are read, and all that is outside the blocks stay in the compute dtype.
"""

import torch
from torch import Tensor, nn

from pera_kernels import fp8
from pera_kernels.add_norm_fp8 import add_norm_fp8_
from pera_kernels.attention.op import attention_parts
from pera_kernels.gelu_fp8 import gelu_fp8
from pera_kernels.quantize_rows import Slot, WeightQuantizer, quantize_parts

from .branches import AttentionLayers, Pending, Plan, output_bias


def attention_branch(x: Tensor, pending: Pending | None, layers: AttentionLayers, plan: Plan) -> tuple[Tensor, Pending]:
    """As ``branches.attention_branch`` without gradients and subsets."""
    norm, qkv, proj, num_heads = layers
    added, left = output_bias(proj, x)
    normed = _begin(x, pending, norm)
    parts = attention_parts(fp8.linear(normed, qkv.weight, qkv.bias, x.dtype), num_heads, plan.groups)
    return x, Pending(fp8.linear(quantize_parts(parts), proj.weight, added, x.dtype), left, None)


def mlp_branch(
    x: Tensor, pending: Pending, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear
) -> tuple[Tensor, Pending]:
    """As ``branches.mlp_branch`` without gradients and subsets."""
    added, left = output_bias(fc2, x)
    act = gelu_fp8(fp8.linear(_begin(x, pending, norm), fc1.weight, fc1.bias, x.dtype))
    return x, Pending(fp8.linear(act, fc2.weight, added, x.dtype), left, None)


def _begin(x: Tensor, pending: Pending | None, norm: nn.LayerNorm) -> fp8.Rows:
    """Add what is pending to the stream, in place, and normalise it."""
    y, y_bias, _ = (None, None, None) if pending is None else pending
    return add_norm_fp8_(x, y, y_bias, norm.weight, norm.bias, norm.eps)


class Fp8Copies:
    """E4m3 copies of the weights of a backbone's blocks, in memory of their own that never moves.

    ``pera_kernels.fp8.in_e4m3`` takes a copy while it is up to date. A state dict has the weights only.

    Args:
        blocks: of a backbone; its linear layers get the copies.
    """

    def __init__(self, blocks: nn.Module):
        self._weights = [module.weight for module in blocks.modules() if isinstance(module, nn.Linear)]
        device = self._weights[0].device
        values = torch.empty(sum(w.numel() for w in self._weights), dtype=fp8.E4M3, device=device)
        scales = torch.empty(sum(w.shape[0] for w in self._weights), 1, device=device)
        slots = []
        for weight, part, scale in zip(
            self._weights,
            values.split([w.numel() for w in self._weights]),
            scales.split([w.shape[0] for w in self._weights]),
            strict=True,
        ):
            copy = fp8.Rows(part.view(weight.shape), scale)
            weight.fp8_copy = copy  # pyright: ignore[reportAttributeAccessIssue]
            slots.append(Slot(weight.detach(), copy))
        self._quantizer = WeightQuantizer(slots)
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies and scales."""
        return sum(slot.copy.values.nbytes + slot.copy.scale.nbytes for slot in self._quantizer.slots)

    def traffic(self) -> dict[str, int]:
        """Bytes that the kernel which writes the copies reads and writes, by its name."""
        return self._quantizer.traffic()

    def refresh(self) -> None:
        """Write all copies anew: call it after every change of the weights. The host waits for nothing."""
        self._quantizer()
        for weight in self._weights:
            weight.fp8_copy_version = weight._version  # pyright: ignore[reportAttributeAccessIssue]
