"""Many bands and 16 bits in visible_patches, contrast_mean and pixel_loss: every implementation, float64 reference."""

import itertools
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import each_on_cpu, runs
from patches_support import PatchArguments
from torch import Tensor

from pera_kernels import backend
from pera_kernels.pixel_loss import eager as pixel_eager
from pera_kernels.pixel_loss import pixel_loss
from pera_kernels.pixel_loss import reference as pixel_reference
from pera_kernels.visible_patches import contrast_mean, eager, reference, visible_patches
from pera_kernels.visible_patches.arguments import Patches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["reference", "eager", "native", *(["triton"] if INTERPRETED else [])]
ORDERS = [*itertools.permutations(range(4)), (4, -1, -1, -1), (0, 4, 1, -1), (-1, -1, -1, -1), (1, -1, -1, -1)]
SOME = ORDERS[:: 9 if INTERPRETED else 3]  # the interpreter takes 30 ms for what one program does
LARGEST = {torch.uint8: 255, torch.uint16: 65535}
BANDS = [(3, (2, 1, 0)), (4, None), (6, (4, 0, 3))]
if not INTERPRETED:
    BANDS += [(3, None), (3, ()), (6, (0, 1, 2)), (1, None)]


available = partial(runs, "visible_patches")
implementation = each_on_cpu("visible_patches", IMPLEMENTATIONS)


@dataclass
class Case(PatchArguments):
    """The ops on any number of bands."""

    rgb: tuple[int, ...] | None

    def where(self) -> tuple:
        return tuple(vars(self).values())[:-1]

    def rows(self, dtype: torch.dtype, op: Any = visible_patches) -> Tensor:
        return op(*self.where(), dtype, rgb=self.rgb)

    def eager_rows(self, dtype: torch.dtype) -> Tensor:
        return eager.visible_patches(Patches(**vars(self)), dtype)

    def grays(self, op: Any = contrast_mean, **options: Any) -> Tensor:
        return op(self.crops, self.order, self.factors, rgb=self.rgb, **options)


def make_case(
    channels: int,
    rgb: tuple[int, ...] | None,
    dtype: torch.dtype = torch.uint16,
    orders: list[tuple[int, ...]] = SOME,
    patch_size: int = 5,
    seed: int = 0,
) -> Case:
    """Random crops of 3 x 2 patches with plain black, white and gray corners, bands of unlike brightness."""
    random = torch.Generator().manual_seed(seed)
    n, top = len(orders), LARGEST[dtype]
    values = torch.rand(n, 3 * patch_size, 2 * patch_size, channels, generator=random)
    values = values * torch.linspace(1, 0.3, channels)
    values[:, 0, :1], values[:, 0, 1:2], values[:, -1, -1:] = 0, 1, 0.3
    crops = (values * top).round().int().to(dtype)
    index = torch.randint(0, 6, (n, 4), dtype=torch.int32, generator=random)
    low, span = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors = low + span * torch.rand(n, 4, generator=random)
    mean, std = [0.4 + 0.02 * c for c in range(channels)], [0.2 + 0.01 * c for c in range(channels)]
    order = torch.tensor(orders, dtype=torch.int32).view(n, 4)
    return Case(crops, index, order, factors, None, mean, std, patch_size, rgb)


def check(result: Tensor, right: Tensor, plain: Tensor) -> None:
    """Three times the error of eager PyTorch in the same dtype, and two roundings, as small samples may be lucky."""
    assert result.shape == right.shape
    precision, plain_precision = torch.finfo(result.dtype).eps, torch.finfo(plain.dtype).eps
    error = (plain.double() - right).abs().max() * precision / plain_precision
    allowed = 3 * error + 2 * precision * right.abs().max()
    assert 0 < allowed < 0.1 * right.abs().max()
    assert (result.double() - right).abs().max() <= allowed


