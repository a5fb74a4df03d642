"""Batches without images: black ones for shapes, random ones with the recipe's share of coloured views for speed."""

import numpy as np
import torch

from pera_fast.config import Config
from pera_fast.data.loading.batch import Batch, ColorParams, CropGroup
from pera_fast.model.inputs import StepInputs
from pera_fast.train.inputs import make_inputs


def blank_batch(cfg: Config, batch_size: int) -> Batch:
    """A batch of black crops whose colour parameters change nothing, in the shapes of a configuration."""
    views = cfg.views
    dtype = torch.uint16 if cfg.data.depth == "16" else torch.uint8
    groups = []
    for crops, size in ((views.num_global, views.global_size), (views.num_local, views.local_size)):
        n = crops * batch_size
        pixels = torch.zeros(n, size, size, cfg.model.in_chans, dtype=dtype)
        colours = ColorParams(
            torch.full((n, 4), -1, dtype=torch.int32), torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1)
        )
        groups.append(CropGroup(pixels, colours, colours))
    return Batch(micro_step=0, epoch=0, samples=np.arange(batch_size), global_=groups[0], local=groups[1])


def random_inputs(cfg: Config, batch_size: int) -> StepInputs:
    """Random crops, coloured as the recipe colours: every coloured view is jittered, in an order of its own."""
    batch = blank_batch(cfg, batch_size)
    generator = torch.Generator().manual_seed(0)
    views = cfg.views
    shares = views.student_color * (1 - views.student_gray), views.teacher_color
    for group in (batch.global_, batch.local):
        group.pixels.random_(0, 256, generator=generator)
        n = group.pixels.shape[0]
        group.student, group.teacher = (_colours(n, share, generator) for share in shares)
    return make_inputs(batch, cfg)


def _colours(n: int, share: float, generator: torch.Generator) -> ColorParams:
    order = torch.rand(n, 4, generator=generator).argsort(1).int()
    order[torch.rand(n, generator=generator) >= share] = -1
    factors = 0.8 + 0.4 * torch.rand(n, 4, generator=generator)
    factors[:, 3] = 0.2 * torch.rand(n, generator=generator) - 0.1
    return ColorParams(order, factors)
