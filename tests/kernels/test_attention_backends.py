"""The choice of an attention implementation for each group, and the code around the GPU operators.

Without a GPU the operators of xformers and torch are replaced by the formula, in the layouts that they use.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.attention import attention, op, sdpa, varlen, xformers
from pera_kernels.attention.arguments import Packed
from pera_kernels.isa import Isa, at_most

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPS = [2, 40, 0, 5, 5, 8, 3, 23]
HEADS, DIM = 2, 32


def make_qkv(dtype: torch.dtype = torch.bfloat16, groups: list[int] = GROUPS) -> Tensor:
    return torch.randn(packing.num_tokens(groups), 3 * DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


def everything(qkv: Tensor, groups: list[int] = GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exps, gradient of qkv."""
    leaf = qkv.detach().requires_grad_()
    out, lse = torch.ops.pera.attention(leaf, HEADS, groups)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), lse, torch.autograd.grad(out, leaf, upstream)[0]


def formula(qkv: Tensor, groups: list[int] = GROUPS) -> tuple[Tensor, Tensor, Tensor]:
    with backend.use("reference"):
        return everything(qkv, groups)


def spans(bounds: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)]


def packed_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v [T, H, d] -> out [T, H, d], log-sum-exps [H, T]."""
    parts = [sdpa._forward_formula(*(t[s].transpose(0, 1) for t in (q, k, v))) for s in spans(bounds)]
    return torch.cat([y for y, _ in parts], 1).transpose(0, 1).contiguous(), torch.cat([lse for _, lse in parts], 1)


def packed_backward(grad, q, k, v, out, lse, bounds) -> list[Tensor]:
    """Gradients [T, H, d]; the log-sum-exps are read as contiguous memory, as the kernels do."""
    assert lse.is_contiguous()
    assert grad.is_contiguous()
    assert out.is_contiguous()
    parts = []
    for s in spans(bounds):
        rows = (t[s].transpose(0, 1) for t in (grad, q, k, v, out))
        parts.append([g.transpose(0, 1).to(q.dtype) for g in sdpa._backward_formula(*rows, lse[:, s])])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class StubXformers:
    """The part of xformers.ops.fmha that is used, checking shapes; log-sum-exps packed or padded."""

    def __init__(self, padded: bool = False) -> None:
        self.padded, self.masks = padded, 0
        self.BlockDiagonalMask = self

    def from_seqlens(self, lengths, *, device):
        self.masks += 1
        assert all(length > 0 for length in lengths)
        return SimpleNamespace(lengths=list(lengths), bounds=cu_seqlens(lengths))

    def memory_efficient_attention_forward_requires_grad(self, q, k, v, attn_bias):
        assert q.shape == k.shape == v.shape == (1, sum(attn_bias.lengths), HEADS, DIM // HEADS)
        out, lse = packed_forward(q[0], k[0], v[0], attn_bias.bounds)
        if not self.padded:
            return out[None], lse[None]
        wide = torch.full((len(attn_bias.lengths), HEADS, -(-max(attn_bias.lengths) // 32) * 32), float("inf"))
        for row, span in zip(wide, spans(attn_bias.bounds), strict=True):
            row[:, : span.stop - span.start] = lse[:, span]
        return out[None], wide

    def memory_efficient_attention_backward(self, grad, output, lse, q, k, v, attn_bias):
        assert grad.shape == output.shape == q.shape
        assert lse.shape == (1, HEADS, q.shape[1])
        grads = packed_backward(*(t[0] for t in (grad, q, k, v, output, lse)), attn_bias.bounds)
        return [g[None] for g in grads]


class StubAten:
    """The aten operators of Flash-Attention, with their arguments in their places."""

    def _flash_attention_forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None):
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == cu_q.diff().max()
        assert (dropout, causal, debug) == (0.0, False, False)
        return *packed_forward(q, k, v, cu_q), None, None, None

    def _flash_attention_forward_no_dropout_inplace(self, out, *given):
        assert out.shape == given[0].shape
        assert out.stride(-1) == 1
        y, lse = self._flash_attention_forward(*given)[:2]
        self.written = out.copy_(y).data_ptr()
        return lse

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused
    ):
        assert max_q == max_k == cu_q.diff().max()
        assert (dropout, causal) == (0.0, False)
        return packed_backward(grad, q, k, v, out, lse, cu_q)


@pytest.fixture
def stub(monkeypatch):
    """xformers and varlen run on the CPU, through stubs; returns that of xformers."""
    made = StubXformers()
    monkeypatch.setattr(xformers, "_fmha", lambda: made)
    monkeypatch.setattr(varlen, "aten", StubAten())
    for module in (xformers, varlen):
        monkeypatch.setattr(module, "available", lambda device: None)
        monkeypatch.setitem(backend._registry["attention"], module.__name__.rsplit(".", 1)[1], lambda device: None)
    caches = (xformers._mask, varlen._bounds)
    for cached in caches:
        cached.cache_clear()
    with at_most(Isa.BASE):  # no native kernels before them
        yield made
    for cached in caches:
        cached.cache_clear()


def agree(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.equal(a, b) or (a - b).abs().max() <= 2**-7 * b.abs().max()


@pytest.mark.parametrize("name", ["xformers", "varlen"])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_operators(stub, name, padded):
    stub.padded = padded
    qkv = make_qkv()
    with backend.use(name):
        agree(everything(qkv), formula(qkv))


@pytest.mark.parametrize("groups", [[1, 9], [1, 33], [4, 1]])
def test_one_sequence_in_either_layout(stub, groups):
    qkv = make_qkv(groups=groups)
    for stub.padded in (False, True):
        with backend.use("xformers"):
            agree(everything(qkv, groups), formula(qkv, groups))


def test_masks_and_bounds_are_made_once(stub):
    with backend.use("xformers"):
        for _ in range(3):
            everything(make_qkv())
        assert stub.masks == 1
        everything(make_qkv(groups=[2, 9]), [2, 9])
        assert stub.masks == 2
    with backend.use("varlen"):
        everything(make_qkv())
        first = varlen._bounds(tuple(GROUPS), CPU)
        everything(make_qkv())
    assert varlen._bounds(tuple(GROUPS), CPU)[0] is first[0]
    assert varlen._bounds.cache_info().misses == 1
    assert first[0].tolist() == [0, 40, 80, 88, 96, 104, 112, 120, 143, 166, 189]
    assert first[1] == 40


@pytest.mark.parametrize("inplace", [True, False])
def test_varlen_writes_where_it_is_told_to(stub, kernels, monkeypatch, inplace):
    """Beside another implementation's rows its result needs no copy, where PyTorch has the operator for it."""
    if not inplace:
        monkeypatch.delattr(StubAten, varlen.INPLACE)
    monkeypatch.setattr(xformers, "available", lambda device: "left out")
    monkeypatch.setattr(op, "SHORT_SEQUENCE", 8)
    long, short = [2, 40], [5, 8]
    qkv = make_qkv(groups=[*long, *short])
    assert [module for module, _ in op._plan(qkv, HEADS, [*long, *short])] == [varlen, kernels]
    agree(everything(qkv, [*long, *short]), formula(qkv, [*long, *short]))
    out = torch.full((80, DIM), 7.0, dtype=qkv.dtype)
    lse = torch.empty(80, HEADS)
    got = varlen.forward(Packed(qkv[:80], HEADS, long), out, lse)
    assert (got.data_ptr() == out.data_ptr()) == inplace
    assert (varlen.aten.written == out.data_ptr()) if inplace else out.eq(7).all()