@pytest.mark.parametrize(("channels", "rgb"), BANDS, ids=str)
@pytest.mark.parametrize("pixels", LARGEST, ids=str)
def test_rows_and_grays(implementation: str, channels: int, rgb: tuple[int, ...] | None, pixels: torch.dtype) -> None:
    sizes = [8 if channels % 2 else 5] if INTERPRETED else [5, 8]
    for patch_size in sizes:
        case = make_case(channels, rgb, pixels, patch_size=patch_size)
        right = case.rows(torch.float64, reference.visible_patches)
        for dtype in (torch.float32, torch.float16, *(() if INTERPRETED else (torch.bfloat16, torch.float64))):
            plain = torch.float32 if dtype == torch.float64 else dtype
            check(case.rows(dtype), right, case.eager_rows(plain))
        grays = case.grays(reference.contrast_mean, dtype=torch.float64)
        torch.testing.assert_close(case.grays().double(), grays, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("channels", "rgb"), BANDS, ids=str)
@pytest.mark.parametrize("pixels", LARGEST, ids=str)
def test_pixel_loss(implementation: str, channels: int, rgb: tuple[int, ...] | None, pixels: torch.dtype) -> None:
    for dtype, patch_size in ((torch.float32, 5), (torch.float16, 8)):
        case = make_case(channels, rgb, pixels, SOME[:3], patch_size)
        random = torch.Generator().manual_seed(1)
        pred = torch.randn(case.index.numel(), patch_size**2 * channels, generator=random).to(dtype)
        results = []
        for op, leaf in (
            (pixel_loss, pred.clone()),
            (pixel_reference.pixel_loss, pred.double()),
            (lambda pred, *where, rgb: pixel_eager.pixel_loss(pred, Patches(*where, rgb)), pred.clone()),
        ):
            leaf.requires_grad_()
            loss = op(leaf, *case.where(), rgb=rgb)
            (loss * 1.7).backward()
            results.append((loss.detach(), leaf.grad))
        for result, right, plain in zip(*results, strict=True):
            check(result, right, plain)


@pytest.mark.parametrize("pixels", LARGEST, ids=str)
def test_declared_colours_are_those_of_an_rgb_image(implementation: str, pixels: torch.dtype) -> None:
    """Red, green and blue among other bands become what they become alone; the others what bands without colours do."""
    rgb, others = (4, 0, 3), [1, 2, 5]
    case = make_case(6, rgb, pixels)
    case = replace(case, gray_mean=case.grays())

    def part(channels: list[int], colours: tuple[int, ...] | None) -> Tensor:
        mean, std = ([values[c] for c in channels] for values in (case.mean, case.std))
        some = replace(case, crops=case.crops[..., channels].contiguous(), mean=mean, std=std, rgb=colours)
        return some.rows(torch.float32).unflatten(1, (3, -1))

    whole = case.rows(torch.float32).unflatten(1, (6, -1))
    torch.testing.assert_close(whole[:, rgb], part(list(rgb), None), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole[:, others], part(others, ()), rtol=1e-6, atol=1e-6)
    no_colours = replace(case, rgb=()).rows(torch.float32).unflatten(1, (6, -1))
    assert torch.equal(no_colours[:, others], whole[:, others])
    assert not torch.allclose(no_colours[:, rgb], whole[:, rgb], atol=0.01)


def test_contrast_blends_with_the_mean_over_all_bands(implementation: str) -> None:
    case = make_case(6, (0, 1, 2), orders=[(1, -1, -1, -1)])
    mean = case.crops.double().mean() / 65535
    torch.testing.assert_close(case.grays().double(), mean.view(1), rtol=1e-6, atol=0)
    case = replace(case, factors=torch.zeros(1, 4), mean=[0.0] * 6, std=[1.0] * 6)  # nothing is left but the gray
    torch.testing.assert_close(case.rows(torch.float32).double(), mean.expand(4, 150), rtol=1e-6, atol=0)


def test_8_bit_rgb_is_what_it_was(implementation: str) -> None:
    """To say that the three channels are red, green and blue changes no bit; nor does it to turn them round twice."""
    for patch_size in (5, 16):
        case = make_case(3, None, torch.uint8, patch_size=patch_size)
        plain = case.rows(torch.float32)
        assert torch.equal(replace(case, rgb=(0, 1, 2)).rows(torch.float32), plain)
        turned = replace(case, crops=case.crops.flip(3), rgb=(2, 1, 0), mean=case.mean[::-1], std=case.std[::-1])
        turned_rows = turned.rows(torch.float32).unflatten(1, (3, -1)).flip(1).flatten(1)
        torch.testing.assert_close(turned_rows, plain, rtol=2e-6, atol=2e-6)


