"""The run folder's rules for starting and resuming, and the messages to the user."""

import json
from pathlib import Path

import pytest
import torch
from train_support import flip_middle, state

from pera_fast.config import load_config, to_yaml
from pera_fast.errors import UserError
from pera_fast.train.checkpoint import checkpoint_path
from pera_fast.train.run_folder import (
    RunFolder,
    change_notes,
    check_resumed_batch,
    continue_config,
    resumed_position,
    start_auto,
    start_new,
    start_resumed,
)

RECIPE = ["train.steps=8", "model.depth=2"]


@pytest.fixture
def held(tmp_path: Path) -> RunFolder:
    """A folder that holds a run with a checkpoint of step 4."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    cfg = load_config("tiny", RECIPE)
    folder.write_config(cfg, cfg)
    torch.save(state(4, config=to_yaml(cfg), total_batch=16), checkpoint_path(folder.checkpoints, 4))
    return folder


def line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_new_run(tmp_path: Path):
    folder = RunFolder(tmp_path / "a" / "b")
    assert start_new(folder, "tiny", RECIPE).cfg.model.depth == 2
    folder.make()
    assert folder.root.is_dir()
    assert list(folder.root.iterdir()) == []


def test_folder_holds_another_run(held: RunFolder):
    with pytest.raises(UserError) as error:
        start_new(held, "tiny", RECIPE)
    assert str(held.root) in line(error)
    assert "--resume" in line(error)


def test_out_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        start_new(RunFolder(tmp_path / "file"), "tiny", [])


@pytest.mark.parametrize("out", ["file/below", "/proc/pera"])
def test_out_cannot_be_written(tmp_path: Path, out: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path / out).make()
    assert "cannot write there" in line(error)


@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_resume(tmp_path: Path, there: bool):
    folder = RunFolder(tmp_path / "run")
    if there:
        folder.make()
    with pytest.raises(UserError) as error:
        start_resumed(folder, "tiny", [])
    assert "no run to resume" in line(error)


def test_resume_keeps_the_runs_own_configuration(held: RunFolder):
    start = start_resumed(held, "tiny", [])
    assert (start.step, start.cfg.train.steps, start.cfg.model.depth) == (4, 8, 2)
    assert "step_00000004.pt" in start.notes[0]
    assert len(start.notes) == 1
    assert start_resumed(held, None, []).cfg == start.cfg


def test_auto_begins_and_goes_on_with_the_same_settings(tmp_path: Path, held: RunFolder):
    new = start_auto(RunFolder(tmp_path / "new"), "tiny", RECIPE)
    assert (new.resumed, new.step) == (False, 0)
    again = start_auto(held, "tiny", [*RECIPE, "data.loader_threads=3"])  # harmless
    assert (again.resumed, again.step, again.cfg.data.loader_threads) == (True, 4, 3)
    assert again.notes == [f"resuming from {checkpoint_path(held.checkpoints, 4)}"]


@pytest.mark.parametrize("settings", [["train.steps=9", "model.depth=2"], ["model.depth=2"], [*RECIPE, "train.seed=4"]])
def test_auto_refuses_other_settings(held: RunFolder, settings: list[str]):
    with pytest.raises(UserError) as error:
        start_auto(held, "tiny", settings)
    assert ("train.seed=4 (was 0)" if "train.seed=4" in settings else "train.steps=") in line(error)
    assert "another --out" in line(error)
    with pytest.raises(UserError, match="recipe=vit_s16"):
        start_auto(held, "vit_s16", RECIPE)


def test_auto_compares_what_was_asked_for_not_what_the_data_decided(held: RunFolder):
    asked = load_config("tiny", RECIPE)
    decided = asked.with_values({"data.depth": "16", "data.band_range": [[0.0, 10000.0]]})
    held.write_config(decided, asked)
    torch.save(state(4, config=to_yaml(decided), total_batch=16), checkpoint_path(held.checkpoints, 4))
    start = start_auto(held, "tiny", RECIPE)
    assert (start.cfg.data.depth, start.cfg.data.band_range) == ("16", [[0.0, 10000.0]])
    assert start.asked == asked
    with pytest.raises(UserError, match=r"data\.depth=16 \(was auto\)"):
        start_auto(held, "tiny", [*RECIPE, "data.depth=16"])


def test_what_is_changed_on_resuming_is_asked_for_from_then_on(held: RunFolder):
    start = start_resumed(held, None, ["train.steps=12"])
    held.write_config(start.cfg, start.asked)
    torch.save(state(4, config=to_yaml(start.cfg), total_batch=16), checkpoint_path(held.checkpoints, 4))
    assert start_auto(held, "tiny", ["train.steps=12", "model.depth=2"]).resumed
    with pytest.raises(UserError, match=r"train\.steps=8 \(was 12\)"):
        start_auto(held, "tiny", RECIPE)


def test_what_was_changed_on_resuming_outlives_a_kill_before_the_next_checkpoint(held: RunFolder):
    start = start_resumed(held, None, ["train.steps=12"])
    held.write_config(start.cfg, start.asked)  # and killed: the newest checkpoint still says 8
    assert start_auto(held, "tiny", ["train.steps=12", "model.depth=2"]).cfg.train.steps == 12


def test_resume_of_a_run_that_ended_before_its_first_checkpoint(held: RunFolder):
    checkpoint_path(held.checkpoints, 4).unlink()
    start = start_resumed(held, "tiny", [])
    assert (start.step, start.checkpoint, start.cfg.model.depth) == (0, None, 2)
    assert "no checkpoint yet" in start.notes[0]


def test_resume_with_harmless_changes(held: RunFolder):
    given = ["data.loader_threads=1", "train.checkpoint_every=3", "train.accumulate=2", "train.loggers=[wandb]"]
    start = start_resumed(held, "tiny", given)
    assert start.cfg.train.loggers == ["wandb"]
    assert (start.cfg.data.loader_threads, start.cfg.train.checkpoint_every, start.cfg.train.accumulate) == (1, 3, 2)
    assert len(start.notes) == 1


@pytest.mark.parametrize("change", ["train.steps=12", "train.precision=bf16"])
def test_resume_with_a_change_that_is_noted(held: RunFolder, change: str):
    start = start_resumed(held, "tiny", [change])
    assert list(start.changed) == [change.partition("=")[0]]


@pytest.mark.parametrize(
    "change",
    ["model.depth=3", "model.embed_dim=96", "loss.koleo_weight=0", "optim.lr=0.1", "train.seed=1", "views.hflip=0"],
)
def test_resume_refuses_what_would_be_another_run(held: RunFolder, change: str):
    with pytest.raises(UserError) as error:
        start_resumed(held, "tiny", [change, "train.checkpoint_every=3"])
    assert change.split("=")[0] in line(error)
    assert "checkpoint_every" not in line(error)


def test_resume_with_another_recipe_lists_the_keys(held: RunFolder):
    with pytest.raises(UserError) as error:
        start_resumed(held, "vit_s16", [])
    message = line(error)
    assert "recipe tiny, not vit_s16" in message
    assert f"model.embed_dim=384 (was {load_config('tiny', []).model.embed_dim})" in message
    assert "model.depth=12 (was 2)" in message


def test_resume_takes_no_recipe_file(held: RunFolder):
    """Its keys would be taken for changes, or passed over; --resume auto compares them all."""
    with pytest.raises(UserError) as error:
        start_resumed(held, str(held.config), [])
    why = "a run goes on with its own settings; leave --recipe out, or give --resume auto"
    assert line(error) == f"--resume with --recipe {held.config}: {why}"


def test_resume_from_a_damaged_checkpoint(held: RunFolder):
    flip_middle(checkpoint_path(held.checkpoints, 4))
    with pytest.raises(UserError) as error:
        start_resumed(held, "tiny", [])
    assert "step_00000004.pt: damaged checkpoint" in line(error)


def test_resume_with_another_total_batch(held: RunFolder):
    start = start_resumed(held, "tiny", [])
    assert start.checkpoint is not None
    check_resumed_batch(start.checkpoint, 16, 1)
    with pytest.raises(UserError, match=r"train\.total_batch_size=16"):
        check_resumed_batch(start.checkpoint, 32, 1)
    start.checkpoint["devices"] = 1
    with pytest.raises(UserError, match=r"train\.total_batch_size=16"):
        check_resumed_batch(start.checkpoint, 32, 1)
    check_resumed_batch(start.checkpoint, 32, 2)


def test_position_on_as_many_devices_and_on_others():
    """100 images, 4 a step: 25 steps an epoch; stopped in epoch 2."""
    stopped = state(57, total_batch=4, images=100, devices=2)
    assert resumed_position(stopped, 4, 2, 100) == (57, "")
    position, note = resumed_position(stopped, 4, 4, 100)
    assert position == 57
    assert note == "4 device(s) instead of 2, the same total batch: the epoch goes on with the same images"
    position, note = resumed_position(stopped, 8, 4, 100)
    assert position == 2 * 12
    assert note == (
        "4 device(s) instead of 2: a step takes 8 images instead of 4; epoch 2 restarts from its beginning"
        " (train.total_batch_size=4 would go on within it)"
    )
    again = state(58, total_batch=8, images=100, devices=4, position=25)  # one step later
    assert resumed_position(again, 8, 4, 100) == (25, "")
    assert resumed_position(again, 2, 1, 100)[0] == 2 * 50
    assert resumed_position(state(57, total_batch=4, images=100), 4, 2, 100) == (57, ""), "written before it was kept"


def test_two_processes_do_not_train_in_one_folder(held: RunFolder):
    with held.locked():
        with pytest.raises(UserError) as error, RunFolder(held.root).locked():
            pass
        assert "another process is training there" in line(error)
    with RunFolder(held.root).locked():
        pass


def test_metrics_are_cut_after_the_checkpoint(held: RunFolder):
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in range(1, 7)]
    held.metrics.write_text("\n".join(lines) + '\n{"step": 7, "lo')  # killed in the middle of a line
    held.cut_metrics(4)
    assert held.metrics.read_text() == "\n".join(lines[:4]) + "\n"


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (["train.epochs=21"], ["train.epochs=21 has no effect: train.steps=12 is the length of the run"]),
        (["train.cuda_graph=false"], ["train.cuda_graph=false has no effect: the run is on a CPU"]),
        (["train.device=cpu"], ["train.device=cpu has no effect: there is no GPU"]),
        (["train.steps=24", "data.decode_on=cpu"], ["train.steps=24 (was 12)", "data.decode_on=cpu has no effect"]),
        (["train.steps=12"], []),
    ],
)
def test_notes_on_resuming_say_what_has_an_effect(overrides: list[str], notes: list[str]):
    saved = load_config("tiny", ["train.steps=12"])
    cfg, changed = continue_config(saved, None, overrides, "RUN")
    told = change_notes(changed, cfg, "cpu", has_gpu=False)
    assert len(told) == len(notes)
    assert all(note in line for note, line in zip(notes, told, strict=True))
    assert all("not the run that it would have been" not in line or "train.steps" in line for line in told)
