"""Launches, bytes and FLOPs of a step on a GPU, counted without one."""

import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions in the interpreter", allow_module_level=True)

from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_fast.config import load_config
from pera_fast.model.pera import PerA
from pera_fast.profile import count
from pera_fast.profile.on_gpu import on_gpu
from pera_fast.profile.work import Counting, Work
from pera_fast.train.flops import flops_per_image
from pera_kernels import backend, cost
from pera_kernels.add_norm import add_norm, add_norm_
from pera_kernels.attention import measured as attention
from pera_kernels.gelu import gelu, gelu_, gelu_backward_
from pera_kernels.linear_gelu import linear_gelu, linear_gelu_backward
from pera_kernels.linear_gelu import measured as gelus
from pera_kernels.quantize_rows import quantize_rows
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_norm import sequence_norm

SMALL = [
    *("train.batch_size=2", "model.embed_dim=64", "model.num_heads=1", "model.head_hidden=64", "model.depth=3"),
    *("model.bottleneck=32", "model.prototypes=256", "views.global_size=64", "views.local_size=32"),
]
# A step of vit_b16 at this batch, recompute "none". Launches are those of kernels, at most 900, and cuBLAS's memsets.
BATCH, LAUNCHES, KERNELS, GIGABYTES = 64, 1042, 855, 103.0


@pytest.fixture(scope="module")
def vit_b16() -> Work:
    """The work of a step of vit_b16."""
    return count.count_step(load_config("vit_b16", [f"train.batch_size={BATCH}"]))


def counted(*overrides: str, **options) -> tuple[Work, Counter[str], Counter[str]]:
    """The work of a step of a small network, and the launches and bytes of each op."""
    patch, kept = pytest.MonkeyPatch(), []

    class Kept(Counting):
        def __init__(self, opened: bool = False) -> None:
            super().__init__(opened)
            kept.append(self)
            self.bytes: Counter[str] = Counter()

        def add(self, item: cost.Cost) -> None:
            super().add(item)
            if self._ops:
                self.bytes[self._ops[0]] += item.bytes

    with patch.context() as p:
        p.setattr(count, "Counting", Kept)
        work = count.count_step(load_config("vit_b16", [*SMALL, *overrides]), **options)
    return work, kept[0].by_op, kept[0].bytes


def inside(run: Callable[[], None], opened: bool = False) -> Counting:
    """Counts some calls on tensors that seem to lie on a GPU."""
    counting = Counting(opened)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        counting,
        on_gpu((9, 0), 132, 1, counting.launched, lambda _: None),
    ):
        run()
    return counting


@pytest.mark.parametrize(
    "overrides",
    [("train.precision=bf16", "model.teacher_precision=fp8"), ("train.precision=fp32", "model.recompute=cheap")],
)
def test_stated_launches_are_those_that_ops_make(overrides: tuple[str, ...]) -> None:
    """Bytes nearly: a kernel may read of a tensor what it needs, and read and write another."""
    stated, opened = (counted(*overrides, opened=opened) for opened in (False, True))
    assert len(stated[1]) > 15
    assert stated[1] == opened[1]
    assert stated[0].total("launches") == opened[0].total("launches")
    assert {op: (said, opened[2][op]) for op, said in stated[2].items() if not 0.3 < said / opened[2][op] < 1.6} == {}
    assert stated[0].total("bytes") == pytest.approx(opened[0].total("bytes"), rel=0.05)


def others() -> None:
    """Ops that a small step does not run."""
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    groups, kept = [2, 5, 3, 2], [1, 2]
    x, y = (torch.empty(rows, 64, **half, requires_grad=True) for rows in (16, 9))
    keep = torch.empty(3, dtype=torch.int32, device="cuda")
    sequence_add(x, y, groups, keep, kept).sum().backward()
    norm = (torch.empty(64, device="cuda", requires_grad=True) for _ in range(2))
    sequence_norm(x, *norm, 1e-6, groups, keep, kept).sum().backward()
    gelu(torch.empty(4, 64, **half, requires_grad=True)).sum().backward()
    out = add_norm(x, torch.empty(16, 64, **half), None, None, None, 1e-6, groups)[0]
    out.backward(torch.empty_like(out))
    quantize_rows(torch.empty(4, 64, **half))
    wide, weight, hidden = (torch.empty(*shape, **half) for shape in ((8192, 256), (1024, 256), (8192, 1024)))
    with backend.use("triton"):
        linear_gelu(wide, weight, torch.empty(1024, **half), with_hidden=True)
        linear_gelu_backward(wide, weight.t().contiguous(), hidden)


def test_stated_launches_of_other_ops() -> None:
    stated, opened = (inside(others, opened) for opened in (False, True))
    names = {"sequence_add_backward", "sequence_norm_backward", "gelu_backward_", "linear_gelu_backward"}
    assert names | {"quantize_rows", "add_norm_backward"} <= set(stated.by_op)
    assert stated.by_op == opened.by_op


