"""query_attention against its definition, and against attention of all tokens."""

import pytest
import torch
from packed_support import DTYPES, EPS, compare, error, outputs_and_grads, randn
from torch.library import opcheck

from pera_kernels import backend, packing
from pera_kernels.attention import attention
from pera_kernels.query_attention import op, query_attention
from pera_kernels.query_attention.reference import query_attention as definition

HEADS, DIM = 2, 16
CASES = [([3, 5, 7, 2], [4, 1]), ([1, 1], [1]), ([4, 19, 0, 3], [12, 1]), ([2, 40], [1]), ([2, 5, 3, 4], [0, 2])]


def tensors(groups: list[int], queries: list[int]):
    asked = sum(n * count for (n, _), count in zip(packing.pairs(groups), queries, strict=True))
    return {"q": randn(asked, DIM, seed=1), "kv": randn(packing.num_tokens(groups), 2 * DIM, seed=2)}


@pytest.mark.parametrize(("groups", "queries"), CASES)
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_matches_the_definition(groups: list[int], queries: list[int], name: str) -> None:
    def fast(q, kv):
        return query_attention(q, kv, HEADS, queries, groups)[0]

    def reference(q, kv):
        return definition(q, kv, HEADS, queries, groups)

    given = tensors(groups, queries)
    with backend.use(name):
        if name == "reference":
            compare(fast, reference, given, ("q", "kv"), half={"q", "kv"})
            return
        exact = outputs_and_grads(reference, given, ("q", "kv"))
        for dtype in DTYPES:  # fused attention rounds its probabilities to the half type before their product
            got = outputs_and_grads(fast, {k: v.to(dtype) for k, v in given.items()}, ("q", "kv"))
            for key, value in exact.items():
                assert error(got[key], value) <= 8 * EPS[dtype] + 1e-13, (dtype, key)


def test_all_queries_give_attention() -> None:
    groups = [3, 9, 2, 4]
    qkv = randn(packing.num_tokens(groups), 3 * DIM, dtype=torch.float32)
    q, kv = qkv.split([DIM, 2 * DIM], dim=1)
    out, _ = query_attention(q, kv, HEADS, [9, 4], groups)
    torch.testing.assert_close(out, attention(qkv, HEADS, groups), rtol=1e-5, atol=1e-6)


def test_opcheck() -> None:
    groups, queries = [3, 5, 2, 4], [2, 1]
    q, kv = (t.float().requires_grad_() for t in tensors(groups, queries).values())
    opcheck(op._query_attention, (q, kv, HEADS, queries, groups))


def test_bad_shapes_are_refused() -> None:
    q, kv = (t.float() for t in tensors([3, 5], [2]).values())
    with pytest.raises(ValueError, match="do not hold"):
        query_attention(q, kv, HEADS, [3], [3, 5])
    with pytest.raises(ValueError, match="do not hold"):
        query_attention(q, kv[:, :DIM], HEADS, [2], [3, 5])
