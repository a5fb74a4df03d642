"""`visible_patches` and `contrast_mean`: every implementation against the float64 reference."""

import itertools
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import each_on_cpu, runs
from patches_support import PatchArguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pera_kernels import backend
from pera_kernels.visible_patches import contrast_mean, eager, reference, visible_patches
from pera_kernels.visible_patches.arguments import Patches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["reference", "eager", "native", *(["triton"] if INTERPRETED else [])]
ORDERS = [*itertools.permutations(range(4)), (4, -1, -1, -1), (-1, -1, 4, -1), (-1, -1, -1, -1)]
ORDERS += [(1, -1, -1, -1), (0, 4, 1, -1), (2, 4, 3, 1), (-1, 3, -1, 1), (3, 0, -1, -1), (-1, -1, -1, 2)]
SOME = ORDERS[::8] if INTERPRETED else ORDERS  # the interpreter takes 30 ms for what one program does
MEAN, STD = [0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]


implementation = each_on_cpu("visible_patches", IMPLEMENTATIONS)


class Case(PatchArguments):
    """The ops on RGB."""

    def args(self, dtype: torch.dtype) -> tuple:
        return (*vars(self).values(), dtype)

    def eager(self, dtype: torch.dtype) -> Tensor:
        return eager.visible_patches(Patches(**vars(self)), dtype)


def make_case(
    orders: list[tuple[int, ...]],
    *,
    rows: int = 3,
    columns: int = 2,
    channels: int = 3,
    patch_size: int = 5,
    seen: int = 3,
    seed: int = 0,
) -> Case:
    """Random crops, with plain gray, black and white corners (hue of a gray pixel is the delicate case)."""
    random = torch.Generator().manual_seed(seed)
    n, h, w = len(orders), rows * patch_size, columns * patch_size
    crops = torch.randint(0, 256, (n, h, w, channels), dtype=torch.uint8, generator=random)
    crops[:, 0, :1], crops[:, 0, 1:2], crops[:, -1, -1:] = 0, 255, 77
    index = torch.randint(0, rows * columns, (n, seen), dtype=torch.int32, generator=random)
    low, span = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors = low + span * torch.rand(n, 4, generator=random)
    order = torch.tensor(orders, dtype=torch.int32).view(n, 4)
    return Case(crops, index, order, factors, None, MEAN[:channels], STD[:channels], patch_size)


def truth(case: Case) -> Tensor:
    return reference.visible_patches(*case.args(torch.float64))


@cache
def plain_error(dtype: torch.dtype, channels: int, colored: bool) -> float:
    """Largest error of eager PyTorch in `dtype`, over all orders and enough pixels that luck plays no part."""
    case = make_case(ORDERS, rows=4, columns=4, channels=channels, patch_size=8, seen=8)
    if not colored:
        case = replace(case, order=None, factors=None)
    plain_dtype = torch.float32 if dtype == torch.float64 else dtype
    error = (case.eager(plain_dtype).double() - truth(case)).abs().max().item()
    return error * torch.finfo(dtype).eps / torch.finfo(plain_dtype).eps


