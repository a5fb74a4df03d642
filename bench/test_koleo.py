"""`koleo` on the rows of a step's global crops: each implementation, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pera_kernels import backend
from pera_kernels.koleo import koleo, reference

IMPLEMENTATIONS = ("reference", "chunked", "native")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def arguments(request, cfg, images, device) -> list[Tensor]:
    """Rows of the global crops and the student's prototypes."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    draw = torch.Generator().manual_seed(0)
    k, d = cfg.model.prototypes, cfg.model.bottleneck
    rows = torch.randn(images * cfg.views.num_global, d, generator=draw)
    rows = torch.nn.functional.normalize(rows).to(device, dtype)
    v = 0.05 * torch.randn(k, d, generator=draw).to(device)
    return [t.requires_grad_() for t in (rows, v, torch.ones(k, 1, device=device))]


@pytest.fixture(scope="module")
def exact(arguments, cfg) -> list[Tensor]:
    """Loss and gradient of the rows, in float64."""
    wide = [t.detach().double() for t in arguments]
    wide[0].requires_grad_()
    loss = reference.koleo(*wide, cfg.views.num_global)
    return [loss.detach(), *torch.autograd.grad(loss, wide[:1])]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, device):
    """Forces the implementation; skips with the reason where it cannot run."""
    with backend.use(request.param):
        try:
            backend.choose("koleo", device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


def test_koleo_forward(measure, arguments, exact, cfg, implementation):
    v = arguments[1]

    def op() -> Tensor:
        with torch.no_grad():
            return koleo(*arguments, cfg.views.num_global)

    measure(op, expected=exact[0], moved=v.numel() * v.element_size())


def test_koleo_backward(measure, arguments, exact, cfg, implementation):
    v = arguments[1]
    loss = koleo(*arguments, cfg.views.num_global)

    def op() -> Tensor:
        return torch.autograd.grad(loss, arguments, retain_graph=True)[0]

    measure(op, expected=exact[1], moved=2 * v.numel() * v.element_size())
