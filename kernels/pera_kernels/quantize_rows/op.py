"""pera::quantize_rows: schema, shapes, implementations; and the quantiser of a network's weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend, cost, fp8
from ..packing import HALF_OR_SINGLE
from . import reference

backend.register("quantize_rows", "triton", available=fp8.needs_triton)
backend.register("quantize_rows", "pytorch")


def _in_triton(x: Tensor) -> bool:
    if backend.choose("quantize_rows", x.device) != "triton" or x.dtype not in HALF_OR_SINGLE:
        return False
    from . import triton

    return triton.why_not(x) is None


def _quantize(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Fill values [R, C] and scale [R, 1]."""
    if not x.numel():
        return
    if _in_triton(x):
        from . import triton

        triton.quantize_rows(x, values, scale)
    elif backend.choose("quantize_rows", x.device) == backend.REFERENCE or x.dtype not in HALF_OR_SINGLE:
        for target, source in zip((values, scale), reference.quantize_rows(x), strict=True):
            target.copy_(source)
    else:  # half types are not widened for their largest magnitude
        scale.copy_(x.abs().amax(1, keepdim=True)).clamp_(min=fp8.SMALLEST).div_(fp8.LARGEST)
        values.copy_(x / scale)


@torch.library.custom_op("pera::quantize_rows", mutates_args=())
def _quantize_parts(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows = [part.shape[0] for part in parts]
    values = parts[0].new_empty(sum(rows), parts[0].shape[1], dtype=fp8.E4M3)
    scale = parts[0].new_empty(sum(rows), 1, dtype=torch.float32)
    for part, v, s in zip(parts, values.split(rows), scale.split(rows), strict=True):
        _quantize(part, v, s)
    return values, scale


@_quantize_parts.register_fake
def _(parts):
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    return parts[0].new_empty(rows, columns, dtype=fp8.E4M3), parts[0].new_empty(rows, 1, dtype=torch.float32)


@cost.of("pera::quantize_rows")
def _(result, parts):
    values, scale = result
    of_a_value = cost.size(values, scale) / max(values.numel(), 1)
    return [cost.Cost(bytes=cost.size(part) + round(part.numel() * of_a_value)) for part in parts if part.numel()]


def quantize_rows(x: Tensor) -> fp8.Rows:
    """Divide each row of a matrix by a scale of its own and round it to e4m3.

    Args:
        x: [R, C], C at least 1, any float dtype.

    Returns:
        values [R, C] in e4m3, scale float32 [R, 1]: the largest magnitude of the row over 448, the largest number of
        e4m3 (at least 1e-30 over 448, for rows of zeros). A row with an infinity or a NaN has a NaN in
        ``values * scale``.

    Raises:
        ValueError: x is no matrix with columns.
    """
    return quantize_parts([x])


def quantize_parts(parts: Sequence[Tensor]) -> fp8.Rows:
    """``quantize_rows`` of rows that come in several matrices [R_i, C] of one dtype, packed one after the other."""
    for part in parts:
        if part.ndim != 2 or not part.shape[1] or part.shape[1] != parts[0].shape[1]:
            raise ValueError(f"quantize_rows: wants matrices of as many columns, not {[tuple(p.shape) for p in parts]}")
    return fp8.Rows(*_quantize_parts(list(parts)))


@dataclass(frozen=True)
class Slot:
    """A weight and its copy.

    Attributes:
        weight: float32 [out, in], contiguous.
        copy: values [out, in] and scale [out, 1], contiguous.
    """

    weight: Tensor
    copy: fp8.Rows


class WeightQuantizer:
    """Quantise fixed weights again and again, in one launch for all weights with rows of one length.

    Args:
        slots: of one device; they are kept and must not move.

    Raises:
        ValueError: a tensor has the wrong dtype, shape, device or strides.
    """

    def __init__(self, slots: Sequence[Slot]):
        self.slots = list(slots)
        for number, slot in enumerate(self.slots):
            _check(number, slot, self.slots[0].weight.device)
        self._tables = None

    def __call__(self) -> None:
        """Write all copies."""
        if not self.slots:
            return
        with torch.no_grad():
            if not _in_triton(self.slots[0].weight):
                for slot in self.slots:
                    _quantize(slot.weight, *slot.copy)
                return
            from . import triton

            self._tables = self._tables or triton.tables(self.slots)
            for table in self._tables:
                table.quantize()

    def traffic(self) -> dict[str, int]:
        """Bytes that the kernel of a call reads and writes, by its name."""
        return {"quantize_weights_kernel": sum(cost.size(slot.weight, *slot.copy) for slot in self.slots)}


def _check(number: int, slot: Slot, device: torch.device) -> None:
    rows, columns = slot.weight.shape
    wanted = {
        "weight": (slot.weight, torch.float32, (rows, columns)),
        "values": (slot.copy.values, fp8.E4M3, (rows, columns)),
        "scale": (slot.copy.scale, torch.float32, (rows, 1)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"WeightQuantizer: slot {number}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device},"
                f" wants {dtype} {list(shape)} on {device}, contiguous"
            )
