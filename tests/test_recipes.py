"""Recipes: files, their listing, and a run's length that stretches the warm-ups."""

from pathlib import Path

import pytest

import pera_fast
from pera_fast import cli
from pera_fast.config import from_yaml, load_config, recipe_names, to_yaml
from pera_fast.config.keys import KEYS
from pera_fast.config.listing import meanings
from pera_fast.errors import UserError
from pera_fast.train.schedules import make_schedules


@pytest.mark.parametrize("steps", [None, 300])
def test_epochs_stretch_the_warm_ups_as_steps_do(steps: int | None) -> None:
    more = [] if steps is None else [f"train.steps={steps}"]
    cfg = load_config("vit_b16", ["train.epochs=20", *more])
    assert (cfg.optim.warmup_epochs, cfg.optim.teacher_temp_warmup_epochs) == (2, 3)
    schedules = make_schedules(cfg, steps_per_epoch=15)
    assert (schedules.steps, schedules.lr_warmup, schedules.temp_warmup) == (300, 30, 45)
    said = "warm-ups of 300 steps: learning rate 30 (10%), teacher temperature 45 (15%)"
    assert str(schedules) == f"{said}; train.steps and train.epochs stretch them"


def test_a_warm_up_that_is_given_stays() -> None:
    cfg = load_config("vit_b16", ["train.epochs=20", "optim.warmup_epochs=5"])
    assert (cfg.optim.warmup_epochs, cfg.optim.teacher_temp_warmup_epochs) == (5, 3)
    with pytest.raises(UserError, match=r"optim.warmup_epochs=30.0: is longer than train.epochs=20"):
        load_config("vit_b16", ["train.epochs=20", "optim.warmup_epochs=30"])


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "recipe: vit_s16\nmodel: {prototypes: 64}\ntrain: {epochs: 50}\ndata: {bands: [4, 3, 2, 8], depth: 8}\n"
    )
    cfg = load_config(path, ["train.seed=3"])
    same = ["model.prototypes=64", "train.epochs=50", "data.bands=[4,3,2,8]", "data.depth=8", "train.seed=3"]
    assert cfg == load_config("vit_s16", same)
    assert (cfg.recipe, cfg.model.in_chans, cfg.optim.warmup_epochs) == ("vit_s16", 4, 5)
    assert load_config(path, ["data.bands=[1,2,3]"]).views.mean == load_config().views.mean
    path.write_text("")
    assert load_config(path) == load_config("vit_b16")


@pytest.mark.parametrize("recipe", ["tiny", "vit_g16"])
def test_a_runs_settings_are_a_recipe(recipe: str, tmp_path: Path) -> None:
    cfg = load_config(recipe, ["model.in_chans=5", "data.band_range=[[0,1e-7]]", "data.depth=16", "train.steps=9"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path / "config.yaml") == cfg == from_yaml(to_yaml(cfg))
    wider = load_config(tmp_path / "config.yaml", ["model.in_chans=6", "data.band_range=null", "data.band_scale=auto"])
    assert len(wider.views.mean) == len(wider.views.std) == 6


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_listing_has_every_key_and_is_a_recipe_file(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train.epochs=10", "data.depth=8", 'data.bands=[red,"4 x",8]']
    assert cli.run(["config", "--recipe", recipe, *overrides]) == 0
    text = capsys.readouterr().out
    (tmp_path / "my.yaml").write_text(text)
    assert load_config(tmp_path / "my.yaml") == load_config(recipe, overrides)
    words = " ".join(text.replace("#", " ").split())
    for key, meaning in ((key, meaning) for key, meaning in meanings().items() if not key.startswith("finetune.")):
        assert f" {key.partition('.')[2]}: " in words
        assert " ".join(meaning.rstrip(".").split()) in words
    assert len(meanings()) == len(KEYS)
    assert "batch_size: 16" in words
    assert "Allowed: bf16 | fp16 | fp32" in words


BAD = {
    "train: {stepz: 4}": "my.yaml: train.stepz=4: no such key; did you mean train.steps?",
    "train: {steps: 0}": "train.steps=0: wants a whole number (at least 1) or null",
    "trian: {steps: 4}": "my.yaml: trian: no such section; did you mean train?",
    "recipe: vit_b61": "my.yaml: recipe: vit_b61: no such recipe; known: tiny, vit_b16, vit_g16, vit_l16, vit_s16;"
    " did you mean vit_b16?",
    "train: [": "my.yaml: not a configuration: ",
    "- 3": "my.yaml: not a configuration: wants sections model, views, loss, optim, train, data",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_gets_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text)
    assert cli.run(["config", "--recipe", "my.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {BAD[text]}")
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as caught:
            pera_fast.pretrain(data=tmp_path, out=tmp_path / "out", recipe=str(path))
        assert str(caught.value) == f"--recipe {path}: cannot be read ({why}); give a recipe's name or a YAML file"
    assert not (tmp_path / "out").exists()
