"""Triton kernels of distillation_loss: the passes around cuBLAS products of a chunk of prototypes.

``weight_norm_fwd_kernel`` writes W = g v / ||v|| in the products' dtype. For each chunk of it cuBLAS makes the logits,
in float32 whatever the products' dtype; one kernel reduces them to five numbers per row and part of the chunk, or turns
them into their gradient. Chunks are as large as GPU_CHUNK_BYTES allow: a launch costs more than a chunk's way through
memory. ``weight_norm_bwd_kernel`` takes the product of that with the
rows through the weight norm; the gradient of v is written by it once. Partial sums are combined in a fixed order: no
atomics, equal bits on every repeat; the host waits for nothing.

Kernels that compare exponents with the forward's maximum run without fused multiply-adds: both passes must round a
logit alike, or large logits lose their probability.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import products
from ..aot import Variant
from ..launching import on_their_device
from ..products import mm
from . import weight_norm
from .arguments import Arguments, Statistics, Weights

MAX_DIM = 4096  # a row of v has to fit one block's registers
BLOCK = 4096  # logits of a row that one program reduces
BLOCK_BWD = 2048
TILE = 4096  # elements of v in one program


@triton.jit
def weight_norm_fwd_kernel(
    v_ptr,  # (c, D)
    g_ptr,  # (c,)
    w_ptr,  # (c, D)
    inverse_norm_ptr,  # (c,) float32
    count,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (cols < D)[None, :]
    offsets = rows[:, None] * D + cols[None, :]
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + rows, mask=rows < count, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.where(rows < count, tl.sum(v * v, 1), 1.0))
    tl.store(inverse_norm_ptr + rows, inverse, mask=rows < count)
    tl.store(w_ptr + offsets, (v * (g * inverse)[:, None]).to(w_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_norm_bwd_kernel(
    grad_w_ptr,  # (c, D)
    v_ptr,  # (c, D)
    g_ptr,  # (c,)
    grad_v_ptr,  # (c, D)
    grad_g_ptr,  # (c,)
    other_ptr,  # (c, D) float32, another part of W's gradient over other_scale
    other_scale_ptr,  # () float32
    shift_ptr,  # (D,) float32, a third part, the same for every row
    count,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (cols < D)[None, :]
    offsets = rows[:, None] * D + cols[None, :]
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_w = tl.load(grad_w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_OTHER:
        grad_w += tl.load(other_ptr + offsets, mask=mask, other=0.0) * tl.load(other_scale_ptr)
        grad_w += tl.load(shift_ptr + cols, mask=cols < D, other=0.0)[None, :]
    g = tl.load(g_ptr + rows, mask=rows < count, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.where(rows < count, tl.sum(v * v, 1), 1.0))
    unit = v * inverse[:, None]
    along = tl.sum(grad_w * unit, 1)
    grad_v = (g * inverse)[:, None] * (grad_w - unit * along[:, None])
    tl.store(grad_v_ptr + offsets, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_g_ptr + rows, along.to(grad_g_ptr.dtype.element_ty), mask=rows < count)


@triton.jit
def prototype_logits_mean_kernel(
    v_ptr,  # (K, D)
    g_ptr,  # (K,)
    mean_ptr,  # (D,) float32
    out_ptr,  # (K,) float32
    count,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (cols < D)[None, :]
    v = tl.load(v_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + rows, mask=rows < count, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + cols, mask=cols < D, other=0.0)
    norm = tl.sqrt_rn(tl.where(rows < count, tl.sum(v * v, 1), 1.0))
    tl.store(out_ptr + rows, tl.sum(v * mean[None, :], 1) * (g / norm), mask=rows < count)


@triton.jit
def distillation_loss_fwd_kernel(
    student_ptr,  # (N, c) float32 products
    teacher_ptr,  # (N, c) float32
    center_ptr,  # (c,)
    partial_ptr,  # (parts, N, 5) float32: student's maximum and sum, teacher's maximum and sum, cross term
    rows,
    count,
    student_scale,  # 1 / temperature
    teacher_scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    mask = cols < count
    s = tl.load(student_ptr + row * count + cols, mask=mask, other=0.0)
    t = tl.load(teacher_ptr + row * count + cols, mask=mask, other=0.0)
    center = tl.load(center_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    s = s * student_scale
    t = (t - center) * teacher_scale
    student_max = tl.max(tl.where(mask, s, float("-inf")), 0)
    teacher_max = tl.max(tl.where(mask, t, float("-inf")), 0)
    weights = tl.where(mask, tl.exp(t - teacher_max), 0.0)
    out = partial_ptr + (part * rows + row) * 5
    tl.store(out, student_max)
    tl.store(out + 1, tl.sum(tl.where(mask, tl.exp(s - student_max), 0.0), 0))
    tl.store(out + 2, teacher_max)
    tl.store(out + 3, tl.sum(weights, 0))
    tl.store(out + 4, tl.sum(weights * s, 0))


@triton.jit
def distillation_loss_combine_kernel(
    partial_ptr,  # (parts, N, 5) float32
    loss_ptr,  # (N,) float32
    student_ptr,  # (N, 2) float32: maximum and sum
    teacher_ptr,  # (N, 2) float32
    rows,
    parts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < parts
    base = partial_ptr + (part.to(tl.int64) * rows + row) * 5
    student_maxima = tl.load(base, mask=mask, other=float("-inf"))
    student_sums = tl.load(base + 1, mask=mask, other=0.0)
    teacher_maxima = tl.load(base + 2, mask=mask, other=float("-inf"))
    teacher_sums = tl.load(base + 3, mask=mask, other=0.0)
    crosses = tl.load(base + 4, mask=mask, other=0.0)
    student_max = tl.max(student_maxima, 0)
    teacher_max = tl.max(teacher_maxima, 0)
    student_sum = tl.sum(student_sums * tl.exp(student_maxima - student_max), 0)
    rescale = tl.exp(teacher_maxima - teacher_max)
    teacher_sum = tl.sum(teacher_sums * rescale, 0)
    loss = tl.log(student_sum) + student_max - tl.sum(crosses * rescale, 0) / teacher_sum
    tl.store(loss_ptr + row, loss)
    tl.store(student_ptr + row * 2, student_max)
    tl.store(student_ptr + row * 2 + 1, student_sum)
    tl.store(teacher_ptr + row * 2, teacher_max)
    tl.store(teacher_ptr + row * 2 + 1, teacher_sum)


@triton.jit
def distillation_loss_bwd_kernel(
    student_ptr,  # (N, c) float32 products
    teacher_ptr,  # (N, c) float32
    center_ptr,  # (c,)
    student_lse_ptr,  # (N, 2) float32: maximum and sum
    teacher_lse_ptr,  # (N, 2) float32
    upstream_ptr,  # (N,) float32
    dz_ptr,  # (N, c); may be student_ptr
    count,
    student_scale,
    teacher_scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < count
    upstream = tl.load(upstream_ptr + row) * student_scale
    student_max = tl.load(student_lse_ptr + row * 2)
    student_factor = upstream / tl.load(student_lse_ptr + row * 2 + 1)
    teacher_max = tl.load(teacher_lse_ptr + row * 2)
    teacher_factor = upstream / tl.load(teacher_lse_ptr + row * 2 + 1)
    s = tl.load(student_ptr + row * count + cols, mask=mask, other=0.0)
    t = tl.load(teacher_ptr + row * count + cols, mask=mask, other=0.0)
    center = tl.load(center_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(s * student_scale - student_max) * student_factor
    target = tl.exp((t - center) * teacher_scale - teacher_max) * teacher_factor
    tl.store(dz_ptr + row * count + cols, (p - target).to(dz_ptr.dtype.element_ty), mask=mask)


def why_not(rows: Tensor, *prototypes: Tensor) -> str | None:
    """Why these kernels cannot take the arguments, or None."""
    if not weight_norm.runs_native(rows, *prototypes):
        return "float64 runs in PyTorch only"
    if rows.shape[1] > MAX_DIM:
        return f"a prototype of {rows.shape[1]} values does not fit one block (at most {MAX_DIM})"
    if rows.shape[1] == 0 or rows.shape[0] == 0:
        return "there is nothing to launch for"
    return None


def _tile(dim: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of prototypes, and warps: 16 values a thread or more, for enough loads in flight."""
    width = triton.next_power_of_2(dim)
    height = max(TILE // width, 1)
    return height, width, min(max(height * width // 512, 1), 16)


@on_their_device
def effective(v: Tensor, g: Tensor, out: Tensor, inverse_norms: Tensor) -> Tensor:
    """g v / ||v|| of a contiguous chunk (c, d), written to ``out`` (c, d), and 1 / ||v|| (c,) float32."""
    count, dim = v.shape
    height, width, warps = _tile(dim)
    weight_norm_fwd_kernel[(triton.cdiv(count, height),)](
        v, g, out, inverse_norms, count, D=dim, BLOCK_K=height, BLOCK_D=width, num_warps=warps
    )
    return out


@on_their_device
def prototype_logits_mean(mean: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """W mean (K,) float32 of mean (d,) float32, v (K, d) and g (K, 1), in one pass over v."""
    count, dim = v.shape
    height, width, warps = _tile(dim)
    out = torch.empty(count, dtype=torch.float32, device=v.device)
    prototype_logits_mean_kernel[(triton.cdiv(count, height),)](
        v.contiguous(), g.contiguous(), mean.contiguous(), out, count,
        D=dim, BLOCK_K=height, BLOCK_D=width, num_warps=warps,
    )  # fmt: skip
    return out


class Other(NamedTuple):
    """A gradient of W that is ``scale * W matrix`` and the same row more for every prototype."""

    matrix: Tensor  # (d, d), dtype of products, largest value 1
    scale: Tensor  # () float32
    shift: Tensor  # (d,) float32


def other_of(low_rank: weight_norm.LowRank) -> Other:
    """The sum over the low rank, made once: W Z' diag(a) Z is W times a (d, d) matrix.

    It is scaled to a largest value of 1, so that no loss scale makes it overflow in float16.
    """
    z = low_rank.rows[:-1].float()
    matrix = (z * low_rank.weights.float()).t() @ z
    scale = matrix.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return Other((matrix / scale).to(low_rank.rows.dtype), scale, low_rank.rows[-1].float())


@on_their_device
def effective_backward(
    grad_w: Tensor, v: Tensor, g: Tensor, grad_v: Tensor, grad_g: Tensor, other: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    """Gradients of a contiguous chunk of v (c, d) and g (c, 1) from that of ``effective``; written once.

    other: (c, d) float32, its scale (), a row (d,): more of W's gradient.
    """
    count, dim = v.shape
    height, width, warps = _tile(dim)
    weight_norm_bwd_kernel[(triton.cdiv(count, height),)](
        grad_w, v, g, grad_v, grad_g, *(other or (grad_w, grad_w, grad_w)), count,
        D=dim, BLOCK_K=height, BLOCK_D=width, HAS_OTHER=other is not None, num_warps=warps,
    )  # fmt: skip


class _Walk:
    """Buffers and products of one pass over the prototypes; the last chunk may be shorter."""

    def __init__(self, rows: Tensor, k: int, bytes_per_prototype: int) -> None:
        self.n, self.d, self.k = rows.shape[0], rows.shape[1], k
        self.dtype = products.product_dtype(rows.dtype, rows.device)
        self.size = weight_norm.gpu_chunk_size(k, bytes_per_prototype)
        self.device = rows.device

    def __iter__(self):
        for start in range(0, self.k, self.size):
            yield slice(start, min(start + self.size, self.k))

    def rows(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype).contiguous()  # (N, d)

    def weights(self, v: Tensor, g: Tensor, inverse_norms: Tensor) -> Tensor:
        """W (K, d), and 1 / ||v|| into inverse_norms (K,)."""
        out = torch.empty(v.shape, dtype=self.dtype, device=self.device)
        return effective(v.contiguous(), g.contiguous(), out, inverse_norms)

    def products(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.n * self.size, dtype=dtype, device=self.device)

    def take(self, buffer: Tensor, count: int) -> Tensor:
        return buffer[: self.n * count].view(self.n, count)


def forward(arguments: Arguments) -> tuple[Tensor, Statistics]:
    """Loss (N,), and what the backward needs, as ``chunked.forward``."""
    return forward_with_weights(arguments)[:2]


@on_their_device
def forward_with_weights(arguments: Arguments) -> tuple[Tensor, Statistics, Weights]:
    """Run ``forward`` and also return W (K, d) of student and teacher, for a later use."""
    (student_rows, student_v, student_g), (teacher_rows, teacher_v, teacher_g) = arguments[:2]
    center, student_temp, teacher_temp = arguments[2:]
    n, k = student_rows.shape[0], student_v.shape[0]
    walk = _Walk(student_rows, k, 8 * n)
    student, teacher, center = walk.rows(student_rows), walk.rows(teacher_rows), center.contiguous()
    first, second = walk.products(), walk.products()
    parts = [triton.cdiv(part.stop - part.start, BLOCK) for part in walk]
    inverse_norms = torch.empty(2, k, dtype=torch.float32, device=walk.device)
    student_weights = walk.weights(student_v, student_g, inverse_norms[0])
    teacher_weights = walk.weights(teacher_v, teacher_g, inverse_norms[1])
    partial = torch.empty(sum(parts), n, 5, dtype=torch.float32, device=walk.device)
    done = 0
    for part, count in zip(walk, parts, strict=True):
        s = mm(student, student_weights[part].t(), walk.take(first, part.stop - part.start))
        t = mm(teacher, teacher_weights[part].t(), walk.take(second, part.stop - part.start))
        distillation_loss_fwd_kernel[(n, count)](
            s, t, center[part], partial[done:], n, s.shape[1], 1 / student_temp, 1 / teacher_temp,
            BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        done += count
    loss = torch.empty(n, dtype=torch.float32, device=walk.device)
    student_lse, teacher_lse = (torch.empty(n, 2, dtype=torch.float32, device=walk.device) for _ in range(2))
    distillation_loss_combine_kernel[(n,)](
        partial, loss, student_lse, teacher_lse, n, done, BLOCK=triton.next_power_of_2(done), num_warps=1
    )
    return loss, Statistics(student_lse, teacher_lse, inverse_norms), Weights(student_weights, teacher_weights)


@on_their_device
def backward(
    grad: Tensor,  # (N,)
    arguments: Arguments,
    statistics: Statistics,
    need_rows: bool = True,
    need_prototypes: bool = True,
    other: weight_norm.LowRank | Other | None = None,
    weights: Weights | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student rows, v and g, as ``chunked.backward``; without elements where not needed.

    weights: W (K, d) of student and teacher from ``forward_with_weights``; None: they are made again.
    """
    (student_rows, student_v, student_g), (teacher_rows, teacher_v, teacher_g) = arguments[:2]
    center, student_temp, teacher_temp = arguments[2:]
    student_lse, teacher_lse, inverse_norms = statistics
    n, k, dim = student_rows.shape[0], student_v.shape[0], student_rows.shape[1]
    half, device = _half(student_rows), student_rows.device
    walk = _Walk(student_rows, k, (8 + half) * n)
    student, teacher, center = walk.rows(student_rows), walk.rows(teacher_rows), center.contiguous()
    first, second = walk.products(), walk.products()
    narrow = first if walk.dtype == torch.float32 else walk.products(walk.dtype)
    upstream = grad.float().contiguous()
    grad_rows = torch.zeros(student_rows.shape if need_rows else 0, dtype=torch.float32, device=device)
    grad_part = torch.empty_like(grad_rows)
    # float32 though the products are narrow: it is about to be projected, and differences of it are small.
    grad_w = torch.empty(walk.size if need_prototypes else 0, dim, dtype=torch.float32, device=device)
    grad_v = torch.empty(student_v.shape if need_prototypes else 0, dtype=student_v.dtype, device=device)
    grad_g = torch.empty(student_g.shape if need_prototypes else 0, dtype=student_g.dtype, device=device)
    if weights is None:
        norms = torch.empty_like(inverse_norms)  # what was saved is not to be written
        made = walk.weights(student_v, student_g, norms[0]), walk.weights(teacher_v, teacher_g, norms[1])
        weights = Weights(*made)
    student_weights, teacher_weights = weights
    more = other if need_prototypes else None
    if isinstance(more, weight_norm.LowRank):
        more = other_of(more)
    grad_more = torch.empty(0 if more is None else walk.size, dim, dtype=torch.float32, device=device)
    for part in walk:
        count = part.stop - part.start
        w = student_weights[part]
        s = mm(student, w.t(), walk.take(first, count))
        t = mm(teacher, teacher_weights[part].t(), walk.take(second, count))
        dz = walk.take(narrow, count)
        distillation_loss_bwd_kernel[(n, triton.cdiv(count, BLOCK_BWD))](
            s, t, center[part], student_lse, teacher_lse, upstream, dz, count, 1 / student_temp, 1 / teacher_temp,
            BLOCK=BLOCK_BWD, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        if need_rows:
            grad_rows.add_(mm(dz, w, grad_part))
        if need_prototypes:
            added = None
            if more is not None:
                added = mm(w, more.matrix, grad_more[:count]), more.scale, more.shift
            chunk = student_v[part].contiguous(), student_g[part].contiguous()
            effective_backward(mm(dz.t(), student, grad_w[:count]), *chunk, grad_v[part], grad_g[part], added)
    return grad_rows.to(student_rows.dtype), grad_v, grad_g


def _half(rows: Tensor) -> int:
    return products.product_dtype(rows.dtype, rows.device).itemsize


def _variants() -> list[Variant]:
    half, full, size = "*bf16", "*fp32", "i32"
    dim = 384  # the bottleneck of vit_s16, vit_b16 and vit_g16
    height, width, warps = _tile(dim)
    tile = {"D": dim, "BLOCK_K": height, "BLOCK_D": width}
    name = "vit_s16, vit_b16, vit_g16 bf16"
    v = {"v_ptr": full, "g_ptr": full, "count": size}
    into = {"grad_w_ptr": full, "grad_v_ptr": full, "grad_g_ptr": full}
    into |= {"other_ptr": full, "other_scale_ptr": full, "shift_ptr": full}
    scales = {"student_scale": "fp32", "teacher_scale": "fp32", "count": size}
    logits = {"student_ptr": full, "teacher_ptr": full, "center_ptr": full, **scales}
    lse = {"student_lse_ptr": full, "teacher_lse_ptr": full, "upstream_ptr": full}
    parts = {"partial_ptr": full, "rows": size}
    results = {"loss_ptr": full, "student_ptr": full, "teacher_ptr": full, "parts": size}
    return [
        Variant(name, weight_norm_fwd_kernel, {**v, "w_ptr": half, "inverse_norm_ptr": full}, tile, warps),
        Variant(name, prototype_logits_mean_kernel, {**v, "mean_ptr": full, "out_ptr": full}, tile, warps),
        Variant(name, weight_norm_bwd_kernel, {**v, **into}, {**tile, "HAS_OTHER": True}, warps),
        Variant(name, distillation_loss_fwd_kernel, {**logits, **parts}, {"BLOCK": BLOCK}, 8),
        Variant(name, distillation_loss_combine_kernel, {**parts, **results}, {"BLOCK": 32}, 1),
        Variant(name, distillation_loss_bwd_kernel, {**logits, **lse, "dz_ptr": half}, {"BLOCK": BLOCK_BWD}, 4),
    ]


VARIANTS = _variants()
