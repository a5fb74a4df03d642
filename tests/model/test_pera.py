"""The whole model on uint8 crops: options, recomputation, precision, token counts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pera_fast.config import Config, load_config
from pera_fast.data.loading.batch import Batch, ColorParams, CropGroup
from pera_fast.model.pera import PerA
from pera_fast.model.transformer import VisionTransformer, bicubic_matrix
from pera_fast.train.inputs import kept_sequences, make_inputs

SMALL = [
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.depth=4",
    "model.patch_size=8",
    "model.head_hidden=32",
    "model.bottleneck=16",
    "model.prototypes=96",
    "model.drop_path=0.3",
    "views.global_size=48",
    "views.local_size=24",
    "views.num_local=3",
    "train.batch_size=4",
]


needs_inductor = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="Inductor's C++ does not compile where torch is held to no vector units",
)


def config(*overrides: str) -> Config:
    return load_config("tiny", [*SMALL, *overrides])


def colours(n: int, seed: int) -> ColorParams:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, 4, generator=generator).argsort(1).int()
    order[::3] = -1
    order[1::5] = torch.tensor([4, -1, -1, -1], dtype=torch.int32)
    factors = 1 + 0.4 * (torch.rand(n, 4, generator=generator) - 0.5)
    factors[:, 3] -= 1
    return ColorParams(order, factors)


def crops(cfg: Config, count: int, size: int, seed: int) -> CropGroup:
    n = count * cfg.train.batch_size
    shape = (n, size, size, cfg.model.in_chans)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return CropGroup(pixels, colours(n, seed + 1), colours(n, seed + 2))


def batch_of(cfg: Config, micro_step: int = 3) -> Batch:
    views = cfg.views
    return Batch(
        micro_step=micro_step,
        epoch=1,
        samples=torch.arange(10, 10 + cfg.train.batch_size).numpy(),
        global_=crops(cfg, views.num_global, views.global_size, 1),
        local=crops(cfg, views.num_local, views.local_size, 2),
    )


def step(cfg: Config, dtype: torch.dtype = torch.float32) -> tuple[PerA, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = PerA(cfg).to(dtype)
    out = model(make_inputs(batch_of(cfg), cfg), 0.04)
    out["loss"].backward()
    return model, out


def gradients(model: PerA) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.masking=block"],
        ["model.masking=grid"],
        ["model.masking=none"],
        ["loss.koleo_on=bottleneck"],
        ["loss.koleo_weight=0"],
        ["loss.centering=sinkhorn"],
        ["model.in_chans=5"],
        ["model.in_chans=1"],
        ["model.drop_path=0"],
        ["views.num_local=0"],
        ["train.batch_size=1"],
        ["model.student_ratio=0.4"],
        ["train.precision=bf16"],
        ["train.precision=fp16"],
    ],
    ids=lambda o: ",".join(o) or "published",
)
def test_options_train(overrides: list[str]) -> None:
    cfg = config(*overrides)
    model, out = step(cfg)
    assert torch.isfinite(out["loss"])
    for name, grad in gradients(model).items():
        unused = (cfg.model.masking == "none" or cfg.model.student_ratio == 0.4) and name.startswith(
            ("pred_", "s_mask")
        )
        assert (grad is None) == unused, name
        assert unused or torch.isfinite(grad).all(), name
    assert all(p.grad is None for p in model.teacher.parameters())


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    cfg = config()
    _, out = step(cfg)
    koleo, pixel = out["koleo_loss"] * cfg.views.num_global, out["pixel_loss"] * 100 * cfg.views.num_global
    total = out["global_cls_loss"] + out["local_cls_loss"] + 0.1 * koleo + 0.01 * pixel
    assert torch.allclose(total, out["loss"].detach(), rtol=1e-6)


@pytest.mark.parametrize("policy", ["cheap", "block"])
def test_recomputation_changes_no_gradient(policy: str) -> None:
    model, out = step(config())
    other, other_out = step(config(f"model.recompute={policy}"))
    assert torch.equal(out["loss"], other_out["loss"])
    for (name, grad), got in zip(gradients(model).items(), gradients(other).values(), strict=True):
        assert (grad - got).norm() <= 2e-6 * grad.norm() + 1e-12, name


@pytest.mark.parametrize(
    ("policy", "backend"),
    [
        ("none", "aot_eager"),
        ("block", "aot_eager"),
        pytest.param("cheap", "inductor", marks=needs_inductor),  # does all that aot_eager does
    ],
)
def test_blocks_compile_as_one_graph(policy: str, backend: str) -> None:
    cfg = config(f"model.recompute={policy}", "model.depth=4")
    model, _ = step(cfg)
    exact, exact_out = step(cfg, torch.float64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    compiled = PerA(cfg)
    compiled.compile_blocks(backend)
    compiled_out = compiled(make_inputs(batch_of(cfg), cfg), 0.04)
    compiled_out["loss"].backward()
    # Teacher: first, middle, last. Student, before and after the mask tokens: first, second, which is after them the
    # last; with policy "block" every block is given a complete stream, as the first one is.
    graphs = 3 + (3 if policy == "block" else 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(compiled_out["loss"], exact_out["loss"], rtol=4 * eps, atol=0)
    wanted = gradients(exact)

    def errors(of: PerA) -> dict[str, float]:
        return {k: float((g - wanted[k]).norm() / wanted[k].norm()) for k, g in gradients(of).items()}

    allowed = 3 * max(eps, *errors(model).values())
    assert all(error <= allowed for error in errors(compiled).values()), errors(compiled)


def test_steps_repeat_to_the_bit() -> None:
    first, second = step(config())[0], step(config())[0]
    for a, b in zip(gradients(first).values(), gradients(second).values(), strict=True):
        assert torch.equal(a, b)


class LargestTensors(TorchDispatchMode):
    """Shapes of the tensors that ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return out


