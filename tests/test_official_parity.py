"""The model against what the authors' published implementation computed (docs/method.md; numbers in tests/golden).

PERA_GOLDEN_DIR names another folder of files of the same form; every size is read from the files.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pera_fast.config import Config, load_config
from pera_fast.data.sampling.masks import indices_from_ranks
from pera_fast.model.inputs import GroupInputs, StepInputs, num_kept
from pera_fast.model.pera import PerA
from pera_fast.train.optim import apply_gradients, make_optimizer, make_scaler
from pera_fast.train.schedules import StepValues, make_schedules
from pera_kernels import backend
from pera_kernels.visible_patches import contrast_mean, visible_patches

GOLDEN = Path(os.environ.get("PERA_GOLDEN_DIR") or Path(__file__).parent / "golden")
FILES = sorted(path.name for path in GOLDEN.glob("step_*.safetensors"))


class Golden:
    """One step_*.safetensors file."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as f:
            self.meta = {k: json.loads(v) for k, v in f.metadata().items()}
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with prefix, by the rest of the name."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def config(self):
        m = self.meta
        return load_config(
            "tiny",
            [
                f"model.patch_size={m['patch_size']}",
                f"model.embed_dim={m['embed_dim']}",
                f"model.depth={m['depth']}",
                f"model.num_heads={m['num_heads']}",
                f"model.drop_path={m['drop_path']}",
                f"model.head_hidden={m['head_hidden']}",
                f"model.bottleneck={m['bottleneck']}",
                f"model.prototypes={m['prototypes']}",
                f"model.student_ratio={m['student_ratio']}",
                f"model.teacher_ratio={m['teacher_ratio']}",
                f"views.num_global={m['num_global']}",
                f"views.num_local={m['num_local']}",
                f"views.global_size={m['global_size']}",
                f"views.local_size={m['local_size']}",
                f"optim.clip={m['clip']}",
                "optim.eps=2e-5",
                "optim.betas=[0.9,0.999]",
                "loss.student_temp=0.1",
                "loss.center_momentum=0.9",
                f"train.batch_size={m['batch']}",
                "train.precision=fp32",
            ],
        )

    def inputs(self, step: int) -> StepInputs:
        cfg = self.config()
        groups = []
        for name in ("global", "local"):
            ranks = self.tensors[f"step{step}.rank.{name}"].numpy()
            student, predicted, _ = cfg.model.patch_counts(ranks.shape[1])
            index = [torch.from_numpy(a) for a in indices_from_ranks(ranks, student, predicted)]
            crops = [self.tensors[f"step{step}.images.{who}_{name}_crops"].float() for who in "ST"]
            groups.append(GroupInputs(crops[0], *index, teacher_crops=crops[1]))
        return StepInputs(*groups, keep=self.keep(step, [g.crops.shape[0] for g in groups]))

    def keep(self, step: int, sequences: list[int]) -> Tensor | None:
        drop_path, depth = self.meta["drop_path"], self.meta["depth"]
        if not drop_path:
            return None
        drawn = [p for _, p in sorted(self.under(f"step{step}.randperm.").items())]
        kept = [p[: num_kept(n, drop_path)] for p, n in zip(drawn, sequences * 2 * depth, strict=True)]
        return torch.cat(kept).int().view(depth, 2, -1)


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN / request.param)


def model_of(golden: Golden, recompute: str = "none") -> PerA:
    cfg = golden.config().with_values({"model.recompute": recompute})
    model = PerA(cfg)
    missing, unexpected = model.load_state_dict(golden.under("init."), strict=False)
    assert missing == ["center"], "every parameter has the published checkpoint's name"
    assert not unexpected
    return model


def close(got: Tensor, want: Tensor, relative: float, what: str) -> None:
    """Largest difference, relative to the largest value."""
    got, want = got.cpu(), want.reshape(got.shape).double()
    bound = relative * want.abs().max().item() + 1e-12
    difference = (got.double() - want).abs().max().item()
    assert difference <= bound, f"{what}: off by {difference:.3g}, allowed {bound:.3g}"


def test_there_are_golden_files() -> None:
    assert FILES, f"no step_*.safetensors in {GOLDEN}"


def effective_logits(rows: Tensor, layer: torch.nn.Module) -> Tensor:
    return rows @ (layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)).t()