def test_one_capability_stands_for_those_that_nobody_measured() -> None:
    """A measurement on another one needs a count of its own."""
    rows = {*attention.MEASURED, *(capability for where in gelus.FASTER.values() for capability in where)}
    assert rows == {count.HOPPER}
    assert count.OTHERS != count.HOPPER
    kinds = [
        {row.kind for row in counted("views.global_size=160", capability=capability)[0].rows if row.flops}
        for capability in (count.HOPPER, count.OTHERS)
    ]
    assert ["cudnn attention" in found for found in kinds] == [True, False]


def test_every_op_states_its_cost() -> None:
    ours = {name for name in OPDEFS if name.startswith("pera::")}
    assert ours
    assert {name for name in ours if cost.stated(name) is None and not cost.is_opened(name)} == set()


def test_operators_by_class() -> None:
    def run() -> None:
        x, w = (torch.empty(256, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        assert x.is_cuda
        assert x.device.type == "cuda"
        y = x @ w.t()  # 256 x 256 x 128
        y.view(-1).add_(1)
        y[:, :128].copy_(x)
        gelu(x)

    work = inside(run).work
    product, add = 2 * (2 * 256 * 128 + 256 * 256), 2 * 2 * 256 * 256
    copy = move = 2 * 2 * 256 * 128
    assert work.by_part("launches") == {"products": 1, "passes": 3}
    assert work.by_part("bytes") == {"products": product, "passes": add + copy + move}
    assert work.total("flops") == 2 * 256 * 256 * 128


def test_attention_is_two_products_forward_and_five_backward() -> None:
    def run() -> None:
        q = torch.empty(3, 2, 64, 32, dtype=torch.bfloat16, device="cuda")
        y, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[:2]
        seed = torch.empty((), dtype=torch.int64, device="cuda")
        torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            q, q, q, q, y, lse, seed, seed, None, None, None, 64, 64, 0.0, False
        )

    one, work = 2 * 3 * 2 * 64 * 64 * 32, inside(run).work
    assert work.by_part("flops")["attention"] == (2 + 5) * one
    assert {row.kind for row in work.rows if row.flops} == {"cudnn attention"}


def test_flops_are_those_of_the_method(vit_b16: Work) -> None:
    """What a step multiplies is what MFU counts, and a little more: the gradient of attention, the center, KoLeo."""
    counted_by_hand = BATCH * flops_per_image(load_config("vit_b16", []))
    assert 0.98 < vit_b16.total("flops") / counted_by_hand < 1.03


def test_the_budget_of_a_step(vit_b16: Work) -> None:
    """Ceilings that only get smaller: who needs more launches or bytes says why, who needs fewer lowers them."""
    assert vit_b16.total("launches") <= LAUNCHES
    assert sum(times * row.launches for row, times in vit_b16.rows.items() if row.bytes) <= KERNELS <= 900
    assert vit_b16.total("bytes") <= GIGABYTES * 1e9


def test_kernels_by_name() -> None:
    """Launches and bytes of each Triton kernel are those that all launches of the step are made of."""
    cfg = load_config("vit_b16", [*SMALL, "train.precision=bf16"])
    by_kernel, work = count.count_kernels(cfg), count.count_step(cfg, opened=True)
    assert {"add_norm_fwd_kernel", "gelu_bwd_kernel", "adamw_ema_kernel", "distillation_loss_fwd_kernel"} <= set(
        by_kernel
    )
    assert all(launches > 0 for launches, _ in by_kernel.values())
    launches, moved = (sum(numbers) for numbers in zip(*by_kernel.values(), strict=True))
    assert 0.1 < launches / work.total("launches") < 1
    assert 0.2 < moved / work.total("bytes") < 1
    parameters = sum(p.numel() for p in PerA(cfg).parameters())
    assert (
        by_kernel["adamw_ema_kernel"][1] > 4 * 5 * parameters / 2
    )  # of the student: five float32 values each, at least


def test_what_is_updated_in_place_counts_twice() -> None:
    """It is read and written, whether a kernel knows it by one argument or by two."""
    groups, bytes_of = [2, 32], 2 * 64 * 64

    def run() -> None:
        x, y = (torch.empty(64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        bias = torch.empty(64, device="cuda")
        add_norm_(x, y, None, bias, bias, 1e-6, groups)
        gelu_(x)
        gelu_backward_(y, x)

    found = inside(run, opened=True).by_kernel
    small = 2000  # statistics, biases, sums
    for name, times in (("add_norm_fwd_kernel", 4), ("gelu_fwd_kernel", 2), ("gelu_bwd_kernel", 3)):
        assert 0 <= found[name][1] - times * bytes_of <= small, name


def test_ranks_exchange_gradients() -> None:
    alone, together = counted(world_size=1)[0], counted(world_size=4)[0]
    assert "exchange" not in alone.by_part("launches")
    cfg = load_config("vit_b16", SMALL)
    trained = sum(p.numel() for p in PerA(cfg).parameters() if p.requires_grad)
    sent = together.by_part("bytes")["exchange"]
    assert 1.5 * 4 * trained <= sent <= 1.5 * 4 * trained + 4096  # the losses come along
    assert together.total("launches") > alone.total("launches") + 2
