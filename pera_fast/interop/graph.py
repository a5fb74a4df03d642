"""A vision transformer in plain PyTorch operations, which other runtimes know: the network that ONNX files hold."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_fast.model.transformer import Block
from pera_fast.weights.backbone import Backbone

_CUBIC = -0.75  # PyTorch's and the published code's bicubic coefficient


class PlainTransformer(nn.Module):
    """The backbone on whole images of any size, normalisation included.

    Args:
        backbone: whose parameters it shares.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone):
        super().__init__()
        views, self.net = backbone.cfg.views, backbone.model
        self.register_buffer("mean", torch.tensor(views.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(views.std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features after the final norm.

        Args:
            pixels: float32 [B, C, H, W] in [0, 1], not normalised; H and W multiples of the patch size.

        Returns:
            cls [B, D] and patches [B, L, D], L in raster order.
        """
        proj, net = self.net.patch_embed.proj, self.net
        maps = F.conv2d((pixels - self.mean) / self.std, proj.weight, proj.bias, proj.stride)
        tokens = maps.flatten(2).transpose(1, 2) + self._positions(maps)
        cls = (net.cls_token + net.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls, tokens], 1)
        for block in net.blocks:
            assert isinstance(block, Block)
            x = _block(block, x)
        x = net.norm(x)
        return x[:, 0], x[:, 1:]

    def _positions(self, maps: Tensor) -> Tensor:
        """[1, h * w, D] position embeddings of maps [B, D, h, w], as docs/method.md section 4.2 interpolates them."""
        grid = self.net.grid
        learnt = self.net.pos_embed[0, 1:].view(grid, grid, -1)
        rows = torch.einsum("hg,gkd->hkd", _bicubic(maps[0, 0, :, 0], grid), learnt)
        return torch.einsum("wk,hkd->hwd", _bicubic(maps[0, 0, 0], grid), rows).flatten(0, 1)[None]


def _bicubic(line: Tensor, grid: int) -> Tensor:
    """float32 [n, grid]: weights of the learnt positions for a line [n] of patches; one-to-one where n = grid.

    The scale is (n + 0.1) / grid, so that the weights are tensors of the graph and n may differ from call to call.
    """
    ones = torch.ones_like(line)
    count = ones.sum()
    scale = torch.where(count == grid, torch.ones_like(count), (count + 0.1) / grid)
    at = (ones.cumsum(0) - 0.5) / scale - 0.5
    low = at.floor()
    columns = torch.arange(grid, dtype=line.dtype, device=line.device)
    weights = torch.zeros_like(at)[:, None] * columns
    for step in (-1, 0, 1, 2):
        place = (low + step).clamp(0, grid - 1)
        weight = _cubic((at - low - step).abs())
        weights = weights + weight[:, None] * (place[:, None] == columns).to(line.dtype)
    return weights


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel at distances from 0 to 2."""
    a, x = _CUBIC, distance
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)


def _block(block: Block, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x)).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    x = x + block.attn.proj(y.transpose(1, 2).reshape(batch, length, width))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
