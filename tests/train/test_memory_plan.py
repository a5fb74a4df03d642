"""The predicted memory of a step against the simulated one, and what `model.recompute=auto` makes of it."""

import json
from pathlib import Path

import pytest
import torch

from pera_fast.config import load_config
from pera_fast.data.loading.decode_on import Decoding
from pera_fast.model.pera import PerA
from pera_fast.profile.simulate import simulate_step
from pera_fast.train import memory_plan
from pera_fast.train.memory_plan import (
    MIB,
    POLICIES,
    bytes_per_image,
    choose_recompute,
    fixed_bytes,
    loader_bytes,
    step_bytes,
)

MEASURED = Path(__file__).parents[2] / "bench" / "results" / "gpu" / "2-h200-2d9b0ae.json"
GPU = torch.device("cuda", 0)


def on_meta(*settings: str, recipe: str = "vit_b16"):
    cfg = load_config(recipe, ["train.precision=bf16", *settings])
    with torch.device("meta"):
        return cfg, PerA(cfg)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("vit_b16", []), ("vit_s16", []), ("vit_b16", ["model.drop_path=0"]), ("vit_b16", ["model.masking=none"])],
)
def test_prediction_is_a_close_upper_bound(recipe: str, settings: list[str]) -> None:
    """Above what is counted, by no more than the spare tenth for the slope; "block" by its one block."""
    for policy in POLICIES:
        peaks = {}
        for batch in (16, 32):
            sizes = [f"train.batch_size={batch}", f"model.recompute={policy}"]
            peaks[batch] = simulate_step(load_config(recipe, ["train.precision=bf16", *settings, *sizes])).peak
        slope = (peaks[32] - peaks[16]) / 16
        cfg, model = on_meta(*settings, recipe=recipe)
        predicted = bytes_per_image(cfg, policy)
        assert slope <= predicted <= 1.12 * slope + (10 * MIB if policy == "block" else 0), policy
        assert peaks[32] <= fixed_bytes(model) + 32 * predicted, policy


def test_prediction_holds_what_an_h200_reserved() -> None:
    """The prediction is at most 8 % above what the allocator held for the default step (no recomputation)."""
    rows = json.loads(MEASURED.read_text())["steps"]
    measured = {row["batch"]: row["reserved_mib"] for row in rows if row["variant"] == "as it comes"}
    assert sorted(measured) == [16, 64, 256]
    cfg, model = on_meta()
    for batch, reserved in measured.items():
        assert reserved <= step_bytes(cfg, model, "none", batch) / MIB <= 1.08 * reserved, batch


def free_memory(patch: pytest.MonkeyPatch, free: float, reserved: float = 0.0, total: float = 140.0) -> None:
    """A GPU with so many GiB that are free, held by this process's allocator, and there in all."""
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), int(total * 2**30)))
    patch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * 2**30))


def test_auto_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, model = on_meta()
    chosen = []
    for gib in (140, 23, 17, 8):
        free_memory(monkeypatch, gib)
        choice = choose_recompute(cfg, model, GPU, batch_size=128)
        chosen.append(choice.policy)
        assert "GiB" in choice.reason
    assert chosen == ["none", "none", "cheap", "block"]
    assert "may not fit" in choice.reason


def test_auto_counts_what_is_free_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has most of a large GPU; the weights that lie there already are part of the step."""
    cfg, model = on_meta()
    free_memory(monkeypatch, free=17)
    assert choose_recompute(cfg, model, GPU, batch_size=128).policy == "cheap"
    free_memory(monkeypatch, free=17, reserved=6)
    choice = choose_recompute(cfg, model, GPU, batch_size=128)
    assert choice.policy == "none"
    assert choice.reason == "step and loader take 19.8 GiB of 20.7, nine tenths of what is free"


def test_auto_counts_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches ahead, and where the GPU decodes, what DALI and nvJPEG hold."""
    cfg, model = on_meta()
    crops = 3 * (2 * 448**2 + 8 * 96**2)
    on_cpu, on_gpu = (Decoding(on, 4, "") for on in ("cpu", "gpu"))
    ahead = 128 * 3 * crops
    assert loader_bytes(cfg, 128, on_cpu, 1000 * 1000) == ahead
    assert loader_bytes(cfg, 128, on_gpu, 1000 * 1000) == ahead + 128 * 2 * (crops + 3_000_000) + 4 * 16 * MIB
    deep = cfg.with_values({"data.depth": "16"})
    assert loader_bytes(deep, 128, on_cpu, 0) == 2 * ahead
    assert bytes_per_image(deep, "none") - bytes_per_image(cfg, "none") == 2 * crops
    free_memory(monkeypatch, 23)
    loader = loader_bytes(cfg, 128, on_gpu, 1000 * 1000)
    assert choose_recompute(cfg, model, GPU, batch_size=128, loader=loader).policy == "cheap"


def test_what_is_configured_is_taken() -> None:
    cfg, model = on_meta("model.recompute=block")
    assert choose_recompute(cfg, model, GPU, 64).policy == "block"
    cfg, model = on_meta()
    assert choose_recompute(cfg, model, torch.device("cpu"), 64).policy == "cheap"
    assert memory_plan.SPARE == 0.1
