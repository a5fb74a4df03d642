"""Metrics of every step: metrics.jsonl and the loggers."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch

from pera_fast.train.loggers import make_loggers
from pera_fast.train.loggers.background import Background, finish
from pera_fast.train.loggers.base import About, Ending

log = logging.getLogger(__name__)

# One object per step. step counts the optimiser steps done (the first is 1); epoch is the pass over the data that the
# step belongs to, from 0; seconds is the step's time, without probes and checkpoints; data_wait is the fraction of it
# spent waiting for data; mem is in MiB: the most that PyTorch's allocator held on the GPU, the pool of a CUDA graph
# included, or this process's resident memory on a CPU; mfu is null where the peak is unknown. A value that is not
# finite is null, and `nonfinite` then names what was not. Steps that were probed (eval.data) have `probe_knn` too, the
# teacher's kNN accuracy.
KEYS = (
    "step", "epoch", "loss", "global_cls_loss", "local_cls_loss", "koleo_loss", "pixel_loss", "lr", "wd", "momentum",
    "teacher_temp", "grad_norm", "seconds", "images_per_s", "data_wait", "mfu", "mem",
)  # fmt: skip
Metrics = dict[str, Any]  # one such object: numbers, None, and the list of names `nonfinite`


def memory_mib(device: torch.device) -> float:
    """The most that PyTorch's allocator held on the GPU so far, or this process's resident memory, in MiB.

    What it held, not what lay in tensors: between replays the pool of a CUDA graph holds no tensor, yet nobody else can
    have it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    return 0.0


class MetricsWriter:
    """Appends to metrics.jsonl and hands on to the loggers. A full disk, or a logger that fails, never costs the run.

    Args:
        path: metrics.jsonl; loggers keep their files beside it. None: nothing is written (ranks other than 0).
        done: steps done before this process.
        loggers: names, as in `train.loggers`.
        settings: {dotted key: value} of the configuration, for the loggers.
    """

    def __init__(
        self,
        path: Path | None,
        done: int = 0,
        loggers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ):
        self._file: TextIOWrapper | None = None
        self._loggers: list[Background] = []
        self._last: Metrics = {}  # of every key
        if path is None:
            return
        try:
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()
        except OSError as error:
            log.warning("%s: cannot be written (%s); going on without", path, error.strerror)
        self._loggers = make_loggers(loggers, About(path.parent, done, settings or {}))

    def write(self, metrics: Metrics) -> None:
        """Appends one step's numbers."""
        clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in metrics.items()}
        if self._file is not None:
            try:
                self._file.write(json.dumps(clean, allow_nan=False) + "\n")
            except OSError as error:
                log.warning("metrics.jsonl: cannot be written (%s); going on without", error.strerror)
                self._drop_file()
        self._last.update(clean)
        for logger in self._loggers:
            logger.log(clean)

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # what could not be written stays unwritten

    def close(self, ending: Ending = "finished") -> None:
        """Closes the file and the loggers, which get a bounded time to send the rest and how the run ended."""
        self._drop_file()
        loggers, self._loggers = self._loggers, []
        finish(loggers, ending, self._last)
