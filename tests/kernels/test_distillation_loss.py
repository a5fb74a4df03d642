"""pera::distillation_loss against its dense definition: values, gradients, memory, dispatch."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import Largest
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pera_kernels import backend, products
from pera_kernels.distillation_loss import (
    chunked,
    distillation_loss,
    prototype_logits_mean,
    prototypes,
    reference,
    weight_norm,
)
from pera_kernels.distillation_loss.arguments import Arguments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GOLDEN = Path(os.environ.get("PERA_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
TEMPS = (0.1, 0.04)
HALF = (torch.bfloat16, torch.float16)


def make(n: int, k: int, d: int, dtype=torch.float64, v_dtype=None, seed: int = 0, requires_grad: bool = True):
    """Rows of norm 1, prototypes of uneven norms, g away from 1, a center; the first three take gradients."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    def rows() -> Tensor:
        return torch.nn.functional.normalize(draw(n, d)).to(dtype)

    v_dtype = v_dtype or torch.promote_types(dtype, torch.float32)
    student = rows(), draw(k, d).to(v_dtype), (draw(k, 1).abs() + 0.5).to(v_dtype)
    teacher = rows(), draw(k, d).to(v_dtype), (draw(k, 1).abs() + 0.5).to(v_dtype)
    for tensor in student:
        tensor.requires_grad_(requires_grad)
    return *student, *teacher, 0.1 * draw(k).to(v_dtype)


def evaluate(function, args, upstream: Tensor, temps=TEMPS) -> list[Tensor]:
    """Loss and the gradients of student rows, v and g."""
    loss = function(*args, *temps)
    return [loss.detach(), *torch.autograd.grad(loss, args[:3], upstream.to(loss.dtype))]


def wide(args) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in args]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one short, at test sizes; larger ones in Triton's interpreter, which takes its time."""
    monkeypatch.setattr(weight_norm, "MIN_CHUNK", 256 if INTERPRETED else 64)
    monkeypatch.setattr(weight_norm, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(weight_norm, "GPU_CHUNK_BYTES", 64)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 9), k=st.integers(1, 200), d=st.integers(1, 17), seed=st.integers(0, 99))
def test_equals_reference_in_float64(n, k, d, seed):
    args = make(n, k, d, seed=seed)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for got, want in zip(
        evaluate(distillation_loss, args, upstream), evaluate(reference.distillation_loss, args, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_chunks_cover_prototypes_once():
    v, g = make(1, 301, 3)[1:3]
    seen = [chunk.rows for chunk in weight_norm.chunks(v, g, weight_norm.chunk_size(5, 301), v.dtype, v.dtype)]
    assert [(s.start, s.stop) for s in seen] == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 301)]


def test_gradcheck():
    args = make(3, 70, 4)

    def function(rows, v, g):
        return distillation_loss(rows, v, g, *args[3:], *TEMPS)

    assert torch.autograd.gradcheck(function, args[:3], fast_mode=True)
    with backend.use("reference"):
        assert torch.autograd.gradcheck(function, args[:3], fast_mode=True)