def test_only_visible_patches_are_embedded_and_no_logits_are_held() -> None:
    cfg = config("model.prototypes=20011")  # a prime: a tensor of N * K elements has this factor
    torch.manual_seed(0)
    model, inputs = PerA(cfg), make_inputs(batch_of(cfg), cfg)
    with LargestTensors() as seen:
        model(inputs, 0.04)["loss"].backward()
    rows = cfg.train.batch_size * (cfg.views.num_global + cfg.views.num_local)
    assert (rows, cfg.model.prototypes) not in seen.shapes
    num_patches = (cfg.views.global_size // cfg.model.patch_size) ** 2
    n_global = cfg.train.batch_size * cfg.views.num_global
    dense = {(n_global * num_patches, cfg.model.embed_dim), (n_global, num_patches, cfg.model.embed_dim)}
    assert not dense & seen.shapes


class HostReads(TorchDispatchMode):
    """Refuses ops that make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{name} synchronises the host with the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masking", ["random", "none"])
def test_no_host_synchronisation_in_a_step(masking: str) -> None:
    cfg = config(f"model.masking={masking}")
    model, inputs = PerA(cfg), make_inputs(batch_of(cfg), cfg)
    with HostReads():
        out = model(inputs, 0.04)
        out["loss"].backward()
        model.update_center(out["teacher_mean"])
        model.update_teacher(0.99)


def test_teacher_follows_the_student() -> None:
    cfg = config()
    model = PerA(cfg)
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(0.9)
    for t, b, s in zip(model.teacher.parameters(), before, model.student.parameters(), strict=True):
        assert torch.allclose(t, 0.9 * b + 0.1 * s, atol=1e-6)


def test_kept_sequences() -> None:
    cfg = config()
    keep = kept_sequences(cfg, [8, 12], micro_step=5, rank=0)
    assert keep.shape == (cfg.model.depth, 2, 5 + 8)  # int(8 * .7), int(12 * .7)
    for branch in keep.reshape(-1, 13):
        for part, n in ((branch[:5], 8), (branch[5:], 12)):
            assert len(set(part.tolist())) == len(part)
            assert part.min() >= 0
            assert part.max() < n
    assert not (keep == kept_sequences(cfg, [8, 12], micro_step=6, rank=0)).all()
    assert not (keep == kept_sequences(cfg, [8, 12], micro_step=5, rank=1)).all()
    assert (keep == kept_sequences(cfg, [8, 12], micro_step=5, rank=0)).all()


def test_places_from_the_host_are_those_that_the_model_would_make() -> None:
    cfg = config()
    model, inputs = PerA(cfg), make_inputs(batch_of(cfg), cfg)
    sequences = [group.student_index.shape[0] for group in (inputs.global_, inputs.local)]
    assert inputs.places.shape == (cfg.model.depth, 2, sum(sequences))
    losses = [model(i, 0.04)["loss"] for i in (inputs, replace(inputs, places=None))]
    assert losses[0] == losses[1]


def test_masks_belong_to_samples_not_to_batches() -> None:
    cfg = config()
    whole = make_inputs(batch_of(cfg), cfg)
    batch = batch_of(cfg, micro_step=9)
    batch.samples = batch.samples[2:]
    for name, count in (("global_", 2), ("local", 3)):
        group = getattr(batch, name)
        pick = [c * 4 + i for c in range(count) for i in (2, 3)]
        setattr(batch, name, CropGroup(group.pixels[pick], *(_pick(p, pick) for p in (group.student, group.teacher))))
    part = make_inputs(batch, cfg)
    index = whole.global_.student_index.view(2, 4, -1)[:, 2:].flatten(0, 1)
    assert torch.equal(part.global_.student_index, index)


def _pick(colour: ColorParams, rows: list[int]) -> ColorParams:
    return ColorParams(colour.order[rows], colour.factors[rows])


def test_position_interpolation_is_bicubic() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(6, 8, 3, 16, 1, 2)
    pos = vit.pos_embed[:, 1:].view(1, 6, 6, 16).permute(0, 3, 1, 2)
    scale = (3 + 0.1) / 6
    want = torch.nn.functional.interpolate(pos, scale_factor=(scale, scale), mode="bicubic")
    got = vit.position(3)
    assert torch.allclose(got[1:], want.flatten(2)[0].t(), atol=1e-6)
    assert torch.equal(got[0], vit.pos_embed[0, 0])
    assert torch.allclose(bicubic_matrix(6, 3).sum(1), torch.ones(9), atol=1e-6)
