"""Configuration: recipes against docs/method.md, every message about bad input, round trips."""

import math
import re
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.config import (
    BatchPlan,
    Config,
    ModelConfig,
    TrainConfig,
    check,
    differences,
    from_yaml,
    load_config,
    recipe_names,
    to_yaml,
)
from pera_fast.config.keys import KEYS, SECTIONS, kind, show
from pera_fast.errors import UserError


def message(*overrides: str, recipe: str = "vit_b16") -> str:
    """The one line that these overrides give."""
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# docs/method.md sections 2 to 6, written out again: a recipe that drifts from it must fail here.
PUBLISHED = {
    "model.patch_size": 16,
    "model.mlp_ratio": 4,
    "model.drop_path": 0.3,
    "model.in_chans": 3,
    "model.head_hidden": 2048,
    "model.bottleneck": 384,
    "model.prototypes": 131072,
    "model.masking": "random",
    "model.student_ratio": 0.2,
    "model.teacher_ratio": 0.6,
    "views.num_global": 2,
    "views.num_local": 8,
    "views.global_size": 448,
    "views.local_size": 96,
    "views.global_scale": [0.4, 1.0],
    "views.local_scale": [0.05, 0.4],
    "views.aspect": [0.75, 1.33],
    "views.hflip": 0.5,
    "views.vflip": 0.5,
    "views.student_color": 0.8,
    "views.student_gray": 0.1,
    "views.teacher_color": 0.1,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.2,
    "views.hue": 0.1,
    "views.mean": [0.485, 0.456, 0.406],
    "views.std": [0.229, 0.224, 0.225],
    "loss.student_temp": 0.1,
    "loss.center_momentum": 0.9,
    "loss.centering": "center",
    "loss.koleo_weight": 0.1,
    "loss.koleo_on": "logits",
    "loss.pixel_weight": 0.01,
    "optim.lr": 1e-3,
    "optim.warmup_lr": 0,
    "optim.final_lr": 1e-6,
    "optim.warmup_epochs": 20,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.2,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 2e-5,
    "optim.clip": 3.0,
    "optim.final_teacher_momentum": 1.0,
    "optim.teacher_temp_warmup_epochs": 30,
    "train.epochs": 200,
    "train.batch_size": 16,
    "train.precision": "bf16",
}
NETWORKS = {  # width, depth, heads, teacher momentum, teacher temperatures
    "vit_s16": (384, 12, 6, 0.992, 0.03, 0.05),
    "vit_b16": (768, 12, 12, 0.992, 0.03, 0.05),
    "vit_l16": (1024, 24, 16, 0.992, 0.03, 0.05),
    "vit_g16": (1024, 40, 16, 0.998, 0.02, 0.03),
}


