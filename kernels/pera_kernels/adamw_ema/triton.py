"""Multi-tensor Triton kernels of the update, which find their tensors through a table of addresses on the device.

The addresses of parameters, moments and copies stay the same over a run, so the table is written once; those of the
gradients have a table of their own, which is written again where they moved. A chunk is `CHUNK` elements of one tensor.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from .reference import Slot

CHUNK = 8192
BLOCK = 1024
NUM_WARPS = 4
PREPARE_BLOCK = 1024
PREPARE_WARPS = 8
COLUMNS = 8  # of the table: `Slot.addresses`
COPY_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to elements of a dtype; ALIGNED says that the address is a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def sum_squares_kernel(
    table_ptr, grads_ptr, chunks_ptr, out_ptr, first, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum of squares of a chunk of a gradient; 0 where there is none."""
    program = tl.program_id(0) + first
    tensor = tl.load(chunks_ptr + 2 * program)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    count = tl.load(table_ptr + tensor * COLUMNS + 7)
    address = tl.load(grads_ptr + tensor)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    if address == 0:
        count = start
    grad_ptr = _pointer(address, tl.float32, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        i = start + offset + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + i, mask=i < count, other=0.0)
        total += grad * grad
    tl.store(out_ptr + program, tl.sum(total))


@triton.jit
def prepare_kernel(
    partial_ptr, num_partial, losses_ptr, num_losses, scale_ptr, table_ptr, grads_ptr, num_tensors,
    corrections_ptr, out_ptr, factor, clip, log_beta1, log_beta2,
    COLUMNS: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: norm, flags and multiplier of the gradients; steps and bias corrections of the tensors."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, num_partial, BLOCK):
        i = offset + lanes
        total += tl.load(partial_ptr + i, mask=i < num_partial, other=0.0)
    bad = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, num_losses, BLOCK):
        i = offset + lanes
        loss = tl.load(losses_ptr + i, mask=i < num_losses, other=0.0)
        bad += tl.where(tl.abs(loss) < float("inf"), 0, 1)  # a NaN compares as false
    multiplier = factor
    if HAS_SCALE:
        multiplier = factor / tl.load(scale_ptr)
    norm = tl.sqrt(tl.sum(total)) * multiplier
    finite = tl.abs(norm) < float("inf")
    ok = finite & (tl.sum(bad) == 0)
    step = ok.to(tl.float32)
    multiplier = multiplier / tl.maximum((norm + 1e-6) / clip, 1.0)
    tl.store(out_ptr, norm)
    tl.store(out_ptr + 1, step)
    tl.store(out_ptr + 2, multiplier)
    tl.store(out_ptr + 3, 1.0 - finite.to(tl.float32))
    for offset in range(0, num_tensors, BLOCK):
        i = offset + lanes
        inside = i < num_tensors
        address = tl.load(table_ptr + i * COLUMNS + 6, mask=inside, other=0)
        grads = tl.load(grads_ptr + i, mask=inside, other=0)
        counted = inside & (address != 0) & (grads != 0)
        step_ptr = address.to(tl.pointer_type(tl.float32))
        steps = tl.load(step_ptr, mask=counted, other=0.0) + step
        tl.store(step_ptr, steps, mask=counted)
        steps = tl.maximum(steps, 1.0).to(tl.float64)  # 1 - beta^steps loses its digits in float32
        correction1 = 1.0 - tl.exp(steps * log_beta1)
        correction2 = 1.0 - tl.exp(steps * log_beta2)
        tl.store(corrections_ptr + 2 * i, (1.0 / correction1).to(tl.float32), mask=inside)
        tl.store(corrections_ptr + 2 * i + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=inside)


