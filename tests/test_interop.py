"""Published checkpoints: names, sizes, files that are something else."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm_support import import_timm
from torch import Tensor

from pera_fast import cli
from pera_fast.config import load_config, to_yaml
from pera_fast.errors import UserError
from pera_fast.interop.published import convert
from pera_fast.model.pera import PerA

GOLDEN = Path(os.environ.get("PERA_GOLDEN_DIR") or Path(__file__).parent / "golden")
FILES = sorted(GOLDEN.glob("step_*.safetensors"))


def published(file: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Parameters as the authors' code names and stores them, and the sizes of the network."""
    with safe_open(file, "pt") as f:
        sizes = {k: json.loads(v) for k, v in f.metadata().items()}
        state = {k.removeprefix("init."): f.get_tensor(k) for k in f.keys() if k.startswith("init.")}  # noqa: SIM118
    return state, sizes


def save(path: Path, state: dict[str, Tensor], **more: object) -> Path:
    torch.save({"model": state, "optimizer": {}, "scaler": {}, "best_loss": 1.5, "epoch": 7, **more}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_published_names_load(file: Path, prefix: str, tmp_path: Path) -> None:
    state, sizes = published(file)
    path = save(tmp_path / "pera.params", {prefix + k: v for k, v in state.items()})
    found = convert(path, tmp_path / "out", num_heads=sizes["num_heads"])
    assert (found.embed_dim, found.depth, found.patch_size) == (sizes["embed_dim"], sizes["depth"], sizes["patch_size"])
    assert (found.prototypes, found.img_size, found.epoch) == (sizes["prototypes"], sizes["global_size"], 7)

    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=found.img_size,
        patch_size=found.patch_size,
        embed_dim=found.embed_dim,
        depth=found.depth,
        num_heads=found.num_heads,
        num_classes=0,
    )
    vit.load_state_dict(load_file(found.teacher), strict=True)

    keys = ("patch_size", "embed_dim", "depth", "num_heads", "head_hidden", "bottleneck", "prototypes")
    overrides = [f"model.{key}={sizes[key]}" for key in keys]
    crops = [f"views.global_size={sizes['global_size']}", f"views.local_size={sizes['local_size']}"]
    model = PerA(load_config("tiny", [*overrides, *crops]))
    missing, unexpected = model.load_state_dict(load_file(found.weights), strict=False)
    assert (missing, unexpected) == (["center"], [])
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)


def own(path: Path) -> Path:
    """A checkpoint as our trainer writes it, of a network with 4 heads of 32."""
    cfg = load_config("tiny", ["model.depth=2", "model.prototypes=24", "model.head_hidden=16", "data.depth=16"])
    state = {"format": 1, "step": 3, "config": to_yaml(cfg), "model": PerA(cfg).state_dict()}
    torch.save(state, path)
    return path


def test_a_checkpoint_of_our_own_keeps_its_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own(tmp_path / "step_00000003.pt")
    assert cli.run(["convert", str(path), "--out", str(tmp_path / "out")]) == 0
    with safe_open(tmp_path / "out" / "teacher.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata["num_heads"] == 4
    assert "width 128, depth 2, 4 heads" in capsys.readouterr().out
    assert (metadata["num_heads"], metadata["depth"], metadata["bits"]) == (4, 2, 16)
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    with pytest.raises(UserError, match=r"teacher.safetensors: exists already; give another name, or --overwrite"):
        convert(path, tmp_path / "out")
    convert(path, tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match=r"--heads 2: .* has 4; leave it out"):
        convert(path, tmp_path / "out", num_heads=2)


def test_heads_are_not_guessed(tmp_path: Path) -> None:
    state, sizes = published(FILES[0])
    path = save(tmp_path / "pera.params", state)
    with pytest.raises(UserError, match=f"width of {sizes['embed_dim']} has; give --heads N"):
        convert(path, tmp_path / "out")
    with pytest.raises(UserError, match="--heads 5: does not divide"):
        convert(path, tmp_path / "out", num_heads=5)


class _Opens:
    """Pickles to a call of open(), as a hostile checkpoint would to something worse."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    state, _ = published(FILES[0])
    path = save(tmp_path / "hostile.params", state, extra=_Opens(tmp_path / "ran"))
    with pytest.raises(UserError, match="could run code"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    state, _ = published(FILES[0])
    (folder / "text.params").write_text("not a checkpoint")
    (folder / "empty.params").write_bytes(b"")
    (folder / "pickle.params").write_bytes(pickle.dumps([1, 2]))
    torch.save([1, 2], folder / "list.params")
    torch.save({"epoch": 3}, folder / "nothing.params")
    whole = save(folder / "whole.params", state).read_bytes()
    (folder / "cut.params").write_bytes(whole[: len(whole) // 2])
    no_teacher = {k: v for k, v in state.items() if not k.startswith("teacher.backbone")}
    mixed = {**state, "teacher.backbone.norm.bias": torch.zeros(7)}
    return {
        "missing": (folder / "nowhere.params", "no such file"),
        "text": (folder / "text.params", r"not a PyTorch checkpoint \(begins with b'not '\)"),
        "empty": (folder / "empty.params", r"not a PyTorch checkpoint \(begins with b''\)"),
        "list": (folder / "list.params", "holds a list"),
        "pickle": (folder / "pickle.params", "holds a list|not a PyTorch checkpoint|could run code"),
        "nothing": (folder / "nothing.params", "no parameters"),
        "cut": (folder / "cut.params", "not a PyTorch checkpoint"),
        "no teacher": (save(folder / "half.params", no_teacher), "teacher.backbone"),
        "shapes": (save(folder / "mixed.params", mixed), "backbone.norm.bias"),
    }


@pytest.mark.parametrize(
    "case", ["missing", "text", "empty", "list", "pickle", "nothing", "cut", "no teacher", "shapes"]
)
def test_other_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path, message = _bad_files(tmp_path)[case]
    with pytest.raises(UserError, match=message) as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    state, sizes = published(FILES[0])
    path = save(tmp_path / "pera.params", state)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        convert(path, tmp_path / "file", num_heads=sizes["num_heads"])