def value(cfg: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


@pytest.mark.parametrize("recipe", NETWORKS)
def test_recipe_is_the_published_one(recipe):
    cfg = load_config(recipe, [])
    assert cfg.recipe == recipe
    assert {key: value(cfg, key) for key in PUBLISHED} == PUBLISHED
    names = ("model.embed_dim", "model.depth", "model.num_heads", "optim.teacher_momentum")
    names += ("optim.warmup_teacher_temp", "optim.teacher_temp")
    assert tuple(value(cfg, name) for name in names) == NETWORKS[recipe]


def test_patch_counts_are_the_published_ones():
    model = load_config("vit_b16").model
    assert model.patch_counts(28**2) == (157, 157, 470)
    assert model.patch_counts(6**2) == (7, 7, 22)  # the 7 between are nobody's in a local crop


@given(st.integers(1, 900), st.floats(0.001, 0.999), st.floats(0, 1))
def test_patch_counts_partition_the_crop(patches, student_ratio, rest):
    model = ModelConfig(student_ratio=student_ratio, teacher_ratio=max((1 - student_ratio) * rest, 1e-6))
    counts = model.patch_counts(patches)
    assert sum(counts) == patches
    assert min(counts) >= 0


def test_ratios_that_sum_to_one_leave_nothing_between():
    for tenths in range(1, 10):
        model = ModelConfig(student_ratio=tenths / 10, teacher_ratio=1 - tenths / 10)
        for patches in range(1, 300):
            assert model.patch_counts(patches)[1] <= 1  # the two roundings may differ by one, never overlap


def test_there_are_five_recipes_and_tiny_is_tiny():
    assert recipe_names() == ["tiny", "vit_b16", "vit_g16", "vit_l16", "vit_s16"]
    tiny = load_config("tiny", [])
    assert tiny.train.precision == "fp32"
    assert tiny.model.prototypes <= 4096
    assert tiny.model.embed_dim <= 192


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stepss=60", "train.stepss=60: no such key; did you mean train.steps?"),
        ("batch_size=4", "batch_size=4: no such key; did you mean train.batch_size?"),
        ("training.batch_size=4", "training.batch_size=4: no such key; did you mean train.batch_size?"),
        ("model.batch_size=4", "model.batch_size=4: no such key; did you mean train.batch_size?"),
        ("zzz.qqq=1", "zzz.qqq=1: no such key; sections: model, views, loss, optim, train, data, eval, finetune"),
        ("recipe=tiny", "recipe=tiny: choose a recipe with --recipe tiny"),
        (
            "train.steps",
            "train.steps: not an override; write section.key=value, such as train.steps=60; did you mean"
            " train.steps=...?",
        ),
        ("train.steps=abc", "train.steps=abc: wants a whole number (at least 1) or null"),
        ("train.steps=1.5", "train.steps=1.5: wants a whole number (at least 1) or null"),
        ("train.steps=0", "train.steps=0: wants a whole number (at least 1) or null"),
        ("train.steps=[1]", "train.steps=[1]: wants a whole number (at least 1) or null"),
        ("train.epochs=null", "train.epochs=null: wants a whole number (at least 1)"),
        ("train.epochs=", "train.epochs=: has no value; wants a whole number (at least 1)"),
        (
            "train.steps=",
            "train.steps=: has no value; for none write train.steps=null; wants a whole number (at least 1) or null",
        ),
        ("data.index= ", "data.index=: has no value; for none write data.index=null; wants a text or null"),
        ("train.compile=3", "train.compile=3: wants true or false"),
        ("train.precision=16", "train.precision=16: allowed: bf16 | fp16 | fp32; did you mean fp16?"),
        ("train.seed=-1", "train.seed=-1: wants a whole number (at least 0, at most 9223372036854775807)"),
        ("optim.lr=true", "optim.lr=true: wants a number (at least 0)"),
        ("optim.lr=.nan", "optim.lr=nan: wants a number (at least 0), and finite"),
        ("optim.lr=.inf", "optim.lr=inf: wants a number (at least 0), and finite"),
        ("optim.lr=${optim.eps}", "optim.lr=${optim.eps}: wants a number (at least 0)"),
        ("optim.lr=???", "optim.lr=???: wants a number (at least 0)"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: wants two numbers such as [0.9,0.999]"),
        (
            "optim.betas=[0.9,1]",
            "optim.betas=[0.9,1.0]: wants a list of numbers such as [0.5,0.5] (at least 0, below 1)",
        ),
        (
            "optim.warmup_epochs=300",
            "optim.warmup_epochs=300.0: is longer than train.epochs=200; allowed: at most that",
        ),
        ("views.hflip=1.5", "views.hflip=1.5: wants a number (at least 0, at most 1)"),
        ("views.num_local=-1", "views.num_local=-1: wants a whole number (at least 0)"),
        ("views.num_global=0", "views.num_global=0: wants a whole number (at least 1)"),
        ("views.aspect=[2,1]", "views.aspect=[2.0,1.0]: wants two numbers [smallest,largest]"),
        ("views.local_scale=[0.1]", "views.local_scale=[0.1]: wants two numbers [smallest,largest]"),
        ("views.mean=[0.5,0.5]", "views.mean=[0.5,0.5]: has 2 numbers, wants one per channel: model.in_chans=3"),
        ("views.std=[0,1,1]", "views.std=[0.0,1.0,1.0]: wants a list of numbers such as [0.5,0.5] (above 0)"),
        ("views.mean=0.5,0.5", "views.mean=0.5,0.5: wants a list of numbers such as [0.5,0.5]"),
        ("views.mean=[0.5", "views.mean=[0.5: wants a list of numbers such as [0.5,0.5]"),
        ("views.mean=[a,b,c]", "views.mean=[a,b,c]: wants a list of numbers such as [0.5,0.5]"),
        (
            "views.global_size=450",
            "views.global_size=450: must be a multiple of model.patch_size=16; nearest: 448 or 464",
        ),
        ("model.patch_size=14", "views.local_size=96: must be a multiple of model.patch_size=14; nearest: 84 or 98"),
        ("views.local_size=10", "views.local_size=10: must be a multiple of model.patch_size=16; nearest: 16"),
        ("model.num_heads=5", "model.num_heads=5: must divide model.embed_dim=768; nearest that do: 2, 3, 4, 6"),
        ("model.depth=0", "model.depth=0: wants a whole number (at least 1)"),
        ("model.drop_path=1", "model.drop_path=1.0: wants a number (at least 0, below 1)"),
        (
            "model.masking=blok",
            "model.masking=blok: allowed: random | block | grid | none; did you mean block?",
        ),
        (
            "model.student_ratio=0.5",
            "model.student_ratio=0.5: with model.teacher_ratio=0.6 the sum is over 1, and the masks are disjoint;"
            " allowed: at most 0.4 (or model.masking=none, where both see everything)",
        ),
        (
            "model.student_ratio=0.01",
            "model.student_ratio=0.01: the student would see no patch of a local crop (36 patches: 0 student, 14"
            " between, 22 teacher); make this ratio or views.local_size=96 larger",
        ),
        (
            "model.teacher_ratio=0.01",
            "model.teacher_ratio=0.01: the teacher would see no patch of a local crop (36 patches: 7 student, 29"
            " between, 0 teacher); make this ratio or views.local_size=96 larger",
        ),
        ("train.batch_size=null", "train.batch_size=null: give train.batch_size or train.total_batch_size"),
        ("train.batch_size=0", "train.batch_size=0: wants a whole number (at least 1) or null"),
    ],
)
def test_bad_override_gets_this_line(override, line):
    assert message(override) == line


