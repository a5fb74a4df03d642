"""Triton kernels of quantize_rows: each row is read once and stays in registers until it is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fp8
from ..aot import Variant
from ..fp8_triton import VALUES, row_scale, why_not
from ..launching import device_of, on_their_device
from .op import Slot

COPY_TYPES = {fp8.E4M3: tl.float8e4nv, torch.float32: tl.float32}

__all__ = ["VARIANTS", "quantize_rows", "tables", "why_not"]


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # (R, C)
    values_ptr,  # (R, C) e4m3
    scale_ptr,  # (R,) float32
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    place = row.to(tl.int64) * C + col
    x = tl.load(x_ptr + place, mask=col < C, other=0.0).to(tl.float32)
    scale, factor = row_scale(tl.max(tl.abs(x), 0))
    tl.store(values_ptr + place, (x * factor).to(values_ptr.dtype.element_ty), mask=col < C)
    tl.store(scale_ptr + row, scale)


@triton.jit
def quantize_weights_kernel(
    table_ptr,  # (weights, 3) int64: addresses of weight, values, scale
    rows_ptr,  # (programs, 2) int32: weight and row of each program
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    COPY: tl.constexpr,
):
    """One row of one of many weights."""
    program = tl.program_id(0)
    weight = tl.load(rows_ptr + 2 * program)
    row = tl.load(rows_ptr + 2 * program + 1)
    x_ptr = tl.multiple_of(tl.load(table_ptr + 3 * weight).to(tl.pointer_type(tl.float32)), 16)
    values_ptr = tl.multiple_of(tl.load(table_ptr + 3 * weight + 1).to(tl.pointer_type(COPY)), 16)
    scale_ptr = tl.load(table_ptr + 3 * weight + 2).to(tl.pointer_type(tl.float32))
    col = tl.arange(0, BLOCK)
    place = row.to(tl.int64) * C + col
    x = tl.load(x_ptr + place, mask=col < C, other=0.0)
    scale, factor = row_scale(tl.max(tl.abs(x), 0))
    tl.store(values_ptr + place, (x * factor).to(COPY), mask=col < C)
    tl.store(scale_ptr + row, scale)


@on_their_device
def quantize_rows(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Fill values (R, C) and scale (R, 1), both contiguous, from x (R, C)."""
    x, columns = x.contiguous(), x.shape[1]
    out = values if fp8.kernel_dtype() == values.dtype else torch.empty_like(values, dtype=fp8.kernel_dtype())
    constants = _constants(columns)
    quantize_rows_kernel[(x.shape[0],)](x, out, scale, **constants, num_warps=_warps(constants["BLOCK"]))
    if out is not values:
        values.copy_(out)


def _constants(columns: int) -> dict[str, int]:
    return {"C": columns, "BLOCK": triton.next_power_of_2(columns)}


def _warps(block: int) -> int:
    return min(max(block // VALUES, 1), 16)


@dataclass
class Table:
    """Weights of one device with rows of one length, by their addresses on the device.

    Attributes:
        columns: length of a row.
        weights: the slots, which must stay where they are.
        outs: what the kernel writes instead of the copies' values in Triton's interpreter; else the values.
        addresses: int64 [weights, 3].
        rows: int32 [programs, 2].
    """

    columns: int
    weights: list[Slot]
    outs: list[Tensor]
    addresses: Tensor
    rows: Tensor

    def quantize(self) -> None:
        """Write the copies."""
        constants, dtype = _constants(self.columns), fp8.kernel_dtype()
        with device_of(self.rows):
            quantize_weights_kernel[(self.rows.shape[0],)](
                self.addresses, self.rows, **constants, COPY=COPY_TYPES[dtype], num_warps=_warps(constants["BLOCK"])
            )
        for slot, out in zip(self.weights, self.outs, strict=True):
            if out is not slot.copy.values:
                slot.copy.values.copy_(out)


def tables(slots: Sequence[Slot]) -> list[Table]:
    """The launches for slots that were checked."""
    by_length: dict[int, list[Slot]] = {}
    for slot in slots:
        if slot.weight.numel():
            by_length.setdefault(slot.weight.shape[1], []).append(slot)
    return [_table(columns, some) for columns, some in by_length.items()]


def _table(columns: int, slots: list[Slot]) -> Table:
    device, dtype = slots[0].weight.device, fp8.kernel_dtype()
    outs = [
        slot.copy.values if dtype == fp8.E4M3 else torch.empty_like(slot.copy.values, dtype=dtype) for slot in slots
    ]
    addresses = [
        (s.weight.data_ptr(), out.data_ptr(), s.copy.scale.data_ptr()) for s, out in zip(slots, outs, strict=True)
    ]
    rows = [(number, row) for number, slot in enumerate(slots) for row in range(slot.weight.shape[0])]
    return Table(
        columns, slots, outs,
        torch.tensor(addresses, dtype=torch.int64).to(device), torch.tensor(rows, dtype=torch.int32).to(device),
    )  # fmt: skip


def _variants() -> list[Variant]:
    result = []
    signature = {"x_ptr": "*bf16", "values_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    weights = {"table_ptr": "*i64", "rows_ptr": "*i32"}
    for recipe, dim in (("vit_s16", 384), ("vit_b16", 768), ("vit_g16", 1024)):
        constants = _constants(dim)
        warps = _warps(constants["BLOCK"])
        result.append(Variant(f"{recipe} bf16", quantize_rows_kernel, signature, constants, warps, least=89))
        for name, columns in ((recipe, dim), (f"{recipe}, fc2", 4 * dim)):
            constants = {**_constants(columns), "COPY": tl.float8e4nv}
            warps = _warps(constants["BLOCK"])
            result.append(Variant(name, quantize_weights_kernel, weights, constants, warps, least=89))
    return result


VARIANTS = _variants()
