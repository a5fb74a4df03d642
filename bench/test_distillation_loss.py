"""`distillation_loss` and its weight norm: each implementation on a step's rows, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pera_kernels import backend
from pera_kernels.distillation_loss import distillation_loss, reference

IMPLEMENTATIONS = ("reference", "chunked", "native", "triton", "products")
TEMPS = (0.1, 0.04)


def draw_rows(count: int, dim: int, dtype: torch.dtype, draw: torch.Generator, device: torch.device) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=draw)).to(device, dtype)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def arguments(request, cfg, images, device) -> list[Tensor]:
    """Rows of all crops and the prototypes of both networks; the student's take gradients."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    draw = torch.Generator().manual_seed(0)
    count = images * (cfg.views.num_global + cfg.views.num_local)
    k, d = cfg.model.prototypes, cfg.model.bottleneck
    networks = []
    for _ in range(2):
        networks += [draw_rows(count, d, dtype, draw, device)]
        networks += [0.05 * torch.randn(k, d, generator=draw).to(device), torch.ones(k, 1, device=device)]
    for tensor in networks[:3]:
        tensor.requires_grad_()
    return [*networks, 0.01 * torch.randn(k, generator=draw).to(device)]


@pytest.fixture(scope="module")
def exact(arguments) -> list[Tensor]:
    """Loss and gradient of the rows, in float64; 16 rows at a time: their logits are all in memory."""
    rows, v, g, teacher_rows, *rest = arguments
    losses, grads = [], []
    wide = [t.detach().double() for t in (v, g, *rest)]
    for part, teacher in zip(rows.detach().double().split(16), teacher_rows.double().split(16), strict=True):
        part.requires_grad_()
        loss = reference.distillation_loss(part, *wide[:2], teacher, *wide[2:], *TEMPS)
        grads += torch.autograd.grad(loss.sum(), part)
        losses.append(loss.detach())
    return [torch.cat(losses), torch.cat(grads)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, device):
    """Forces the implementation; skips where it cannot run. `products` is none of them: the floor."""
    if request.param == "products":
        yield request.param
        return
    with backend.use(request.param):
        try:
            backend.choose("distillation_loss", device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


def prototype_bytes(arguments: list[Tensor], matrices: int) -> int:
    return matrices * arguments[1].numel() * arguments[1].element_size()


def test_distillation_forward(measure, arguments, exact, implementation):
    if implementation == "products":
        rows, v, _, teacher_rows, teacher_v = (t.detach().float() for t in arguments[:5])
        products = torch.empty(rows.shape[0], min(4096, v.shape[0]), device=rows.device)

        def op() -> Tensor:
            for x, weights in ((rows, v), (teacher_rows, teacher_v)):
                for chunk in weights.split(4096):
                    torch.mm(x, chunk.t(), out=products[:, : chunk.shape[0]])
            return exact[0]
    else:

        def op() -> Tensor:
            with torch.no_grad():
                return distillation_loss(*arguments, *TEMPS)

    measure(op, expected=exact[0], moved=prototype_bytes(arguments, 2))


def test_distillation_backward(measure, arguments, exact, implementation):
    """Gradients alone: both walks' worth of products, and the gradient of v written."""
    if implementation == "products":
        rows, v, _, teacher_rows, teacher_v = (t.detach().float() for t in arguments[:5])
        dz = torch.zeros(rows.shape[0], min(4096, v.shape[0]), device=rows.device)
        grad, grad_v = torch.zeros_like(rows), torch.empty_like(v)

        def op() -> Tensor:
            for begin in range(0, v.shape[0], 4096):
                chunk, teacher = v[begin : begin + 4096], teacher_v[begin : begin + 4096]
                part = dz[:, : chunk.shape[0]]
                torch.mm(teacher_rows, teacher.t(), out=part)
                torch.mm(rows, chunk.t(), out=part)
                grad.addmm_(part, chunk)
                torch.mm(part.t(), rows, out=grad_v[begin : begin + 4096])
            return exact[1]
    else:
        loss = distillation_loss(*arguments, *TEMPS).sum()

        def op() -> Tensor:
            return torch.autograd.grad(loss, arguments[:3], retain_graph=True)[0]

    measure(op, expected=exact[1], moved=prototype_bytes(arguments, 3))