def test_a_section_is_not_a_key():
    assert message("model=3").startswith("model=3: model is a section; set one of its keys: model.patch_size, ")


def test_unknown_recipe_names_the_known_and_the_nearest():
    known = "tiny, vit_b16, vit_g16, vit_l16, vit_s16"
    assert message(recipe="vitb16") == f"--recipe vitb16: no such recipe; known: {known}; did you mean vit_b16?"
    assert message(recipe="../etc") == f"--recipe ../etc: no such recipe; known: {known}"


def test_a_message_stays_on_one_line_whatever_is_typed():
    assert "\n" not in message("train.steps=a\nb")
    assert "\n" not in message("a\nb=3")
    assert "\n" not in message("train.precision=a\nb")


def test_no_local_crops_need_no_local_size():
    assert load_config("vit_b16", ["views.num_local=0", "views.local_size=7"]).views.num_local == 0


def test_no_masking_shows_everything_to_both():
    model = load_config("vit_b16", ["model.masking=none"]).model
    assert (model.student_ratio, model.teacher_ratio) == (1.0, 1.0)
    assert model.patch_counts(784) == (784, 0, 784)
    text = message("model.masking=none", "model.student_ratio=0.4")
    assert text == (
        "model.student_ratio=0.4: model.masking=none shows every patch to both networks; allowed with it: 1.0"
    )


def test_mean_and_std_follow_the_channels_unless_given():
    views = load_config("vit_b16", ["model.in_chans=4"]).views
    assert (views.mean, views.std) == ([0.5] * 4, [0.25] * 4)
    views = load_config("vit_b16", ["model.in_chans=2", "views.mean=[0.1,0.2]"]).views
    assert (views.mean, views.std) == ([0.1, 0.2], [0.25] * 2)
    assert "views.mean=[1.0,1.0,1.0]: has 3 numbers" in message("model.in_chans=4", "views.mean=[1,1,1]")


@pytest.mark.parametrize("channels", ["0", "-2", "x", "null"])
def test_bad_channels_are_named(channels):
    assert message(f"model.in_chans={channels}").startswith(f"model.in_chans={channels}: wants a whole number")


