"""Chunked iteration over the weight-normalised prototypes.

The effective row k is ``w_k = g_k * v_k / ||v_k||``. Products take a *direction* and a *scale* per row instead of w
itself: ``x . w_k = (x . direction_k) * scale_k``, so the scale touches [N, chunk] products and not the [chunk, d]
weights, and where the products run in v's own dtype the direction is v, uncopied.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend

MAX_CHUNK = 4096  # 8192 costs 10% more on a CPU with 2.5 MiB of L2 a core
MIN_CHUNK = 256
CHUNK_ELEMENTS = 1 << 20  # of one [N, chunk] buffer
GPU_CHUNK_BYTES = 256 << 20  # of a chunk's products and gradients for all rows: a launch costs more than their way
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = torch.ops.pera_native  # a namespace; empty unless the library was built and loaded
NATIVE_NAMES = (
    "distillation_forward_",
    "distillation_backward_",
    "weight_norm",
    "weight_norm_backward_",
)


class Chunk(NamedTuple):
    """Prototypes ``rows`` of the matrix."""

    rows: slice
    direction: Tensor  # [c, d], dtype of the products; valid until the next chunk
    scale: Tensor  # [c], accumulation dtype; effective prototype = scale * direction
    inverse_norm: Tensor  # [c], accumulation dtype, 1 / ||v||
    unit: bool  # the direction is v / ||v||, else v
    native: bool = False  # the passes over the chunk run in the native library


class LowRank(NamedTuple):
    """A gradient of W that is W times a matrix of low rank, plus the same row t for every prototype.

    W Z' diag(a) Z + 1 t'. It goes through weight norm together with others: by chunk it is two thin products.
    """

    rows: Tensor  # [E, d]: Z and, as the last row, t; dtype of the products
    weights: Tensor  # [E - 1, 1]: a, whose size may be in Z already; accumulation dtype

    def at(self, chunk: Chunk, g: Tensor) -> tuple[Tensor, Tensor]:
        """For a chunk of prototypes and its g [c, 1]: what ``write_grad_v`` takes.

        Returns:
            The gradient [E, c] of ``rows @ w.T`` times the chunk's scale, dtype of the products; and that of g [c].
        """
        unit = torch.mm(self.rows, chunk.direction.t()).to(chunk.scale.dtype)  # to become products with v / ||v||
        if not chunk.unit:
            unit.mul_(chunk.inverse_norm)
        dz = torch.ones_like(unit)
        torch.mul(unit[:-1], self.weights, out=dz[:-1])
        dz[:-1].mul_(g[:, 0].to(dz.dtype))
        along = unit.mul_(dz).sum(0)
        return dz.mul_(chunk.scale).to(self.rows.dtype), along


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax and sums for rows of that dtype: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def chunk_size(n: int, k: int) -> int:
    """Prototypes per chunk for n rows: [n, chunk] keeps within a few MiB, whatever the batch."""
    size = CHUNK_ELEMENTS // max(n, 1)
    return max(1, min(k, MAX_CHUNK, max(MIN_CHUNK, size - size % 64)))


def gpu_chunk_size(k: int, bytes_per_prototype: int) -> int:
    """Prototypes per chunk on a GPU, whose buffers keep within GPU_CHUNK_BYTES; a power of two, or all k."""
    fitting = max(GPU_CHUNK_BYTES // max(bytes_per_prototype, 1), MIN_CHUNK)
    return min(k, 1 << fitting.bit_length() - 1)


def runs_native(rows: Tensor, *prototypes: Tensor) -> bool:
    """Whether the native library's passes take these dtypes: all but float64."""
    return all(tensor.dtype in NATIVE_DTYPES for tensor in (rows, *prototypes))


def chunks(
    v: Tensor,
    g: Tensor,
    size: int,
    dtype: torch.dtype,
    accumulate: torch.dtype,
    native: bool = False,
    inverse_norms: Tensor | None = None,
    known: bool = False,
) -> Iterator[Chunk]:
    """Walks over the prototypes.

    Args:
        v: [K, d].
        g: [K, 1].
        size: prototypes per chunk; the last one may be shorter.
        dtype: of the directions (see ``products.product_dtype``).
        accumulate: dtype of scales and norms; float32 or float64.
        native: one pass of the native library a chunk; for the dtypes that it takes (``runs_native``).
        inverse_norms: [K] of dtype accumulate, 1 / ||v||: written by the walk, or read by it if known: the pass for the
            norms costs a fifth of a product at the sizes of the recipe.
    """
    # float16 has too few exponents to trust v's own size; in the wide types v / ||v|| and v round alike.
    unit = dtype == torch.float16 or (native and v.dtype != dtype)
    buffer = None
    if unit or v.dtype != dtype:
        buffer = torch.empty(min(size, v.shape[0]), v.shape[1], dtype=dtype, device=v.device)
    known = known and inverse_norms is not None
    for start in range(0, v.shape[0], size):
        rows = slice(start, min(start + size, v.shape[0]))
        part = v[rows].detach()
        direction = part if buffer is None else buffer[: part.shape[0]]
        if native and (unit or not known):  # a unit direction is written, with the norm by the way
            part = part.contiguous()
            scale, inverse_norm = NATIVE.weight_norm(part, g[rows].detach(), None if buffer is None else direction)
        else:
            inverse_norm = (
                inverse_norms[rows] if known and inverse_norms is not None else _inverse_norm(part, accumulate)
            )
            scale = g[rows, 0].detach().to(accumulate)
            if buffer is not None:
                direction.copy_(part.to(accumulate) * inverse_norm[:, None] if unit else part)
            scale = scale if unit else scale * inverse_norm
        if inverse_norms is not None and not known:
            inverse_norms[rows] = inverse_norm
        yield Chunk(rows, direction, scale, inverse_norm, unit, native)


