"""The distillation loss in one streaming pass over chunks of prototypes; portable PyTorch.

Buffers are [N, chunk] and reused; products and elementwise passes write into them in place, because at the sizes of
the recipe every further pass over a prototypes-sized tensor costs as much as a tenth of the matrix products.
"""

import torch
from torch import Tensor

from .weight_norm import Chunk, accumulation_dtype, chunk_size, chunks, product_dtype, write_grad_v


class _Logits:
    """Products of rows with the chunks of one prototype matrix, in a reused buffer."""

    def __init__(self, rows: Tensor, v: Tensor, g: Tensor, size: int, accumulate: torch.dtype) -> None:
        self.dtype = product_dtype(rows.dtype, rows.device)
        self.rows = rows.detach().to(self.dtype)  # [N, d]
        self.chunks = chunks(v, g, size, self.dtype, accumulate)
        self.buffer = _Buffer(rows, size, accumulate)
        self.narrow = None if self.dtype == accumulate else _Buffer(rows, size, self.dtype)

    def next(self) -> tuple[Chunk, Tensor]:
        """The next chunk and ``rows @ direction.T`` [N, c] in the accumulation dtype; the scale is not applied."""
        chunk = next(self.chunks)
        out = self.buffer.take(chunk)
        if self.narrow is None:
            torch.mm(self.rows, chunk.direction.t(), out=out)
        else:
            out.copy_(torch.mm(self.rows, chunk.direction.t(), out=self.narrow.take(chunk)))
        return chunk, out


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


def forward(
    student_rows: Tensor,
    student_v: Tensor,
    student_g: Tensor,
    teacher_rows: Tensor,
    teacher_v: Tensor,
    teacher_g: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N] and the log-sum-exps of student and teacher, each as [N, 2]: maximum and sum of exp(z - maximum).

    Arguments as ``distillation_loss`` takes them.
    """
    n, k = student_rows.shape[0], student_v.shape[0]
    dtype = accumulation_dtype(student_rows.dtype)
    size = chunk_size(n, k)
    student = _Logits(student_rows, student_v, student_g, size, dtype)
    teacher = _Logits(teacher_rows, teacher_v, teacher_g, size, dtype)
    student_lse, teacher_lse = _LogSumExp(student_rows, dtype), _LogSumExp(student_rows, dtype)
    # Running sum over prototypes of exp(teacher - maximum) * student: the cross term of the loss, not yet normalised.
    cross = torch.zeros(n, dtype=dtype, device=student_rows.device)
    for _ in range(0, k, size):
        chunk, t = teacher.next()
        t.mul_(chunk.scale / teacher_temp).sub_(center[chunk.rows].to(dtype) / teacher_temp)
        weights, rescale = teacher_lse.exp_(t)
        chunk, s = student.next()
        s.mul_(chunk.scale / student_temp)
        cross.mul_(rescale).add_(weights.mul_(s).sum(1))
        student_lse.exp_(s)
    loss = student_lse.value() - cross / teacher_lse.total
    return loss, student_lse.parts(), teacher_lse.parts()


def backward(
    grad: Tensor,
    student_rows: Tensor,
    student_v: Tensor,
    student_g: Tensor,
    teacher_rows: Tensor,
    teacher_v: Tensor,
    teacher_g: Tensor,
    center: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student rows, v and g for the loss's gradient ``grad`` [N]; recomputes both logits by chunk."""
    n, k = student_rows.shape[0], student_v.shape[0]
    dtype = accumulation_dtype(student_rows.dtype)
    size = chunk_size(n, k)
    student = _Logits(student_rows, student_v, student_g, size, dtype)
    teacher = _Logits(teacher_rows, teacher_v, teacher_g, size, dtype)
    spare = _Buffer(student_rows, size, dtype)
    upstream = (grad.to(dtype) / student_temp)[:, None]
    student_max, student_factor = student_lse[:, :1], upstream / student_lse[:, 1:]
    teacher_max, teacher_factor = teacher_lse[:, :1], upstream / teacher_lse[:, 1:]
    grad_rows = torch.zeros(student_rows.shape, dtype=dtype, device=student_rows.device)
    grad_v = torch.empty(student_v.shape, dtype=student_v.dtype, device=student_v.device)
    grad_g = torch.empty(student_g.shape, dtype=student_g.dtype, device=student_g.device)
    for _ in range(0, k, size):
        chunk, t = teacher.next()
        t.mul_(chunk.scale / teacher_temp).sub_(center[chunk.rows].to(dtype) / teacher_temp)
        t.sub_(teacher_max).exp_()
        chunk, s = student.next()
        dz = torch.mul(s, chunk.scale / student_temp, out=spare.take(chunk))
        dz.sub_(student_max).exp_().mul_(student_factor).sub_(t.mul_(teacher_factor))
        # Sum over rows of dz * (logit / g): the gradient of g, and the part of v's gradient along v.
        along = torch.mul(dz, s, out=t).sum(0)
        if not chunk.unit:
            along.mul_(chunk.inverse_norm)
        grad_g[chunk.rows, 0] = along.to(grad_g.dtype)
        dz = dz.mul_(chunk.scale).to(student.dtype)
        grad_rows.add_(torch.mm(dz, chunk.direction))
        write_grad_v(grad_v[chunk.rows], dz, student.rows, student_v[chunk.rows].detach(), along, chunk)
    return grad_rows.to(student_rows.dtype), grad_v, grad_g