@pytest.mark.parametrize(
    ("overrides", "world_size", "plan"),
    [
        ([], 8, BatchPlan(16, 1, 8, 128)),
        (["train.batch_size=24", "train.accumulate=2"], 8, BatchPlan(24, 2, 8, 384)),
        (["train.total_batch_size=64"], 4, BatchPlan(16, 1, 4, 64)),
        (["train.total_batch_size=64", "train.accumulate=2"], 4, BatchPlan(8, 2, 4, 64)),
        (["train.total_batch_size=64", "train.batch_size=8"], 2, BatchPlan(8, 4, 2, 64)),
        (["train.total_batch_size=64", "train.batch_size=8", "train.accumulate=4"], 2, BatchPlan(8, 4, 2, 64)),
        (["train.total_batch_size=null"], 2, BatchPlan(16, 1, 2, 32)),
    ],
)
def test_batch_is_given_per_device_or_in_total(overrides, world_size, plan):
    cfg = load_config("vit_b16", overrides)
    assert cfg.train.resolve_batch(world_size) == plan
    assert from_yaml(to_yaml(cfg)).train.resolve_batch(world_size) == plan  # a saved run means the same
    assert plan.per_device * plan.accumulate * plan.world_size == plan.total
    assert str(plan.total) in str(plan)
    assert str(plan.per_device) in str(plan)


@pytest.mark.parametrize(
    ("overrides", "world_size", "line"),
    [
        (
            ["train.total_batch_size=64"],
            3,
            "train.total_batch_size=64: must be a multiple of 3 (3 device(s) x 1 accumulated); nearest: 63 or 66",
        ),
        (
            ["train.total_batch_size=60", "train.batch_size=8"],
            2,
            "train.total_batch_size=60: must be a multiple of 16 (2 device(s) x batch_size 8); nearest: 48 or 64",
        ),
        (
            ["train.total_batch_size=2"],
            4,
            "train.total_batch_size=2: must be a multiple of 4 (4 device(s) x 1 accumulated); nearest: 4",
        ),
        (
            ["train.total_batch_size=60", "train.batch_size=8", "train.accumulate=3"],
            2,
            "train.total_batch_size=60: but train.batch_size=8 x 2 device(s) x train.accumulate=3 is 48; leave one of"
            " the three out",
        ),
    ],
)
def test_batch_that_does_not_divide_gets_this_line(overrides, world_size, line):
    cfg = load_config("vit_b16", overrides)
    with pytest.raises(UserError) as caught:
        cfg.train.resolve_batch(world_size)
    assert str(caught.value) == line


def test_the_last_of_equal_overrides_counts_and_text_is_verbatim():
    cfg = load_config("tiny", ["train.steps=1", "train.steps=2", "data.index=/a b/c=d: [e] #1.parquet"])
    assert cfg.train.steps == 2
    assert cfg.data.index == "/a b/c=d: [e] #1.parquet"
    assert load_config("tiny", ["data.index=null"]).data.index is None
    assert load_config("tiny", ["optim.lr=1e-4"]).optim.lr == 1e-4  # text to plain YAML 1.1


