"""`sequence_norm`: each implementation on the student's stream, with and without stochastic depth."""

from __future__ import annotations

import pytest
import torch
from packed_inputs import DTYPES, IMPLEMENTATIONS, forced, normal, size, student_stream

from pera_kernels import packing
from pera_kernels.sequence_norm.op import sequence_norm_backward, sequence_norm_with_stats


@pytest.fixture(params=["subset", "all"])
def stream(request, cfg, images, device):
    """x, the norm's parameters, keep, groups, kept, rows of the branch."""
    groups, keep, kept = student_stream(cfg, images, device)
    if request.param == "all":
        keep, kept = None, []
    dim, dtype = cfg.model.embed_dim, DTYPES[cfg.train.precision]
    x = normal(packing.num_tokens(groups), dim, dtype=dtype, device=device)
    weight, bias = (normal(dim, device=device, seed=seed) for seed in (1, 2))
    rows = packing.num_tokens(packing.kept_groups(groups, None if keep is None else kept))
    return x, weight, bias, keep, groups, kept, rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequence_norm_forward(measure, stream, device, implementation):
    x, weight, bias, keep, groups, kept, rows = stream

    def forward(dtype: torch.dtype) -> torch.Tensor:
        params = (weight.double(), bias.double()) if dtype == torch.float64 else (weight, bias)
        return sequence_norm_with_stats(x.to(dtype), *params, 1e-6, groups, keep, kept)[0]

    expected = forward(torch.float64)
    with forced("sequence_norm", implementation, device):
        measure(lambda: forward(x.dtype), expected=expected, moved=2 * rows * size(x[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequence_norm_backward(measure, stream, device, implementation):
    x, weight, bias, keep, groups, kept, rows = stream
    grad = normal(rows, x.shape[1], dtype=x.dtype, device=device, seed=3)

    def backward(dtype: torch.dtype) -> torch.Tensor:
        return sequence_norm_backward(grad.to(dtype), x.to(dtype), weight.to(stats[0]), *stats, keep, groups, kept)[0]

    with forced("sequence_norm", "reference", device):
        stats = sequence_norm_with_stats(x.double(), weight.double(), bias.double(), 1e-6, groups, keep, kept)[1:]
        expected = backward(torch.float64)
        stats = [part.float() for part in stats]
    with forced("sequence_norm", implementation, device):
        measure(lambda: backward(x.dtype), expected=expected, moved=2 * rows * size(x[0]) + size(x))