def test_forward_values(golden: Golden) -> None:
    model, inputs = model_of(golden), golden.inputs(0)
    predictions: list[Tensor] = []
    model.pred_head.register_forward_hook(lambda _m, _i, out: predictions.append(out))
    with torch.no_grad():
        student = model.student_rows(inputs)[0]
        teacher = model.teacher_rows(inputs)
    n = inputs.global_.crops.shape[0]
    for who, rows, branch in (("student", student, model.student), ("teacher", teacher, model.teacher)):
        logits = effective_logits(rows, branch.cls_head.last_layer)
        close(logits[:n], golden.tensors[f"step0.{who}.global_cls_tokens"], 1e-4, f"{who} global logits")
        close(logits[n:], golden.tensors[f"step0.{who}.local_cls_tokens"], 1e-4, f"{who} local logits")
    close(predictions[0], golden.tensors["step0.student.global_pred_tokens"], 1e-4, "predicted pixels")


def test_pixel_target_is_the_normalised_student_view(golden: Golden) -> None:
    group, patch = golden.inputs(0).global_, golden.meta["patch_size"]
    rows = visible_patches(
        group.crops, group.predicted_index, None, None, None, [0.0] * 3, [1.0] * 3, patch, torch.float32
    )
    target = rows.view(-1, 3, patch * patch).transpose(1, 2)
    assert torch.equal(target.reshape(-1), golden.tensors["step0.student.global_patch_target"].reshape(-1))


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_training_steps(golden: Golden, recompute: str) -> None:
    check_training_steps(golden, recompute, golden.meta["steps"])


