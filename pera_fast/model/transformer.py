"""Vision transformer on packed tokens (docs/method.md section 4).

Parameters carry the published checkpoint's names, which are timm's. Tokens are packed as ``pera_kernels.packing`` says;
dense tensors of all patches never exist.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import normal_, trunc_normal_, zeros_
from torch.utils.checkpoint import checkpoint

from pera_fast.ranges import span
from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.sequence_norm import sequence_norm

from . import fp8 as fp8_branches
from .branches import AttentionLayers, Pending, Plan, add_pending, attention_branch, mlp_branch, norm_pending
from .rows import row_groups

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Holder of the projection's parameters; the projection itself is ``pera_kernels.embed_tokens``."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)  # keeps the framework's default init


class Attention(nn.Module):
    """Projections of multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """Pre-norm transformer block whose branches may see a subset of the sequences only."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        subsets: tuple[Tensor, Tensor] | tuple[None, None],
        plan: Plan,
        tails: Sequence[int] | None = None,
    ) -> tuple[Tensor, Pending]:
        """One block, whose last addition is left to what follows.

        Args:
            x: packed tokens [T, D]; overwritten where no gradient is recorded.
            pending: the addition that the block before left; None: x is complete.
            subsets: sequences that the attention and the MLP branch see, see ``attention_branch``.
            plan: groups and policy.
            tails: None, or in a network's last block the rows that are read, see ``rows.take_rows``.

        Returns:
            The stream and the MLP branch's result; with tails the rows of both that are read.
        """
        attn, mlp = self.attn, self.mlp
        in_fp8 = plan.fp8 and tails is None  # the last block has no large products: few of its rows are read
        with span("attention"):
            layers = AttentionLayers(self.norm1, attn.qkv, attn.proj, attn.num_heads)
            if in_fp8:
                x, pending = fp8_branches.attention_branch(x, pending, layers, plan)
            else:
                x, pending = attention_branch(x, pending, layers, subsets[0], plan, tails)
        if tails is not None:
            plan = plan._replace(groups=tuple(row_groups(plan.groups, tails)))
        with span("mlp"):
            layers = self.norm2, mlp.fc1, mlp.fc2
            if in_fp8:
                return fp8_branches.mlp_branch(x, pending, *layers)
            return mlp_branch(x, pending, *layers, subsets[1], plan)


def bicubic_matrix(grid: int, target: int) -> Tensor:
    """float32 [target ** 2, grid ** 2]: position embeddings of a grid to those of a target grid.

    docs/method.md section 4.2: bicubic with scale factor (target + 0.1) / grid, no antialias.
    """
    basis = torch.eye(grid * grid, dtype=torch.float64).view(grid * grid, 1, grid, grid)
    scale = (target + 0.1) / grid
    columns = F.interpolate(basis, scale_factor=(scale, scale), mode="bicubic")
    return columns.view(grid * grid, target * target).t().contiguous().float()


class VisionTransformer(nn.Module):
    """ViT with cls token and learned position embedding for a square grid.

    Args:
        grid: patches per side that the position embedding is learned for (global crops).
        patch_size: pixels per side of a patch.
        in_chans: image channels.
        embed_dim: width D.
        depth: blocks.
        num_heads: attention heads; divides embed_dim.
        mlp_ratio: MLP width over embed_dim.
        other_grids: patches per side of other crop sizes, whose interpolation matrices are made once.
    """

    def __init__(
        self,
        grid: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        other_grids: Sequence[int] = (),
    ):
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, embed_dim))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        for other in other_grids:
            self.keep_grid(other)
        self.reset_parameters()

    def keep_grid(self, grid: int) -> None:
        """Make the interpolation matrix of crops with ``grid`` patches a side once, rather than at each use."""
        if grid != self.grid and not hasattr(self, f"_bicubic_{grid}"):
            matrix = bicubic_matrix(self.grid, grid).to(self.pos_embed.device)
            self.register_buffer(f"_bicubic_{grid}", matrix, persistent=False)

    def reset_parameters(self) -> None:
        """Initial weights of docs/method.md section 4.3."""
        trunc_normal_(self.pos_embed, std=0.02)
        normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                zeros_(module.bias)

    def position(self, grid: int) -> Tensor:
        """Position embedding [1 + grid * grid, D] of crops with ``grid`` patches a side; row 0 belongs to cls.

        The bicubic interpolation is linear in the embedding: a product with one small matrix, whose gradient is a
        matrix product too (deterministic on every device).
        """
        pos = self.pos_embed.view(-1, self.embed_dim)  # the gradient of a view is a view: no launch
        if grid == self.grid:
            return pos
        matrix = getattr(self, f"_bicubic_{grid}", None)
        if matrix is None:
            matrix = bicubic_matrix(self.grid, grid)
        first, patches = pos.split([1, pos.shape[0] - 1])
        return torch.cat([first, matrix.to(pos) @ patches])

    def embed(self, rows: Sequence[Tensor], index: Sequence[Tensor], grids: Sequence[int]) -> Tensor:
        """Packed tokens [sum(N * (1 + n)), D] of groups of sequences, cls first in each.

        Args:
            rows: patch rows [N * n, C * P * P] of each group.
            index: int32 [N, n], their patch numbers.
            grids: patches a side of each group's crops.
        """
        proj, positions = self.patch_embed.proj, [self.position(grid) for grid in grids]
        assert proj.bias is not None
        return embed_tokens(rows, proj.weight.flatten(1), proj.bias, positions, self.cls_token.view(-1), index)

    def forward_blocks(
        self,
        x: Tensor,
        groups: Sequence[int],
        start: int = 0,
        stop: int | None = None,
        subsets: Tensor | None = None,
        kept_counts: Sequence[int] = (),
        recompute: str = "none",
    ) -> Tensor:
        """Blocks start to stop on packed tokens.

        Args:
            x: packed tokens [T, D] in the compute dtype; overwritten where no gradient is recorded.
            groups: [n0, len0, n1, len1, ...].
            start, stop: range of blocks.
            subsets: int32 [depth, 2, sum(kept_counts) + sum(n)], stochastic depth's subsets for every block and
                branch, as ``packing.with_places`` gives them; None drops nothing.
            kept_counts: kept sequences of each group.
            recompute: what the backward pass makes again: "none", "cheap" (norms and GELU) or "block" (everything).

        Returns:
            [T, D], before the final norm.
        """
        plan = _plan(groups, subsets, kept_counts, recompute)
        x, pending = self._blocks(x, start, len(self.blocks) if stop is None else stop, subsets, plan, recompute)
        return x if pending is None else add_pending(x, pending, plan)

    def forward_rows(
        self,
        x: Tensor,
        groups: Sequence[int],
        tails: Sequence[int],
        start: int = 0,
        subsets: Tensor | None = None,
        kept_counts: Sequence[int] = (),
        recompute: str = "none",
        fp8: bool = False,
    ) -> Tensor:
        """All blocks from start on and the final norm, for the rows that are read.

        The last block makes queries, projection and MLP of those rows only; keys and values come from all tokens.

        Args:
            tails: how many last tokens of a sequence of each group are read, beside its cls token.
            x, groups, start, subsets, kept_counts, recompute: as for ``forward_blocks``.
            fp8: whether the blocks' products run in FP8; without gradients and subsets only.

        Returns:
            Normalised rows [sum(n * (1 + tail)), D], as ``rows.take_rows`` orders them.
        """
        plan, last = _plan(groups, subsets, kept_counts, recompute)._replace(fp8=fp8), len(self.blocks) - 1
        x, pending = self._blocks(x, start, last, subsets, plan, recompute)
        x, pending = self.blocks[last](x, pending, _subsets(subsets, last), plan, tails)
        plan = plan._replace(groups=tuple(row_groups(groups, tails)))
        return norm_pending(x, pending, self.norm, plan)

    def _blocks(
        self, x: Tensor, start: int, stop: int, subsets: Tensor | None, plan: Plan, recompute: str
    ) -> tuple[Tensor, Pending | None]:
        """Blocks start to stop: the stream and what is still to be added."""
        pending: Pending | None = None
        for i in range(start, stop):
            args = _subsets(subsets, i), plan
            if recompute == "block" and torch.is_grad_enabled():
                x = checkpoint(self._whole, i, x, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x, pending = self.blocks[i](x, pending, *args)
        return x, pending

    def _whole(self, i: int, x: Tensor, subsets: tuple[Tensor, Tensor] | tuple[None, None], plan: Plan) -> Tensor:
        """Block i with its last addition: one tensor to keep, the stream."""
        x, pending = self.blocks[i](x, None, subsets, plan)
        return add_pending(x, pending, plan)

    def final_norm(self, rows: Tensor) -> Tensor:
        """The final LayerNorm on some rows [R, D]: it acts on each row alone, so only rows that are used need it."""
        return sequence_norm(rows, self.norm.weight, self.norm.bias, self.norm.eps, [rows.shape[0], 1])


def _plan(groups: Sequence[int], subsets: Tensor | None, kept_counts: Sequence[int], recompute: str) -> Plan:
    return Plan(tuple(groups), None if subsets is None else tuple(kept_counts), recompute == "none")


def _subsets(subsets: Tensor | None, block: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Subsets of sequences for a block's attention and MLP branch."""
    return (None, None) if subsets is None else (subsets[block, 0], subsets[block, 1])
