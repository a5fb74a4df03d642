"""Schedules: what must hold for any configuration. The published numbers: tests/test_official_parity.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pera_fast.config import Config
from pera_fast.train.schedules import Schedules, make_schedules


def table(schedules: Schedules) -> dict[str, np.ndarray]:
    """Every schedule at every step, by the short names of metrics.jsonl."""
    rows = [schedules.at(i) for i in range(schedules.steps)]
    names = {"lr": "lr", "wd": "weight_decay", "tm": "momentum", "tt": "teacher_temp"}
    return {key: np.array([getattr(row, name) for row in rows]) for key, name in names.items()}


@st.composite
def configs(draw) -> tuple[Config, int]:
    epochs = draw(st.integers(1, 30))
    cfg = Config().with_values({
        "train.epochs": epochs,
        "train.steps": draw(st.none() | st.integers(1, 200)),
        "optim.warmup_epochs": draw(st.floats(0, epochs)),
        "optim.teacher_temp_warmup_epochs": draw(st.floats(0, epochs)),
    })  # fmt: skip
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
    cfg = Config().with_values({"train.steps": 60})  # 20 and 30 of 200 epochs: 6 and 9 of 60 steps
    schedules = make_schedules(cfg, steps_per_epoch=7)
    assert (schedules.steps, schedules.lr_warmup, schedules.temp_warmup) == (60, 6, 9)


@pytest.mark.parametrize("step", [-1, 60])
def test_step_outside_the_run(step: int):
    cfg = Config().with_values({"train.steps": 60})
    with pytest.raises(ValueError, match="60 steps"):
        make_schedules(cfg, 1).at(step)
