"""The points of a profile, and the messages to wrong arguments."""

import json
from pathlib import Path

import pytest

from pera_fast import cli
from pera_fast.errors import UserError
from pera_fast.profile.points import RATIOS, Point, Variant, parse_batch_sizes, parse_choices, plan


def test_pictures_say_what_the_words_of_a_name_are():
    labels = [variant.label() for variant in plan(["tiny"], [], policies=["none"])]
    assert labels == ["tiny, masks 0.2/0.6, recompute none", "tiny, no masks, recompute none"]


def names(*args, **kwargs) -> list[str]:
    return [variant.name() for variant in plan(*args, **kwargs)]


def test_policies_and_dense_masking() -> None:
    assert names(["tiny"], []) == [
        "tiny 0.2/0.6 none", "tiny 0.2/0.6 cheap", "tiny 0.2/0.6 block", "tiny dense none"
    ]  # fmt: skip
    assert names(["tiny"], [], policies=["block"], dense=False) == ["tiny 0.2/0.6 block"]
    assert names(["tiny"], [], policies=["block"])[-1] == "tiny dense block"
    assert names(["tiny", "vit_s16"], [], policies=["none"], dense=False) == [
        "tiny 0.2/0.6 none", "vit_s16 0.2/0.6 none"
    ]  # fmt: skip


def test_what_an_override_fixes_is_not_varied() -> None:
    assert names(["tiny"], ["model.recompute=block"]) == ["tiny 0.2/0.6 block", "tiny dense block"]
    assert names(["tiny"], ["model.recompute=block", "model.masking=grid"]) == ["tiny 0.2/0.6 grid block"]
    assert names(["tiny"], ["model.recompute=none", "model.masking=none"]) == ["tiny dense none"]


def test_mask_ratios() -> None:
    swept = plan(["tiny"], ["model.recompute=none"], dense=False, ratios=True)
    assert len(swept) == len(RATIOS), "each once; the recipe's own is there as its policy"
    assert len({variant.name() for variant in swept}) == len(RATIOS)
    assert {v.purpose for v in swept[1:]} == {"ratios"}


def test_a_point_survives_json() -> None:
    point = Point(Variant("tiny", ("model.depth=2",), "dense"), 8, "cpu", status="ok", at_peak={"weights": 3})
    assert Point.from_json(json.loads(json.dumps(point.to_json()))) == point


def test_lists_on_the_command_line() -> None:
    assert parse_batch_sizes("32,8, 16,8") == [8, 16, 32]
    assert parse_choices("--policies", "block,none", ("none", "cheap", "block")) == ["block", "none"]
    assert parse_choices("--policies", None, ("none",)) is None


MESSAGES = {
    "--batch-sizes 8,x": "--batch-sizes 8,x: must be whole numbers of at least 1, such as 8,16,32",
    "--batch-sizes 0,8": "--batch-sizes 0,8: must be whole numbers of at least 1, such as 8,16,32",
    "--policies some": "--policies some: no such choice 'some'; allowed: none, cheap, block; did you mean none?",
    "--device tpu": "--device tpu: no such device; allowed: auto, simulate, cuda, cpu; did you mean cpu?",
    "train.batch_size=8": "train.batch_size: give --batch-sizes instead",
    "train.device=cpu": "train.device: give --device instead",
    "--out notes.txt": "--out notes.txt: is a file; give a folder",
    "--recipe vit_b61": "--recipe vit_b61: no such recipe; known: tiny, vit_b16, vit_g16, vit_l16, vit_s16;"
    " did you mean vit_b16?",
    "model.dept=3": "model.dept=3: no such key; did you mean model.depth?",
    "trace --device simulate": "--device simulate: a trace is of real steps; allowed: auto, cuda, cpu",
}


@pytest.mark.parametrize("arguments", MESSAGES)
def test_wrong_input_is_one_line_and_2(arguments: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    line = ["profile", *arguments.split()]
    line += [] if "--out" in line else ["--out", "out"]
    line += [] if "--recipe" in line else ["--recipe", "tiny"]
    assert cli.run(line) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {MESSAGES[arguments]}\n"
    assert captured.out == ""


def test_messages_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
    for message in MESSAGES.values():
        if message.startswith(("--batch-sizes 8", "--policies", "--device", "train.")):
            assert message in page


def test_cuda_without_a_gpu(tmp_path: Path, capsys, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command, other in (([], "simulate"), (["trace"], "cpu")):
        assert cli.run(["profile", *command, "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"error: --device cuda: torch sees no GPU; --device {other} needs none\n"


def test_both_commands_have_help(capsys) -> None:
    assert cli.run(["profile", "--help"]) == 0
    assert "--batch-sizes" in capsys.readouterr().out
    assert cli.run(["profile", "trace", "--help"]) == 0
    assert "trace.json.gz" in capsys.readouterr().out


def test_wrong_settings_are_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.student_ratio"):
        Variant("tiny", ("model.student_ratio=0.9",)).config(8)
    assert cli.run(["profile", "--recipe", "tiny", "--out", str(tmp_path / "out"), "model.student_ratio=0.9"]) == 2
    assert not (tmp_path / "out").exists()
