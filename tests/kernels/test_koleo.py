"""pera::koleo against its dense definition: values, gradients, near duplicates, memory, dispatch."""

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
from pera_kernels.distillation_loss import weight_norm
from pera_kernels.koleo import gram, koleo, koleo_rows, reference

GOLDEN = Path(os.environ.get("PERA_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


def make(rows: int, k: int, d: int, dtype=torch.float64, seed: int = 0, requires_grad: bool = True):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    out = draw(rows, d).to(dtype), draw(k, d).to(wide), (draw(k, 1).abs() + 0.5).to(wide)
    return tuple(t.requires_grad_(requires_grad) for t in out)


def evaluate(function, args, num_crops: int, upstream: float = 1.0) -> list[Tensor]:
    loss = function(*args, num_crops)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, args)]


def wide(args) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in args]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(weight_norm, "MIN_CHUNK", 64)
    monkeypatch.setattr(weight_norm, "GPU_CHUNK_BYTES", 64)
    monkeypatch.setattr(weight_norm, "CHUNK_ELEMENTS", 64)


@pytest.fixture(params=["gram", "streamed"])
def form(request, monkeypatch):
    """Either way to the sums over prototypes, whatever the shapes."""
    monkeypatch.setattr(gram, "prefers_gram", lambda rows: request.param == "gram")
    return request.param


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(2, 6),
    num_crops=st.integers(1, 3),
    k=st.integers(2, 200),
    d=st.integers(2, 40),
    seed=st.integers(0, 99),
)
def test_equals_reference_in_float64(size, num_crops, k, d, seed):
    args = make(size * num_crops, k, d, seed=seed)
    for got, want in zip(
        evaluate(koleo, args, num_crops, 0.7), evaluate(reference.koleo, args, num_crops, 0.7), strict=True
    ):
        assert error(got, want) < 1e-8


@pytest.mark.parametrize("d", [5, 50])
def test_forms_equal_reference(form, d):
    args = make(8, 300, d)
    for got, want in zip(evaluate(koleo, args, 2), evaluate(reference.koleo, args, 2), strict=True):
        assert error(got, want) < 1e-11


def test_gradcheck(form):
    args = make(6, 90, 20)
    assert torch.autograd.gradcheck(lambda *a: koleo(*a, 2), args, fast_mode=True)
    with backend.use("reference"):
        assert torch.autograd.gradcheck(lambda *a: koleo(*a, 2), args, fast_mode=True)