@pytest.mark.parametrize("made", [xformers._mask, varlen._bounds], ids=["xformers", "varlen"])
def test_masks_and_bounds_stay_for_a_cuda_graph(stub, made):
    """A recorded graph knows their addresses, and replays whatever other lengths were attended to since."""
    with backend.use("xformers"):
        first = made((2, 40), CPU)
        for length in range(1, 200):
            made((3, length), CPU)
        assert made((2, 40), CPU) is first


def test_the_real_mask_has_the_same_bounds():
    """xformers' own BlockDiagonalMask, where it is installed."""
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    mask = attn_bias.BlockDiagonalMask.from_seqlens(varlen.lengths(GROUPS), device=CPU)
    assert mask.q_seqinfo.seqstart.tolist() == varlen._bounds(tuple(GROUPS), CPU)[0].tolist()
    assert mask.q_seqinfo.max_seqlen == 40


def test_operators_have_the_arguments_that_are_passed():
    """The calls in varlen.py and sdpa.py against this torch's schemas: order of the arguments, and their defaults."""
    names = {
        "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
        "return_debug_mask",
        "_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal rng_state unused",
        "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k "
        "max_q max_k dropout_p is_causal philox_seed philox_offset",
        "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp",
        "_scaled_dot_product_efficient_attention_backward": "grad_out_ query key value attn_bias out logsumexp "
        "philox_seed philox_offset dropout_p grad_input_mask",
    }
    for name, arguments in names.items():
        schema = getattr(torch.ops.aten, name).default._schema
        passed = len(arguments.split())
        assert [a.name for a in schema.arguments[:passed]] == arguments.split(), schema
        assert all(a.has_default_value() or a.kwarg_only for a in schema.arguments[passed:]), schema


