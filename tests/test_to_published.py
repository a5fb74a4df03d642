"""The way back to the authors' form of a checkpoint."""

import math
from pathlib import Path

import pytest
import torch
from train_support import small_config

from pera_fast import cli
from pera_fast.config import to_yaml
from pera_fast.errors import UserError
from pera_fast.interop.published import convert
from pera_fast.interop.to_published import convert_back
from pera_fast.model.pera import PerA
from pera_fast.train.optim import make_optimizer
from pera_fast.weights.files import load_safetensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PerA, torch.optim.AdamW]:
    """A checkpoint with AdamW's moments, as `train.checkpoint` has it."""
    cfg = small_config()
    model = PerA(cfg)
    optimizer = make_optimizer(model.parameters(), cfg)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step()
    path = tmp_path_factory.mktemp("back") / "step_00000012.pt"
    numbers = {"format": 1, "step": 12, "position": 12, "images": 22, "total_batch": 4, "devices": 1}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "config": to_yaml(cfg)}
    torch.save({**numbers, "recipe": "tiny", "data": "", "nonfinite": {"total": 0, "row": 0}, **state}, path)
    return path, model, optimizer


def test_there_and_back_is_exact(checkpoint: tuple[Path, PerA, torch.optim.AdamW], tmp_path: Path) -> None:
    path, model, _ = checkpoint
    back = convert_back(path, tmp_path / "a.params")
    assert (back.epoch, back.optimizer) == (2, True)  # 12 steps of 5 an epoch
    there = convert(back.path, tmp_path / "out", num_heads=2)
    state = {name: value for name, value in model.state_dict().items() if name != "center"}
    found, _ = load_safetensors(there.weights)
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    again = convert_back(there.weights, tmp_path / "b.params")
    assert not again.optimizer
    first, second = (torch.load(file, weights_only=True)["model"] for file in (back.path, again.path))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_authors_sequence_of_loading_works(
    checkpoint: tuple[Path, PerA, torch.optim.AdamW], tmp_path: Path
) -> None:
    """Model by name, AdamW over all parameters in their order with our moments, GradScaler, best loss."""
    path, model, optimizer = checkpoint
    stored = torch.load(convert_back(path, tmp_path / "a.params").path, weights_only=True)
    names = list(stored["model"])
    assert names[0] == "s_mask_token"
    assert [name.split(".")[0] for name in names] == sorted(
        (name.split(".")[0] for name in names), key=["s_mask_token", "pred_head", "student", "teacher"].index
    )
    parameters = [torch.nn.Parameter(value.clone()) for value in stored["model"].values()]
    theirs = torch.optim.AdamW([{"params": parameters}], lr=1e-4)
    theirs.load_state_dict(stored["optimizer"])
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in zip(names, parameters, strict=True):
        assert (parameter in theirs.state) == (name in ours)
        for key in ("exp_avg", "exp_avg_sq") if name in ours else ():
            assert torch.equal(theirs.state[parameter][key], optimizer.state[ours[name]][key])
    torch.amp.GradScaler("cpu").load_state_dict(stored["scaler"])
    assert stored["best_loss"] == math.inf


def test_wrong_files_get_a_line(
    checkpoint: tuple[Path, PerA, torch.optim.AdamW], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, _ = checkpoint
    there = convert(path, tmp_path / "out")
    with pytest.raises(UserError, match=r"has no s_mask_token; the authors' form wants student, teacher and heads"):
        convert_back(there.teacher, tmp_path / "x.params")
    four = PerA(small_config("model.in_chans=4"))
    torch.save({"model": four.state_dict()}, tmp_path / "four.pt")
    with pytest.raises(UserError, match="is of 4 channels, and the authors' code takes three only"):
        convert_back(tmp_path / "four.pt", tmp_path / "x.params")
    words = f"convert {path} --out {tmp_path}/x.params"
    assert cli.run(words.split()) == 0
    assert "AdamW's moments, " not in capsys.readouterr().err
    assert cli.run(words.split()) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run([*words.split(), "--heads", "2", "--overwrite"]) == 2
    assert "--heads 2: has no effect" in capsys.readouterr().err
