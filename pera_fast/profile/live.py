"""Counts the live memory of a program without running it, from the lifetimes of FakeTensor storages.

A fake tensor has a shape, a dtype and a storage that holds no bytes but dies when the last tensor on it dies. Counting
storages by lifetime gives the memory that the program's tensors need, with no allocator's rounding, no workspace of a
library and no CUDA context. Ops of ``pera_kernels`` are opened: the temporaries of their PyTorch implementation count,
where kernels have the like.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Label = tuple[str, ...]

# Not opened: their kernels and their PyTorch implementations walk over pixels or prototypes in pieces that fit the
# caches, a few MiB beside their results whatever the batch (a test opens them); the walks would take most of the time.
PIECEWISE = frozenset(
    f"pera::{name}{direction}"
    for name in ("contrast_mean", "visible_patches", "pixel_loss", "koleo", "distillation_loss", "prototype_losses")
    for direction in ("", "_backward")
)
# Not opened: a GPU's kernels hold their results and a few KiB. What runs on fake tensors in their place widens half
# types and writes gathered rows and scores out, up to 10 MiB per image at vit_b16.
FUSED = frozenset(
    f"pera::{name}{way}"
    for name in ("attention", "query_attention", "sequence_norm", "sequence_add", "add_norm", "gelu")
    for way in ("", "_", "_backward", "_backward_", "_backward_with_sums", "_parts")
)


class LiveBytes(TorchDispatchMode):
    """Keeps a diary of all storages that ops return: size, label at birth, birth and death.

    Attributes:
        live: bytes alive now.
        births: (size, label) of each storage, in order of birth; its place is the storage's number.
        events: numbers of storages, at birth as they are and at death as ~number.
    """

    def __init__(
        self,
        opened: dict[Hashable, int] | None = None,
        skip: frozenset[str] = PIECEWISE | FUSED,
        foreign: frozenset[int] = frozenset(),
    ) -> None:
        """Nothing has been born yet.

        Args:
            opened: temporaries of ops by their arguments' shapes, kept from call to call.
            skip: ops that are not opened.
            foreign: ids of storages that are another's to count.
        """
        super().__init__()
        self.live = 0
        self.births: list[tuple[int, Label]] = []
        self.events: list[int] = []
        self._label: Label = ()
        self._alive: dict[int, tuple[weakref.ref, int]] = {}  # by the storage's id
        self._opened = {} if opened is None else opened
        self._skip, self._foreign = skip, foreign

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Storages born inside carry this name behind those of the labels around it."""
        before, self._label = self._label, (*self._label, name)
        try:
            yield
        finally:
            self._label = before

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor's storage, None if no op that was watched has made it."""
        known = self._alive.get(id(tensor.untyped_storage()))
        return None if known is None else known[1]

    def peak(self, since: int = 0) -> tuple[int, list[int]]:
        """The most bytes that were alive at once and the numbers of those storages.

        Args:
            since: only events from here on count for the peak.
        """
        live, most, at = 0, -1, 0
        for place, event in enumerate(self.events):
            live += self.births[event][0] if event >= 0 else -self.births[~event][0]
            if place >= since - 1 and live > most:
                most, at = live, place
        alive: dict[int, None] = {}
        for event in self.events[: at + 1]:
            if event >= 0:
                alive[event] = None
            else:
                del alive[~event]
        return max(most, 0), list(alive)

    def by_label(self, numbers: list[int], renamed: Mapping[int, Label] = {}) -> dict[Label, int]:
        """Bytes of some storages by label; ``renamed`` gives other labels to single storages."""
        sums: dict[Label, int] = {}
        for number in numbers:
            size, label = self.births[number]
            label = renamed.get(number, label)
            sums[label] = sums.get(label, 0) + size
        return sums

    def _born(self, size: int, label: Label) -> int:
        number = len(self.births)
        self.births.append((size, label))
        self.events.append(number)
        self.live += size
        return number

    def _died(self, number: int) -> None:
        self.events.append(~number)
        self.live -= self.births[number][0]

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive or key in self._foreign:
            return
        number = self._born(storage.nbytes(), self._label)

        def died(_: Any) -> None:
            del self._alive[key]
            self._died(number)

        self._alive[key] = weakref.ref(storage, died), number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "pera" and func._schema.name not in self._skip:
            self._died(self._born(self._temporaries(func, args, kwargs), (*self._label, func._schema.name[6:])))
        out = func(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _temporaries(self, func: OpOverload, args: tuple, kwargs: dict) -> int:
        """The most bytes, its results among them, that an op's PyTorch implementation holds of its own at once."""
        key = _signature(func, args, kwargs)
        if key not in self._opened:
            definition, tensors = OPDEFS.get(func._schema.name), tree_leaves((args, kwargs))
            given = frozenset(id(t.untyped_storage()) for t in tensors if isinstance(t, Tensor)) | self._foreign
            inside = LiveBytes(self._opened, self._skip, given)
            try:
                with inside:
                    kept = definition and definition._init_fn(*args, **kwargs)
                self._opened[key] = inside.peak()[0]
                del kept
            except DataDependentOutputException:  # it looks at values: then only the op's result counts
                self._opened[key] = 0
        return self._opened[key]


def _signature(func: OpOverload, args: tuple, kwargs: dict) -> Hashable:
    """Equal for two calls whose tensors have equal shapes and dtypes and whose other arguments are equal."""
    parts: list[Hashable] = [func._schema.name]
    for value in tree_leaves((args, kwargs)):
        is_tensor = isinstance(value, Tensor)
        parts.append((value.shape, value.stride(), value.dtype, value.requires_grad) if is_tensor else value)
    return tuple(parts)


def reads_value(func: OpOverload) -> bool:
    """Whether an op brings one number to the host."""
    return func is torch.ops.aten._local_scalar_dense.default
