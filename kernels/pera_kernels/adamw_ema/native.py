"""The native update, which finds its tensors through a table of addresses, as the Triton kernels do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import Slot

CHUNK = 16384  # kChunk of cpu.cpp


class Table:
    """Addresses of the slots' tensors. The slots must stay alive and where they are.

    Args:
        slots: as `AdamWEma` takes them, checked.
        copy_dtype: bf16 or fp16 of the copies; None: no slot has one.
        betas: of AdamW.
    """

    def __init__(self, slots: Sequence[Slot], copy_dtype: torch.dtype | None, betas: tuple[float, float]):
        self._half, self._betas = copy_dtype == torch.float16, betas
        rows = [slot.addresses() for slot in slots]
        chunks = [-(-slot.param.numel() // CHUNK) for slot in slots]
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._grads = torch.zeros(len(slots), dtype=torch.int64)
        self._chunks = torch.tensor([0, *chunks], dtype=torch.int64).cumsum(0)
        self._corrections = torch.ones(len(slots), 2)
        self._scalars = torch.zeros(4)

    def point(self, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients' addresses."""
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        self._grads = torch.tensor(addresses, dtype=torch.int64)

    def prepare(self, losses: Tensor, clip: float, grad_scale: Tensor | None, factor: float) -> Tensor:
        """f32 [4] of `AdamWEma.prepare`, from the gradients that `point` took."""
        torch.ops.pera_native.adamw_ema_prepare(
            self._rows, self._grads, self._chunks, losses, grad_scale, factor, clip, *self._betas, self._corrections,
            self._scalars,
        )  # fmt: skip
        return self._scalars

    def apply(self, *, lr: float, weight_decay: float, eps: float, momentum: float) -> None:
        """The update that `prepare` allowed."""
        torch.ops.pera_native.adamw_ema_apply(
            self._rows, self._grads, self._chunks, self._corrections, self._scalars, lr, weight_decay, *self._betas,
            eps, momentum, self._half,
        )  # fmt: skip
