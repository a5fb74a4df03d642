"""Launches, bytes and FLOPs of PyTorch's operators on a GPU.

By class: products, attention, operators on lists of tensors, and passes over memory.

A pass reads its arguments and writes its results; views and empty tensors cost nothing.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from pera_kernels import cost
from pera_kernels.cost import Cost, size

FREE = frozenset({
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "detach_", "lift_fresh",
    "alias", "set_", "resize_", "_unsafe_view", "_reshape_alias", "promote_types", "result_type", "is_same_size",
    "record_stream", "_pin_memory", "is_pinned",
})  # fmt: skip
WRITE_FIRST = frozenset({"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"})  # their first is not read
GATHERS = frozenset({"index", "index_select", "gather", "embedding"})  # read as much as they write
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_scaled_mm"})
ADDING = frozenset({"addmm", "baddbmm", "addmv"})  # their first argument is added
# at::native::multi_tensor_apply: tensors of a launch by how many lists there are, blocks of a launch, their elements
TENSORS, BLOCKS, ELEMENTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


def costs(func: OpOverload, args: tuple, kwargs: dict, result: Any) -> list[Cost]:
    """Costs of a call of an operator of PyTorch on a GPU."""
    name = func._schema.name.partition("::")[2]
    if name in FREE or name.startswith("sym_") or func.is_view:
        return []
    if name == "_to_copy" and kwargs.get("dtype") in (None, args[0].dtype):
        return []  # to the device on which the tensor is already
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if name in PRODUCTS:
        return _product(name, args, results[0])
    if "attention" in name:
        return _attention(name, args, results)
    if name.startswith(("_foreach", "_fused")):
        return _several(name, args)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors and not results:
        return []
    if name in WRITE_FIRST:
        return [Cost(bytes=size(tensors))]
    if name in GATHERS:
        return [Cost(bytes=2 * size(results) + size(tensors[1:]))]
    return [Cost(bytes=size(tensors, results))]


def _product(name: str, args: tuple, out: Tensor) -> list[Cost]:
    tensors = [t for t in args if isinstance(t, Tensor)]
    a, b = tensors[1:3] if name in ADDING else tensors[:2]
    rows = a.shape[-2] if a.dim() > 1 else 1
    columns = b.shape[-1] if b.dim() > 1 else 1
    batch = a.shape[0] if a.dim() == 3 else 1
    return cost.product(rows, columns, a.shape[-1], a.dtype, out.element_size(), batch)


def _attention(name: str, args: tuple, results: list[Tensor]) -> list[Cost]:
    """Attention of a dense group [n, H, len, d]: cuDNN's or Flash-Attention 2's."""
    kind: cost.Kind = "cudnn attention" if "cudnn" in name else "attention"
    backward, tensors = "backward" in name, [t for t in args if isinstance(t, Tensor)]
    q, k = tensors[1:3] if backward else tensors[:2]
    pairs, dim = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2], q.shape[3]
    return cost.attention(pairs, dim, q.dtype, size(tensors, results), q.numel() if backward else None, kind)


def _several(name: str, args: tuple) -> list[Cost]:
    """Operators on lists of tensors: so many tensors, and so many blocks of them, fit a launch."""
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    if not lists:
        return []
    adamw = name == "_fused_adamw_"
    if adamw:  # parameters, gradients, two moments; the steps are one number each
        lists = lists[:4]
    launches = _multi_tensor_launches([t.numel() for t in lists[0]], TENSORS[min(len(lists), 5)])
    if name == "_foreach_norm":
        return [Cost(launches + 2, size(lists))]  # clears the sums, adds them up
    written = size(lists) - size(lists[1]) if adamw else size(lists[0]) if name not in WRITE_FIRST else 0
    return [Cost(launches, size(lists) + written)]


def _multi_tensor_launches(elements: list[int], limit: int) -> int:
    launches = tensors = blocks = 0
    for count in elements:
        parts = math.ceil(count / ELEMENTS)
        tensors += 1 if count else 0
        for part in range(parts):
            blocks += 1
            full = blocks == BLOCKS or (tensors == limit and part == parts - 1)
            if full:
                launches, blocks = launches + 1, 0
                tensors = 0 if part == parts - 1 else 1
    return launches + (1 if blocks else 0)