def test_16_bits_of_8_bit_values_are_the_same_rows(implementation: str) -> None:
    for channels, rgb in BANDS:
        eight = make_case(channels, rgb, torch.uint8)
        sixteen = replace(eight, crops=(eight.crops.int() * 257).to(torch.uint16))
        torch.testing.assert_close(sixteen.rows(torch.float32), eight.rows(torch.float32), rtol=3e-6, atol=3e-6)


def test_a_12_bit_gradient_keeps_its_levels(implementation: str) -> None:
    """4096 levels as uint16 come out as 4096 levels; as uint8 they would be 256."""
    levels = torch.arange(4096, dtype=torch.int32).view(1, 64, 64, 1) * 16
    index = torch.arange(16, dtype=torch.int32).view(1, -1)
    rows = visible_patches(levels.to(torch.uint16), index, None, None, None, [0.5], [0.25], 16, torch.float32)
    assert rows.unique().numel() == 4096
    values = (rows * 0.25 + 0.5).flatten().sort().values
    assert (values - levels.flatten() / 65535).abs().max() < 1e-6


def test_strides(implementation: str) -> None:
    case = make_case(6, (4, 0, 3))
    n, h, w, c = case.crops.shape
    planar = case.crops.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.zeros(n, h + 1, w + 3, c, dtype=torch.uint16)[:, 1:, 2:-1].copy_(case.crops)
    grays = case.grays()
    right = replace(case, gray_mean=grays).rows(torch.float32)
    for crops in (planar, wide):
        assert not crops.is_contiguous()
        # PyTorch's own sums may take another order
        torch.testing.assert_close(replace(case, crops=crops).grays(), grays, rtol=1e-6, atol=0)
        given = replace(case, crops=crops, gray_mean=grays).rows(torch.float32)
        assert torch.equal(given, right)


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_bands(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 9), label="channels")
    chosen = st.permutations(range(channels)).map(lambda order: tuple(order[:3])) if channels >= 3 else st.just(())
    rgb = data.draw(st.one_of(st.none(), st.just(()), chosen), label="rgb")
    size, seed = data.draw(st.integers(1, 9), label="patch_size"), data.draw(st.integers(0, 9), label="seed")
    orders = data.draw(st.lists(st.sampled_from(ORDERS), min_size=1, max_size=3), label="orders")
    case = make_case(channels, rgb, data.draw(st.sampled_from(list(LARGEST))), orders, size, seed)
    right, plain = case.rows(torch.float64, reference.visible_patches), case.eager_rows(torch.float32)
    for name in filter(available, IMPLEMENTATIONS):
        with backend.use(name):
            result = case.rows(torch.float32).double()
            assert (result - right).abs().max() <= 3 * (plain - right).abs().max() + 2e-5


@pytest.mark.parametrize("rgb", [(0, 1), (0, 1, 1), (0, 1, 4), (-1, 0, 1), (0, 1, 2, 3)], ids=str)
def test_impossible_colours_are_named(implementation: str, rgb: tuple[int, ...]) -> None:
    case = replace(make_case(4, None), rgb=rgb)
    with pytest.raises(ValueError, match="rgb must be three distinct numbers below 4"):
        case.rows(torch.float32)
    with pytest.raises(ValueError, match="rgb must be three distinct numbers below 4"):
        case.grays()


def test_opcheck(implementation: str) -> None:
    case = make_case(4, (2, 1, 0), orders=SOME[:2])
    torch.library.opcheck(torch.ops.pera.visible_patches, (*case.where(), torch.float32, case.rgb))
    torch.library.opcheck(torch.ops.pera.contrast_mean, (case.crops, case.order, case.factors, case.rgb))
    pred = torch.randn(8, 100, requires_grad=True)
    torch.library.opcheck(torch.ops.pera.pixel_loss, (pred, *case.where(), case.rgb))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("channels", "rgb"), BANDS, ids=str)
def test_on_a_gpu(channels: int, rgb: tuple[int, ...] | None) -> None:
    case = make_case(channels, rgb)
    moved = {name: value.cuda() for name, value in vars(case).items() if isinstance(value, Tensor)}
    result = replace(case, **moved).rows(torch.float32).cpu()
    check(result, case.rows(torch.float64, reference.visible_patches), case.eager_rows(torch.float32))
