"""`mask_tokens`: each implementation on the student's global sequences."""

from __future__ import annotations

import pytest
import torch
from packed_inputs import DTYPES, IMPLEMENTATIONS, forced, normal, patch_numbers, size, views

from pera_kernels.mask_tokens import mask_tokens


@pytest.fixture
def inputs(cfg, images, device):
    """tokens, mask_token, pos, index; as many patches are predicted as are seen."""
    crops, patches, seen = views(cfg, images)["global"]
    dim, dtype = cfg.model.embed_dim, DTYPES[cfg.train.precision]
    tokens = normal(crops * (1 + seen), dim, dtype=dtype, device=device)
    mask_token, pos = normal(dim, device=device, seed=1), normal(1 + patches, dim, device=device, seed=2)
    return tokens, mask_token, pos, patch_numbers(crops, patches, seen, device)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_tokens_forward(measure, inputs, device, implementation):
    tokens, mask_token, pos, index = inputs
    expected = mask_tokens(tokens.double(), mask_token.double(), pos.double(), index)
    moved = 2 * size(tokens) + index.numel() * (size(tokens[0]) + size(pos[0]))
    with forced("mask_tokens", implementation, device):
        measure(lambda: mask_tokens(*inputs), expected=expected, moved=moved)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_tokens_backward(measure, inputs, device, implementation):
    tokens, _, pos, index = inputs
    grad = normal(tokens.shape[0] + index.numel(), tokens.shape[1], dtype=tokens.dtype, device=device, seed=3)

    def backward(dtype: torch.dtype) -> torch.Tensor:
        return torch.ops.pera.mask_tokens_backward(
            grad.to(dtype), pos.double() if dtype == torch.float64 else pos, index
        )[2]

    expected = backward(torch.float64)
    with forced("mask_tokens", implementation, device):
        moved = size(grad) + size(tokens) + size(pos)
        measure(lambda: backward(tokens.dtype), expected=expected, moved=moved)