@pytest.mark.parametrize("recipe", ["tiny", "vit_b16", "vit_g16", "vit_l16", "vit_s16"])
def test_saved_configuration_reads_back(recipe):
    cfg = load_config(recipe, ["train.steps=60", "data.index=/x/${y}: #z", "train.total_batch_size=64"])
    again = from_yaml(to_yaml(cfg))
    assert again == cfg
    assert differences(cfg, again) == {}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {stepss: 3}", "train.stepss=3: no such key; did you mean train.steps?"),
        ("train: {steps: soon}", "train.steps=soon: wants a whole number"),
        ("trian: {steps: 3}", "trian: no such section; did you mean train?"),
        ("train: 3", "train: no such section"),
        ("train: {steps: [", "not a configuration"),
        ("- 1", "not a configuration"),
        ("model: {num_heads: 5}", "model.num_heads=5: must divide"),
    ],
)
def test_a_broken_saved_configuration_gets_one_line(text, part):
    with pytest.raises(UserError) as caught:
        from_yaml(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


IMPOSSIBLE_BANDS = {
    "data.bands=[nir] model.in_chans=3": "data.bands=[nir]: has 1 band(s), wants one per channel: model.in_chans=3",
    "data.bands=[1,1]": "data.bands=[1,1]: names the band 1 twice",
    "data.bands=[NIR,nir]": "data.bands=[NIR,nir]: names the band NIR twice",
    "data.bands=[0]": "data.bands=[0]: wants a list of band numbers from 1 and names such as [4,3,red] or null",
    "data.bands=red": "data.bands=red: wants a list of band numbers",
    "data.bands=[]": "data.bands=[]: has 0 band(s), wants one per channel: model.in_chans=3",
    "views.rgb_bands=[1,2]": "views.rgb_bands=[1,2]: wants the bands of red, green and blue, or [] for none",
    "views.rgb_bands=[1,2,4]": "views.rgb_bands=[1,2,4]: 4 is not among the 3 band(s), which are 1 to 3",
    "data.bands=[nir,red,1] views.rgb_bands=[red,3,1]": (
        "views.rgb_bands=[red,3,1]: 3 is not among data.bands=[nir,red,1]"
    ),
    "data.depth=12": "data.depth=12: allowed: auto | 8 | 16",
    "data.band_scale=percentile:98,2": (
        "data.band_scale=percentile:98,2: allowed: auto | percentile:LOW,HIGH (0 to 100, rising) |"
        " divide:NUMBER (above 0) | given (data.band_range)"
    ),
    "data.band_scale=divide:0": "data.band_scale=divide:0: allowed: auto | ",
    "data.band_scale=given": "data.band_scale=given: wants data.band_range=[[low,high],...] with it",
    "data.band_range=[0,10000]": "data.band_range=[0,10000]: wants a list of pairs [low,high] such as [[0,3000],",
    "data.band_range=[[0,1],[0,1]]": (
        "data.band_range=[[0.0,1.0],[0.0,1.0]]: has 2 pairs, wants one per channel (model.in_chans=3) or one for all"
    ),
    "data.band_range=[[5,5]]": "data.band_range=[[5.0,5.0]]: wants low < high, and finite: [5.0,5.0]",
}


@pytest.mark.parametrize("overrides", IMPOSSIBLE_BANDS)
def test_impossible_bands(overrides):
    assert message(*overrides.split()).startswith(IMPOSSIBLE_BANDS[overrides])


def test_bands_and_what_follows_them():
    cfg = load_config("tiny", ["data.bands=[8,Red,green,2]", "views.rgb_bands=[red,GREEN,2]"])
    assert (cfg.model.in_chans, cfg.views.mean) == (4, [0.5] * 4)
    assert cfg.rgb_channels() == [1, 2, 3]
    assert cfg.has_colors()
    assert from_yaml(to_yaml(cfg)) == cfg
    assert load_config("tiny").rgb_channels() is None
    assert load_config("tiny").has_colors()
    assert load_config("tiny", ["views.rgb_bands=[]"]).rgb_channels() == []
    assert not load_config("tiny", ["views.rgb_bands=[]"]).has_colors()
    assert not load_config("tiny", ["model.in_chans=6"]).has_colors()
    assert load_config("tiny", ["model.in_chans=6", "views.rgb_bands=[4,3,2]"]).rgb_channels() == [3, 2, 1]
    given = load_config("tiny", ["data.band_range=[[0,10000]]"])
    assert (given.data.band_scale, given.data.band_range) == ("given", [[0.0, 10000.0]])


def test_differences_name_key_and_both_values():
    a, b = load_config("tiny"), load_config("tiny", ["model.depth=6", "optim.lr=1"])
    assert differences(a, b) == {"model.depth": (4, 6), "optim.lr": (1e-3, 1.0)}
    assert "recipe" in differences(a, load_config("vit_b16"))


def test_a_configuration_never_changes():
    cfg = load_config("tiny")
    with pytest.raises(FrozenInstanceError):
        cfg.train = TrainConfig()
    for section in SECTIONS:
        for f in fields(SECTIONS[section]):
            with pytest.raises(FrozenInstanceError):
                setattr(getattr(cfg, section), f.name, None)
    other = cfg.with_values({"model.depth": 6, "model.num_heads": 1, "optim.lr": 0.5})
    assert differences(cfg, other).keys() == {"model.depth", "model.num_heads", "optim.lr"}
    assert (other.model.depth, other.model.num_heads, other.optim.lr) == (6, 1, 0.5)
    assert cfg == load_config("tiny")


def test_check_is_for_configurations_made_by_hand_too():
    cfg = Config()
    check(cfg)
    cfg = cfg.with_values({"model.num_heads": 7})
    with pytest.raises(UserError, match=re.escape("model.num_heads=7: must divide model.embed_dim=768")):
        check(cfg)


PATHS = "data.index", "eval.data", "eval.root", "train.init_from"


def test_every_key_has_a_type_rule():
    for key in KEYS:
        base, _ = kind(key)
        rule = KEYS[key].metadata
        if base in (int, float, list[float]):
            assert rule or key == "views.mean", f"{key} may be anything"
        elif base in (str, list[str]):
            assert "choices" in rule or key in (*PATHS, "data.band_scale")
    assert all(is_dataclass(getattr(Config(), f.name)) for f in fields(Config) if f.name != "recipe")


def _values(key: str) -> st.SearchStrategy:
    """Values that a key may have by its own rule, near the recipe's where other keys depend on it."""
    base, optional = kind(key)
    rule = KEYS[key].metadata
    if key in PATHS:
        text = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1)
        strategy = text.filter(lambda t: t not in ("null", "~"))
    elif "choices" in rule:
        strategy = st.sampled_from(rule["choices"])
        strategy = st.lists(strategy, unique=True) if base == list[str] else strategy
    elif base is bool:
        strategy = st.booleans()
    elif base is int:
        strategy = st.integers(rule["low"], rule.get("high", 2**40))
    else:
        low = rule.get("low", rule.get("above", 0))
        high = rule.get("high", rule.get("below", 1e3))
        ends = {"exclude_min": "above" in rule, "exclude_max": "below" in rule}
        number = st.floats(low, high, **ends)
        two = rule.get("rising") or key == "optim.betas"
        strategy = st.lists(number, min_size=2 if two else 3, max_size=2 if two else 3).map(
            sorted if rule.get("rising") else list
        )
        if base is float:
            strategy = number
    return st.none() | strategy if optional else strategy


