"""A whole transformer block: the teacher's forward, the student's in the second half of the blocks."""

import torch
from torch import Tensor

from pera_bench.point import Point
from pera_bench.work import BOTH, FORWARD, Cost, Work
from pera_fast.model.branches import Pending, Plan
from pera_fast.model.transformer import Block
from pera_kernels.packing import kept_groups, num_tokens, pairs, with_places

IMPLEMENTATIONS = ("reference", "compiled", "pera-fast")
CASES = {"teacher": (FORWARD,), "student_late": (FORWARD, BOTH)}


def make(point: Point, case: str) -> Work:
    """A block in the middle of a network: the addition that the block before left comes first.

    Every op is dispatched alike: all definitions, or what would run, also as one graph (compiled). Bytes are not
    stated.
    """
    m, groups = point.cfg.model, point.groups(case)
    keep, kept_counts = (None, []) if case == "teacher" else point.keep(groups)
    subset = None if keep is None else with_places(keep, groups, kept_counts)
    plan = Plan(tuple(groups), None if keep is None else tuple(kept_counts), m.recompute in ("auto", "none"))
    block = Block(m.embed_dim, m.num_heads, m.mlp_ratio).to(point.device)
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    names = [name for name, _ in block.named_parameters()]

    def call(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        if not torch.is_grad_enabled():
            x = x.clone()  # it is overwritten then, and every call is to find the same
        pending = Pending(y, None, subset)
        x, pending = torch.func.functional_call(block, values, (x, pending, (subset, subset), plan))
        return torch.cat([x, pending.y])

    branch = kept_groups(groups, None if keep is None else kept_counts)
    x, y = (point.normal(num_tokens(g), point.dim) for g in (groups, branch))
    arguments = (x, y, *(p.detach() for p in block.parameters()))
    flops = forward_flops(point, branch)
    return Work(
        op=None,
        call=call,
        reference=call,
        arguments=arguments,
        learned=range(len(arguments)),
        forward=Cost(flops=flops),
        backward=Cost(flops=2 * flops),
    )


def forward_flops(point: Point, groups: list[int]) -> int:
    """Matrix products of one block on packed sequences: projections, MLP, scores."""
    dim, ratio = point.dim, point.cfg.model.mlp_ratio
    return sum(n * (length * int(8 + 4 * ratio) * dim**2 + 4 * length**2 * dim) for n, length in pairs(groups))
