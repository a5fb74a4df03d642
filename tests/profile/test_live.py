"""Live bytes by storage lifetime: of single ops, and of a training step simulated without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import load_config
from pera_fast.profile.batches import blank_batch
from pera_fast.profile.fits import MemoryFit, fit_line, fit_points
from pera_fast.profile.live import FUSED, PIECEWISE, LiveBytes
from pera_fast.profile.points import Point, Variant
from pera_fast.profile.simulate import part, simulate_step
from pera_kernels import backend
from pera_kernels.distillation_loss import distillation_loss
from pera_kernels.koleo import koleo
from pera_kernels.pixel_loss import pixel_loss
from pera_kernels.products import half_products
from pera_kernels.prototype_losses import prototype_losses
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.visible_patches import contrast_mean, visible_patches

MIB = 2**20
SMALL = ["model.embed_dim=64", "model.depth=2", "model.prototypes=256", "model.head_hidden=64", "model.bottleneck=32"]


def test_storages_are_counted_from_birth_to_death() -> None:
    with FakeTensorMode(), LiveBytes() as count:
        with count.label("first"):
            a = torch.empty(1024, dtype=torch.float32)
        view = a[10:]
        assert count.live == 4096
        with count.label("second"):
            b = a + 1
        assert count.live == 8192
        since = len(count.events)
        del a, b
        assert count.live == 4096, "a view keeps its storage alive"
        del view
        c = torch.empty(100, dtype=torch.uint8)
    assert count.live == 100
    peak, alive = count.peak()
    assert peak == 8192
    assert count.by_label(alive) == {("first",): 4096, ("second",): 4096}
    assert count.by_label(alive, {0: ("other",)}) == {("other",): 4096, ("second",): 4096}
    assert count.number(c) == 2
    assert count.peak(since)[0] == 8192, "what is alive at the beginning counts"
    assert count.peak(since + 2)[0] == 100


def test_ops_are_opened_once_for_equal_shapes() -> None:
    """A LayerNorm of half rows takes a float32 copy of them where no kernel of our own runs."""
    with backend.without("native", "triton"), FakeTensorMode(), LiveBytes(skip=PIECEWISE) as count:
        x = torch.empty(256, 64, dtype=torch.bfloat16)
        weight, bias = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
        before = count.live
        peaks = []
        for _ in range(2):
            since = len(count.events)
            y = sequence_norm(x, weight, bias, 1e-6, [256, 1])
            peaks.append(count.peak(since)[0] - before)
            assert count.live - before == y.nbytes
            del y
        assert peaks[0] == peaks[1], "replayed"
        assert peaks[0] > 256 * 64 * (2 + 4), "more than the result: wide rows"
        assert len(count._opened) == 1


@pytest.mark.parametrize("images", [2, 6])
def test_ops_that_are_not_opened_hold_a_few_mib(images: int) -> None:
    cfg = load_config("vit_b16", ["views.global_size=224", "views.num_local=0"])
    crops = blank_batch(cfg, images).global_
    mean, std = cfg.views.mean, cfg.views.std
    with backend.without("native", "triton"), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        count = LiveBytes(skip=frozenset())
        given = crops.pixels, crops.student.order, crops.student.factors
        pixels, order, factors = (fake.from_tensor(t) for t in given)
        index = torch.zeros(pixels.shape[0], 40, dtype=torch.int32)
        pred = torch.zeros(pixels.shape[0] * 40, 768, dtype=torch.bfloat16, requires_grad=True)
        rows = torch.zeros(40 * images, 384, dtype=torch.bfloat16, requires_grad=True)
        v, g = (torch.ones(8192, width, requires_grad=True) for width in (384, 1))
        with count:
            gray = contrast_mean(pixels, order, factors)
            visible_patches(pixels, index, order, factors, gray, mean, std, 16, torch.bfloat16)
            pixel_loss(pred, pixels, index, order, factors, gray, mean, std, 16).backward()
            koleo(rows, v, g, 2).backward()
            teacher = rows.detach(), v.detach(), g.detach()
            distillation_loss(rows, v, g, *teacher, v.detach()[:, 0], 0.1, 0.05).sum().backward()
            entropies, spread = prototype_losses(rows, v, g, *teacher, v.detach()[:, 0], 0.1, 0.05, 8, 2)
            (entropies.sum() + spread).backward()
    opened = {name: size for (name, *_), size in count._opened.items()}
    assert PIECEWISE & opened.keys() == opened.keys()
    assert len(opened) == 10, "two have no gradient"
    prototypes = rows.nbytes + v.nbytes + g.nbytes
    results = {"pera::visible_patches": pred.nbytes, "pera::pixel_loss_backward": pred.nbytes}
    results |= {f"pera::{name}_backward": prototypes for name in ("koleo", "distillation_loss", "prototype_losses")}
    for name, size in opened.items():
        assert 0 < size - results.get(name, 0) < 32 * MIB, name


def test_parts_of_a_small_step() -> None:
    cfg = load_config("tiny", [*SMALL, "train.batch_size=4", "train.precision=bf16"])
    memory = simulate_step(cfg)
    parameters = 4 * sum(p.numel() for p in _model(cfg).parameters())
    trained = 4 * sum(p.numel() for p in _model(cfg).parameters() if p.requires_grad)
    center = 4 * cfg.model.prototypes
    assert sum(memory.at_peak.values()) == memory.peak
    assert memory.peak > memory.between_steps
    assert parameters + center <= memory.at_peak["weights"] < 1.1 * (parameters + center)
    assert memory.at_peak["optimiser state"] == pytest.approx(2 * trained, rel=0.01)
    assert memory.at_peak["crops"] >= 4 * (2 * 96 * 96 + 4 * 40 * 40) * 3
    assert {"student attention", "student mlp", "student embed", "backward"} <= memory.at_peak.keys()


def _model(cfg):
    from pera_fast.model.pera import PerA

    with torch.device("meta"):
        return PerA(cfg)


def test_every_image_takes_the_same_and_recomputation_less() -> None:
    slopes = {}
    for policy, batches in (("none", (4, 8, 12)), ("block", (4, 8))):
        variant = Variant("tiny", (*SMALL, f"model.recompute={policy}"))
        peaks = [simulate_step(variant.config(batch)).peak for batch in batches]
        points = [Point(variant, b, "simulate", status="ok", peak=p) for b, p in zip(batches, peaks, strict=True)]
        line = fit_line(batches, [p.peak for p in points])
        assert line is not None
        assert line.deviation < 0.01
        slopes[policy] = line.slope
    assert slopes["none"] > slopes["block"]


def test_accumulated_gradients_are_alive_in_the_forward_pass() -> None:
    one = simulate_step(load_config("tiny", [*SMALL, "train.batch_size=4"]))
    two = simulate_step(load_config("tiny", [*SMALL, "train.batch_size=4", "train.accumulate=2"]))
    assert two.peak > one.peak


def test_parts_have_names() -> None:
    assert part(("student", "mlp", "sequence_add")) == "student mlp"
    assert part(("student",)) == "student stream"
    assert part(("backward", "mlp", "attention")) == "backward"
    assert part(("optimiser",)) == part(("EMA",)) == "update"
    assert part(()) == "other"


def memory(policy: str) -> MemoryFit:
    """Batches 8 and 16 at the published sizes: 448 px, 2 + 8 crops, 131072 prototypes, bf16."""
    variant = Variant("vit_b16", (f"model.recompute={policy}",))
    points = [Point(variant, b, "simulate", status="ok", peak=simulate_step(variant.config(b)).peak) for b in (8, 16)]
    line = fit_points(points)
    assert line is not None
    return line


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "slope"), [("cheap", 80), ("block", 40)])
def test_vit_b16_memory(policy: str, slope: float) -> None:
    line = memory(policy)
    print(f"vit_b16 {policy}: {line.fixed / MIB:.0f} + {line.slope / MIB:.1f} * batch MiB")
    assert line.slope / MIB <= slope
    assert line.fixed / MIB <= 3400


@pytest.mark.slow
def test_masks_save_memory_at_vit_b16() -> None:
    """More than three times the batch fits, because neither network sees what is masked (docs/method.md section 1)."""
    slopes = []
    for masking in ("random", "none"):
        variant = Variant("vit_b16", ("model.recompute=cheap", f"model.masking={masking}"))
        peaks = [simulate_step(variant.config(batch)).peak for batch in (64, 128)]
        slopes.append((peaks[1] - peaks[0]) / 64)
    print(f"sparse {slopes[0] / MIB:.1f}, dense {slopes[1] / MIB:.1f} MiB per image: {slopes[1] / slopes[0]:.2f}x")
    assert 3 < slopes[1] / slopes[0] < 5


def loss_bytes(images: int) -> tuple[int, int]:
    """Most bytes alive of the losses on the prototypes at vit_b16, and those kept between forward and backward."""
    cfg = load_config("vit_b16", [])
    k, d, crops = cfg.model.prototypes, cfg.model.bottleneck, cfg.views.num_global
    n = images * (crops + cfg.views.num_local)
    with backend.without("native", "triton"), half_products(), FakeTensorMode(), LiveBytes(skip=FUSED) as count:
        rows, teacher_rows = torch.empty(2, n, d, dtype=torch.bfloat16).requires_grad_().unbind()
        v, teacher_v = (torch.empty(k, d, requires_grad=True) for _ in range(2))
        g, teacher_g = (torch.empty(k, 1, requires_grad=True) for _ in range(2))
        before, since = count.live, len(count.events)
        networks = rows, v, g, teacher_rows.detach(), teacher_v.detach(), teacher_g.detach()
        entropies, spread = prototype_losses(*networks, torch.empty(k), 0.1, 0.05, images * crops, crops)
        loss = entropies.sum() + spread
        kept = count.live - before
        loss.backward()
        return count.peak(since)[0] - before, kept


def test_losses_take_little_memory_per_image() -> None:
    """A logit of each of an image's ten rows to 131072 prototypes, in float32, would be 5 MiB per network."""
    (first, first_kept), (second, second_kept) = loss_bytes(8), loss_bytes(16)
    print(f"losses: {(second - first) / 8 / MIB:.3f} MiB per image, kept {(second_kept - first_kept) / 8 / MIB:.3f}")
    assert second - first <= 2 * 8 * MIB
    assert second_kept - first_kept <= 0.1 * 8 * MIB