@triton.jit
def adamw_ema_kernel(
    table_ptr, grads_ptr, chunks_ptr, corrections_ptr, scalars_ptr, first, lr, decay, beta2, weight1, weight2, eps,
    weight_ema, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """Update of a chunk: reads p, g and both moments, and t; writes them but g, and the copies. Nothing unless ok."""
    if tl.load(scalars_ptr + 1) > 0:
        program = tl.program_id(0) + first
        tensor = tl.load(chunks_ptr + 2 * program)
        start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
        row = table_ptr + tensor * COLUMNS
        grad_at = tl.load(grads_ptr + tensor)
        teacher_at, copy_at, teacher_copy_at = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
        count = tl.load(row + 7)
        if ALIGNED:
            count = tl.multiple_of(count, 16)
        param_ptr = _pointer(tl.load(row), tl.float32, ALIGNED)
        avg_ptr = _pointer(tl.load(row + 1), tl.float32, ALIGNED)
        square_ptr = _pointer(tl.load(row + 2), tl.float32, ALIGNED)
        grad_ptr = _pointer(grad_at, tl.float32, ALIGNED)
        teacher_ptr = _pointer(teacher_at, tl.float32, ALIGNED)
        copy_ptr = _pointer(copy_at, COPY, ALIGNED)
        teacher_copy_ptr = _pointer(teacher_copy_at, COPY, ALIGNED)
        multiplier = tl.load(scalars_ptr + 2)
        step_size = lr * tl.load(corrections_ptr + 2 * tensor)
        root = tl.load(corrections_ptr + 2 * tensor + 1)
        for offset in range(0, CHUNK, BLOCK):
            i = start + offset + tl.arange(0, BLOCK)
            inside = i < count
            param = tl.load(param_ptr + i, mask=inside, other=0.0)
            if grad_at != 0:
                grad = tl.load(grad_ptr + i, mask=inside, other=0.0) * multiplier
                avg = tl.load(avg_ptr + i, mask=inside, other=0.0)
                square = tl.load(square_ptr + i, mask=inside, other=0.0)
                avg += weight1 * (grad - avg)
                square = beta2 * square + weight2 * grad * grad
                param -= decay * param
                param -= step_size * avg / (tl.sqrt(square) * root + eps)
                tl.store(avg_ptr + i, avg, mask=inside)
                tl.store(square_ptr + i, square, mask=inside)
                tl.store(param_ptr + i, param, mask=inside)
            if copy_at != 0:
                tl.store(copy_ptr + i, param.to(COPY), mask=inside)
            if teacher_at != 0:
                teacher = tl.load(teacher_ptr + i, mask=inside, other=0.0)
                teacher += weight_ema * (param - teacher)
                tl.store(teacher_ptr + i, teacher, mask=inside)
                if teacher_copy_at != 0:
                    tl.store(teacher_copy_ptr + i, teacher.to(COPY), mask=inside)


class Table:
    """Addresses of the slots' tensors on the device. The slots must stay alive and where they are.

    Args:
        slots: as `AdamWEma` takes them, checked.
        device: of all tensors.
        copy_dtype: bf16 or fp16 of the copies; None: no slot has one.
        betas: of AdamW.
    """

    def __init__(
        self, slots: Sequence[Slot], device: torch.device, copy_dtype: torch.dtype | None, betas: tuple[float, float]
    ):
        self._device, self._copy, self._betas = device, COPY_TYPES[copy_dtype or torch.bfloat16], betas
        rows = [slot.addresses() for slot in slots]
        self._fits = [all(address % 16 == 0 for address in row) for row in rows]  # the count of elements, too
        self._gradients: list[int] = [0] * len(slots)
        self._gradients_fit = True
        self._counts = [row[-1] for row in rows]
        self._rows = _send(rows, torch.int64, device)
        self._grads = torch.zeros(len(slots), dtype=torch.int64, device=device)
        self._corrections = torch.empty(len(slots), 2, device=device)
        self._scalars = torch.zeros(4, device=device)
        self._cut(self._fits)

    def _cut(self, fits: Sequence[bool]) -> None:
        """Chunks of the aligned tensors, then those of the others."""
        chunks: list[tuple[int, int]] = []
        for wanted in (True, False):
            for number, (count, fit) in enumerate(zip(self._counts, fits, strict=True)):
                if fit == wanted:
                    chunks += [(number, part) for part in range(-(-count // CHUNK))]
            if wanted:
                aligned = len(chunks)
        self._ranges = [(0, aligned, True), (aligned, len(chunks) - aligned, False)]
        self._chunks = _send(chunks, torch.int32, self._device)
        self._partial = torch.empty(len(chunks), device=self._device)

    def point(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes the gradients' addresses; does nothing where they are what they were."""
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if addresses == self._gradients:
            return
        fits = [fit and address % 16 == 0 for fit, address in zip(self._fits, addresses, strict=True)]
        if fits != [fit and old % 16 == 0 for fit, old in zip(self._fits, self._gradients, strict=True)]:
            self._cut(fits)
        self._gradients = addresses
        self._grads.copy_(_send(addresses, torch.int64, self._device))

    def prepare(self, losses: Tensor, clip: float, grad_scale: Tensor | None, factor: float) -> Tensor:
        """f32 [4] of `AdamWEma.prepare`, from the gradients that `point` took."""
        for first, number, aligned in self._ranges:
            if number:
                sum_squares_kernel[(number,)](
                    self._rows, self._grads, self._chunks, self._partial, first,
                    COLUMNS=COLUMNS, CHUNK=CHUNK, BLOCK=BLOCK, ALIGNED=aligned, num_warps=NUM_WARPS,
                )  # fmt: skip
        prepare_kernel[(1,)](
            self._partial, self._partial.shape[0], losses, losses.shape[0],
            self._scalars if grad_scale is None else grad_scale, self._rows, self._grads, len(self._counts),
            self._corrections, self._scalars, factor, clip, *(_log(beta) for beta in self._betas),
            COLUMNS=COLUMNS, HAS_SCALE=grad_scale is not None, BLOCK=PREPARE_BLOCK, num_warps=PREPARE_WARPS,
        )  # fmt: skip
        return self._scalars

    def apply(self, *, lr: float, weight_decay: float, eps: float, momentum: float) -> None:
        """The update that `prepare` allowed."""
        beta1, beta2 = self._betas
        for first, number, aligned in self._ranges:
            if number:
                adamw_ema_kernel[(number,)](
                    self._rows, self._grads, self._chunks, self._corrections, self._scalars, first,
                    lr, lr * weight_decay, beta2, 1 - beta1, 1 - beta2, eps, 1 - momentum,
                    COLUMNS=COLUMNS, CHUNK=CHUNK, BLOCK=BLOCK, ALIGNED=aligned, COPY=self._copy, num_warps=NUM_WARPS,
                )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _send(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers to the device; the host does not wait: pinned memory is kept until the copy is done."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _variants() -> list[Variant]:
    result = []
    tables = {"table_ptr": "*i64", "grads_ptr": "*i64", "chunks_ptr": "*i32", "first": "i32"}
    floats = ("lr", "decay", "beta2", "weight1", "weight2", "eps", "weight_ema", "factor", "clip")
    numbers = {**dict.fromkeys((*floats, "log_beta1", "log_beta2"), "fp32")}
    numbers |= dict.fromkeys(("num_partial", "num_losses", "num_tensors"), "i32")
    pointers = ("out_ptr", "partial_ptr", "losses_ptr", "scale_ptr", "corrections_ptr", "scalars_ptr")
    signature = {**tables, **numbers, **dict.fromkeys(pointers, "*fp32")}
    for aligned in (True, False):
        name = "aligned" if aligned else "unaligned"
        constants = {"COLUMNS": COLUMNS, "CHUNK": CHUNK, "BLOCK": BLOCK, "ALIGNED": aligned}
        result.append(Variant(name, sum_squares_kernel, signature, constants, NUM_WARPS))
        for copy in ("bf16", "fp16"):
            more = {**constants, "COPY": tl.bfloat16 if copy == "bf16" else tl.float16}
            result.append(Variant(f"{name}, {copy} copies", adamw_ema_kernel, signature, more, NUM_WARPS))
    for scaled in (True, False):
        constants = {"COLUMNS": COLUMNS, "HAS_SCALE": scaled, "BLOCK": PREPARE_BLOCK}
        name = "fp16" if scaled else "bf16, fp32"
        result.append(Variant(name, prepare_kernel, signature, constants, PREPARE_WARPS))
    return result


VARIANTS = _variants()