def test_first_that_can_take_the_call_runs(stub):
    """Half types go to xformers; what it cannot take goes to the next that can."""
    with backend.use("xformers"):
        assert op._plan(make_qkv(), HEADS, GROUPS) == [(xformers, GROUPS)]
        for dtype in (torch.float32, torch.float64):
            assert op._plan(make_qkv(dtype), HEADS, GROUPS) == [(sdpa.fused, GROUPS)]
        assert op._plan(torch.zeros(4, 36).bfloat16(), 3, [1, 4]) == [(sdpa.fused, [1, 4])]  # heads of 4
    with backend.use("varlen"):
        assert op._plan(make_qkv(), HEADS, GROUPS) == [(varlen, GROUPS)]
    with backend.use("reference"):
        assert op._plan(make_qkv(), HEADS, GROUPS) == [(sdpa.formula, GROUPS)]


def test_xformers_says_what_it_lacks(monkeypatch):
    """Its own checks are asked: whether its library loaded, and whether deterministic algorithms are wanted."""

    def reasons(inputs):
        return ["it is not deterministic"] if torch.are_deterministic_algorithms_enabled() else []

    flash = SimpleNamespace(
        FwOp=SimpleNamespace(not_supported_reasons=lambda inputs: []),
        BwOp=SimpleNamespace(not_supported_reasons=reasons),
    )
    monkeypatch.setattr(xformers, "_fmha", lambda: SimpleNamespace(flash=flash, Inputs=lambda *qkv: qkv))
    monkeypatch.setattr(varlen, "available", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    xformers._lacking.cache_clear()
    try:
        assert xformers.available(CUDA) is None
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert "xformers says: it is not deterministic" in xformers.available(CUDA)
        flash.BwOp = None
        xformers._lacking.cache_clear()
        assert "another interface" in xformers.available(CUDA)
        monkeypatch.setattr(varlen, "available", lambda device: "no GPU")
        assert xformers.available(CUDA) == "no GPU"
    finally:
        xformers._lacking.cache_clear()


META = """
import torch
torch.backends.cuda.is_flash_attention_available = lambda: True
torch.version.cuda = "13.0"
torch.cuda.get_device_capability = lambda device=None: (9, 0)
from pera_kernels.attention import sdpa, varlen, xformers
from pera_kernels.attention.arguments import Attended, Packed
cases = [(varlen, torch.bfloat16), (sdpa.fused, torch.bfloat16), (sdpa.fused, torch.float32)]
try:
    from xformers.ops.fmha import attn_bias, common, flash
except ImportError:
    pass
else:
    common._built_with_cuda = True
    attn_bias._to_device_tensor = lambda seq, dtype, device: torch.empty(len(seq), dtype=dtype, device=device)
    for op in (flash.FwOp, flash.BwOp):
        op.SUPPORTED_DEVICES = {"meta"}
    cases.append((xformers, torch.float16))
groups = [4, 158, 0, 5, 11, 8]
for module, dtype in cases:
    qkv = torch.empty(720, 3 * 768, dtype=dtype, device="meta")
    lse = torch.empty(720, 12, device="meta")
    module.forward(Packed(qkv, 12, groups), torch.empty(720, 768, dtype=dtype, device="meta"), lse)
    out = module.forward(Packed(qkv, 12, groups), None, lse)
    assert out.shape == (720, 768) and out.is_contiguous() and out.dtype == dtype
    module.backward(torch.empty_like(out), Packed(qkv, 12, groups), Attended(out, lse), torch.empty_like(qkv))
    print("ran", module)
"""


def test_real_operators_accept_the_calls():
    """Shapes and arguments against the operators' meta implementations, xformers' own checks and choice included."""
    root = Path(op.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", META], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran") == 3 + (importlib.util.find_spec("xformers") is not None)


@pytest.fixture
def kernels(monkeypatch):
    """The Triton module, its launches replaced by the formula; it runs on the CPU."""
    triton = pytest.importorskip("pera_kernels.attention.triton")
    monkeypatch.setattr(triton, "forward", sdpa.formula.forward)
    monkeypatch.setattr(triton, "backward", sdpa.formula.backward)
    monkeypatch.setattr(backend, "needs_triton", lambda device: None)
    return triton


def test_short_groups_go_to_triton(stub, kernels, monkeypatch):
    long, short = [2, 40, 0, 5], [5, 8, 3, 23]
    assert backend.choose("attention", CPU) == "triton"
    assert op._plan(make_qkv(), HEADS, GROUPS) == [(xformers, long[:2]), (kernels, [*long[2:], *short])]
    agree(everything(make_qkv()), formula(make_qkv()))
    assert op._plan(make_qkv(torch.float32), HEADS, GROUPS)[0] == (sdpa.fused, long[:2])
    assert op._plan(make_qkv(torch.float64), HEADS, GROUPS) == [(sdpa.fused, GROUPS)]
    monkeypatch.setattr(op, "SHORT_SEQUENCE", 8)
    assert op._plan(make_qkv(), HEADS, GROUPS)[1:] == [(kernels, [0, 5, 5, 8]), (xformers, [3, 23])]
    agree(everything(make_qkv()), formula(make_qkv()))


@pytest.mark.parametrize(("constant", "variable", "longest"), [(32, "0", 0), (0, "1", 32), (8, "", 8), (0, "", 0)])
def test_short_groups_are_switched(stub, kernels, monkeypatch, constant, variable, longest):
    monkeypatch.setattr(op, "SHORT_SEQUENCE", constant)
    monkeypatch.setenv("PERA_SHORT_ATTENTION", variable)
    taken = [groups for module, groups in op._plan(make_qkv(), HEADS, GROUPS) if module is kernels]
    assert max((length for groups in taken for _, length in packing.pairs(groups)), default=0) == min(longest, 23)
    if longest == 0:
        assert backend.choose("attention", CPU) == "xformers"
        row = next(row for row in backend.report(CPU) if row.op == "attention")
        assert "PERA_SHORT_ATTENTION=1" in row.missing["triton"]


def test_a_wrong_switch_is_named(monkeypatch):
    monkeypatch.setenv("PERA_SHORT_ATTENTION", "yes")
    with pytest.raises(ValueError, match="PERA_SHORT_ATTENTION=yes: must be 0 or 1"):
        attention(make_qkv(), HEADS, GROUPS)


def test_every_implementation_says_why_it_cannot_run():
    with at_most(Isa.BASE):
        row = next(row for row in backend.report(CPU) if row.op == "attention")
    assert row.runs == "sdpa"
    assert list(row.missing) == ["triton", "amx", "avx512_bf16", "cudnn", "xformers", "varlen"]
    native = [row.missing.pop(name) for name in ("amx", "avx512_bf16")]
    assert all("this processor has no " in reason or "native library" in reason for reason in native)
    assert all("not on cpu" in reason for reason in row.missing.values())
    if not torch.cuda.is_available():
        assert xformers.available(CUDA)
        assert varlen.available(CUDA) == "torch sees no GPU"
    for name in ("xformers", "varlen", "triton"):
        with backend.use(name), pytest.raises(RuntimeError, match=f"attention: the {name} implementation was asked"):
            attention(make_qkv(), HEADS, GROUPS)


def test_a_broken_xformers_is_named(monkeypatch):
    monkeypatch.setattr(xformers, "_fmha", lambda: "xformers does not load (ImportError: no)")
    assert xformers.available(CUDA) == "xformers does not load (ImportError: no)"
    assert xformers.available(CPU) == "xformers attends on a GPU, not on cpu"
