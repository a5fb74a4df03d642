"""Every Triton kernel's launch, up to the compiler, under a stand-in for a GPU's driver (stub_driver.py)."""

import ast
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions in the interpreter", allow_module_level=True)

from op_cases import add_norm_case, gelu_case, loss_case, stream_case, tokens_case
from stub_driver import Aten, counts, stub_driver
from torch._library.custom_ops import OPDEFS
from triton.runtime.jit import JITFunction

import pera_kernels
from pera_fast.config import load_config
from pera_fast.model.pera import PerA
from pera_fast.profile.batches import random_inputs
from pera_fast.train.fused_update import FusedUpdate
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_kernels import products
from pera_kernels.aot import variants
from pera_kernels.attention import attention
from pera_kernels.attention.triton import ColumnSums
from pera_kernels.column_sums import column_sums
from pera_kernels.distillation_loss import weight_norm
from pera_kernels.gelu import gelu
from pera_kernels.gelu import triton as gelu_kernels
from pera_kernels.pixel_loss import pixel_loss
from pera_kernels.prototype_losses import prototype_losses
from pera_kernels.quantize_rows import quantize_rows
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.unit_rows import unit_rows
from pera_kernels.visible_patches import contrast_mean, visible_patches

SMALL = [
    *("train.batch_size=2", "model.embed_dim=64", "model.num_heads=1", "model.head_hidden=64", "model.depth=2"),
    *("model.bottleneck=32", "model.prototypes=256", "views.global_size=64", "views.local_size=32"),
]

LOSS_LAUNCHES = 79  # a ceiling that only gets lower


def step(*overrides: str) -> None:
    """Forward, backward and update of a small network with stochastic depth."""
    cfg = load_config("vit_b16", [*SMALL, *overrides])
    model = PerA(cfg)
    model.make_fp8()
    model.recompute = cfg.model.recompute
    out = model(random_inputs(cfg, 2), 0.04)
    out["loss"].backward()
    update = FusedUpdate(model, make_optimizer(model.parameters(), cfg), make_scaler(cfg, torch.device("cpu")))
    values = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.04)
    update(out["loss"].detach().view(1), out["teacher_mean"], values, 3.0)


def others() -> None:
    """What a step does not launch."""
    x, y = torch.randn(2 * 5 + 3 * 2, 64, requires_grad=True), torch.randn(5 + 2 * 2, 64, requires_grad=True)
    keep = torch.tensor([1, 0, 2], dtype=torch.int32)
    sequence_add(x, y, [2, 5, 3, 2], keep, [1, 2]).sum().backward()
    sequence_norm(x, torch.ones(64), torch.zeros(64), 1e-6, [2, 5, 3, 2], keep, [1, 2]).sum().backward()
    quantize_rows(torch.randn(4, 64))
    packed = torch.empty(2, 8, 3 * 64)
    ColumnSums(1, packed.view(-1, 3 * 64)).pack([torch.randn(2, 8, 2, 32) for _ in range(3)], packed)


@pytest.fixture(scope="module")
def launches() -> Iterator[dict[str, Counter[str]]]:
    """Launches of each kernel by what was run."""
    patch, found = pytest.MonkeyPatch(), {}
    with stub_driver(patch) as seen:
        for name, run in {
            "bf16": lambda: step("train.precision=bf16", "model.recompute=none", "model.teacher_precision=fp8"),
            "fp32": lambda: step("train.precision=fp32", "model.recompute=cheap"),
            "fp16": lambda: step("train.precision=fp16", "model.recompute=block", "loss.koleo_on=bottleneck"),
            "others": others,
        }.items():
            start = len(seen)
            run()
            found[name] = counts(seen[start:])
    yield found
    patch.undo()


