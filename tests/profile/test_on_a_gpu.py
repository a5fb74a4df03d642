"""The profile on a GPU: simulated slopes against measured ones, out of memory, traced kernels."""

from pathlib import Path

import pytest
import torch

from pera_fast.profile.points import Point, Variant
from pera_fast.profile.processes import run_points
from pera_fast.profile.run import profile
from pera_fast.profile.trace import trace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_simulated_slopes_are_the_measured_ones(tmp_path: Path) -> None:
    found = profile(["vit_s16"], tmp_path, "cuda", "16,32,64", ["model.recompute=cheap"], dense=False, steps=2)
    assert [p.status for p in found.points] == ["ok"] * 3
    assert all(p.reserved >= p.peak > 0 for p in found.points)
    assert all(c.within for c in found.comparisons), found.comparisons
    assert len(found.comparisons) == 1


def test_out_of_memory_is_survived() -> None:
    variant = Variant("vit_s16", ("model.masking=none", "model.recompute=none"))
    sizes = 1024, 2  # the first takes some 200 GB
    found = run_points([Point(variant, size, "cuda", steps=1) for size in sizes])
    assert [p.status for p in found] == ["out of memory", "ok"]


def test_a_trace_has_kernels_and_a_memory_snapshot(tmp_path: Path) -> None:
    found = trace("tiny", tmp_path, "cuda", 2, ["train.batch_size=4", "train.precision=bf16"])
    assert found.snapshot is not None
    assert found.snapshot.stat().st_size > 0
    assert any("gemm" in row.name.lower() or "kernel" in row.name.lower() for row in found.ops)
    assert {"student", "teacher", "backward"} <= {row.name for row in found.ranges}
