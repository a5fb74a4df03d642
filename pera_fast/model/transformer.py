"""Vision transformer on packed tokens (METHOD.md section 4).

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
from pera_kernels.attention import attention
from pera_kernels.embed_tokens import embed_tokens
from pera_kernels.packing import kept_groups, pairs
from pera_kernels.sequence_add import sequence_add
from pera_kernels.sequence_norm import sequence_norm

from .linear import gelu_linear, linear, norm_linear

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
        self, x: Tensor, groups: Sequence[int], keep: Tensor | None, kept: Sequence[int], recompute: str
    ) -> Tensor:
        """One block.

        Args:
            x: packed tokens [T, D].
            groups: [n0, len0, n1, len1, ...].
            keep: int32 [2, sum(kept)], sequences that the attention (0) and MLP (1) branches see; None: all.
            kept: kept sequences of each group.
            recompute: "cheap" keeps neither norms nor the GELU; anything else keeps what autograd keeps.

        Returns:
            [T, D].
        """
        keep_attn, keep_mlp = (None, None) if keep is None else keep
        recorded = torch.is_grad_enabled()
        cheap = recompute == "cheap" or not recorded
        branch_groups = kept_groups(groups, None if keep is None else kept)
        with span("attention"):
            qkv = _norm_linear(x, self.norm1, groups, keep_attn, kept, self.attn.qkv, cheap)
            y = attention(qkv, self.attn.num_heads, branch_groups)
            x = sequence_add(x, linear(y, self.attn.proj.weight, self.attn.proj.bias), groups, keep_attn, kept)
        with span("mlp"):
            hidden = _norm_linear(x, self.norm2, groups, keep_mlp, kept, self.mlp.fc1, cheap)
            fc2 = self.mlp.fc2
            y = gelu_linear(hidden, fc2.weight, fc2.bias) if cheap else linear(F.gelu(hidden), fc2.weight, fc2.bias)
            if not recorded and keep_mlp is None:
                return x.add_(y)  # x is this call's own sum, and nobody keeps it
            return sequence_add(x, y, groups, keep_mlp, kept)


def _norm_linear(
    x: Tensor,
    norm: nn.LayerNorm,
    groups: Sequence[int],
    keep: Tensor | None,
    kept: Sequence[int],
    layer: nn.Linear,
    cheap: bool,
) -> Tensor:
    if cheap:
        return norm_linear(x, norm.weight, norm.bias, norm.eps, groups, keep, kept, layer.weight, layer.bias)
    return linear(sequence_norm(x, norm.weight, norm.bias, norm.eps, groups, keep, kept), layer.weight, layer.bias)


def bicubic_matrix(grid: int, target: int) -> Tensor:
    """float32 [target ** 2, grid ** 2]: position embeddings of a grid to those of a target grid.

    METHOD.md section 4: bicubic with scale factor (target + 0.1) / grid, no antialias.
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
        for other in set(other_grids) - {grid}:
            self.register_buffer(f"_bicubic_{other}", bicubic_matrix(grid, other), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of METHOD.md section 4."""
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
        pos = self.pos_embed[0]
        if grid == self.grid:
            return pos
        matrix = getattr(self, f"_bicubic_{grid}", None)
        if matrix is None:
            matrix = bicubic_matrix(self.grid, grid)
        return torch.cat([pos[:1], matrix.to(pos) @ pos[1:]])

    def embed(self, rows: Tensor, index: Tensor, position: Tensor) -> Tensor:
        """Packed tokens [N * (1 + n), D], cls first in each sequence, of rows [N * n, C * P * P] at index [N, n]."""
        proj = self.patch_embed.proj
        return embed_tokens(rows, proj.weight.flatten(1), proj.bias, position, self.cls_token[0, 0], index)

    def forward_blocks(
        self,
        x: Tensor,
        groups: Sequence[int],
        start: int = 0,
        stop: int | None = None,
        keep: Tensor | None = None,
        kept: Sequence[int] = (),
        recompute: str = "none",
    ) -> Tensor:
        """Blocks start to stop on packed tokens.

        Args:
            x: packed tokens [T, D] in the compute dtype.
            groups: [n0, len0, n1, len1, ...].
            start, stop: range of blocks.
            keep: int32 [depth, 2, sum(kept)], stochastic depth's subsets for every block; None drops nothing.
            kept: kept sequences of each group.
            recompute: what the backward pass makes again: "none", "cheap" (norms and GELU) or "block" (everything).

        Returns:
            [T, D], before the final norm.
        """
        stop = len(self.blocks) if stop is None else stop
        for i in range(start, stop):
            block_keep = None if keep is None else keep[i]
            args = x, groups, block_keep, kept, recompute
            if recompute == "block" and torch.is_grad_enabled():
                x = checkpoint(self.blocks[i], *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.blocks[i](*args)
        return x

    def final_norm(self, rows: Tensor) -> Tensor:
        """The final LayerNorm on some rows [R, D]: it acts on each row alone, so only rows that are used need it."""
        return sequence_norm(rows, self.norm.weight, self.norm.bias, self.norm.eps, [rows.shape[0], 1])


def sequence_starts(x: Tensor, groups: Sequence[int]) -> Tensor:
    """The first token (cls) of every packed sequence: [sum(n), D]."""
    parts = x.split([n * length for n, length in pairs(groups)])
    return torch.cat([p.view(n, length, -1)[:, 0] for p, (n, length) in zip(parts, pairs(groups), strict=True) if n])
