"""Ops and their definitions with the tensors of one call each, to be compared in any dtype on any device."""

from collections.abc import Callable, Iterable

import torch
from packed_support import EPS, error, outputs_and_grads, randn, subset
from torch import Tensor

from pera_kernels import packing
from pera_kernels.add_norm import add_norm
from pera_kernels.add_norm.reference import add_norm as add_norm_definition
from pera_kernels.distillation_loss import distillation_loss
from pera_kernels.distillation_loss import reference as distillation_definition
from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.embed_tokens.reference import embed_tokens as embed_definition
from pera_kernels.gelu import gelu
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

    def check(self, dtype: torch.dtype, device: str, exact_on: str = "cpu") -> None:
        """At most three times the error of the definition in the same dtype, which runs on the device too."""
        exact = self.run(self.definition, torch.float64, exact_on)
        want, got = self.run(self.definition, dtype, device), self.run(self.fast, dtype, device)
        for name, value in exact.items():
            assert got[name].dtype == want[name].dtype, name
            bound = 3 * error(want[name].to(exact_on), value) + 4 * EPS[dtype]
            assert error(got[name].to(exact_on), value) <= bound, name


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
            chosen = {"kept_counts": kept if subsets else []}
            return lambda x, weight, bias, keep: function(
                x, weight, bias, eps=1e-6, groups=groups, keep=keep if subsets else None, **chosen
            )

        return Case(norm(sequence_norm), norm(norm_definition), tensors, tensors, ("x",), numbers)
    tensors = {"x": randn(tokens, dim, seed=1), "y": randn(branch, dim, seed=2)}

    def add(function: Function) -> Function:
        return lambda x, y, keep: function(x, y, groups=groups, keep=keep, kept_counts=kept)

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


def gelu_case(rows: int, width: int) -> Case:
    return Case(gelu, gelu_definition, {"x": randn(rows, width) * 2}, ("x",), ("x",))


def loss_case(op: str, n: int, k: int, d: int, near: bool = False) -> Case:
    """near: the student's rows are pairs of near ones, so that rounding changes nobody's nearest neighbour."""

    def rows(seed: int) -> Tensor:
        return torch.nn.functional.normalize(randn(n, d, seed=seed))

    names: tuple[str, ...] = ("student_rows", "v", "g", "teacher_rows", "teacher_v", "teacher_g", "center")
    student = randn(n // 2, d, seed=8).repeat_interleave(2, 0) + 0.3 * randn(n, d, seed=1) if near else rows(1)
    made = (torch.nn.functional.normalize(student), randn(k, d, seed=2), randn(k, 1, seed=3).abs() + 0.5)
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