# Keys whose values hang together with others'; what they refuse is tested above.
TIED = {"train.batch_size", "train.total_batch_size", "optim.warmup_epochs", "optim.teacher_temp_warmup_epochs"}
TIED |= {f"model.{n}" for n in ("patch_size", "embed_dim", "num_heads", "in_chans", "student_ratio", "teacher_ratio")}
TIED |= {f"views.{n}" for n in ("global_size", "local_size")} | {"model.masking", "train.epochs"}
TIED |= {"views.rgb_bands", "data.bands", "data.band_scale", "data.band_range", "train.cuda_graph"}
TIED |= {"model.teacher_precision", "eval.size"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_overrides_round_trip(data):
    keys = data.draw(
        st.lists(
            st.sampled_from(sorted(key for key in KEYS.keys() - TIED if not key.startswith("finetune."))),
            unique=True,
            min_size=1,
            max_size=6,
        )
    )
    drawn = {key: data.draw(_values(key), label=key) for key in keys}
    cfg = load_config("tiny", [f"{key}={show(v)}" for key, v in drawn.items()])
    assert {key: value(cfg, key) for key in keys} == drawn
    again = from_yaml(to_yaml(cfg))
    assert again == cfg
    assert asdict(again) == asdict(cfg)
    assert set(differences(load_config("tiny"), cfg)) <= set(keys)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KEYS)), st.text(max_size=12))
def test_any_text_gives_a_configuration_or_one_line(key, text):
    try:
        cfg, line = load_config("tiny", [f"{key}={text}"]), ""
    except UserError as error:
        cfg, line = None, str(error)
    assert "\n" not in line
    assert len(line) < 400
    if cfg is not None:
        v = value(cfg, key)
        assert not isinstance(v, float) or math.isfinite(v)
        assert from_yaml(to_yaml(cfg)) == cfg


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "[wanb]",
            "[wanb]: wanb is none of them; allowed: a list of tensorboard | wandb | mlflow, such as"
            " [tensorboard,wandb]; did you mean wandb?",
        ),
        ("[wandb,wandb]", "[wandb,wandb]: names wandb 2 times"),
        ("wandb", "wandb: wants a list of tensorboard | wandb | mlflow, such as [tensorboard,wandb]"),
        ("[1]", "[1]: wants a list of tensorboard | wandb | mlflow, such as [tensorboard,wandb]"),
    ],
)
def test_loggers_that_cannot_be(given: str, told: str):
    with pytest.raises(UserError) as caught:
        load_config("tiny", [f"train.loggers={given}"])
    assert str(caught.value) == f"train.loggers={told}"


def test_loggers():
    assert load_config("tiny").train.loggers == ["tensorboard"]
    cfg = load_config("tiny", ["train.loggers=[mlflow,wandb]"])
    assert cfg.train.loggers == ["mlflow", "wandb"]
    assert load_config("tiny", ["train.loggers=[]"]).train.loggers == []
    assert from_yaml(to_yaml(cfg)) == cfg