@pytest.mark.parametrize("native_products", [False, True], ids=["upcast", "native"])
@pytest.mark.parametrize("v_dtype", [None, "rows"], ids=["wide_v", "narrow_v"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_error_within_that_of_dense_pytorch(monkeypatch, dtype, v_dtype, native_products):
    if native_products:  # products in the half types themselves, as on a GPU
        monkeypatch.setattr(products, "product_dtype", lambda dtype, device: dtype)
    k = 300 if INTERPRETED else 900  # two chunks there
    args = make(16, k, 48, dtype, dtype if v_dtype == "rows" else None)
    upstream = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    exact = evaluate(reference.distillation_loss, wide(args), upstream.double())
    dense = evaluate(reference.distillation_loss, args, upstream)
    ours = evaluate(distillation_loss, args, upstream)
    for name, got, plain, want in zip(("loss", "rows", "v", "g"), ours, dense, exact, strict=True):
        assert got.dtype == plain.dtype
        assert got.shape == want.shape
        assert error(got, want) <= 3 * max(error(plain, want), 1e-7), name


def test_norm_of_v_does_not_matter_in_float16(monkeypatch):
    monkeypatch.setattr(products, "product_dtype", lambda dtype, device: dtype)
    args = make(4, 100, 8, torch.float16)
    for size in (1e-7, 1e7):  # beyond what float16 holds
        scaled = [*args]
        scaled[1] = (args[1].detach() * size).requires_grad_()
        loss, _, grad_v, _ = evaluate(distillation_loss, args, torch.ones(4))
        loss_scaled, _, grad_scaled, _ = evaluate(distillation_loss, scaled, torch.ones(4))
        torch.testing.assert_close(loss_scaled, loss, rtol=1e-3, atol=0)
        assert error(grad_scaled * size, grad_v.double()) < 5e-3


def test_extreme_logits_stay_finite():
    args = make(6, 300, 8, torch.float32)
    args[2].data.mul_(1e3)  # logits around 3e4 at temperature .03: exp overflows float32 without the running maximum
    args[5].mul_(1e3)
    got = evaluate(distillation_loss, args, torch.ones(6), (0.03, 0.03))
    want = evaluate(reference.distillation_loss, wide(args), torch.ones(6), (0.03, 0.03))
    plain = evaluate(reference.distillation_loss, args, torch.ones(6), (0.03, 0.03))
    for a, p, b in zip(got, plain, want, strict=True):
        assert a.isfinite().all()
        assert error(a, b) <= 3 * max(error(p, b), 1e-6)


def test_identical_student_and_teacher_give_entropy_and_no_gradient():
    rows, v, g = make(4, 200, 6)[:3]
    args = (rows, v, g, rows.detach(), v.detach(), g.detach(), torch.zeros(200, dtype=torch.float64))
    loss, *grads = evaluate(distillation_loss, args, torch.ones(4), (0.1, 0.1))
    p = (rows @ reference.effective_prototypes(v, g).t() / 0.1).softmax(1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).detach())
    assert max(grad.abs().max().item() for grad in grads) < 1e-12


def test_teacher_and_center_are_constants():
    args = [t.requires_grad_() for t in make(3, 90, 5)]
    loss = distillation_loss(*args, *TEMPS).sum()
    grads = torch.autograd.grad(loss, args, allow_unused=True)
    assert all(grad is not None for grad in grads[:3])
    assert grads[3:] == (None,) * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_noncontiguous_arguments(dtype):
    args = make(6, 300, 8, dtype)
    strided = [
        t.detach().repeat_interleave(2, 0)[::2] if t.ndim == 1 else t.detach().t().contiguous().t() for t in args
    ]
    for tensor in strided[:3]:
        tensor.requires_grad_()
    upstream = torch.ones(1, dtype=torch.float64).expand(6)
    for got, want in zip(
        evaluate(distillation_loss, strided, upstream), evaluate(distillation_loss, args, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeat_gives_equal_bits(dtype):
    args = make(7, 333, 12, dtype)
    first, second = (evaluate(distillation_loss, args, torch.ones(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_uninitialised_memory_does_not_matter(monkeypatch, dtype):
    args = make(5, 300, 6, dtype)
    want = evaluate(distillation_loss, args, torch.ones(5))
    empty = torch.empty

    def poisoned(*shape, **kwargs):
        out = empty(*shape, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    got = evaluate(distillation_loss, args, torch.ones(5))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (3, 301, 1), (2, 65, 33), (1, 300, 8), (0, 20, 4)])
def test_odd_shapes(n, k, d, dtype):
    upstream = torch.linspace(-1, 2, n)

    def errors(function, seed):
        """Relative errors; where d or K is 1 the exact gradient is zero: then the size of what cancels counts."""
        args = make(n, k, d, dtype, seed=seed)
        exact = evaluate(reference.distillation_loss, wide(args), upstream.double())
        got = evaluate(function, args, upstream)
        assert [value.shape for value in got] == [want.shape for want in exact]
        return [
            ((value.double() - want).norm() / max(want.norm().item(), 1.0)).item()
            for value, want in zip(got, exact, strict=True)
        ]

    # All four share the errors of a few exponents, so that PyTorch may be lucky with one draw.
    of_pytorch = max(max(errors(reference.distillation_loss, seed)) for seed in range(8))
    ours = errors(distillation_loss, seed=0)
    assert max(ours) <= 3 * max(torch.finfo(dtype).eps, of_pytorch), ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_not_needed_are_left_out(dtype):
    args = make(5, 300, 6, dtype)
    want = evaluate(distillation_loss, args, torch.ones(5))[1:]
    for needed in ((0,), (1, 2), (1,), (2,), (0, 2)):
        some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(args)]
        with Largest() as seen:
            got = torch.autograd.grad(distillation_loss(*some, *TEMPS).sum(), [some[i] for i in needed])
        assert all(torch.equal(a, want[i]) for a, i in zip(got, needed, strict=True))
        if needed == (0,):
            assert seen.elements < args[1].numel()  # no gradient of v was made


def test_nan_is_not_hidden():
    for position in (0, 1, 3, 6):
        args = make(4, 300, 6, torch.float32)
        with torch.no_grad():
            args[position].view(-1)[5] = torch.nan
        assert distillation_loss(*args, *TEMPS).isnan().any(), position


@pytest.mark.parametrize("native_products", [False, True])
def test_never_holds_all_logits(monkeypatch, native_products):
    if native_products:
        monkeypatch.setattr(products, "product_dtype", lambda dtype, device: dtype)
    n, k, d = 64, 4000, 4
    args = make(n, k, d, torch.bfloat16, requires_grad=False)
    with Largest() as dense:
        reference.distillation_loss(*args, *TEMPS)
    assert dense.elements >= n * k  # the count sees what it looks for
    with Largest() as seen:
        _, statistics = chunked.forward(arguments := Arguments.of(*args, *TEMPS))
        chunked.backward(torch.ones(n), arguments, statistics)
    assert seen.elements == k * d  # the gradient of v; [N, chunk] buffers are smaller


def test_saves_no_more_than_arguments_and_a_few_numbers_per_row_and_prototype():
    args = make(8, 500, 4, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        distillation_loss(*args, *TEMPS)
    own = {t.data_ptr() for t in args}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in own) == [(2, 500), (8, 2), (8, 2)]


LACKING = backend.needs_native(*weight_norm.NATIVE_NAMES)(torch.device("cpu"))
needs_library = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_native_passes_do_not_depend_on_threads(dtype):
    n, c, d = 5, 1111, 33
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    ops, before = torch.ops.pera_native, torch.get_num_threads()
    products = draw(n, c).to(dtype), draw(n, c).to(dtype)
    scales = draw(c).abs(), draw(c).abs(), draw(c)
    v, g, upstream = draw(c, d), draw(c, 1), draw(n)

    def run() -> list[Tensor]:
        statistics = torch.tensor([-torch.inf, 0, -torch.inf, 0, 0]).repeat(n, 1)
        ops.distillation_forward_(*products, *scales, *TEMPS, statistics)
        dz = products[0].clone()
        sums = ops.distillation_backward_(dz, products[1], *scales, *TEMPS, statistics[:, :4].contiguous(), upstream)
        direction, grad_v = torch.empty(c, d, dtype=dtype), torch.empty(c, d)
        norms = ops.weight_norm(v, g, direction)
        ops.weight_norm_backward_(direction, v, norms[1], True, grad_v)
        return [statistics, dz, sums, direction, *norms, grad_v]

    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_library
def test_native_exponential_is_exact_to_rounding():
    """The sum of exp(z - max) over two logits is 1 + exp(-x): x over the whole range."""
    x = torch.cat([torch.linspace(0, 90, 20_001), torch.tensor([1e4, 3e38, torch.inf])])
    products = torch.stack([torch.zeros_like(x), -x], 1).contiguous()  # [N, 2]
    statistics = torch.tensor([-torch.inf, 0, -torch.inf, 0, 0]).repeat(len(x), 1)
    one = torch.ones(2)
    dz = products.clone()
    torch.ops.pera_native.distillation_forward_(products, products, one, one, torch.zeros(2), 1.0, 1.0, statistics)
    torch.testing.assert_close(statistics[:, 1].double(), 1 + (-x.double()).exp(), rtol=1.2e-7, atol=0)
    # Against a teacher of sum infinity, the backward leaves the bare exponential of each logit.
    stats = torch.tensor([0, 1, 0, torch.inf]).repeat(len(x), 1)
    torch.ops.pera_native.distillation_backward_(
        dz, torch.zeros_like(dz), one, one, torch.zeros(2), 1.0, 1.0, stats, torch.ones(len(x))
    )
    want = (-x.double()).exp()
    assert ((dz[:, 1].double() - want).abs() <= 1.2e-7 * want + 2e-38).all()


def test_opcheck():
    args = make(3, 80, 4, torch.float32)
    torch.library.opcheck(torch.ops.pera.distillation_loss.default, (*args, *TEMPS))
    with torch.no_grad():
        _, *lse = torch.ops.pera.distillation_loss(*args, *TEMPS)
    plain = [t.detach() for t in args]
    torch.library.opcheck(
        torch.ops.pera.distillation_loss_backward.default, (torch.ones(3), *plain, *lse, *TEMPS, True, True)
    )


def test_compiles_in_one_graph():
    args = make(4, 100, 5)
    compiled = torch.compile(lambda *a: distillation_loss(*a, *TEMPS) * 2, fullgraph=True, backend="aot_eager")
    want = evaluate(lambda *a: distillation_loss(*a[:-2], *TEMPS) * 2, args, torch.ones(4))
    got = evaluate(lambda *a: compiled(*a[:-2]), args, torch.ones(4))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fake_tensors_beyond_int32():
    with FakeTensorMode():
        n, k, d = 20_000, 131_072, 384  # 2.6e9 logits
        rows = torch.empty(n, d, dtype=torch.bfloat16, requires_grad=True)
        v, g = torch.empty(k, d, requires_grad=True), torch.empty(k, 1, requires_grad=True)
        loss = distillation_loss(rows, v, g, rows.detach(), v.detach(), g.detach(), torch.empty(k), *TEMPS)
        assert loss.shape == (n,)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss.sum(), (rows, v, g))
        assert [(t.shape, t.dtype) for t in grads] == [(t.shape, t.dtype) for t in (rows, v, g)]


def test_reference_can_be_forced(monkeypatch):
    args = make(3, 50, 4)
    monkeypatch.setattr(chunked, "forward", None)
    with backend.use("reference"):
        distillation_loss(*args, *TEMPS)
    with pytest.raises(TypeError):
        distillation_loss(*args, *TEMPS)
    assert "distillation_loss" in {row.op for row in backend.report()}


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 9), "student_rows must be"),
        (0, torch.zeros(3, 4, dtype=torch.int64), "student_rows must be floating"),
        (2, torch.zeros(50), "student_g must be"),
        (3, torch.zeros(2, 4), "teacher_rows"),
        (6, torch.zeros(1, 50), "center must be"),
        (8, 0.0, "teacher_temp must be positive"),
    ],
)
def test_bad_arguments_are_named(position, value, message):
    args = [*make(3, 50, 4), *TEMPS]
    args[position] = value
    with pytest.raises((TypeError, ValueError), match=message):
        distillation_loss(*args)