def _inverse_norm(v: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(v.to(dtype), dim=1).reciprocal_()


def write_grad_v(out: Tensor, dz: Tensor, rows: Tensor, v: Tensor, along: Tensor, chunk: Chunk) -> None:
    """Gradient of a chunk of v from that of its products with rows: ``g/||v|| * (dz' rows - v/||v|| * along)``.

    In half types the part along v is taken off ``dz' rows`` as it was rounded, or the two would not cancel.

    Args:
        out: [c, d] of v's dtype; written once.
        dz: [N, c] gradient of ``rows @ w.T`` times the chunk's scale, dtype of products.
        rows: [N, d], dtype of products.
        v: [c, d], the chunk's part of v.
        along: [c], accumulation dtype: gradient of g, that is the part of W's gradient along v / ||v||.
        chunk: the chunk.
    """
    # Both kinds of direction give g / ||v||.
    if out.dtype == dz.dtype and not chunk.unit and dz.dtype.itemsize >= 4:
        pull_back = (chunk.scale * along * chunk.inverse_norm)[:, None]
        torch.mul(v, -pull_back.to(v.dtype), out=out)
        out.addmm_(dz.t(), rows)
        return
    products = torch.mm(dz.t(), rows)
    if chunk.native:
        NATIVE.weight_norm_backward_(products, v.contiguous(), chunk.inverse_norm, chunk.unit, out)
        return
    wide, v = products.to(chunk.scale.dtype), v.to(chunk.scale.dtype)
    del products
    dots = torch.bmm(wide[:, None], v[:, :, None])[:, :, 0]  # no temporary of the chunk's size
    wide.addcmul_(v, dots.mul_(chunk.inverse_norm[:, None] ** 2), value=-1)
    out.copy_(wide.mul_(chunk.inverse_norm[:, None]) if chunk.unit else wide)


def prototypes(v: Tensor, g: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The effective prototype matrix ``g * v / ||v||`` (docs/method.md section 4.6), as a constant: no gradient.

    Args:
        v: [K, d].
        g: [K, 1].
        dtype: of the result; default that of v. Arithmetic in float32 (float64 if v is).

    Returns:
        [K, d].
    """
    check_prototypes(v, g, "")
    accumulate = accumulation_dtype(v.dtype)
    out = torch.empty(v.shape, dtype=dtype or v.dtype, device=v.device)
    for chunk in chunks(v, g, MAX_CHUNK, accumulate, accumulate):
        out[chunk.rows] = chunk.direction * chunk.scale[:, None]
    return out


def prototype_logits_mean(rows_mean: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mean logits over a batch, from the mean of its rows: ``W @ mean(rows) = mean(W @ rows)``.

    So the center's all-reduce carries d numbers, not K (docs/method.md section 5.2).

    Args:
        rows_mean: [d] mean of the teacher's bottleneck rows, float32 or float64.
        v: [K, d].
        g: [K, 1].

    Returns:
        [K] in the dtype of ``rows_mean``; no gradient.
    """
    check_prototypes(v, g, "")
    if rows_mean.shape != (v.shape[1],):
        raise ValueError(f"rows_mean must be [{v.shape[1]}], got {list(rows_mean.shape)}")
    dtype = accumulation_dtype(rows_mean.dtype)
    mean = rows_mean.detach().to(dtype)
    if backend.choose("distillation_loss", v.device) == "triton":
        from . import triton

        if triton.why_not(mean[None], v, g) is None:
            return triton.prototype_logits_mean(mean, v.detach(), g.detach())
    out = torch.empty(v.shape[0], dtype=dtype, device=v.device)
    for chunk in chunks(v, g, MAX_CHUNK, dtype, dtype):
        torch.mv(chunk.direction, mean, out=out[chunk.rows])
        out[chunk.rows].mul_(chunk.scale)
    return out


def check_prototypes(v: Tensor, g: Tensor, prefix: str) -> None:
    """Raises TypeError or ValueError, naming the argument, unless v is [K, d] and g [K, 1], floating, K >= 1."""
    for name, tensor in ((f"{prefix}v", v), (f"{prefix}g", g)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if v.ndim != 2 or v.shape[0] < 1:
        raise ValueError(f"{prefix}v must be [K, d] with K >= 1, got {list(v.shape)}")
    if tuple(g.shape) != (v.shape[0], 1):
        raise ValueError(f"{prefix}g must be [{v.shape[0]}, 1], got {list(g.shape)}")
