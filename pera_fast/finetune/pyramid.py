"""Makes maps of several strides of the one stride that a plain vision transformer has."""

from torch import Tensor, nn

LEVELS = 4


class MapNorm(nn.Module):
    """LayerNorm over the channels of a map [N, C, H, W]; the same in training and after it, for batches of any size."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], each pixel normalised over C."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Sequential):
    """Convolution that keeps the size, MapNorm and, if wanted, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, act: bool = True):
        layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), MapNorm(outputs)]
        super().__init__(*layers, *([nn.GELU()] if act else []))


class SimpleFeaturePyramid(nn.Module):
    """Four maps of a plain vision transformer's last one, as ViTDet makes them (Li et al. 2022, arXiv 2203.16527).

    The strides are patch_size / 4, / 2, x 1 and x 2: 4, 8, 16 and 32 px for patches of 16 px, 2 to 16 px for patches
    of 8 px. Patches of 14 px give 3.5 to 28: sizes are then those of the maps, whatever the quotient.

    Args:
        inputs: channels D of the backbone's map, its width.
        width: channels of every map that comes out.

    Shapes:
        in: [N, D, h, w], float, h and w patches of the image.
        out: a list of float [N, width, 4 h, 4 w], [.., 2 h, 2 w], [.., h, w] and [.., ceil(h / 2), ceil(w / 2)].

    Examples:
        >>> maps = SimpleFeaturePyramid(768, 256)(torch.zeros(2, 768, 14, 14))
        >>> [tuple(m.shape[2:]) for m in maps]
        [(56, 56), (28, 28), (14, 14), (7, 7)]
    """

    def __init__(self, inputs: int, width: int = 256):
        super().__init__()
        self.inputs, self.width = inputs, width
        half, quarter = max(inputs // 2, 1), max(inputs // 4, 1)
        scales = [
            nn.Sequential(
                nn.ConvTranspose2d(inputs, half, 2, 2),
                MapNorm(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ),
            nn.ConvTranspose2d(inputs, half, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        channels = [quarter, half, inputs, inputs]
        self.levels = nn.ModuleList(
            nn.Sequential(scale, ConvBlock(found, width, 1, act=False), ConvBlock(width, width, 3, act=False))
            for scale, found in zip(scales, channels, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps from the finest to the coarsest, see the class."""
        return [level(x) for level in self.levels]


def as_map(patches: Tensor, height: int, width: int) -> Tensor:
    """Patch features [N, height * width, D] in raster order as a map [N, D, height, width]."""
    return patches.transpose(1, 2).reshape(patches.shape[0], patches.shape[2], height, width)
