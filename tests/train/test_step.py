"""The order of an optimiser step, seen from a model that only keeps a diary."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pera_fast.config import Config
from pera_fast.train.distributed import World
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.step import StepResult, train_step

VALUES = StepValues(lr=0.5, weight_decay=0.0, momentum=0.75, teacher_temp=0.04)
HERE = World(0, 1, torch.device("cpu"))


class Diary(nn.Module):
    """One weight; the loss of a micro-batch x is w * x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.entries: list[tuple[str, object]] = []

    def forward(self, x: Tensor, teacher_temp: float) -> dict[str, Tensor]:
        self.entries.append(("forward", teacher_temp))
        loss = (self.weight * x).sum()
        parts = {
            "global_cls_loss": loss * 0.5,
            "local_cls_loss": loss * 0.25,
            "koleo_loss": x.sum(),
            "pixel_loss": x.sum(),
        }
        return {"loss": loss, **parts, "teacher_mean": torch.stack([x, 2 * x])}

    def update_center(self, teacher_mean: Tensor) -> None:
        self.entries.append(("center", teacher_mean.tolist()))
        self.entries.append(("weight", self.weight.item()))

    def update_teacher(self, momentum: float) -> None:
        self.entries.append(("teacher", momentum))


def step(
    model: Diary, batches: Iterator[Tensor], accumulate: int, asked: tuple[bool, bool] = (False, False)
) -> StepResult:
    cfg = Config()
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, HERE.device)
    return train_step(model, model, optimizer, scaler, batches, accumulate, VALUES, 100.0, HERE, lambda: asked)


def test_center_then_teacher_once_after_the_update():
    model, batches = Diary(), iter([torch.tensor(1.0), torch.tensor(3.0), torch.tensor(9.0)])
    result = step(model, batches, accumulate=2)
    names = [name for name, _ in model.entries]
    assert names == ["forward", "forward", "center", "weight", "teacher"]
    diary = dict(model.entries)
    assert diary["forward"] == VALUES.teacher_temp
    assert diary["center"] == [2.0, 4.0]  # means over the micro-batches
    assert diary["weight"] == pytest.approx(0.5, abs=1e-4)  # AdamW's first step has the size of lr
    assert diary["teacher"] == VALUES.momentum
    assert next(batches).item() == 9.0  # took as many as it needed
    assert result.losses == {
        "loss": 2.0, "global_cls_loss": 1.0, "local_cls_loss": 0.5, "koleo_loss": 2.0, "pixel_loss": 2.0
    }  # fmt: skip
    assert result.grad_norm == pytest.approx(2.0)
    assert (result.applied, result.stop, result.nonfinite) == (True, (False, False), [])


@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_micro_batch_spoils_the_step(bad: int):
    values = [1.0, 2.0]
    values[bad] = math.nan
    model = Diary()
    result = step(model, iter(map(torch.tensor, values)), accumulate=2)
    assert not result.applied
    assert [name for name, _ in model.entries] == ["forward", "forward"]
    assert model.weight.item() == 1.0
    assert set(result.nonfinite) == set(result.losses)


def test_gradients_do_not_outlive_their_step():
    model = Diary()
    first = step(model, iter([torch.tensor(4.0)]), accumulate=1)
    second = step(model, iter([torch.tensor(1.0)]), accumulate=1)
    assert (first.grad_norm, second.grad_norm) == (pytest.approx(4.0), pytest.approx(1.0))


@pytest.mark.parametrize("asked", [(True, False), (False, True)])
def test_stop_is_reported(asked: tuple[bool, bool]):
    result = step(Diary(), iter([torch.tensor(1.0)]), 1, asked)
    assert result.stop == asked
    assert result.applied  # the step is finished first
