"""The distillation loss in one streaming pass over chunks of prototypes; portable PyTorch, or native passes.

Buffers are [N, chunk] and reused; products and elementwise passes write into them in place, because at the sizes of
the recipe every further pass over a prototypes-sized tensor costs as much as a tenth of the matrix products. The native
library makes one pass of what is a dozen here; the walk and the products are the same.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import products
from .arguments import Arguments, Network, Statistics
from .weight_norm import (
    NATIVE,
    Chunk,
    LowRank,
    accumulation_dtype,
    chunk_size,
    chunks,
    write_grad_v,
)


class _Logits:
    """Products of rows with the chunks of one prototype matrix, in a reused buffer."""

    def __init__(self, network: Network, inverse_norms: Tensor, known: bool, size: int, native: bool) -> None:
        rows, v, g = network
        accumulate = accumulation_dtype(rows.dtype)
        self.dtype = products.product_dtype(rows.dtype, rows.device)
        self.rows = rows.detach().to(self.dtype)  # [N, d]
        self.chunks = chunks(v, g, size, self.dtype, accumulate, native, inverse_norms, known)
        # Native passes widen what they read.
        widen = self.dtype != accumulate and not native
        self.buffer = _Buffer(rows, size, accumulate if widen else self.dtype)
        self.narrow = _Buffer(rows, size, self.dtype) if widen else None

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk and ``rows @ direction.T`` [N, c]; the scale is not applied.

        In the accumulation dtype, for native passes in the products'.
        """
        for chunk in self.chunks:
            out = self.buffer.take(chunk)
            if self.narrow is None:
                torch.mm(self.rows, chunk.direction.t(), out=out)
            else:
                out.copy_(torch.mm(self.rows, chunk.direction.t(), out=self.narrow.take(chunk)))
            yield chunk, out


class _Buffer:
    """[N, c] views, always contiguous, of one allocation."""

    def __init__(self, rows: Tensor, size: int, dtype: torch.dtype) -> None:
        self.n = rows.shape[0]
        self.flat = torch.empty(self.n * size, dtype=dtype, device=rows.device)

    def take(self, chunk: Chunk) -> Tensor:
        c = chunk.scale.shape[0]
        return self.flat[: self.n * c].view(self.n, c)


class _LogSumExp:
    """Running maximum and sum of exponentials per row."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.maximum = torch.full((rows.shape[0],), -torch.inf, dtype=dtype, device=rows.device)
        self.total = torch.zeros_like(self.maximum)

    def exp_(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Takes z [N, c] in; leaves ``exp(z - maximum)`` in it.

        Returns that, and the factor [N] that brings what was summed before to the new maximum.
        """
        maximum = torch.maximum(self.maximum, z.amax(1))
        rescale = (self.maximum - maximum).exp_()
        z.sub_(maximum[:, None]).exp_()
        self.total.mul_(rescale).add_(z.sum(1))
        self.maximum = maximum
        return z, rescale

    def value(self) -> Tensor:
        return self.total.log() + self.maximum

    def parts(self) -> Tensor:
        """[N, 2]: maximum and sum. Apart, because their joint value rounds to the maximum's last bit, and that is an
        absolute error in an exponent: 1e-6 of a probability at a temperature of .03, worse for large logits."""
        return torch.stack([self.maximum, self.total], 1)


def forward(arguments: Arguments, native: bool = False) -> tuple[Tensor, Statistics]:
    """Loss [N], and what the backward needs; native: with the passes of the native library."""
    (rows, v, _), _, center, student_temp, teacher_temp = arguments
    n, k = rows.shape[0], v.shape[0]
    dtype = accumulation_dtype(rows.dtype)
    size = chunk_size(n, k)
    inverse_norms = torch.empty(2, k, dtype=dtype, device=v.device)
    student = _Logits(arguments.student, inverse_norms[0], False, size, native)
    teacher = _Logits(arguments.teacher, inverse_norms[1], False, size, native)
    teacher.narrow = student.narrow  # each is read as soon as it is written
    if native:
        loss, student_lse, teacher_lse = _native_forward(student, teacher, center, student_temp, teacher_temp)
        return loss, Statistics(student_lse, teacher_lse, inverse_norms)
    student_sums, teacher_sums = _LogSumExp(rows, dtype), _LogSumExp(rows, dtype)
    # Running sum over prototypes of exp(teacher - maximum) * student: the cross term of the loss, not yet normalised.
    cross = torch.zeros(n, dtype=dtype, device=rows.device)
    for (chunk, s), (teacher_chunk, t) in zip(student, teacher, strict=True):
        t.mul_(teacher_chunk.scale / teacher_temp).sub_(center[chunk.rows].to(dtype) / teacher_temp)
        weights, rescale = teacher_sums.exp_(t)
        s.mul_(chunk.scale / student_temp)
        cross.mul_(rescale).add_(weights.mul_(s).sum(1))
        student_sums.exp_(s)
    loss = student_sums.value() - cross / teacher_sums.total
    return loss, Statistics(student_sums.parts(), teacher_sums.parts(), inverse_norms)


