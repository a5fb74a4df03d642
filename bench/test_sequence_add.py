"""`sequence_add`: each implementation on the student's stream with stochastic depth."""

from __future__ import annotations

import pytest
import torch
from packed_inputs import DTYPES, IMPLEMENTATIONS, forced, normal, size, student_stream

from pera_kernels import packing
from pera_kernels.sequence_add import sequence_add


@pytest.fixture
def stream(cfg, images, device):
    """Stream and branch; groups, keep, kept."""
    groups, keep, kept = student_stream(cfg, images, device)
    dim, dtype = cfg.model.embed_dim, DTYPES[cfg.train.precision]
    x = normal(packing.num_tokens(groups), dim, dtype=dtype, device=device)
    y = normal(packing.num_tokens(packing.kept_groups(groups, kept)), dim, dtype=dtype, device=device, seed=1)
    return x, y, (groups, keep, kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequence_add_forward(measure, stream, device, implementation):
    x, y, packed = stream
    expected = sequence_add(x.double(), y.double(), *packed)
    with forced("sequence_add", implementation, device):
        measure(lambda: sequence_add(x, y, *packed), expected=expected, moved=2 * size(x) + size(y))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequence_add_backward(measure, stream, device, implementation):
    x, y, (groups, keep, kept) = stream
    backward = torch.ops.pera.sequence_add_backward
    expected = backward(x.double(), keep, groups, kept)
    with forced("sequence_add", implementation, device):
        measure(lambda: backward(x, keep, groups, kept), expected=expected, moved=2 * size(y))
