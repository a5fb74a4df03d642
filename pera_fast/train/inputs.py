"""Makes the networks' inputs from a batch of crops: draws mask indices and the subsets of stochastic depth.

Everything is NumPy on the loader's prefetch thread, keyed by sample and step: the networks draw nothing.
"""

import numpy as np
import torch

from pera_fast.config import Config
from pera_fast.data.loading.batch import Batch, CropGroup
from pera_fast.data.sampling.masks import dense_indices, draw_ranks, indices_from_ranks
from pera_fast.keyed import Purpose, generator
from pera_fast.model.inputs import GroupInputs, StepInputs, num_kept
from pera_kernels.packing import places


def make_inputs(batch: Batch, cfg: Config, rank: int = 0) -> StepInputs:
    """Indices of visible and predicted patches, kept sequences, and the crops they belong to.

    Args:
        batch: crops and colours; masks are keyed by its epoch and sample numbers.
        cfg: resolved configuration.
        rank: this process's rank; stochastic depth is keyed by it and the micro-step.

    Returns:
        Inputs with the crops where they are, and all else on the device of the batch's colours; indices int32.
    """
    views, masking = cfg.views, cfg.model.masking
    grids = [views.global_size // cfg.model.patch_size, views.local_size // cfg.model.patch_size]
    crops = [views.num_global, views.num_local]
    if masking == "none":
        indices = [dense_indices(n * len(batch.samples), grid * grid) for n, grid in zip(crops, grids, strict=True)]
    else:
        indices = []
        for ranks, grid in zip(_ranks(batch, cfg, crops, grids), grids, strict=True):
            student, predicted, _ = cfg.model.patch_counts(grid * grid)
            indices.append(indices_from_ranks(ranks, student, predicted))
    global_, local = (_group(*pair) for pair in zip((batch.global_, batch.local), indices, strict=True))
    sequences = [index[0].shape[0] for index in indices]
    numbers = kept_sequences(cfg, sequences, batch.micro_step, rank)
    if numbers is None:
        return StepInputs(global_, local)
    keep, device = torch.from_numpy(numbers), batch.global_.student.order.device
    where = places(keep, sequences, [num_kept(n, cfg.model.drop_path) for n in sequences])
    return StepInputs(global_, local, keep.to(device), where.to(device))


def _ranks(batch: Batch, cfg: Config, crops: list[int], grids: list[int]) -> list[np.ndarray]:
    """Patch ranks of the global and local crops, crop-major [crops * B, L]."""
    drawn = []
    for sample in batch.samples:
        rng = generator(cfg.train.seed, Purpose.MASK, batch.epoch, int(sample))
        drawn.append([draw_ranks(rng, n, grid, cfg.model.masking) for n, grid in zip(crops, grids, strict=True)])
    return [np.stack(group, axis=1).reshape(-1, group[0].shape[1]) for group in zip(*drawn, strict=True)]


def _group(group: CropGroup, indices: tuple[np.ndarray, np.ndarray, np.ndarray]) -> GroupInputs:
    """Inputs of a group of crops, with the patches of the student, between, and of the teacher."""
    device = group.student.order.device
    index = [torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in indices]
    colours = group.student.order, group.student.factors, group.teacher.order, group.teacher.factors
    return GroupInputs(group.pixels, *index, *(c.to(device) for c in colours))


def kept_sequences(cfg: Config, sequences: list[int], micro_step: int, rank: int) -> np.ndarray | None:
    """Stochastic depth's subsets: int32 [depth, 2, kept global + kept local], ascending; None if nothing is dropped.

    docs/method.md section 4.4: two independent subsets per block (attention, MLP), for each group its own.
    """
    if cfg.model.drop_path == 0:
        return None
    rng = generator(cfg.train.seed, Purpose.DROP_PATH, micro_step, rank)
    branches = 2 * cfg.model.depth
    subsets = []
    for n in sequences:
        order = rng.permuted(np.tile(np.arange(n, dtype=np.int32), (branches, 1)), axis=1)
        subsets.append(np.sort(order[:, : num_kept(n, cfg.model.drop_path)], axis=1))
    return np.concatenate(subsets, axis=1).reshape(cfg.model.depth, 2, -1)
