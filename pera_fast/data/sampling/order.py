"""The order of samples: maps a rank's position in the run to the samples of its micro-batch."""

import numpy as np

from pera_fast.errors import UserError
from pera_fast.keyed import Purpose, generator


class SampleOrder:
    """Shuffled passes over n samples, cut into optimiser steps, micro-batches and ranks.

    Optimiser step s of an epoch takes perm[s*T : (s+1)*T] with T = batch_size * world_size * accumulate, its
    micro-batch a the a-th share of world_size * batch_size of that, rank r the r-th share of batch_size of that. What
    is left over at the end of an epoch (fewer than T samples) is not used in that epoch.

    Raises:
        UserError: if there are fewer samples than one optimiser step takes.
    """

    def __init__(self, n: int, *, seed: int, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1):
        total = batch_size * world_size * accumulate
        if n < total:
            raise UserError(
                f"{n} readable image(s) are fewer than the {total} of one step (batch {batch_size} x {world_size}"
                f" device(s) x {accumulate} accumulated): give more images or lower train.batch_size"
            )
        self.n, self.seed, self.batch_size, self.rank, self.world_size = n, seed, batch_size, rank, world_size
        self.steps_per_epoch = n // total  # optimiser steps
        self.micro_steps_per_epoch = self.steps_per_epoch * accumulate
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __call__(self, micro_step: int) -> tuple[int, np.ndarray]:
        """(epoch, samples int64 [batch_size]) of this rank at this micro-step. Called from one thread."""
        epoch, position = divmod(micro_step, self.micro_steps_per_epoch)
        if epoch != self._epoch:
            self._permutation = generator(self.seed, Purpose.SHUFFLE, epoch).permutation(self.n)
            self._epoch = epoch
        start = (position * self.world_size + self.rank) * self.batch_size
        return epoch, self._permutation[start : start + self.batch_size]
