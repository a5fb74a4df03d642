"""Schedules against the published implementation's numbers, and what must hold for any configuration."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pera_fast.config import Config
from pera_fast.train.schedules import Schedules, make_schedules

GOLDEN = Path(os.environ.get("PERA_GOLDEN_DIR", Path(__file__).parent.parent / "golden"))
NUMBER = r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(NUMBER, text)]


def golden_config(metadata: dict[str, str]) -> Config:
    """The configuration that the file's metadata describes in words."""
    cfg = Config()
    o = cfg.optim
    cfg.train.epochs = int(metadata["epochs"])
    o.lr, o.final_lr, o.warmup_epochs, o.warmup_lr = numbers(metadata["lr"])
    o.weight_decay, o.final_weight_decay = numbers(metadata["wd"])
    o.teacher_momentum, o.final_teacher_momentum = numbers(metadata["tm"])
    o.warmup_teacher_temp, _, o.teacher_temp_warmup_epochs, o.teacher_temp = numbers(metadata["tt"])
    return cfg


def table(schedules: Schedules) -> dict[str, np.ndarray]:
    rows = [schedules.at(i) for i in range(schedules.steps)]
    names = {"lr": "lr", "wd": "weight_decay", "tm": "momentum", "tt": "teacher_temp"}
    return {key: np.array([getattr(row, name) for row in rows]) for key, name in names.items()}


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(str(GOLDEN / "schedules.safetensors"), "np") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("as_steps", [False, True], ids=["train.epochs", "train.steps"])
def test_published_numbers(golden, as_steps: bool):
    metadata, want = golden
    cfg, per_epoch = golden_config(metadata), int(metadata["iters_per_epoch"])
    if as_steps:  # the same length given in steps: the warm-ups keep their fractions
        cfg.train.steps, per_epoch_given = cfg.train.epochs * per_epoch, 1
    else:
        per_epoch_given = per_epoch
    got = table(make_schedules(cfg, per_epoch_given))
    for key, values in want.items():
        np.testing.assert_allclose(got[key], values, rtol=1e-12, atol=1e-15, err_msg=key)


@st.composite
def configs(draw) -> tuple[Config, int]:
    cfg = Config()
    cfg.train.epochs = draw(st.integers(1, 30))
    cfg.train.steps = draw(st.none() | st.integers(1, 200))
    cfg.optim.warmup_epochs = draw(st.floats(0, cfg.train.epochs))
    cfg.optim.teacher_temp_warmup_epochs = draw(st.floats(0, cfg.train.epochs))
    return cfg, draw(st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(configs())
def test_any_length(case: tuple[Config, int]):
    cfg, per_epoch = case
    schedules = make_schedules(cfg, per_epoch)
    assert schedules.steps == (cfg.train.steps or cfg.train.epochs * per_epoch)
    got, o = table(schedules), cfg.optim
    warm = schedules.lr_warmup
    assert np.all(np.diff(got["lr"][:warm]) >= 0)
    assert np.all(np.diff(got["lr"][warm:]) <= 0)
    assert np.all((got["lr"] >= min(o.warmup_lr, o.final_lr)) & (got["lr"] <= o.lr * (1 + 1e-12)))
    for key in ("wd", "tm", "tt"):
        assert np.all(np.diff(got[key]) >= -1e-15), key
    if warm > 1:
        assert got["lr"][warm - 1] == pytest.approx(o.lr, rel=1e-12)  # linspace includes its end
        assert got["lr"][0] == o.warmup_lr
    assert np.all(got["tt"][schedules.temp_warmup :] == o.teacher_temp)


def test_steps_keep_the_warmup_fraction():
    cfg = Config()
    cfg.train.steps = 60  # 20 and 30 of 200 epochs: 6 and 9 of 60 steps
    schedules = make_schedules(cfg, steps_per_epoch=7)
    assert (schedules.steps, schedules.lr_warmup, schedules.temp_warmup) == (60, 6, 9)


@pytest.mark.parametrize("step", [-1, 60])
def test_step_outside_the_run(step: int):
    cfg = Config()
    cfg.train.steps = 60
    with pytest.raises(ValueError, match="60 steps"):
        make_schedules(cfg, 1).at(step)
