"""The predicted memory of a step against the simulated one, and what `model.recompute=auto` makes of it."""

from types import SimpleNamespace

import pytest
import torch

from pera_fast.config import load_config
from pera_fast.model.pera import PerA
from pera_fast.profile.simulate import simulate_step
from pera_fast.train import memory_plan
from pera_fast.train.memory_plan import MIB, POLICIES, bytes_per_image, choose_recompute, fixed_bytes

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


def test_auto_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, model = on_meta()
    chosen = []
    for gib in (140, 22, 16, 8):
        found = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        choice = choose_recompute(cfg, model, GPU, batch_size=128)
        chosen.append(choice.policy)
        assert "GiB" in choice.reason
    assert chosen == ["none", "none", "cheap", "block"]
    assert "may not fit" in choice.reason


def test_what_is_configured_is_taken() -> None:
    cfg, model = on_meta("model.recompute=block")
    assert choose_recompute(cfg, model, GPU, 64).policy == "block"
    cfg, model = on_meta()
    assert choose_recompute(cfg, model, torch.device("cpu"), 64).policy == "cheap"
    assert memory_plan.SPARE == 0.1
