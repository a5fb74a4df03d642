"""Weights of any origin: what `--weights` may name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm_support import import_timm

from pera_fast.errors import UserError
from pera_fast.features.dense import features
from pera_fast.weights import load
from pera_fast.weights.load import load_backbone


def test_a_timm_name_gives_timms_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights stand in for those that timm would fetch."""
    import_timm()
    import timm

    made: list[Any] = []

    def create(name: str, pretrained: bool, **more: Any) -> Any:
        assert pretrained
        torch.manual_seed(0)
        made.append(real(name, pretrained=False, depth=2, img_size=64, **more).eval())
        return made[0]

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    backbone = load_backbone("vit_tiny_patch16_224")
    assert backbone.source == "timm:vit_tiny_patch16_224"
    assert (backbone.width, backbone.cfg.model.num_heads, backbone.cfg.views.global_size) == (192, 3, 64)
    told = made[0].pretrained_cfg
    assert backbone.cfg.views.mean == list(told["mean"])
    pixels = torch.randn(2, 3, 64, 64)
    cls, patches = features(backbone.model, pixels, backbone.cfg.views.mean, backbone.cfg.views.std)
    with torch.no_grad():
        wanted = made[0].forward_features(pixels)
    assert (torch.cat([cls[:, None], patches], 1) - wanted).abs().max() < 1e-5


def test_names_that_timm_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    with pytest.raises(UserError, match="no such file, folder or timm model"):
        load_backbone("vit_nothing_patch16")
    import timm

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"timm gives no weights \(no network\)"):
        load_backbone("vit_tiny_patch16_224")


def test_random_weights_are_of_the_seed_and_the_sizes() -> None:
    one, again, other = (load_backbone("random:tiny", seed=seed) for seed in (1, 1, 2))
    name = "blocks.0.attn.qkv.weight"
    states = [backbone.model.state_dict()[name] for backbone in (one, again, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert one.cfg.recipe == "tiny"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("random", "of which sizes"),
        ("random:tinny", "did you mean tiny?"),
        ("nothing/here", "no such file or folder"),
        ("nothing.pt", "no such file or folder"),
        ("s3://bucket/x.pt", "is a URL"),
    ],
)
def test_what_is_no_weights_gets_a_line(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_backbone(name)


def test_folders_and_files_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run"):
        load_backbone(tmp_path)
    (tmp_path / "config.yaml").write_text("recipe: tiny\n")
    with pytest.raises(UserError, match="neither an exported teacher nor a checkpoint"):
        load_backbone(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_backbone(tmp_path / "x.safetensors")
    torch.save({"model": {"conv1.weight": torch.ones(2, 2)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="no vision transformer: 'patch_embed"):
        load_backbone(tmp_path / "resnet.pth")


def test_an_unusual_width_asks_for_heads(tmp_path: Path) -> None:
    backbone = load_backbone("random:tiny")
    assert load.HEADS.get(128) is None
    torch.save(backbone.model.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="how many attention heads its width of 128 has; give --heads N"):
        load_backbone(tmp_path / "plain.pth")
    found = load_backbone(tmp_path / "plain.pth", heads=4)
    assert found.cfg.model.num_heads == 4
    assert "nothing of its normalisation" in found.notes[0]