def test_agrees_with_published_losses():
    """The published run's own logits go in as rows of identity prototypes."""
    with safe_open(GOLDEN / "step_plain.safetensors", "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        batch, k, pairs = meta["batch"], meta["prototypes"], meta["num_global"] + meta["num_local"]
        eye, ones = torch.eye(k), torch.ones(k, 1)
        for step in range(meta["steps"]):
            center = torch.zeros(k) if step == 0 else file.get_tensor(f"step{step - 1}.center").view(k)
            for part in ("global", "local"):
                student, teacher = (
                    file.get_tensor(f"step{step}.{net}.{part}_cls_tokens").view(-1, k) for net in ("student", "teacher")
                )
                assert student.shape[0] == batch * meta[f"num_{part}"]
                rows = distillation_loss(student, eye, ones, teacher, eye, ones, center, 0.1, meta["teacher_temp"])
                want = file.get_tensor(f"step{step}.loss.{part}_dino_loss").item()
                assert rows.sum().item() / batch / pairs == pytest.approx(want, rel=1e-5)


def test_prototypes_and_mean_logits():
    _, v, g, rows, *_ = make(7, 301, 5, requires_grad=False)
    want = reference.effective_prototypes(v, g)
    torch.testing.assert_close(prototypes(v, g), want)
    assert prototypes(v.float(), g.float(), torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(prototype_logits_mean(rows.mean(0), v, g), (rows @ want.t()).mean(0))
    single = prototype_logits_mean(rows.mean(0).float(), v.float(), g.float())  # a kernel's on a GPU
    torch.testing.assert_close(single.double(), (rows @ want.t()).mean(0), rtol=1e-5, atol=1e-6)
    half = prototype_logits_mean(rows.mean(0).float(), v.bfloat16(), g.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), (rows @ want.t()).mean(0), rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="rows_mean"):
        prototype_logits_mean(rows, v, g)
