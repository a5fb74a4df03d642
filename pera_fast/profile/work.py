"""Launches, bytes and FLOPs of a training step on a GPU, counted without one.

The trainer's own step runs on fake tensors that seem to lie on a GPU (``on_gpu``). Ops of ``pera_kernels`` state what
they cost (``pera_kernels.cost``); one that states nothing is opened: what it calls is counted. PyTorch's operators
count by class (``operators``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pera_fast.profile.on_gpu import fiction, truth, without_device
from pera_fast.profile.operators import costs
from pera_kernels import cost
from pera_kernels.cost import Cost, size

PARTS = ("products", "attention", "passes", "losses", "update", "exchange")
LOSS_OPS = ("koleo", "prototype_losses", "distillation_loss", "pixel_loss", "sinkhorn")
UPDATE_SPANS = ("optimiser", "EMA")


class Row(NamedTuple):
    """Equal launches of a step, or of one op.

    Attributes:
        part: one of PARTS.
        kind: what bounds it, as in ``pera_kernels.cost.Cost``.
        dtype: of the products' operands.
        launches, bytes, flops: as in ``pera_kernels.cost.Cost``.
    """

    part: str
    kind: str
    dtype: str
    launches: int
    bytes: int
    flops: float


@dataclass
class Work:
    """The work of a step: how often it has each row.

    Attributes:
        rows: with how often they come.
    """

    rows: Counter[Row] = field(default_factory=Counter)

    def add(self, part: str, item: Cost) -> None:
        """Adds launches to a part."""
        self.rows[Row(part, item.kind, str(item.dtype)[6:], item.launches, item.bytes, item.flops)] += 1

    def total(self, what: str) -> float:
        """Sum of launches, bytes or flops."""
        return sum(times * getattr(row, what) for row, times in self.rows.items())

    def by_part(self, what: str) -> dict[str, float]:
        """Sum by part, of the parts that there are."""
        sums: dict[str, float] = {}
        for row, times in self.rows.items():
            sums[row.part] = sums.get(row.part, 0) + times * getattr(row, what)
        return {part: sums[part] for part in PARTS if part in sums}

    def parts(self) -> dict[str, dict[str, float]]:
        """Launches, bytes and flops by part."""
        sums = {what: self.by_part(what) for what in ("launches", "bytes", "flops")}
        return {part: {what: by_part[part] for what, by_part in sums.items()} for part in sums["launches"]}


class Counting(TorchDispatchMode):
    """Counts what the ops that run inside would launch on a GPU."""

    def __init__(self, opened: bool = False) -> None:
        """Nothing was counted yet.

        Args:
            opened: ops that state their cost are opened all the same: what their kernels' launchers really launch.
        """
        super().__init__()
        self.work = Work()
        self.by_op: Counter[str] = Counter()  # launches of each op of pera_kernels
        self.by_kernel: dict[str, tuple[int, int]] = {}  # launches and bytes of each Triton kernel that was launched
        self._opened = opened
        self._spans: list[str] = []
        self._ops: list[str] = []
        self._pointed: dict[str, int] = {}

    def begin(self, pointed: dict[str, int]) -> None:
        """Start to count, from nothing.

        Args:
            pointed: bytes of kernels that find their tensors by addresses, over all their launches.
        """
        self.work, self.by_op, self.by_kernel, self._pointed = Work(), Counter(), {}, dict(pointed)

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """For ``pera_fast.ranges.listening``."""
        self._spans.append(name)
        try:
            yield
        finally:
            self._spans.pop()

    def _part(self, kind: str) -> str:
        if any(name in UPDATE_SPANS for name in self._spans):
            return "update"
        if "loss" in self._spans or any(op.startswith(LOSS_OPS) for op in self._ops):
            return "losses"
        return kind.rpartition(" ")[2]  # "cudnn attention" is attention

    def add(self, item: Cost) -> None:
        """Counts launches."""
        if not item.launches:
            return
        self.work.add(self._part(item.kind), item)
        if self._ops:
            self.by_op[self._ops[0]] += item.launches

    def launched(self, kernel: str, read: list[Any], written: list[Any]) -> None:
        """A launch of a Triton kernel: it reads each tensor of ``read`` and writes each of ``written`` once."""
        moved = self._pointed.pop(kernel, 0) + _bytes(read) + _bytes(written)
        launches, before = self.by_kernel.get(kernel, (0, 0))
        self.by_kernel[kernel] = launches + 1, before + moved
        self.add(Cost(bytes=moved))

    def exchanged(self, tensor: Tensor, ranks: int) -> None:
        """An all-reduce in a ring: each rank sends and gets the tensor's bytes nearly twice."""
        self.work.add("exchange", Cost(1, round(2 * (ranks - 1) / ranks * size(tensor)), kind="exchange"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = without_device(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func.namespace == "pera":
            return self._pera(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.add(Cost(bytes=8))
            return 1.0
        if _is_composite(func):
            with fiction(), self:
                return func.decompose(*args, **kwargs)
        writes = not func._schema.returns and func._schema.is_mutable  # makes nothing, and is slow to fake
        with truth():
            result = None if writes else func(*args, **kwargs)
        if func.namespace == "aten":
            for item in costs(func, args, kwargs, result):
                self.add(item)
        return result

    def _pera(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        name = func._schema.name
        statement = None if self._opened else cost.stated(name)
        self._ops.append(name.partition("::")[2])
        try:
            if statement is None:
                with fiction(), self:
                    return OPDEFS[name]._init_fn(*args, **kwargs)
            with truth():
                result = func(*args, **kwargs)
            with fiction():
                for item in statement(result, *_in_order(func, args, kwargs)):
                    self.add(item)
            return result
        finally:
            self._ops.pop()


def _bytes(arguments: list[Any]) -> int:
    """Bytes of the tensors among a launch's arguments; one that it gets twice counts once."""
    seen: dict[Any, Tensor] = {}
    for value in arguments:
        value = value if isinstance(value, Tensor) else getattr(value, "base", None)  # of a tensor descriptor
        if isinstance(value, Tensor):
            seen[id(value.untyped_storage()), value.storage_offset()] = value
    return sum(size(tensor) for tensor in seen.values())


def _in_order(func: OpOverload, args: tuple, kwargs: dict) -> list[Any]:
    """All arguments of an op in the schema's order."""
    rest = func._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(a.name, a.default_value) for a in rest)]


def _is_composite(func: OpOverload) -> bool:
    """Whether the operator is made of others on any device."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
