"""Every op on a GPU against its definition in float64: values and gradients, odd shapes, large and foreign tensors."""

from collections.abc import Callable, Iterable

import pytest
import torch
from packed_support import EPS, error, outputs_and_grads, randn, subset
from torch import Tensor

from pera_kernels import backend, packing
from pera_kernels.add_norm import add_norm
from pera_kernels.add_norm.reference import add_norm as add_norm_definition
from pera_kernels.distillation_loss import distillation_loss
from pera_kernels.distillation_loss import reference as distillation_definition
from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.embed_tokens.reference import embed_tokens as embed_definition
from pera_kernels.gelu import gelu, gelu_, gelu_backward_
from pera_kernels.gelu.reference import gelu as gelu_definition
from pera_kernels.koleo import koleo
from pera_kernels.koleo import reference as koleo_definition
from pera_kernels.mask_tokens import mask_tokens
from pera_kernels.mask_tokens.reference import mask_tokens as mask_definition
from pera_kernels.prototype_losses import prototype_losses
from pera_kernels.prototype_losses import reference as losses_definition
from pera_kernels.query_attention import query_attention
from pera_kernels.query_attention.reference import query_attention as query_definition
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_add.reference import sequence_add as add_definition
from pera_kernels.sequence_norm import sequence_norm
from pera_kernels.sequence_norm.reference import sequence_norm as norm_definition

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [8, 100, 768]
TEMPS = 0.1, 0.05
Function = Callable[..., Tensor]


