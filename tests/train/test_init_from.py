"""Runs that start from given weights: `train.init_from`."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from train_support import SMALL, small_config

from pera_fast import pretrain
from pera_fast.errors import UserError
from pera_fast.features.dense import features
from pera_fast.interop.to_published import convert_back
from pera_fast.model.export import timm_state_dict
from pera_fast.model.pera import PerA
from pera_fast.train.init_from import initialise, read_initial
from pera_fast.weights.adapt import adapt, channel_names, interpolated
from pera_fast.weights.backbone import random_backbone
from pera_fast.weights.load import load_backbone


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nvidia.dali")
    out = tmp_path_factory.mktemp("first") / "run"
    assert pretrain(images, out, "tiny", overrides=[*SMALL, "train.steps=2"]).exit_code == 0
    return out


def model_from(*overrides: str) -> PerA:
    cfg = small_config(*overrides)
    initial = read_initial(cfg)
    assert initial is not None
    model = PerA(cfg)
    initialise(model, initial)
    return model


def test_all_of_a_run_is_taken(run: Path) -> None:
    stored = torch.load(sorted((run / "checkpoints").glob("*.pt"))[-1], weights_only=True)["model"]
    state = model_from(f"train.init_from={run}").state_dict()
    for name, value in stored.items():
        wanted = stored[name.replace("student.", "teacher.")]  # both start as the teacher
        assert torch.equal(state[name], wanted), name
        assert value.shape == wanted.shape


def test_a_backbone_alone_leaves_the_heads_new(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = model_from(f"train.init_from={run / 'exported' / 'teacher.safetensors'}")
    state = load_backbone(run).model.state_dict()
    for name, value in state.items():
        assert torch.equal(model.student.backbone.state_dict()[name], value)
        assert torch.equal(model.teacher.backbone.state_dict()[name], value)
    assert "new: cls head, pixel head, mask token" in caplog.text


def test_other_prototypes_make_a_new_head_only(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model_from(f"train.init_from={run}", "model.prototypes=32")
    assert "backbone, pixel head, mask token" in caplog.text
    assert "new: cls head" in caplog.text


def test_published_files_and_dino_names_are_taken(run: Path, tmp_path: Path) -> None:
    newest = sorted((run / "checkpoints").glob("*.pt"))[-1]
    convert_back(newest, tmp_path / "theirs.params")
    cfg = small_config()
    wanted = load_backbone(run).model.state_dict()
    initial = read_initial(small_config(f"train.init_from={newest}"))
    assert initial is not None
    assert all(torch.equal(initial.backbone.state[name], value) for name, value in wanted.items())
    plain = timm_state_dict(wanted, "")
    gamma = 0.1 + torch.rand(2, cfg.model.embed_dim)
    dino = {f"module.backbone.{name}": value for name, value in plain.items()}
    dino["module.backbone.blocks.0.ls1.gamma"], dino["module.backbone.blocks.1.ls2.gamma"] = gamma
    torch.save({"teacher": {**dino, "module.head.mlp.0.weight": torch.ones(2, 2)}}, tmp_path / "dino.pth")
    scaled = load_backbone(tmp_path / "dino.pth", heads=2).model.state_dict()
    assert torch.allclose(
        scaled["blocks.0.attn.proj.weight"], plain["blocks.0.attn.proj.weight"] * gamma[0][:, None], atol=1e-7
    )
    assert torch.allclose(scaled["blocks.1.mlp.fc2.bias"], plain["blocks.1.mlp.fc2.bias"] * gamma[1], atol=1e-7)
    assert torch.equal(scaled["blocks.0.mlp.fc2.bias"], plain["blocks.0.mlp.fc2.bias"])
    save_file({**plain, "reg_token": torch.zeros(1, 1, 2)}, tmp_path / "registers.safetensors")
    with pytest.raises(UserError, match="has reg_token, which a plain ViT has not"):
        load_backbone(tmp_path / "registers.safetensors", heads=2)


def test_positions_follow_the_size() -> None:
    cfg = small_config()
    backbone = random_backbone(cfg, "random")
    larger = adapt(backbone, small_config("views.global_size=64"))
    assert larger.state["pos_embed"].shape == (1, 65, cfg.model.embed_dim)
    assert "from 4 x 4 to 8 x 8" in larger.notes[0]
    ramp = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3)
    positions = torch.cat([torch.full((1, 1, 3), -7.0), ramp], 1)
    wider = interpolated(positions, 4, 8)
    assert torch.equal(wider[:, 0], positions[:, 0])
    assert wider[0, 1:].mean().item() == pytest.approx(ramp.mean().item(), abs=1e-4)
    assert (wider[0, 1:].view(8, 8, 3).diff(dim=1)[2:-2, 2:-2] > 0).all()


def test_rgb_weights_go_to_the_bands_of_that_name() -> None:
    backbone = random_backbone(small_config(), "random")
    kernels = backbone.model.patch_embed.proj.weight
    bands = '["blue","green","red","nir"]'
    cfg = small_config(f"data.bands={bands}", 'views.rgb_bands=["red","green","blue"]')
    found = adapt(backbone, cfg)
    got = found.state["patch_embed.proj.weight"]
    for channel, source in enumerate((2, 1, 0)):
        assert torch.allclose(got[:, channel], kernels[:, source] * 3 / 4)
    assert torch.allclose(got[:, 3], kernels.mean(1) * 3 / 4)
    assert "from 3 to 4 bands: blue, green, red by name, the mean kernel for the other 1" in found.notes[0]
    gray = torch.rand(1, 1, 8, 8)  # a patch that is alike in all bands gives what it gave
    ours = (kernels * gray).sum((1, 2, 3))
    evened = adapt(backbone, small_config("model.in_chans=12")).state["patch_embed.proj.weight"]
    assert torch.allclose((evened * gray).sum((1, 2, 3)), ours, atol=1e-5)


def test_names_of_channels() -> None:
    assert channel_names(small_config()) == ["red", "green", "blue"]
    assert channel_names(small_config("data.bands=[4,3,2]")) == ["red", "green", "blue"]
    assert channel_names(small_config("data.bands=[NIR,Red]")) == ["nir", "red"]
    assert channel_names(small_config("model.in_chans=4", "views.rgb_bands=[3,2,1]")) == ["blue", "green", "red", 4]


def test_nothing_changes_where_all_is_the_same() -> None:
    backbone = random_backbone(small_config(), "random")
    found = adapt(backbone, small_config())
    assert found.notes == ()
    again = PerA(small_config()).teacher.backbone
    again.load_state_dict(found.state, strict=False)
    pictures, views = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), backbone.cfg.views
    wanted, got = (features(net, pictures, views.mean, views.std)[0] for net in (backbone.model, again))
    assert torch.equal(wanted, got)


def test_a_run_starts_from_it_and_resumes_without(run: Path, images: Path, tmp_path: Path) -> None:
    moved = tmp_path / "weights.safetensors"
    moved.write_bytes((run / "exported" / "teacher.safetensors").read_bytes())
    settings = [*SMALL, "train.steps=2", "optim.lr=0", "optim.final_lr=0", f"train.init_from={moved}"]
    out = tmp_path / "second"
    result = pretrain(images, out, "tiny", overrides=settings)
    assert math.isfinite(result.metrics["loss"])
    for name, value in load_backbone(moved).model.state_dict().items():
        assert torch.allclose(load_backbone(out).model.state_dict()[name], value, atol=1e-6)
    moved.unlink()
    assert pretrain(images, out, None, resume=True, overrides=["train.steps=3"]).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["train.init_from=/nowhere/weights.pt"], "train.init_from /nowhere/weights.pt: no such file or folder"),
        (["train.init_from=random"], "train.init_from random: of which sizes?"),
        (["train.init_from=random:tiny"], "is of model.embed_dim=128 (here 16)"),
    ],
)
def test_weights_that_do_not_fit_get_a_line(images: Path, tmp_path: Path, settings: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain(images, tmp_path / "run", "tiny", overrides=[*SMALL, *settings])
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()