@pytest.mark.parametrize("implementation", ["reference", "native", "triton"])
def test_training_steps_with_every_backend(golden: Golden, implementation: str) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (implementation == "triton") != interpreted:
        pytest.skip("Triton runs here in its interpreter only, and nothing else runs there")
    with backend.use(implementation):
        if implementation == "native" and backend.native() is None:
            pytest.skip("the native library was not built")
        chosen = {row.op: row.runs for row in backend.report("cpu")}
        assert list(chosen.values()).count(implementation) >= 6, chosen
        check_training_steps(golden, "cheap", 1 if interpreted else golden.meta["steps"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_training_steps_on_a_gpu(golden: Golden, recompute: str) -> None:
    check_training_steps(golden, recompute, golden.meta["steps"], torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["triton", "sdpa", "reference"])  # the others take no float32
def test_training_steps_with_every_backend_on_a_gpu(golden: Golden, implementation: str) -> None:
    with backend.use(implementation):
        check_training_steps(golden, "cheap", golden.meta["steps"], torch.device("cuda", 0))


def check_training_steps(
    golden: Golden, recompute: str, steps: int, device: torch.device = torch.device("cpu")
) -> None:
    meta = golden.meta
    model = model_of(golden, recompute).to(device)
    cfg = model.cfg
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(cfg, device)
    values = StepValues(
        lr=meta["lr"], weight_decay=meta["wd"], momentum=meta["momentum"], teacher_temp=meta["teacher_temp"]
    )
    for step in range(steps):
        out = model(golden.inputs(step).to(device), meta["teacher_temp"])
        check_losses(golden, step, out)
        optimizer.zero_grad()
        out["loss"].backward()
        norm, _ = apply_gradients(optimizer, scaler, values, meta["clip"], out["loss"].detach())
        close(norm.view(1), golden.tensors[f"step{step}.grad_norm"], 1e-4, "gradient norm")
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        wanted = golden.under(f"step{step}.grad.")
        assert gradients.keys() == wanted.keys()
        for name, grad in gradients.items():
            close(grad, wanted[name], 1e-4, f"step {step} gradient of {name}")
        model.update_center(out["teacher_mean"])
        model.update_teacher(meta["momentum"])
        close(model.center, golden.tensors[f"step{step}.center"], 1e-4, "center")
        check_parameters(golden, step, model)


def check_losses(golden: Golden, step: int, out: dict[str, Tensor]) -> None:
    names = {
        "loss": "loss",
        "loss.global_dino_loss": "global_cls_loss",
        "loss.local_dino_loss": "local_cls_loss",
        "loss.koleo_loss": "koleo_loss",
        "loss.mae_loss": "pixel_loss",
    }
    for theirs, ours in names.items():
        close(out[ours].detach().view(1), golden.tensors[f"step{step}.{theirs}"], 1e-5, f"step {step} {ours}")


def check_parameters(golden: Golden, step: int, model: PerA) -> None:
    state, gradients = model.state_dict(), golden.under(f"step{step}.grad.")
    compared = total = 0
    for name, want in golden.under(f"step{step}.after.").items():
        # AdamW turns a gradient of nothing but rounding into a full step: compare where there is a gradient.
        grad = gradients[name.replace("teacher.", "student.")]
        real = grad.abs() > 1e-6
        compared, total = compared + int(real.sum()), total + real.numel()
        difference = torch.where(real, state[name].cpu() - want, 0.0).abs().max().item()
        assert difference <= 1e-5, f"step {step} {name} after the step: off by {difference:.3g}"
    assert compared > 0.5 * total, f"only {compared} of {total} parameters have a gradient to compare by"


def test_masks_are_disjoint_and_complete(golden: Golden) -> None:
    for group in (golden.inputs(0).global_, golden.inputs(0).local):
        rows = torch.cat([group.student_index, group.predicted_index, group.teacher_index], dim=1).sort(dim=1).values
        assert torch.equal(rows, torch.arange(rows.shape[1], dtype=torch.int32).expand_as(rows))


def test_pixel_loss_is_zero_without_predicted_patches(golden: Golden) -> None:
    model, inputs = model_of(golden), golden.inputs(0)
    model.cfg = model.cfg.with_values({"model.student_ratio": 0.4})
    ranks = golden.tensors["step0.rank.global"].numpy()
    n_student, n_predicted, _ = model.cfg.model.patch_counts(ranks.shape[1])
    student, _, teacher = indices_from_ranks(ranks, n_student + n_predicted, 0)
    inputs.global_.student_index = torch.from_numpy(student)
    inputs.global_.predicted_index = torch.from_numpy(np.empty((len(ranks), 0), np.int32))
    inputs.global_.teacher_index = torch.from_numpy(teacher)
    out = model(inputs, golden.meta["teacher_temp"])
    assert out["pixel_loss"] == 0
    assert torch.isfinite(out["loss"])


def test_jitter() -> None:
    with safe_open(GOLDEN / "color_jitter.safetensors", "pt") as file:
        images, order, factors, want = (file.get_tensor(name) for name in ("input", "order", "factors", "output_float"))
    n, height, width, channels = images.shape
    size = math.gcd(height, width)
    rows, columns = height // size, width // size
    index = torch.arange(rows * columns, dtype=torch.int32).repeat(n, 1)
    gray = contrast_mean(images, order, factors)
    plain = [0.0] * channels, [1.0] * channels
    patches = visible_patches(images, index, order, factors, gray, *plain, size, torch.float32)
    got = patches.view(n, rows, columns, channels, size, size).permute(0, 1, 4, 2, 5, 3).reshape(want.shape)
    assert (got - want).abs().max() <= 2e-3


NUMBER = r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"


def _numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(NUMBER, text)]


def schedule_config(metadata: dict[str, str]) -> Config:
    """The configuration that the file's metadata describes in words."""
    names = {
        "lr": ("lr", "final_lr", "warmup_epochs", "warmup_lr"),
        "wd": ("weight_decay", "final_weight_decay"),
        "tm": ("teacher_momentum", "final_teacher_momentum"),
        "tt": ("warmup_teacher_temp", "", "teacher_temp_warmup_epochs", "teacher_temp"),
    }
    values: dict[str, Any] = {"train.epochs": int(metadata["epochs"])}
    for key, wanted in names.items():
        numbers = zip(wanted, _numbers(metadata[key]), strict=True)
        values |= {f"optim.{name}": number for name, number in numbers if name}
    return Config().with_values(values)


@pytest.fixture(scope="module")
def schedule_numbers() -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(str(GOLDEN / "schedules.safetensors"), "np") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("as_steps", [False, True], ids=["train.epochs", "train.steps"])
def test_schedules(schedule_numbers: tuple[dict[str, str], dict[str, np.ndarray]], as_steps: bool) -> None:
    metadata, want = schedule_numbers
    cfg, per_epoch = schedule_config(metadata), int(metadata["iters_per_epoch"])
    if as_steps:  # the same length given in steps: the warm-ups keep their fractions
        cfg, per_epoch_given = cfg.with_values({"train.steps": cfg.train.epochs * per_epoch}), 1
    else:
        per_epoch_given = per_epoch
    schedules = make_schedules(cfg, per_epoch_given)
    names = {"lr": "lr", "wd": "weight_decay", "tm": "momentum", "tt": "teacher_temp"}
    for key, values in want.items():
        got = [getattr(schedules.at(step), names[key]) for step in range(schedules.steps)]
        np.testing.assert_allclose(got, values, rtol=1e-12, atol=1e-15, err_msg=key)