def _native_forward(
    student: _Logits, teacher: _Logits, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Student's maximum and sum, teacher's maximum and sum, cross term.
    statistics = torch.tensor([-torch.inf, 0, -torch.inf, 0, 0]).repeat(student.rows.shape[0], 1)
    for (chunk, s), (teacher_chunk, t) in zip(student, teacher, strict=True):
        scales = chunk.scale, teacher_chunk.scale, center[chunk.rows]
        NATIVE.distillation_forward_(s, t, *scales, student_temp, teacher_temp, statistics)
    student_lse, teacher_lse, cross = statistics.split([2, 2, 1], 1)
    loss = student_lse[:, 1].log() + student_lse[:, 0] - cross[:, 0] / teacher_lse[:, 1]
    return loss, student_lse.clone(), teacher_lse.clone()


def backward(
    grad: Tensor,
    arguments: Arguments,
    statistics: Statistics,
    need_rows: bool = True,
    need_prototypes: bool = True,
    native: bool = False,
    other: LowRank | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student rows, v and g for the loss's gradient ``grad`` [N]; recomputes both logits by chunk.

    A gradient that is not needed has no elements; its product and its passes are left out. ``other`` is a gradient of
    the student's effective prototypes from elsewhere, which those of v and g are to hold as well.
    """
    rows, v, g = arguments.student
    n, k = rows.shape[0], v.shape[0]
    dtype = accumulation_dtype(rows.dtype)
    size = chunk_size(n, k)
    student = _Logits(arguments.student, statistics.inverse_norms[0], True, size, native)
    teacher = _Logits(arguments.teacher, statistics.inverse_norms[1], True, size, native)
    teacher.narrow = student.narrow  # each is read as soon as it is written
    upstream = grad.to(dtype) / arguments.student_temp
    differentiate = (_NativeGradient if native else _Gradient)(upstream, arguments, statistics, size)
    grad_rows = torch.zeros(rows.shape if need_rows else 0, dtype=dtype, device=rows.device)
    grad_v, grad_g = v.new_empty(0), g.new_empty(0)
    if need_prototypes:
        grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        grad_g = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    factors = student.rows if other is None else torch.cat([student.rows, other.rows])
    for (chunk, s), (teacher_chunk, t) in zip(student, teacher, strict=True):
        dz, along = differentiate(chunk, s, teacher_chunk, t)
        dz = dz.to(student.dtype)
        if need_rows and dz.dtype == dtype:
            grad_rows.addmm_(dz, chunk.direction)
        elif need_rows:
            grad_rows.add_(torch.mm(dz, chunk.direction))
        if need_prototypes:
            if other is not None:
                other_dz, other_along = other.at(chunk, g[chunk.rows].detach())
                dz, along = torch.cat([dz, other_dz]), along + other_along
            grad_g[chunk.rows, 0] = along.to(grad_g.dtype)
            write_grad_v(grad_v[chunk.rows], dz, factors, v[chunk.rows].detach(), along, chunk)
    return grad_rows.to(rows.dtype), grad_v, grad_g


class _Gradient:
    """Gradient of the loss for a chunk of the student's products.

    Called with both networks' chunks and products [N, c], which it overwrites; returns it, and the gradient of g [c]:
    sum over rows of dz * (logit / g), which is also the part of v's gradient along v.
    """

    def __init__(
        self,
        upstream: Tensor,  # [N], over the student's temperature
        arguments: Arguments,
        statistics: Statistics,
        size: int,
    ) -> None:
        _, _, self.center, self.student_temp, self.teacher_temp = arguments
        student_lse, teacher_lse, _ = statistics
        self.student_max, self.student_factor = student_lse[:, :1], upstream[:, None] / student_lse[:, 1:]
        self.teacher_max, self.teacher_factor = teacher_lse[:, :1], upstream[:, None] / teacher_lse[:, 1:]
        self.spare = _Buffer(upstream, size, upstream.dtype)

    def __call__(self, chunk: Chunk, s: Tensor, teacher_chunk: Chunk, t: Tensor) -> tuple[Tensor, Tensor]:
        shift = self.center[chunk.rows].to(t.dtype) / self.teacher_temp
        t.mul_(teacher_chunk.scale / self.teacher_temp).sub_(shift)
        t.sub_(self.teacher_max).exp_()
        dz = torch.mul(s, chunk.scale / self.student_temp, out=self.spare.take(chunk))
        dz.sub_(self.student_max).exp_().mul_(self.student_factor).sub_(t.mul_(self.teacher_factor))
        along = torch.mul(dz, s, out=t).sum(0)
        return dz.mul_(chunk.scale), along if chunk.unit else along.mul_(chunk.inverse_norm)


class _NativeGradient:
    """As ``_Gradient``, in one native pass."""

    def __init__(self, upstream: Tensor, arguments: Arguments, statistics: Statistics, size: int) -> None:
        _, _, self.center, *self.temps = arguments
        self.upstream = upstream.contiguous()
        self.statistics = torch.cat([statistics.student_lse, statistics.teacher_lse], 1)

    def __call__(self, chunk: Chunk, s: Tensor, teacher_chunk: Chunk, t: Tensor) -> tuple[Tensor, Tensor]:
        scales = chunk.scale, teacher_chunk.scale, self.center[chunk.rows]
        along = NATIVE.distillation_backward_(s, t, *scales, *self.temps, self.statistics, self.upstream)
        return s, along if chunk.unit else along.mul_(chunk.inverse_norm)