@pytest.mark.parametrize("native_products", [False, True], ids=["upcast", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_within_that_of_dense_pytorch(monkeypatch, form, dtype, native_products):
    if native_products:  # products in the half types themselves, as on a GPU
        monkeypatch.setattr(products, "product_dtype", lambda dtype, device: dtype)
    args = make(16, 900, 48, dtype)
    exact = evaluate(reference.koleo, wide(args), 2)
    dense = evaluate(reference.koleo, args, 2)
    for name, got, plain, want in zip(("loss", "rows", "v", "g"), evaluate(koleo, args, 2), dense, exact, strict=True):
        assert got.dtype == plain.dtype
        assert got.shape == want.shape
        # The scalar's own error can be lucky: it is held to that of the products' dtype too.
        assert error(got, want) <= 3 * max(error(plain, want), torch.finfo(dtype).eps / 8), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_duplicates(form, dtype):
    """Distance 1e-4: 2 - 2 cos would leave nothing of it in float32."""
    rows, v, g = make(8, 900, 48, torch.float64)
    with torch.no_grad():
        rows[1] = rows[0] + 1e-4 * rows[1]
    if dtype == torch.bfloat16:  # rows as near as that dtype can tell
        with torch.no_grad():
            rows[1] = rows[0]
            rows[1, 3] = rows[0, 3] * (1 + 2**-7)
    args = [t.detach().to(dt).requires_grad_() for t, dt in ((rows, dtype), (v, torch.float32), (g, torch.float32))]
    exact = evaluate(reference.koleo, wide(args), 2)
    dense = evaluate(reference.koleo, args, 2)
    for name, got, plain, want in zip(("loss", "rows", "v", "g"), evaluate(koleo, args, 2), dense, exact, strict=True):
        assert error(got, want) <= 2 * max(error(plain, want), 1e-5), name
        # Of the distance itself much is left: 2 - 2 cos would be wrong by its whole size. How much bfloat16 leaves
        # depends on the CPU's products.
        assert dtype != torch.float32 or error(got, want) <= 2e-2, name


@pytest.mark.parametrize("power", range(0, 18, 2))
def test_loss_scales_of_float16(form, power):
    """Near-duplicates have weights of 1 / distance^2, times the loss scale. Where the gradient of the rows, which is
    float16 by its dtype, is in range, nothing overflows on the way; where it is not, the scaler sees that it is not
    finite and halves the scale."""
    rows, v, g = make(16, 900, 48, torch.float64)
    with torch.no_grad():
        rows.copy_(torch.nn.functional.normalize(rows))
        rows[1] = rows[0]
    args = [t.detach().to(dt) for t, dt in ((rows, torch.float16), (v, torch.float32), (g, torch.float32))]
    args[0][1, 3] = args[0][0, 3] * (1 + 2**-10)
    args = [t.requires_grad_() for t in args]
    exact = evaluate(reference.koleo, wide(args), 2, 2.0**power)
    with products.half_products():
        got = evaluate(koleo, args, 2, 2.0**power)
    if exact[1].abs().max() < torch.finfo(torch.float16).max:
        plain = zip(evaluate(reference.koleo, args, 2), evaluate(reference.koleo, wide(args), 2), strict=True)
        for a, b, (c, d) in zip(got, exact, plain, strict=True):
            assert error(a, b) <= error(c, d) / 2
    else:
        assert not torch.isfinite(got[1]).all()


@pytest.mark.parametrize("d", [3, 40])
def test_single_rows_follow_the_formula(form, d):
    """B = 1: its own neighbour, distance eps * sqrt(K), no gradient."""
    args = make(2, 100, d)
    loss, *grads = evaluate(koleo, args, 2)
    torch.testing.assert_close(loss, -2 * torch.tensor(1e-8 * 10 + 1e-8, dtype=torch.float64).log())
    torch.testing.assert_close(loss, reference.koleo(*args, 2).detach())
    assert all(not grad.any() for grad in grads)


def test_no_rows():
    args = make(0, 100, 4)
    loss, *grads = evaluate(koleo, args, 2)
    assert loss == 0
    assert all(not grad.any() for grad in grads)
    assert koleo_rows(args[0], 2) == 0


def test_neighbours_stay_in_their_group(form):
    rows, v, g = make(6, 100, 5, requires_grad=False)
    rows = torch.cat([rows, rows + 1e-9])  # the nearest of all is in the other crop
    neighbours = gram.forward(rows, v, g, 2).pairs.neighbours
    assert (neighbours[:6] < 6).all()
    assert (neighbours[6:] >= 6).all()
    assert (neighbours != torch.arange(12)).all()


def test_zero_row_is_finite(form):
    args = make(4, 100, 5, torch.float32)
    with torch.no_grad():
        args[0][2] = 0
    got, want = evaluate(koleo, args, 1), evaluate(reference.koleo, args, 1)
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0], want[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeat_gives_equal_bits(form, dtype):
    args = make(8, 333, 24, dtype)
    first, second = (evaluate(koleo, args, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_that_are_not_needed_are_left_out(form, dtype):
    args = make(4, 300, 6, dtype)
    want = evaluate(koleo, args, 2)[1:]
    for needed in ((0,), (1, 2), (2,)):
        some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(args)]
        got = torch.autograd.grad(koleo(*some, 2), [some[i] for i in needed])
        assert all(torch.equal(a, want[i]) for a, i in zip(got, needed, strict=True))


def test_uninitialised_memory_does_not_matter(form, monkeypatch):
    args = make(6, 300, 6, torch.float32)
    want = evaluate(koleo, args, 2)
    empty = torch.empty

    def poisoned(*shape, **kwargs):
        out = empty(*shape, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(evaluate(koleo, args, 2), want, strict=True))


def test_never_holds_all_logits(form):
    rows, k, d = 64, 4000, 6
    args = make(rows, k, d, torch.float32, requires_grad=False)
    with Largest() as dense:
        reference.koleo(*args, 2)
    assert dense.elements >= rows // 2 * k
    with Largest() as seen:
        _, pairs, inverse_norms = gram.forward(*args, 2)
        gram.backward(torch.ones(()), *args, pairs, inverse_norms, 2)
    assert seen.elements == k * d  # the gradient of v
    assert max(t.numel() for t in (*pairs, inverse_norms)) <= max(rows * d, k)


def test_opcheck(form):
    args = make(4, 80, 12, torch.float32)
    torch.library.opcheck(torch.ops.pera.koleo.default, (*args, 2))
    plain = [t.detach() for t in args]
    _, *kept = torch.ops.pera.koleo(*plain, 2)
    torch.library.opcheck(torch.ops.pera.koleo_backward.default, (torch.ones(()), *plain, *kept, 2, True))


def test_compiles_in_one_graph():
    args = make(6, 100, 5)
    compiled = torch.compile(lambda *a: koleo(*a) * 2, fullgraph=True, backend="aot_eager")
    got, want = evaluate(compiled, args, 2), evaluate(lambda *a: koleo(*a) * 2, args, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fake_tensors_beyond_int32():
    with FakeTensorMode():
        rows = torch.empty(20_000, 384, dtype=torch.bfloat16, requires_grad=True)
        v, g = torch.empty(131_072, 384, requires_grad=True), torch.empty(131_072, 1, requires_grad=True)
        loss = koleo(rows, v, g, 2)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, (rows, v, g))
        assert [(t.shape, t.dtype) for t in grads] == [(t.shape, t.dtype) for t in (rows, v, g)]


def test_reference_can_be_forced(monkeypatch):
    args = make(4, 50, 4)
    monkeypatch.setattr(gram, "forward", None)
    with backend.use("reference"):
        koleo(*args, 2)
    with pytest.raises(TypeError):
        koleo(*args, 2)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, 9), "rows must be"),
        (0, torch.zeros(4, 4, dtype=torch.int64), "rows must be floating"),
        (2, torch.zeros(50), "g must be"),
        (3, 3, "num_crops must be"),
        (3, 0, "num_crops must be"),
    ],
)
def test_bad_arguments_are_named(position, value, message):
    args = [*make(4, 50, 4), 2]
    args[position] = value
    with pytest.raises((TypeError, ValueError), match=message):
        koleo(*args)


def test_rows_form_is_koleo_of_identity_prototypes():
    rows = make(8, 1, 6)[0]
    eye, ones = torch.eye(6, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    torch.testing.assert_close(koleo_rows(rows, 2), koleo(rows, eye, ones, 2))
    assert torch.autograd.gradcheck(lambda r: koleo_rows(r, 2), (rows,), fast_mode=True)
    assert koleo_rows(rows.bfloat16(), 2).dtype == torch.float32


def test_agrees_with_published_loss(form):
    """The published run's own logits go in as rows of identity prototypes; it logs the mean over global crops."""
    with safe_open(GOLDEN / "step_plain.safetensors", "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        k, num_crops = meta["prototypes"], meta["num_global"]
        for step in range(meta["steps"]):
            logits = file.get_tensor(f"step{step}.student.global_cls_tokens").view(-1, k)
            want = file.get_tensor(f"step{step}.loss.koleo_loss").item()
            got = koleo(logits, torch.eye(k), torch.ones(k, 1), num_crops).item() / num_crops
            assert got == pytest.approx(want, rel=1e-5)
