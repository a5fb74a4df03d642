"""Training with an FP8 teacher: steps, resuming, memory, and devices that cannot."""

import json
from itertools import repeat
from pathlib import Path

import pytest
import torch
from train_support import RandomCrops, make_run, small_config

from pera_fast.config import load_config
from pera_fast.errors import UserError
from pera_fast.model.pera import PerA
from pera_fast.profile.batches import random_inputs
from pera_fast.profile.measure import real_step
from pera_fast.profile.simulate import simulate_step
from pera_fast.train.api import make_model
from pera_fast.train.checkpoint import load_checkpoint
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.distributed import World
from pera_fast.train.fused_update import make_update
from pera_fast.train.loop import Run, fit
from pera_fast.train.memory_plan import bytes_per_image, fixed_bytes
from pera_fast.train.optim import make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues
from pera_fast.train.signals import StopRequest
from pera_fast.train.step import launch_step, make_graph
from pera_fast.train.teacher_precision import check_teacher_precision
from pera_kernels import fp8
from pera_kernels.quantize_rows.reference import quantize_rows

GPU = torch.device("cuda", 0)
LACKING = not torch.cuda.is_available() or fp8.why_not(GPU) is not None
FP8 = ("train.precision=bf16", "model.teacher_precision=fp8")


def trained(out: Path, *overrides: str, state=None) -> Run:
    run = make_run(small_config(*overrides), out)
    make_copies(run.pera)
    if state is not None:
        run.load(state, "test")
        run.batches.micro_step = state["step"]
    assert fit(run, StopRequest())[0] == 0
    return run


def test_a_run_begins_the_same_and_learns_and_its_copies_follow_the_ema(tmp_path: Path) -> None:
    """Without KoLeo, whose nearest neighbours change with anything, and of a seed whose runs in fp32 and bf16 agree."""
    losses = {}
    for name, overrides in (("bf16", FP8[:1]), ("fp8", FP8)):
        run = trained(tmp_path / name, *overrides, "loss.koleo_weight=0", "train.seed=2")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = torch.tensor([json.loads(line)["loss"] for line in lines])
    assert losses["fp8"].shape == (6,)
    assert not torch.equal(losses["fp8"], losses["bf16"])
    torch.testing.assert_close(losses["fp8"][0], losses["bf16"][0], rtol=0.01, atol=0)
    torch.testing.assert_close(losses["fp8"], losses["bf16"], rtol=0.06, atol=0)
    weight = run.pera.teacher.backbone.blocks[0].mlp.fc2.weight
    copy = weight.fp8_copy
    assert weight.fp8_copy_version == weight._version
    assert (copy.values.float() * copy.scale - weight).norm() < 0.05 * weight.norm()


def test_resumed_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", *FP8)
    state = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step_00000004.pt")
    assert not any("fp8" in name for name in state["model"])
    resumed = trained(tmp_path / "resumed", *FP8, state=state)
    assert resumed.step == whole.step
    for name, value in whole.pera.state_dict().items():
        assert torch.equal(value, resumed.pera.state_dict()[name]), name


def test_a_device_without_fp8_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, gpu = load_config("vit_b16", ["model.teacher_precision=fp8"]), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    line = (
        r"^model\.teacher_precision=fp8: FP8 products need compute capability 8\.9 or newer \(Ada, Hopper, Blackwell\),"
        r" NVIDIA A100-SXM4-80GB has 8\.0; leave it out$"
    )
    with pytest.raises(UserError, match=line):
        check_teacher_precision(cfg, gpu)
    check_teacher_precision(load_config("vit_b16"), gpu)
    check_teacher_precision(cfg, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    check_teacher_precision(cfg, gpu)


def test_the_benches_step_takes_it() -> None:
    step = real_step(small_config(*FP8), torch.device("cpu"))
    assert step().result().applied


def test_simulated_memory_counts_a_byte_a_weight() -> None:
    peaks = {}
    for precision in ("same", "fp8"):
        cfg = load_config("vit_s16", ["train.batch_size=4", f"model.teacher_precision={precision}"])
        peaks[precision] = simulate_step(cfg).between_steps
    with torch.device("meta"):
        model = PerA(cfg)
    blocks = model.teacher.backbone.blocks[:-1]  # the last one runs in bf16
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert weights <= peaks["fp8"] - peaks["same"] <= 1.01 * weights
    assert simulate_step(cfg).peak <= fixed_bytes(model) + 4 * bytes_per_image(cfg, "cheap")


def on_a_gpu(*overrides: str) -> PerA:
    return make_model(small_config(*FP8, "model.embed_dim=64", *overrides))


@pytest.mark.gpu
@pytest.mark.skipif(LACKING, reason="needs a GPU with FP8 products")
def test_a_gpu_gives_what_a_cpu_gives() -> None:
    model = on_a_gpu()
    inputs = next(RandomCrops(model.cfg, 12))
    want = model.teacher_rows(inputs).double()
    model.to(GPU)
    make_copies(model)
    got = model.teacher_rows(inputs.to(GPU)).cpu().double()
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.gpu
@pytest.mark.skipif(LACKING, reason="needs a GPU with FP8 products")
def test_on_a_gpu_the_update_writes_the_copies_that_the_graph_reads() -> None:
    model = on_a_gpu().to(GPU)
    make_copies(model)
    optimizer, scaler = make_optimizer(model.parameters(), model.cfg), make_scaler(model.cfg, GPU)
    graph, update = make_graph(model, scaler, 1), make_update(model, optimizer, scaler)
    inputs = repeat(random_inputs(model.cfg, 4).to(GPU))
    weight = model.teacher.backbone.blocks[0].mlp.fc2.weight
    before = [t.clone() for t in (weight.detach(), weight.fp8_copy.scale)]
    values = StepValues(lr=0.01, weight_decay=0.0, momentum=0.5, teacher_temp=0.04)
    for _ in range(3):
        step = launch_step(
            *(model, model, optimizer, scaler, inputs, 1, values, 3.0, World(0, 1, GPU)), graph=graph, update=update
        )
        assert step.result().applied
    copy = fp8.in_e4m3(weight)
    assert copy is weight.fp8_copy
    assert not torch.equal(weight, before[0])
    assert not torch.equal(copy.scale, before[1])
    expected, scale = quantize_rows(weight.detach().cpu())
    torch.testing.assert_close(copy.scale.cpu(), scale, rtol=1e-6, atol=0)
    assert (copy.values.cpu().float() != expected.float()).float().mean() < 1e-2
