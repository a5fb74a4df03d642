"""Settings of fine-tuning: those of the weights, recipes, overrides, and what has no effect."""

from pathlib import Path

import pytest
from finetune_support import small_config

from pera_fast import cli
from pera_fast.config import Config, load_config, recipe_names, to_yaml
from pera_fast.config.finetune import USED, check_finetune, head_name, input_size, load_finetune
from pera_fast.config.keys import KEYS
from pera_fast.config.load import finetune_recipe_names
from pera_fast.errors import UserError


def test_settings_of_the_weights_hold() -> None:
    base = small_config(["data.bands=[4,3,2,8]", "data.band_range=[[0,3000]]", "data.depth=16", "train.epochs=7"])
    cfg = load_finetune(base, "segmentation", "authors", ["finetune.size=32"])
    assert (cfg.model.embed_dim, cfg.model.in_chans, cfg.views.global_size) == (16, 4, 16)
    assert (cfg.data.bands, cfg.data.band_range, cfg.data.depth) == ([4, 3, 2, 8], [[0, 3000]], "16")
    assert (cfg.views.mean, cfg.views.std) == (base.views.mean, base.views.std)
    assert (cfg.recipe, cfg.train.epochs, cfg.optim.lr, cfg.optim.clip) == ("authors", 100, 1e-4, 10)
    assert (input_size(cfg), head_name(cfg), cfg.finetune.layer_decay) == (32, "fpn", 1)
    assert load_finetune(base, "scene", "authors").finetune.size == 512
    assert input_size(load_finetune(base, "scene")) == 16


def test_what_follows_from_what_is_given() -> None:
    cfg = load_finetune(small_config(), "scene", "finetune", ["train.epochs=10", "optim.weight_decay=0.3"])
    assert (cfg.optim.warmup_epochs, cfg.optim.final_weight_decay) == (1, 0.3)
    assert load_finetune(small_config(), "scene", precision="fp32").train.precision == "fp32"
    assert (
        load_finetune(small_config(), "scene", "finetune", ["train.precision=fp16"], "fp32").train.precision == "fp16"
    )


WRONG = {
    "loss.koleo_weight=1": "loss.koleo_weight=1.0: has no effect in a fine-tuning; leave it out",
    "views.num_local=2": "views.num_local=2: has no effect in a fine-tuning; leave it out",
    "eval.every=2": "eval.every=2: has no effect in a fine-tuning; leave it out",
    "model.depth=4": "model.depth=4: comes from the weights; leave it out",
    "views.global_size=32": "views.global_size=32: comes from the weights; finetune.size is the network's input",
    "finetune.task=scene": "finetune.task=scene: is given by --task; leave it out",
    "finetune.size=18": "finetune.size=18: must be a multiple of the weights' patch size 4; nearest: 16 or 20",
    "finetune.head=fpn": "finetune.head=fpn: does not go with --task scene; allowed: auto | linear | mlp",
    "finetune.haed=mlp": "finetune.haed=mlp: no such key; did you mean finetune.head?",
    "finetune.labels=0": "finetune.labels=0.0: wants a number (above 0, at most 1)",
    "data.bands=[1,2]": "data.bands=[1,2]: the weights were trained on 3 band(s); name as many",
}


LISTED = ("loss.koleo_weight=1", "model.depth=4", "finetune.size=18", "finetune.head=fpn", "data.bands=[1,2]")


@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_setting_gets_one_line(given: str) -> None:
    with pytest.raises(UserError) as caught:
        load_finetune(small_config(), "scene", "finetune", [given])
    assert str(caught.value) == WRONG[given]
    page = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8").replace("\\|", "|")
    assert given not in LISTED or WRONG[given] in page


def test_recipes_of_the_other_command_are_refused(tmp_path: Path) -> None:
    assert finetune_recipe_names() == ["authors", "finetune"]
    assert not set(finetune_recipe_names()) & set(recipe_names())
    with pytest.raises(
        UserError, match=r"^--recipe finetune: is a recipe of `pera-fast finetune`; recipes of pretrain"
    ):
        load_config("finetune")
    with pytest.raises(
        UserError, match=r"^--recipe tiny: is a recipe of `pera-fast pretrain`; here: authors, finetune$"
    ):
        check_finetune("tiny", [])
    with pytest.raises(UserError, match=r"^finetune.size=8: is of `pera-fast finetune` alone; leave it out$"):
        load_config("tiny", ["finetune.size=8"])
    path = tmp_path / "my.yaml"
    path.write_text("recipe: tiny\nfinetune: {size: 8}\n")
    with pytest.raises(UserError, match=r"my.yaml: finetune.size=8: is of `pera-fast finetune` alone"):
        load_config(path)
    with pytest.raises(UserError, match=r"my.yaml: recipe: tiny: is a recipe of `pera-fast pretrain`; known here: "):
        check_finetune(path, [])
    path.write_text("recipe: authors\nloss: {pixel_weight: 2}\n")
    with pytest.raises(UserError, match=r"my.yaml: loss.pixel_weight=2.0: has no effect in a fine-tuning"):
        check_finetune(path, [])
    with pytest.raises(UserError, match=r"my.yaml: recipe: authors: is a recipe of `pera-fast finetune`"):
        load_config(path)


@pytest.mark.parametrize("recipe", ["finetune", "authors"])
def test_the_listing_is_a_recipe_file(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "--recipe", recipe, "train.epochs=9"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "my.yaml").write_text(text)
    base = small_config()
    cfg = load_finetune(base, "change", tmp_path / "my.yaml")
    assert cfg == load_finetune(base, "change", recipe, ["train.epochs=9"])
    assert set(USED) < set(KEYS)
    for key in USED:
        assert f"\n  {key.partition('.')[2]}: " in text
    assert "koleo" not in text
    assert "views.mean" not in text


def test_a_runs_settings_are_a_recipe_for_other_weights(tmp_path: Path) -> None:
    cfg = load_finetune(small_config(), "scene", "authors", ["finetune.size=32", "train.epochs=3"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    other = small_config(["model.in_chans=2", "data.depth=16"])
    again = load_finetune(other, "change", tmp_path / "config.yaml")
    assert (again.finetune.size, again.train.epochs, again.recipe) == (32, 3, "authors")
    assert (again.model.in_chans, again.views.mean, again.finetune.task) == (2, [0.5, 0.5], "change")
    assert "finetune" not in to_yaml(Config())
