"""Metrics of every step: metrics.jsonl and TensorBoard."""

import json
import logging
import math
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

# One object per step. step counts the optimiser steps done (the first is 1); epoch is the pass over the data that the
# step belongs to, from 0; data_wait is the fraction of the step's time spent waiting for data; mem is in MiB: the peak
# that tensors took on the GPU, or this process's resident memory on a CPU; mfu is null where the peak is unknown.
# A value that is not finite is null, and `nonfinite` then names what was not. Steps that were probed (eval.data) have
# `probe_knn` too, the teacher's kNN accuracy.
KEYS = (
    "step", "epoch", "loss", "global_cls_loss", "local_cls_loss", "koleo_loss", "pixel_loss", "lr", "wd", "momentum",
    "teacher_temp", "grad_norm", "images_per_s", "data_wait", "mfu", "mem",
)  # fmt: skip
Metrics = dict[str, Any]  # one such object: numbers, None, and the list of names `nonfinite`


def memory_mib(device: torch.device) -> float:
    """Peak memory of tensors on the GPU so far, or this process's resident memory, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    return 0.0


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard's events. A full disk, or a TensorBoard that fails, never costs the run.

    Args:
        path: metrics.jsonl; TensorBoard's events lie beside it. None: nothing is written (ranks other than 0).
        done: steps done before this process; TensorBoard hides what an earlier process logged after them.
    """

    def __init__(self, path: Path | None, done: int = 0):
        self._file: TextIOWrapper | None = None
        self._board: SummaryWriter | None = None
        if path is None:
            return
        try:
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()
        except OSError as error:
            log.warning("%s: cannot be written (%s); going on without", path, error.strerror)
        self._board = _board(path.parent, done)

    def write(self, metrics: Metrics) -> None:
        """Appends one step's numbers."""
        clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in metrics.items()}
        if self._file is not None:
            try:
                self._file.write(json.dumps(clean, allow_nan=False) + "\n")
            except OSError as error:
                log.warning("metrics.jsonl: cannot be written (%s); going on without", error.strerror)
                self._drop_file()
        if self._board is not None:
            try:
                for key, value in clean.items():
                    if isinstance(value, (int, float)) and key != "step":
                        self._board.add_scalar(key, value, metrics["step"])
            except Exception as error:
                log.warning("TensorBoard events cannot be written (%s); going on without", _reason(error))
                self._board = None

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:
            pass  # what could not be written stays unwritten

    def close(self) -> None:
        """Flushes and closes both."""
        self._drop_file()
        board, self._board = self._board, None
        try:
            if board is not None:
                board.close()
        except Exception as error:
            log.warning("TensorBoard events cannot be written (%s)", _reason(error))


def _board(folder: Path, done: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
    except Exception as error:  # also TypeError (protobuf), AttributeError (a leftover folder called tensorflow), ...
        log.warning("no TensorBoard events, training goes on without: %s", _reason(error))
        return None


def _reason(error: Exception) -> str:
    """An error in one line; with its kind where its own words may not say it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