def launched_in_source() -> set[str]:
    """Kernels that any module of the package launches: what is called as ``kernel[grid](...)``."""
    found = set()
    for path in sorted(Path(pera_kernels.__file__).parent.rglob("*.py")):
        name = ".".join(("pera_kernels", *path.relative_to(Path(pera_kernels.__file__).parent).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            kernel = getattr(importlib.import_module(name), ast.unparse(node.func.value), None)
            assert kernel is not None, f"{path.name}:{node.lineno}: a kernel is to be launched by its name"
            found |= {kernel.__name__} if isinstance(kernel, JITFunction) else set()
    return found


def test_every_kernel_is_launched(launches: dict[str, Counter[str]]) -> None:
    """A new kernel that nothing here launches fails this test."""
    every = {variant.kernel.__name__ for _, variant in variants()}
    assert launched_in_source() == every
    assert every - set(sum(launches.values(), Counter())) == set()


def test_launches_of_a_step(launches: dict[str, Counter[str]]) -> None:
    """Two blocks: what they launch follows from their number and the policy."""
    half, full = launches["bf16"], launches["fp32"]
    assert half["linear_gelu_kernel"] == 2 * 2 - 1  # the teacher's first block runs in FP8
    assert half["gelu_fp8_kernel"] == 1
    assert half["linear_gelu_bwd_kernel"] == 2
    assert full["linear_gelu_kernel"] == 0
    assert full["add_norm_bwd_kernel"] == 2 * 2 + 1  # of each block's norms and of the last one
    assert half["adamw_ema_kernel"] == full["adamw_ema_kernel"] > 0


def tiny() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls whose sizes are 1: a launch makes a constant of each such argument, and so another kernel."""
    cases = {name: tokens_case(name, 1, sequences=1, n=1, grid=1) for name in ("embed_tokens", "mask_tokens")}
    cases |= {name: stream_case(name, 1, [1, 1]) for name in ("sequence_norm", "sequence_add")}
    cases |= {"all": stream_case("sequence_norm", 1, [1, 1], subsets=False), "add_norm": add_norm_case(1, [1, 1])}
    cases |= {"gelu": gelu_case(1, 1), "losses": loss_case("prototype_losses", 2, 1, 1)}
    for name, case in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield name, partial(case.run, case.fast, dtype, "cpu")
    x = torch.randn(1, 1, requires_grad=True)
    yield "unit_rows", lambda: unit_rows(x, 1e-6).sum().backward()
    yield "column_sums", lambda: column_sums(x.detach())
    yield "attention", lambda: attention(torch.randn(1, 48, requires_grad=True), 1, [1, 1]).sum().backward()
    rows = [torch.randn(1, 1, requires_grad=True) for _ in range(3)]
    others = *(torch.randn(1, 1) for _ in range(3)), torch.randn(1), 0.1, 0.05, 1, 1
    yield "losses of a row", lambda: sum(prototype_losses(*rows, *others)).sum().backward()
    crops, index = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    order, factors, gray = torch.full((1, 4), -1, dtype=torch.int32), torch.ones(1, 4), torch.zeros(1)
    colours = index, order, factors, gray, [0.0], [1.0], 1
    yield "contrast_mean", lambda: contrast_mean(crops, order, factors)
    yield "visible_patches", lambda: visible_patches(crops, *colours, torch.float32)
    yield "pixel_loss", lambda: pixel_loss(torch.randn(1, 1, requires_grad=True), crops, *colours).backward()


def test_sizes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub_driver(monkeypatch) as seen:
        for name, run in tiny():
            start = len(seen)
            run()
            assert len(seen) > start, name
    assert len(counts(seen)) > 25


def test_a_wrong_launch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead-of-time compilation, whose signatures are written down, would not see these."""
    x = torch.randn(3, 64)
    with stub_driver(monkeypatch):
        monkeypatch.setattr(gelu_kernels, "BLOCK", 100)  # no power of two
        with pytest.raises(Exception, match="power of 2"):
            gelu(x)
    with stub_driver(monkeypatch):
        monkeypatch.setattr(gelu_kernels, "BLOCK", 128)
        with pytest.raises(TypeError, match="missing"):
            gelu_kernels.gelu_fwd_kernel[(1,)](x, x, BLOCK=128, EXACT=True)  # pyright: ignore[reportCallIssue]
    with stub_driver(monkeypatch) as seen:
        gelu(x)
        assert seen == [("gelu_fwd_kernel", (2, 1, 1))]


class AtenInOps(Aten):
    """Counts them in this library's ops too, which a dispatch mode sees as one call each."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "pera":
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))


def test_launches_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalisation, both losses, their sum, backward and center of batch 64, as in a CUDA graph.

    There are as many chunks as there, at a 64th of the prototypes.
    """
    part, bottleneck, crops = 64, 32, 640
    monkeypatch.setattr(weight_norm, "GPU_CHUNK_BYTES", weight_norm.GPU_CHUNK_BYTES // part)
    monkeypatch.setattr(weight_norm, "MIN_CHUNK", 1)
    monkeypatch.setattr(products, "_FAST_ON_CPU", frozenset())  # else products in bf16, whose float32 result is a copy
    cfg = load_config("vit_b16", [*SMALL, f"model.prototypes={131072 // part}", "train.precision=bf16"])
    model = PerA(cfg)
    student, teacher = (torch.randn(crops, bottleneck).bfloat16() for _ in range(2))
    student.requires_grad_()
    temp, pixel, ok = torch.tensor(0.04), torch.zeros(()), torch.tensor(True)
    with stub_driver(monkeypatch) as seen, AtenInOps() as aten:
        rows = unit_rows(student, 1e-6), unit_rows(teacher, 1e-6)
        out = model._loss(*rows, pixel, crops * 2 // 10, temp)
        out["loss"].backward()
        model.update_center(out["teacher_mean"], ok)
    assert counts(seen)["distillation_loss_fwd_kernel"] == 4  # as in the kernels of a step that an H200 ran
    assert student.grad is not None
    launches = len(seen) + sum(aten.found.values())
    assert launches <= LOSS_LAUNCHES, counts(seen) + aten.found
