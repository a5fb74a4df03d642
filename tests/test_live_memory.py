"""Live memory of a vit_b16 training step: what stays, and what each image of the batch adds."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import load_config
from pera_fast.profile.live import LiveBytes, MemoryFit, fit, simulate_step


def test_storages_are_counted_from_birth_to_death() -> None:
    with FakeTensorMode(), LiveBytes() as count:
        with count.phase("first"):
            a = torch.empty(1024, dtype=torch.float32)
        view = a[10:]
        assert count.live == 4096
        b = a + 1
        assert count.live == 8192
        del a, b
        assert count.live == 4096, "a view keeps its storage alive"
        assert count.by_phase["first"] == 4096
        del view
    assert (count.live, count.peak) == (0, 8192)


def test_fit_and_largest_batch() -> None:
    line = MemoryFit(fixed=1024.0, slope=100.0)
    assert line.largest_batch(2) == 10
    assert line.largest_batch(0.5) == 0


def memory(policy: str) -> MemoryFit:
    """Batches 8 and 16 at the published sizes: 448 px, 2 + 8 crops, 131072 prototypes, bf16."""
    overrides = [f"model.recompute={policy}"]
    first, second = (simulate_step(load_config("vit_b16", [*overrides, f"train.batch_size={b}"])) for b in (8, 16))
    return fit(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "slope"), [("cheap", 80), ("block", 40)])
def test_vit_b16_memory(policy: str, slope: float) -> None:
    line = memory(policy)
    print(f"vit_b16 {policy}: {line.fixed:.0f} + {line.slope:.1f} * batch MiB")
    assert line.slope <= slope
    assert line.fixed <= 3400
