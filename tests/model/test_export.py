"""The exported teacher in timm's VisionTransformer: names, strictness, equal features."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm_support import import_timm

from pera_fast.config import load_config
from pera_fast.features.dense import features
from pera_fast.model.export import export_teacher, teacher_metadata, timm_state_dict, write_safetensors
from pera_fast.model.pera import PerA


@pytest.fixture(scope="module")
def model() -> PerA:
    torch.manual_seed(3)
    model = PerA(load_config("tiny", ["model.depth=3", "model.prototypes=64"]))
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def test_loads_by_name_into_timm_and_gives_equal_features(model: PerA, tmp_path: Path) -> None:
    path = tmp_path / "exported" / "teacher.safetensors"
    export_teacher(model, path)
    cfg = model.cfg
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=cfg.views.global_size,
        patch_size=cfg.model.patch_size,
        embed_dim=cfg.model.embed_dim,
        depth=cfg.model.depth,
        num_heads=cfg.model.num_heads,
        mlp_ratio=cfg.model.mlp_ratio,
        num_classes=0,
    )
    vit.load_state_dict(load_file(path), strict=True)
    images = torch.randint(0, 256, (3, cfg.views.global_size, cfg.views.global_size, 3), dtype=torch.uint8)
    cls, patches = features(model.teacher.backbone, images, cfg.views.mean, cfg.views.std, batch_size=2)
    normalised = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(cfg.views.mean).view(3, 1, 1)) / torch.tensor(
        cfg.views.std
    ).view(3, 1, 1)
    with torch.no_grad():
        want = vit.eval().forward_features(normalised)
    assert (cls - want[:, 0]).abs().max() <= 1e-5 * want.abs().max()
    assert (patches - want[:, 1:]).abs().max() <= 1e-5 * want.abs().max()
    again = features(model.teacher.backbone, normalised, cfg.views.mean, cfg.views.std)
    assert torch.allclose(again[0], cls, atol=1e-5)


def test_metadata_says_how_to_build_it(model: PerA, tmp_path: Path) -> None:
    export_teacher(model, tmp_path / "teacher.safetensors")
    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["embed_dim"] == model.cfg.model.embed_dim
    assert metadata["img_size"] == model.cfg.views.global_size
    assert metadata["mean"] == model.cfg.views.mean


def test_depth_is_the_networks_whatever_the_bits_of_the_images_are() -> None:
    for depth, bits in (("auto", None), ("8", 8), ("16", 16)):
        metadata = teacher_metadata(load_config("tiny", ["model.depth=3", f"data.depth={depth}"]))
        assert metadata["depth"] == 3
        assert metadata["bits"] == bits


def test_equal_weights_are_equal_bytes(model: PerA, tmp_path: Path) -> None:
    for name in "abc":
        export_teacher(model, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1
    with safe_open(tmp_path / "a", "pt") as file:
        assert "blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118
        assert list(file.metadata()) != []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    write_safetensors({"a": torch.ones(3)}, path, {})
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == _plain_mode(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors({"a": torch.zeros(3)}, path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _plain_mode(folder: Path) -> int:
    """Permissions that a plainly written file gets."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        file = Path(inside) / "plain"
        file.write_bytes(b"")
        return file.stat().st_mode & 0o777


def test_wrong_prefix_is_named() -> None:
    with pytest.raises(KeyError, match="teacher"):
        timm_state_dict({"student.backbone.norm.bias": torch.ones(1)})


def test_features_of_many_bands_of_16_bits() -> None:
    """uint16 images give what the same values give as normalised floats."""
    cfg = load_config("tiny", ["model.in_chans=6", "model.depth=1", "model.embed_dim=16", "model.num_heads=2"])
    backbone = PerA(cfg).teacher.backbone
    images = torch.randint(0, 65536, (2, 32, 32, 6), dtype=torch.uint16, generator=torch.Generator().manual_seed(0))
    mean, std = cfg.views.mean, cfg.views.std
    cls, patches = features(backbone, images, mean, std)
    assert (cls.shape, patches.shape) == ((2, 16), (2, 16, 16))
    floats = (images.permute(0, 3, 1, 2).to(torch.float32) / 65535 - 0.5) / 0.25
    other_cls, other_patches = features(backbone, floats, mean, std)
    torch.testing.assert_close(cls, other_cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patches, other_patches, rtol=1e-4, atol=1e-5)
