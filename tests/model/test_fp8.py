"""The teacher in FP8: how far its rows move, what stays as it is, and its weights' copies."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import SMALL, RandomCrops

from pera_fast.config import Config, load_config
from pera_fast.errors import UserError
from pera_fast.features.dense import features
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_kernels import fp8

DEPTH = 3
FP8 = "model.teacher_precision=fp8"


def config(*overrides: str) -> Config:
    return load_config(
        "tiny", [*SMALL, "train.precision=bf16", f"model.depth={DEPTH}", "model.embed_dim=32", *overrides]
    )


def made(*overrides: str) -> tuple[PerA, StepInputs]:
    """A model whose teacher is not its student, and inputs."""
    cfg = config(*overrides)
    torch.manual_seed(0)
    model = PerA(cfg)
    with torch.no_grad():
        for parameter in model.teacher.backbone.blocks.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model, next(RandomCrops(cfg, 12))


class _Products(TorchDispatchMode):
    """Counts FP8 products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_off_by_default_and_then_nothing_runs_in_fp8() -> None:
    assert load_config("vit_b16").model.teacher_precision == "same"
    model, inputs = made()
    model.make_fp8()
    with _Products() as products:
        rows = model.teacher_rows(inputs)
    assert products.count == 0
    assert model.fp8_copies is None
    assert torch.equal(rows, made("model.teacher_precision=same")[0].teacher_rows(inputs))


def test_four_products_a_block_run_in_fp8() -> None:
    model, inputs = made(FP8)
    with _Products() as products:
        model(inputs, 0.04)["loss"].backward()
    assert products.count == 4 * (DEPTH - 1)  # the last block runs in bf16


def test_rows_move_by_the_error_of_e4m3() -> None:
    exact, inputs = made("train.precision=fp32")
    exact = exact.teacher_rows(inputs)
    half, eight = made()[0].teacher_rows(inputs), made(FP8)[0].teacher_rows(inputs)
    assert eight.dtype == half.dtype == torch.bfloat16
    assert distance(half, exact) < distance(eight, exact) < 0.1
    assert distance(eight, half) < 0.1


def test_the_student_is_not_touched() -> None:
    """Its rows to the bit; its gradients through a loss that does not know the teacher."""
    found = []
    for overrides in ((), (FP8,)):
        model, inputs = made(*overrides)
        rows, pixel = model.student_rows(inputs)
        (rows.float().square().sum() + rows[:, 0].sum() + pixel).backward()
        found.append([rows, pixel, *(p.grad for p in model.student.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_teacher_that_is_kept_is_read_in_full_precision() -> None:
    """Features of a trained teacher do not depend on how it was trained."""
    model, _ = made(FP8)
    images = torch.rand(2, 3, 32, 32)
    with _Products() as products:
        features(model.teacher.backbone, images, model.cfg.views.mean, model.cfg.views.std)
    assert products.count == 0


def test_copies_give_what_quantising_gives_and_follow_the_weights() -> None:
    model, inputs = made(FP8)
    plain = model.teacher_rows(inputs)
    model.make_fp8()
    weight = model.teacher.backbone.blocks[0].attn.qkv.weight
    place = fp8.in_e4m3(weight).values.data_ptr()
    assert torch.equal(model.teacher_rows(inputs), plain)
    model.update_teacher(0.5)
    copy = fp8.in_e4m3(weight)
    assert copy.values.data_ptr() == place
    assert distance(copy.values.float() * copy.scale, weight) < 0.05
    moved = model.teacher_rows(inputs)
    assert not torch.equal(moved, plain)
    again, _ = made(FP8)
    again.load_state_dict(model.state_dict())  # the state holds no copies
    assert torch.equal(again.teacher_rows(inputs), moved)
    model.load_state_dict(made(FP8)[0].state_dict())  # copies are out of date, so they are not taken
    assert torch.equal(model.teacher_rows(inputs), plain)
    assert fp8.in_e4m3(weight).values.data_ptr() != place
    model.refresh_fp8()
    assert torch.equal(model.teacher_rows(inputs), plain)
    assert fp8.in_e4m3(weight).values.data_ptr() == place


def test_a_teacher_that_went_wrong_is_seen() -> None:
    model, inputs = made(FP8)
    with torch.no_grad():
        model.teacher.backbone.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    assert not model(inputs, 0.04)["loss"].isfinite()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.precision=fp32"], "goes with train.precision=bf16 only, not with fp32"),
        (["train.precision=fp16"], "goes with train.precision=bf16 only, not with fp16"),
        (["train.precision=bf16", "model.embed_dim=24"], "wants multiples of 16, and model.embed_dim is 24"),
        (
            ["train.precision=bf16", "model.mlp_ratio=3.25"],
            "wants multiples of 16, and model.mlp_ratio x model.embed_dim is 52",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.teacher_precision=fp8: {said}"):
        load_config("tiny", [*SMALL, FP8, *overrides])


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.teacher_precision=fp4: allowed: same \| fp8"):
        load_config("tiny", ["model.teacher_precision=fp4"])
