"""`pixel_loss` and its gradient: each implementation on the predicted patches of a step's global crops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_visible_patches import DTYPES, View, make_view
from torch import Tensor

from pera_kernels import backend
from pera_kernels.pixel_loss import pixel_loss
from pera_kernels.pixel_loss.op import pixel_loss_backward
from pera_kernels.visible_patches import contrast_mean

IMPLEMENTATIONS = ("reference", "eager", "native", "triton")


@dataclass
class Case:
    """pred: [N*n, P*P*C] in the recipe's precision; where: the op's other arguments; grad: the upstream gradient []."""

    pred: Tensor
    where: tuple
    grad: Tensor

    @property
    def moved(self) -> int:
        """Bytes that the forward has to read: predictions and the pixels of their patches."""
        return self.pred.numel() * (self.pred.element_size() + 1)


@pytest.fixture(scope="module", params=["color", "plain"])
def case(request, cfg, images, device) -> Case:
    view: View = make_view(cfg, "global", images, device)
    colors = (None, None, None)
    if request.param == "color":
        with backend.use("reference"):
            colors = (view.order, view.factors, contrast_mean(view.crops, view.order, view.factors))
    values = view.patch_size**2 * view.crops.shape[3]
    draw = torch.Generator().manual_seed(1)
    pred = torch.randn(view.index.numel(), values, generator=draw).to(device, DTYPES[cfg.train.precision])
    where = (view.crops, view.index, *colors, view.mean, view.std, view.patch_size)
    return Case(pred, where, torch.tensor(1.7, device=device))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, device):
    """Forces the implementation; skips with the reason where it cannot run."""
    with backend.use(request.param):
        try:
            backend.choose("pixel_loss", device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
        yield request.param


def test_pixel_loss(measure, case, implementation):
    with backend.use("reference"):
        right = pixel_loss(case.pred.double(), *case.where)
    # relative to the loss, which is a sum over a patch's values
    measure(lambda: pixel_loss(case.pred, *case.where) / right, expected=torch.ones_like(right), moved=case.moved)


def test_pixel_loss_backward(measure, case, implementation):
    with backend.use("reference"):
        right = pixel_loss_backward(case.grad, case.pred.double(), *case.where)
    written = case.pred.numel() * case.pred.element_size()
    measure(
        lambda: pixel_loss_backward(case.grad, case.pred, *case.where),
        expected=right,
        moved=case.moved + written,
    )