def check(result: Tensor, case: Case) -> None:
    """Holds rows against the float64 definition: three times the error that eager PyTorch makes in their dtype."""
    right = truth(case)
    assert result.shape == right.shape
    assert result.is_contiguous()
    allowed = 3 * plain_error(result.dtype, case.crops.shape[3], case.order is not None)
    assert 0 < allowed < 0.05  # the yardstick itself is sane
    assert result.numel() == 0 or (result.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_all_orders_in_one_batch(implementation: str, dtype: torch.dtype) -> None:
    case = make_case(ORDERS if dtype == torch.float32 else SOME)
    result = visible_patches(*case.args(dtype))
    assert result.dtype == dtype
    check(result, case)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_each_order_alone(implementation: str, order: tuple[int, ...]) -> None:
    check(visible_patches(*(case := make_case([order])).args(torch.float32)), case)


@pytest.mark.parametrize("patch_size", [8, 24])
def test_whole_words(implementation: str, patch_size: int) -> None:
    """Sides that are multiples of 8: kernels may read several pixels at once."""
    case = make_case(ORDERS[1::12], rows=2, columns=3, patch_size=patch_size, seen=4)
    check(visible_patches(*case.args(torch.float32)), case)
    right = reference.contrast_mean(case.crops, case.order, case.factors, torch.float64)
    torch.testing.assert_close(contrast_mean(case.crops, case.order, case.factors).double(), right, rtol=1e-6, atol=0)
    moved = torch.empty(case.crops.numel() + 1, dtype=torch.uint8)[1:].view(case.crops.shape).copy_(case.crops)
    assert moved.data_ptr() % 2
    same = visible_patches(*replace(case, crops=moved).args(torch.float32))
    assert torch.equal(same, visible_patches(*case.args(torch.float32)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_contrast_mean(implementation: str, channels: int) -> None:
    case = make_case(ORDERS, channels=channels, rows=9, columns=7)
    result = contrast_mean(case.crops, case.order, case.factors)
    right = reference.contrast_mean(case.crops, case.order, case.factors, torch.float64)
    error = (eager.contrast_mean(case.crops, case.order, case.factors) - right).abs().max()
    assert result.dtype == torch.float32
    assert (result - right).abs().max() <= 3 * error + torch.finfo(torch.float32).eps
    unused = torch.tensor([1 not in order for order in ORDERS])
    assert (result[unused] == 0).all()
    assert (result[~unused] > 0.2).all()


def test_contrast_mean_of_a_wide_crop(implementation: str) -> None:
    """More pixels than one tile, a last tile that is not full, lines longer than a tile."""
    for h, w in [(67, 61), (3, 5000), (4099, 1)]:
        crops = torch.randint(0, 256, (2, h, w, 3), dtype=torch.uint8)
        order = torch.tensor([[1, 0, 2, 3], [3, 0, 1, 2]])
        factors = torch.tensor([[1.2, 0.7, 0.9, 0.05]]).expand(2, 4)
        right = reference.contrast_mean(crops, order, factors, torch.float64)
        torch.testing.assert_close(contrast_mean(crops, order, factors).double(), right, rtol=1e-6, atol=0)


def test_gray_mean_is_taken_where_given(implementation: str) -> None:
    case = make_case(SOME)
    means = contrast_mean(case.crops, case.order, case.factors)
    given = visible_patches(*replace(case, gray_mean=means).args(torch.float32))
    assert torch.equal(given, visible_patches(*case.args(torch.float32)))
    other = replace(case, gray_mean=means + 0.1)
    check(visible_patches(*other.args(torch.float32)), other)
    assert not torch.equal(visible_patches(*other.args(torch.float32)), given)


def test_unseen_pixels_do_not_matter(implementation: str) -> None:
    case = replace(make_case(SOME), gray_mean=torch.full((len(SOME),), 0.4))
    first = visible_patches(*case.args(torch.float32))
    seen = torch.zeros(len(SOME), 6, dtype=torch.bool).scatter_(1, case.index.long(), True)
    mask = seen.view(-1, 3, 1, 2, 1, 1).expand(-1, 3, 5, 2, 5, 3).reshape(case.crops.shape)
    noise = torch.where(mask, case.crops, 255 - case.crops)
    assert not torch.equal(noise, case.crops)
    assert torch.equal(visible_patches(*replace(case, crops=noise).args(torch.float32)), first)


def test_crops_do_not_mix(implementation: str) -> None:
    case = make_case(SOME)
    whole = visible_patches(*case.args(torch.float32)).view(len(SOME), -1)
    for i in range(0, len(SOME), 3):
        one = {name: value[i : i + 1] for name, value in vars(case).items() if isinstance(value, Tensor)}
        assert torch.equal(visible_patches(*replace(case, **one).args(torch.float32)).view(-1), whole[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_color(implementation: str, dtype: torch.dtype) -> None:
    case = replace(make_case([(-1,) * 4] * 3), order=None, factors=None)
    check(visible_patches(*case.args(dtype)), case)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    count = draw(st.integers(0, 3), label="crops")
    size = {name: draw(st.integers(1, 3), label=name) for name in ("rows", "columns")}
    size["channels"] = draw(st.integers(1, 4), label="channels")
    size["patch_size"] = draw(st.integers(1, 17), label="patch_size")
    size["seen"] = draw(st.integers(0, 5), label="seen")
    orders = [draw(st.sampled_from(ORDERS)) for _ in range(count)]
    case = make_case(orders, **size, seed=draw(st.integers(0, 9)))
    if draw(st.booleans(), label="int64"):
        case = replace(case, index=case.index.long(), order=case.order.long())
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    for name in IMPLEMENTATIONS:
        if runs("visible_patches", name):  # the other tests' fixture says why not
            with backend.use(name):
                check(visible_patches(*case.args(dtype)), case)


def test_strides(implementation: str) -> None:
    case = make_case(SOME, rows=4, columns=4)
    n, h, w, c = case.crops.shape
    right = visible_patches(*case.args(torch.float32))
    planar = case.crops.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # NCHW in memory
    wide = torch.zeros(n, h + 2, w + 3, c, dtype=torch.uint8)[:, 1:-1, 2:-1].copy_(case.crops)
    spread = torch.zeros(n, h, w, 2 * c, dtype=torch.uint8)[..., ::2].copy_(case.crops)
    index = torch.zeros(case.index.shape[1], n, dtype=torch.int32).t().copy_(case.index)
    order = torch.zeros(n, 8, dtype=torch.int32)[:, ::2].copy_(case.order)
    factors = torch.zeros(4, n).t().copy_(case.factors)
    for crops in (planar, wide, spread):
        assert not crops.is_contiguous()
        other = replace(case, crops=crops, index=index, order=order, factors=factors)
        assert torch.equal(visible_patches(*other.args(torch.float32)), right)
        means = contrast_mean(case.crops, case.order, case.factors)
        assert torch.equal(contrast_mean(crops, order, factors), means)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_float_crops_are_taken_as_they_are(implementation: str, source: torch.dtype, out: torch.dtype) -> None:
    if INTERPRETED and implementation == "triton" and out == torch.bfloat16 != source:
        pytest.skip("Triton's interpreter cuts off what it should round to bfloat16")
    random = torch.Generator().manual_seed(0)
    crops = torch.randn(2, 3, 8, 12, generator=random, dtype=torch.float64).to(source)
    crops[0, 0, 0, 0], crops[1, 2, 7, 11] = torch.inf, torch.nan
    index = torch.tensor([[5, 0], [3, 5]])
    for strided in (crops, crops.contiguous(memory_format=torch.channels_last), crops.mT.contiguous().mT):
        result = visible_patches(strided, index, None, None, None, MEAN[:3], STD[:3], 4, out)
        patches = crops.view(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 48)
        right = patches[torch.arange(2)[:, None], index].view(4, 48)
        if out != torch.float64:
            right = right.float()
        assert torch.equal(result.nan_to_num(123.0), right.to(out).nan_to_num(123.0))


def test_every_element_is_written(implementation: str) -> None:
    """torch.empty is filled with NaN in this mode."""
    cases = [make_case(SOME), replace(make_case(SOME), order=None, factors=None)]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert visible_patches(*case.args(dtype)).isfinite().all()
        assert contrast_mean(cases[0].crops, cases[0].order, cases[0].factors).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_repeats_give_equal_bits(implementation: str) -> None:
    case = make_case(SOME, rows=4, columns=8, seen=20)
    means = contrast_mean(case.crops, case.order, case.factors)
    rows = visible_patches(*case.args(torch.float32))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            if implementation == "native":  # one thread a row; PyTorch's own sums may split differently
                assert torch.equal(contrast_mean(case.crops, case.order, case.factors), means)
                assert torch.equal(visible_patches(*case.args(torch.float32)), rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(contrast_mean(case.crops, case.order, case.factors), means)
    assert torch.equal(visible_patches(*case.args(torch.float32)), rows)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("seen", [0, 1])
def test_empty(implementation: str, count: int, seen: int) -> None:
    case = make_case([ORDERS[0]] * count, seen=seen)
    assert visible_patches(*case.args(torch.bfloat16)).shape == (count * seen, 75)
    assert contrast_mean(case.crops, case.order, case.factors).shape == (count,)
    views = torch.zeros(count, 3, 15, 10)
    assert visible_patches(views, case.index, None, None, None, [], [], 5, torch.bfloat16).shape == (count * seen, 75)


class Calls(TorchDispatchMode):
    """Names of the ATen ops that run, and the most elements that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(result, Tensor) and func.overloadpacket.__name__ not in ("expand", "view"):
            self.largest = max(self.largest, result.numel() if result.is_floating_point() else 0)
        return result


def test_eager_waits_for_nothing_and_colors_visible_pixels_only() -> None:
    case = make_case(ORDERS, rows=8, columns=8, seen=2)
    means = contrast_mean(case.crops, case.order, case.factors)
    with Calls() as calls:
        eager.contrast_mean(case.crops, case.order, case.factors)
    assert not calls.names & {"_local_scalar_dense", "nonzero", "masked_select", "item"}
    with Calls() as calls:
        rows = replace(case, gray_mean=means).eager(torch.float32)
    assert not calls.names & {"_local_scalar_dense", "nonzero", "masked_select", "item"}
    assert calls.largest == rows.numel()


def test_eager_without_looking_at_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices run, whose tensors the host does not read: all crops at once."""
    case = make_case(ORDERS)
    right = reference.contrast_mean(case.crops, case.order, case.factors, torch.float64)
    looked = eager.contrast_mean(case.crops, case.order, case.factors)
    monkeypatch.setattr(eager, "is_fake", lambda tensor: True)
    means = eager.contrast_mean(case.crops, case.order, case.factors)
    for result in (looked, means):
        torch.testing.assert_close(result.double(), right, rtol=1e-6, atol=0)


def test_python_implementations_take_fake_tensors() -> None:
    """With colours and without: shapes are enough, and nobody asks a fake index for its values."""
    case = make_case(ORDERS[:3], rows=3, columns=2)
    with FakeTensorMode() as mode:
        crops, index, order, factors = (mode.from_tensor(t) for t in (case.crops, case.index, case.order, case.factors))
        means = contrast_mean._init_fn(crops, order, factors)
        assert means.shape == (3,)
        for colors in ((order, factors, means), (order, factors, None), (None, None, None)):
            rows = visible_patches._init_fn(crops, index, *colors, MEAN[:3], STD[:3], 5, torch.bfloat16)
            assert rows.shape == (9, 75)
            assert rows.dtype == torch.bfloat16


def test_eager_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(ORDERS, seen=7)
    with backend.use("eager"):
        means = contrast_mean(case.crops, case.order, case.factors)
        case = replace(case, gray_mean=means)
        rows = visible_patches(*case.args(torch.float32))
        monkeypatch.setattr(eager, "CACHE_VALUES", 4 * 75 + 1)
        assert torch.equal(visible_patches(*case.args(torch.float32)), rows)
        torch.testing.assert_close(contrast_mean(case.crops, case.order, case.factors), means, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("patch_size", [5, 14, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(patch_size: int, dtype: torch.dtype) -> None:
    """Colours of every order and none, without waiting for the device, twice the same bits."""
    for case in (made := make_case(ORDERS, rows=4, columns=4, patch_size=patch_size), replace(made, order=None)):
        case = replace(case, factors=None) if case.order is None else case
        args = [value.cuda() if isinstance(value, Tensor) else value for value in case.args(dtype)]
        visible_patches(*args)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [visible_patches(*args) for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(results[0], results[1])
        check(results[0].cpu(), case)


def test_opcheck(implementation: str) -> None:
    case = make_case(ORDERS[:3])
    torch.library.opcheck(torch.ops.pera.contrast_mean, (case.crops, case.order, case.factors))
    torch.library.opcheck(torch.ops.pera.visible_patches, case.args(torch.bfloat16))
    plain = replace(case, order=None, factors=None)
    torch.library.opcheck(torch.ops.pera.visible_patches, plain.args(torch.float32))


def test_compiles_without_a_break(implementation: str) -> None:
    case = make_case(ORDERS[:5])

    def rows(crops: Tensor, index: Tensor, order: Tensor, factors: Tensor) -> Tensor:
        means = contrast_mean(crops, order, factors)
        return visible_patches(crops, index, order, factors, means, MEAN[:3], STD[:3], 5, torch.float32) * 2

    args = (case.crops, case.index, case.order, case.factors)
    assert torch.equal(torch.compile(rows, fullgraph=True, backend="aot_eager")(*args), rows(*args))


def test_fake_tensors_of_more_than_int32_elements() -> None:
    with FakeTensorMode():
        crops = torch.empty(70000, 448, 448, 3, dtype=torch.uint8)
        index = torch.empty(70000, 470, dtype=torch.int32)
        order, factors = torch.empty(70000, 4, dtype=torch.int32), torch.empty(70000, 4)
        means = contrast_mean(crops, order, factors)
        rows = visible_patches(crops, index, order, factors, means, MEAN[:3], STD[:3], 16, torch.bfloat16)
    assert means.shape == (70000,)
    assert rows.shape == (70000 * 470, 768)
    assert rows.numel() > 2**31
    assert rows.dtype == torch.bfloat16


BAD = {
    "crops must be uint8, uint16 or floating": lambda c: {"crops": c.crops.int()},
    "crops must be uint8 or uint16 \\[N": lambda c: {"crops": c.crops[0]},
    "whole patches": lambda c: {"patch_size": 4},
    "patch_size": lambda c: {"patch_size": 0},
    "mean must have": lambda c: {"mean": [0.5]},
    "std must have": lambda c: {"std": [0.5]},
    "std must be positive": lambda c: {"std": [0.5, 0.0, 0.5]},
    "index must be int32": lambda c: {"index": c.index.float()},
    "index must be \\[2, n\\]": lambda c: {"index": c.index[:1]},
    "index must be in \\[0, 6\\)": lambda c: {"index": c.index + 6},
    "got values from -1": lambda c: {"index": torch.full_like(c.index, -1)},
    "order and factors": lambda c: {"order": None},
    "order must be \\[2, 4\\]": lambda c: {"order": c.order[:, :3]},
    "order must be int32": lambda c: {"order": c.order.float()},
    "factors must be \\[2, 4\\]": lambda c: {"factors": c.factors[:1]},
    "factors must be floating": lambda c: {"factors": c.factors.int()},
    "gray_mean must be \\[2\\]": lambda c: {"gray_mean": torch.zeros(3)},
    "gray_mean must be floating": lambda c: {"gray_mean": torch.zeros(2, dtype=torch.int32)},
    "gray_mean is of use only": lambda c: {"order": None, "factors": None, "gray_mean": torch.zeros(2)},
    "order must be None": lambda c: {"crops": torch.zeros(2, 3, 15, 10)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(implementation: str, message: str) -> None:
    case = make_case(ORDERS[:2])
    with pytest.raises((TypeError, ValueError), match=message):
        visible_patches(*replace(case, **BAD[message](case)).args(torch.float32))


def test_bad_arguments_of_the_rest_are_named() -> None:
    case = make_case(ORDERS[:2])
    with pytest.raises(TypeError, match="dtype must be floating"):
        visible_patches(*case.args(torch.int32))
    with pytest.raises(TypeError, match="crops must be uint8 or uint16"):
        contrast_mean(case.crops.float(), case.order, case.factors)
    with pytest.raises(ValueError, match="order must be"):
        contrast_mean(case.crops, case.order[:1], case.factors)


def test_a_gradient_is_refused() -> None:
    views = torch.zeros(1, 3, 4, 4, requires_grad=True)
    index = torch.zeros(1, 1, dtype=torch.int32)
    rows = visible_patches(views, index, None, None, None, [], [], 4, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        rows.sum().backward()
