"""`embed_tokens`: each implementation on the student's patches, and what stands around its matrix product alone."""

from __future__ import annotations

import pytest
import torch
from packed_inputs import DTYPES, IMPLEMENTATIONS, forced, normal, patch_numbers, size, views

from pera_kernels import backend
from pera_kernels.embed_tokens import embed_tokens


@pytest.fixture(params=["global", "local"])
def inputs(request, cfg, images, device):
    """rows, weight, bias, pos, cls, index."""
    crops, patches, seen = views(cfg, images)[request.param]
    dim, dtype = cfg.model.embed_dim, DTYPES[cfg.train.precision]
    width = cfg.model.in_chans * cfg.model.patch_size**2
    rows = normal(crops * seen, width, dtype=dtype, device=device)
    weight = normal(dim, width, device=device, seed=1) / width**0.5
    bias, cls = (normal(dim, device=device, seed=seed) for seed in (2, 3))
    pos = normal(1 + patches, dim, device=device, seed=4)
    return rows, weight, bias, pos, cls, patch_numbers(crops, patches, seen, device)


def double(inputs):
    return *(t.double() for t in inputs[:-1]), inputs[-1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embed_tokens_forward(measure, inputs, device, implementation):
    rows, index = inputs[0], inputs[-1]
    out_rows = index.shape[0] * (1 + index.shape[1])
    expected = embed_tokens(*double(inputs))
    moved = size(rows) + out_rows * inputs[1].shape[0] * rows.element_size()
    with forced("embed_tokens", implementation, device):
        measure(lambda: embed_tokens(*inputs), expected=expected, moved=moved)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embed_tokens_backward(measure, inputs, device, implementation):
    rows, weight, _, pos, _, index = inputs
    grad = normal(index.shape[0] * (1 + index.shape[1]), weight.shape[0], dtype=rows.dtype, device=device, seed=5)
    wide = double(inputs)
    backward = torch.ops.pera.embed_tokens_backward
    expected = backward(grad.double(), wide[0], wide[1], wide[3], index)[2]
    with forced("embed_tokens", implementation, device):
        moved = size(grad) + size(rows) + size(weight) + size(pos)
        measure(lambda: backward(grad, rows, weight, pos, index)[2], expected=expected, moved=moved)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embed_tokens_without_the_product(measure, inputs, device, implementation, part):
    """The same with a product of one column: what bias, position, cls and packing cost, and their gradients."""
    rows, weight, bias, pos, cls, index = inputs
    rows, weight = rows[:, :1].contiguous(), weight[:, :1].contiguous()
    grad = normal(index.shape[0] * (1 + index.shape[1]), weight.shape[0], dtype=rows.dtype, device=device, seed=5)
    call = {
        "forward": lambda r, w, b, p, c, g: embed_tokens(r, w, b, p, c, index),
        "backward": lambda r, w, b, p, c, g: torch.ops.pera.embed_tokens_backward(g, r, w, p, index)[2],
    }[part]
    inputs = rows, weight, bias, pos, cls, grad
    with backend.use("reference"):
        expected = call(*(t.double() for t in inputs))
    with forced("embed_tokens", implementation, device):
        measure(lambda: call(*inputs), expected=expected, moved=2 * size(grad))
