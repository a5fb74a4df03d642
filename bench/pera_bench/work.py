"""A benchmark case: an op with its reference, arguments and cost, or a whole such as a training step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pera_kernels import backend

FORWARD, BOTH = "forward", "forward+backward"
REFERENCE, COMPILED = "reference", "compiled"
Make = Callable[[], Callable[[], Any]]


class Unavailable(Exception):  # noqa: N818 - not an error: the row is left out, with this reason
    """An implementation cannot run here; the message is one clause."""


@dataclass(frozen=True)
class Cost:
    """Least work of one call: bytes moved (0: not stated), FLOPs of matrix products (0: none)."""

    moved: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.moved + other.moved, self.flops + other.flops)


@dataclass
class Run:
    """One thing to time.

    Attributes:
        call: without arguments; what it returns is looked at by `error` only.
        cost: of one call.
        error: largest difference of its results from the definition in float64, over the largest value; None: unknown.
        context: held while `call` runs: it forces the implementation.
        implementation: what really runs, where that is not what was asked for.
    """

    call: Callable[[], Any]
    cost: Cost
    error: Callable[[], float] | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    implementation: str | None = None


@dataclass
class Work:
    """An op in the shapes of a training step.

    Attributes:
        op: its name in `pera_kernels.backend`; None: something made of several ops.
        call: the op, dispatched by `pera_kernels.backend`.
        reference: its definition in plain PyTorch, differentiable, with the same arguments.
        arguments: of both.
        learned: positions of the arguments that take a gradient.
        forward, backward: cost of a call and of its gradients.
        compiles: what torch.compile is given, or why nothing is; the default is the definition.
    """

    op: str | None
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    arguments: Sequence[Any]
    learned: Sequence[int]
    forward: Cost
    backward: Cost = field(default_factory=Cost)
    compiles: Callable[..., Tensor] | str | None = None

    @classmethod
    def quantizing(
        cls, op: str, call: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor
    ) -> Work:
        """An op that reads each value of x [rows, n] and writes a byte for it, and 4 bytes a row. No gradient."""
        cost = Cost(moved=x.nbytes + x.numel() + 4 * x.shape[0])
        return cls(op, call, reference, arguments=(x,), learned=(), forward=cost)

    def run(self, direction: str, implementation: str) -> Run:
        """The op as one implementation does it. Raises Unavailable."""
        fn, context, name = self._implementation(implementation)
        call = self._call(fn, self._leaves(self.arguments), direction)
        cost = self.forward if direction == FORWARD else self.forward + self.backward

        def error() -> float:
            with context():
                return relative_error(call(), self._exact(direction))

        return Run(call, cost, error, context, name)

    def _implementation(self, name: str) -> tuple[Callable[..., Tensor], Callable[[], AbstractContextManager], str]:
        def forced(backend_name: str) -> Callable[[], AbstractContextManager]:
            return lambda: backend.use(backend_name)

        if name == REFERENCE:
            return self.reference, forced(REFERENCE), name
        if name == COMPILED:
            wanted = self.reference if self.compiles is None else self.compiles
            if isinstance(wanted, str):
                raise Unavailable(wanted)
            torch.compiler.reset()
            context = nullcontext if self.op is None else forced(REFERENCE)  # of several ops: with what would run
            return torch.compile(wanted, fullgraph=True, dynamic=False), context, name
        if self.op is None:
            return self.call, nullcontext, name
        device = next(a.device for a in self.arguments if isinstance(a, Tensor))
        if name == "chosen":
            return self.call, nullcontext, backend.choose(self.op, device)
        with backend.use(name):
            try:
                backend.choose(self.op, device)
            except RuntimeError as reason:
                raise Unavailable(str(reason).split("was asked for, but ")[-1]) from None
        return self.call, forced(name), name

    def _leaves(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, those that are learned as leaves of a graph of their own."""
        return [a.detach().requires_grad_() if i in self.learned else a for i, a in enumerate(arguments)]

    def _call(self, fn: Callable[..., Tensor], arguments: list[Any], direction: str) -> Callable[[], list[Tensor]]:
        if direction == FORWARD:

            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [fn(*arguments)]

            return forward
        learned = [arguments[i] for i in self.learned]

        def both() -> list[Tensor]:
            out = fn(*arguments)
            return list(torch.autograd.grad(out, learned, self._upstream(out)))

        return both

    def _upstream(self, out: Tensor) -> Tensor:
        """The same gradient for every implementation: of the losses ones, else drawn values."""
        if out.ndim < 2:
            return torch.ones_like(out)
        if self._drawn is None or self._drawn.dtype != out.dtype:
            draw = torch.Generator(out.device).manual_seed(1)
            values = torch.randn(out.shape, generator=draw, device=out.device)
            self._drawn = values.to(self.arguments[0].dtype).to(out.dtype)
        return self._drawn

    _drawn: Tensor | None = field(default=None, init=False, repr=False)
    _results: dict[str, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def _exact(self, direction: str) -> list[Tensor]:
        """The definition's results in float64, from the same (rounded) arguments; computed once."""
        if direction not in self._results:
            call = self._call(self.reference, self._leaves([_wide(a) for a in self.arguments]), direction)
            with backend.use(REFERENCE):
                self._results[direction] = call()
            self._drawn = None
        return self._results[direction]


def _wide(argument: Any) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference over the largest exact value, of all results the worst."""
    worst = 0.0
    for result, right in zip(got, exact, strict=True):
        if right.numel():
            scale = right.abs().max().item() or 1.0
            worst = max(worst, (result.double() - right).abs().max().item() / scale)
    return worst


@dataclass
class Whole:
    """Something whole, such as a training step.

    Attributes:
        make: by implementation, what makes it ready and gives the call to time; or that with the backend to force.
        cost: of one call.
        labels: what a row says instead of the implementation's name.
    """

    make: dict[str, Make | tuple[Make, str]]
    cost: Cost
    labels: dict[str, str] = field(default_factory=dict)

    def run(self, direction: str, implementation: str) -> Run:
        """Ready to be timed. Raises Unavailable."""
        gc.collect()  # what an earlier implementation left
        if implementation not in self.make:
            raise Unavailable("it does not run on this device, or not in this case")
        make = self.make[implementation]
        label = self.labels.get(implementation, implementation)
        if not isinstance(make, tuple):
            return Run(make(), self.cost, implementation=label)
        make, name = make
        return Run(make(), self.cost, context=lambda: backend.use(name), implementation=label)