class Case:
    """An op and its definition with the tensors of one call.

    Attributes:
        fast, definition: take the tensors by name and the numbers of a device.
        tensors: float64, on the CPU.
        takes: names of those that take a gradient.
        half: names of those that come in the compute dtype.
        numbers: index tensors by name.
    """

    def __init__(
        self, fast: Function, definition: Function, tensors: dict[str, Tensor], takes: Iterable[str],
        half: Iterable[str], numbers: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.fast, self.definition, self.tensors = fast, definition, tensors
        self.takes, self.half, self.numbers = tuple(takes), set(half), numbers or {}

    def run(self, function: Function, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Result and gradients."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        given = {k: v.to(device, dtype if k in self.half else wide) for k, v in self.tensors.items()}
        numbers = {k: v.to(device) for k, v in self.numbers.items()}
        return outputs_and_grads(lambda **t: function(**t, **numbers), given, self.takes)

    def check(self, dtype: torch.dtype) -> None:
        """At most three times the error of the definition in the same dtype, which runs on the GPU too."""
        exact = self.run(self.definition, torch.float64, "cpu")
        want, got = self.run(self.definition, dtype, "cuda"), self.run(self.fast, dtype, "cuda")
        for name, value in exact.items():
            assert got[name].dtype == want[name].dtype, name
            bound = 3 * error(want[name].cpu(), value) + 4 * EPS[dtype]
            assert error(got[name].cpu(), value) <= bound, name


def patches(sequences: int, n: int, grid: int) -> Tensor:
    draw = torch.Generator().manual_seed(sequences)
    return torch.rand(sequences, grid, generator=draw).argsort(1)[:, :n].sort(1).values.int()


def tokens_case(op: str, dim: int, sequences: int = 37, n: int = 6, grid: int = 9) -> Case:
    index = {"index": patches(sequences, n, grid)}
    pos = {"pos": randn(1 + grid, dim, seed=4)}
    if op == "embed_tokens":
        tensors = {"rows": randn(sequences * n, 24, seed=1), "weight": randn(dim, 24, seed=2) / 5}
        tensors |= {"bias": randn(dim, seed=3), **pos, "cls": randn(dim, seed=5)}
        return Case(embed_tokens, embed_definition, tensors, ("weight", "bias", "pos", "cls"), ("rows",), index)
    tensors = {"tokens": randn(sequences * 4, dim, seed=1), "mask_token": randn(dim, seed=2), **pos}
    return Case(mask_tokens, mask_definition, tensors, ("tokens", "mask_token", "pos"), ("tokens",), index)


def stream_case(op: str, dim: int, groups: list[int], subsets: bool = True) -> Case:
    keep, kept = subset(groups, 1)
    numbers = {"keep": keep}
    tokens, branch = packing.num_tokens(groups), packing.num_tokens(packing.kept_groups(groups, kept))
    if op == "sequence_norm":
        tensors = {"x": randn(tokens, dim, seed=1) * 3 + 1, "weight": randn(dim, seed=2), "bias": randn(dim, seed=3)}

        def norm(function: Function) -> Function:
            return lambda x, weight, bias, keep: function(
                x, weight, bias, eps=1e-6, groups=groups, keep=keep if subsets else None, kept=kept if subsets else []
            )

        return Case(norm(sequence_norm), norm(norm_definition), tensors, tensors, ("x",), numbers)
    tensors = {"x": randn(tokens, dim, seed=1), "y": randn(branch, dim, seed=2)}

    def add(function: Function) -> Function:
        return lambda x, y, keep: function(x, y, groups=groups, keep=keep, kept=kept)

    return Case(add(sequence_add), add(add_definition), tensors, ("x", "y"), ("x", "y"), numbers)


def add_norm_case(dim: int, groups: list[int]) -> Case:
    (first, add_kept), (second, norm_kept) = subset(groups, 1), subset(groups, 2, 0.5)
    rows = packing.num_tokens(packing.kept_groups(groups, add_kept))
    tensors = {"x": randn(packing.num_tokens(groups), dim, seed=1) * 3 + 1, "y": randn(rows, dim, seed=2)}
    tensors |= {name: randn(dim, seed=seed) for seed, name in enumerate(("y_bias", "weight", "bias"), 3)}

    def fast(x, y, y_bias, weight, bias, first, second) -> Tensor:
        sets = packing.with_places(first, groups, add_kept), add_kept, packing.with_places(second, groups, norm_kept)
        return torch.cat(add_norm(x, y, y_bias, weight, bias, 1e-6, groups, *sets, norm_kept)[:2])

    def definition(x, y, y_bias, weight, bias, first, second) -> Tensor:
        return torch.cat(
            add_norm_definition(x, y, y_bias, weight, bias, 1e-6, groups, first, add_kept, second, norm_kept)
        )

    return Case(fast, definition, tensors, tensors, ("x", "y"), {"first": first, "second": second})


def query_case(groups: list[int], queries: list[int], heads: int = 3, head_dim: int = 64) -> Case:
    asked = sum(n * count for (n, _), count in zip(packing.pairs(groups), queries, strict=True))
    dim = heads * head_dim
    tensors = {"q": randn(asked, dim, seed=1), "kv": randn(packing.num_tokens(groups), 2 * dim, seed=2)}
    return Case(
        lambda q, kv: query_attention(q, kv, heads, queries, groups)[0],
        lambda q, kv: query_definition(q, kv, heads, queries, groups),
        tensors, ("q", "kv"), ("q", "kv"),
    )  # fmt: skip


def loss_case(op: str, n: int, k: int, d: int) -> Case:
    def rows(seed: int) -> Tensor:
        return torch.nn.functional.normalize(randn(n, d, seed=seed))

    names: tuple[str, ...] = ("student_rows", "v", "g", "teacher_rows", "teacher_v", "teacher_g", "center")
    made = (rows(1), randn(k, d, seed=2), randn(k, 1, seed=3).abs() + 0.5)
    made += (rows(4), randn(k, d, seed=5), randn(k, 1, seed=6).abs() + 0.5, 0.1 * randn(k, seed=7))
    tensors, takes, half = dict(zip(names, made, strict=True)), names[:3], ("student_rows", "teacher_rows")
    if op == "koleo":
        some = {name: tensors[name] for name in takes}

        def spread(function: Function) -> Function:
            return lambda student_rows, v, g: function(student_rows, v, g, 2).view(1)

        return Case(spread(koleo), spread(koleo_definition.koleo), some, takes, half)

    def whole(function: Callable) -> Function:
        def call(**t: Tensor) -> Tensor:
            if op == "distillation_loss":
                return function(*t.values(), *TEMPS)
            entropies, koleo_loss = function(*t.values(), *TEMPS, n // 2 * 2, 2)
            return torch.cat([entropies, koleo_loss.view(1)])

        return call

    fast = distillation_loss if op == "distillation_loss" else prototype_losses
    definition = (
        distillation_definition.distillation_loss if op == "distillation_loss" else losses_definition.prototype_losses
    )
    return Case(whole(fast), whole(definition), tensors, takes, half)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("op", ["embed_tokens", "mask_tokens"])
def test_tokens(op: str, dim: int, dtype: torch.dtype) -> None:
    tokens_case(op, dim).check(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("groups", [[5, 7, 9, 3], [1, 1], [3, 301, 0, 4]])
@pytest.mark.parametrize("op", ["sequence_norm", "sequence_add", "add_norm"])
def test_streams(op: str, groups: list[int], dim: int, dtype: torch.dtype) -> None:
    (add_norm_case(dim, groups) if op == "add_norm" else stream_case(op, dim, groups)).check(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_norm_of_all_sequences(dtype: torch.dtype) -> None:
    stream_case("sequence_norm", 768, [5, 7, 9, 3], subsets=False).check(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(37, 300), (1, 41), (0, 8), (1031, 3072)])
def test_gelu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    Case(gelu, gelu_definition, {"x": randn(*shape) * 2}, ("x",), ("x",)).check(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("groups", "queries"), [([5, 315, 7, 23], [158, 1]), ([3, 40], [33]), ([4, 19, 0, 3], [12, 1])]
)
def test_query_attention(groups: list[int], queries: list[int], dtype: torch.dtype) -> None:
    case = query_case(groups, queries)
    exact, got = case.run(case.definition, torch.float64, "cpu"), case.run(case.fast, dtype, "cuda")
    for name, value in exact.items():  # fused attention rounds its probabilities before their product
        assert error(got[name].cpu(), value) <= 8 * EPS[dtype] + 1e-5, name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(12, 200, 24), (64, 4096, 256), (9, 1031, 40)])
@pytest.mark.parametrize("op", ["distillation_loss", "koleo", "prototype_losses"])
def test_losses(op: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, d = shape
    loss_case(op, n // 2 * 2, k, d).check(dtype)


def test_losses_of_640_rows_and_131072_prototypes() -> None:
    """The sizes of batch 64: the loss against the definition in float32, rows of which fit in memory."""
    case = loss_case("distillation_loss", 640, 131072, 256)
    got, want = (case.run(f, torch.float32, "cuda") for f in (case.fast, case.definition))
    for name in got:
        assert error(got[name], want[name]) <= 1e-4, name


def needs_memory(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def test_gelu_of_more_than_2_31_elements() -> None:
    needs_memory(20)
    rows, width = 2**31 // 4096 + 3, 4096
    x = torch.full((rows, width), 0.5, dtype=torch.float16, device="cuda")
    x[-1] = torch.linspace(-3, 3, width, device="cuda")
    want = gelu_definition(x[-1:].double())
    grad = torch.ones_like(x)
    _, sums = gelu_backward_(grad, x)
    assert error(gelu_(x)[-1:], want) <= 4 * EPS[torch.float16]
    slope = gelu_backward_(torch.ones(1, 8, device="cuda"), torch.full((1, 8), 0.5, device="cuda"))[1][0].item()
    assert sums.mean().item() == pytest.approx(slope * (rows - 1), rel=1e-2)
    assert grad[rows // 2, 0].item() == pytest.approx(slope, rel=1e-3)


def test_add_norm_of_more_than_2_31_elements() -> None:
    needs_memory(24)
    dim, length = 1024, 512
    n = 2**31 // (dim * length) + 1
    x = torch.zeros(n * length, dim, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros_like(x)
    y[-1] = torch.linspace(-1, 1, dim, device="cuda")
    weight, bias = torch.ones(dim, device="cuda"), torch.zeros(dim, device="cuda")
    out, normed = add_norm(x, y, bias, weight, bias, 1e-6, [n, length], None, [], None, [])[:2]
    want = torch.nn.functional.layer_norm(y[-1].double(), (dim,), eps=1e-6)
    assert torch.equal(out[-1], y[-1])
    assert error(normed[-1], want) <= 4 * EPS[torch.bfloat16]
    assert not normed[:-1].any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_the_current_one() -> None:
    x = randn(100, 768, dtype=torch.float32).to("cuda:1")
    with torch.cuda.device(0):
        assert error(gelu(x), gelu_definition(x.double())) <= 4 * EPS[torch.float32]


@pytest.mark.parametrize("name", ["triton", "cudnn", "varlen", "sdpa", "xformers"])
def test_a_step_of_vit_b16_with_every_attention(name: str) -> None:
    """Gradients of all parameters at batch 4, against those of the definitions: both in bf16."""
    from pera_fast.config import load_config
    from pera_fast.profile.batches import random_inputs
    from pera_fast.train.api import make_model

    cfg = load_config("vit_b16", ["train.batch_size=4", "train.precision=bf16", "model.prototypes=4096"])
    device = torch.device("cuda", 0)
    inputs = random_inputs(cfg, 4).to(device)

    def gradients(implementation: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = make_model(cfg).to(device)
        with backend.use(implementation):
            model(inputs, 0.04)["loss"].backward()
        return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    with backend.use(name):
        try:
            backend.choose("attention", device)
        except RuntimeError as reason:
            pytest.skip(str(reason))
    want, got = gradients("reference"), gradients(name)
    assert got.keys() == want.keys()
    errors = sorted(error(got[k], want[k]) for k in want)
    assert errors[len(errors) // 2] <= 0.1  # both round to bf16 at every layer
    assert errors[-1] <= 0.5
