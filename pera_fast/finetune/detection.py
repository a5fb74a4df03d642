"""Gives a backbone with a feature pyramid the form that the detectors of torchvision and mmdetection take."""

import os
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pera_fast.finetune.pyramid import LEVELS, SimpleFeaturePyramid, as_map
from pera_fast.model.transformer import VisionTransformer
from pera_fast.weights.load import load_backbone
from pera_kernels.visible_patches import visible_patches

_HALF = (torch.bfloat16, torch.float16)


class DetectionBackbone(nn.Module):
    """A plain vision transformer with `SimpleFeaturePyramid`, on images of any size.

    Only patches of the image itself are run: an image of another shape than a square lies in the corner of the square
    grid that positions are interpolated to. Sizes that are no multiple of the patch size are padded with zeros.

    Args:
        backbone: such as `weights.load.load_backbone(...).model`; its parameters are trained if they require gradients.
        width: channels of the maps.
        names: of the maps, from the finest to the coarsest; torchvision's detectors call them 0 to 3.

    Attributes:
        out_channels: channels of every map, which torchvision reads.
        strides: pixels of the image to one of each map, from the finest on.

    Shapes:
        in: float [N, C, H, W], normalised as the weights want it (`mean`, `std` of `from_weights`).
        out: an OrderedDict of float [N, width, h, w], with h = ceil(H / stride) for the strides patch_size / 4, / 2,
            x 1 and x 2 where H is a multiple of the patch size.

    torchvision:

        backbone, mean, std = DetectionBackbone.from_weights("RUN")
        detector = torchvision.models.detection.FasterRCNN(
            backbone, num_classes=2, image_mean=mean, image_std=std, min_size=800, max_size=1333,
            rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        )

    mmdetection wants a tuple: register a subclass whose `forward` returns `tuple(super().forward(x).values())`.
    """

    def __init__(self, backbone: VisionTransformer, width: int = 256, names: Sequence[str] = ("0", "1", "2", "3")):
        super().__init__()
        if len(names) != LEVELS:
            raise ValueError(f"names must be {LEVELS}, one for each map, got {len(names)}")
        self.backbone, self.out_channels, self.names = backbone, width, tuple(names)
        self.pyramid = SimpleFeaturePyramid(backbone.embed_dim, width)
        patch = backbone.patch_size
        self.strides = (patch / 4, patch / 2, patch, patch * 2)

    @classmethod
    def from_weights(
        cls, weights: str | os.PathLike[str], width: int = 256
    ) -> tuple["DetectionBackbone", list[float], list[float]]:
        """A trainable backbone, and mean and standard deviation of each channel, of values in [0, 1].

        Args:
            weights: what `weights.load.load_backbone` takes.
            width: channels of the maps.

        Raises:
            UserError: there are no such weights.
        """
        found = load_backbone(weights)
        return cls(found.model.requires_grad_(True), width), list(found.cfg.views.mean), list(found.cfg.views.std)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps of images, see the class."""
        patch = self.backbone.patch_size
        height, width = (-(-length // patch) for length in images.shape[2:])
        side = max(height, width)
        tokens = self._tokens(images, side, height, width)
        maps = self.pyramid(as_map(tokens, height, width))
        return OrderedDict(zip(self.names, maps, strict=True))

    def _tokens(self, images: Tensor, side: int, height: int, width: int) -> Tensor:
        """Normalised patch features [N, height * width, D] of the patches that lie in the images."""
        backbone, patch, count = self.backbone, self.backbone.patch_size, images.shape[0]
        beyond = (0, side * patch - images.shape[3], 0, side * patch - images.shape[2])
        square = F.pad(images.float(), beyond).contiguous()
        places = torch.arange(side * side, dtype=torch.int32, device=images.device).view(side, side)
        index = places[:height, :width].reshape(1, -1).expand(count, -1).contiguous()
        rows = visible_patches(square, index, None, None, None, [], [], patch, self._dtype(images))
        backbone.keep_grid(side)
        tokens = backbone.embed([rows], [index], [side])
        tokens = backbone.forward_blocks(tokens, [count, 1 + height * width], recompute="cheap")
        return backbone.final_norm(tokens).view(count, 1 + height * width, -1)[:, 1:]

    @staticmethod
    def _dtype(images: Tensor) -> torch.dtype:
        """Autocast's dtype where that is on, else the images', if the blocks can run in it."""
        kind = images.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return images.dtype if images.dtype in _HALF else torch.float32
