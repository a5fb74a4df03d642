"""Checks whether the device can run what ``model.teacher_precision`` asks for."""

import torch

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_kernels import fp8


def check_teacher_precision(cfg: Config, device: torch.device) -> None:
    """Raises UserError, one line, where the teacher is to run in FP8 and the device has no FP8 products."""
    if cfg.model.teacher_precision != "fp8":
        return
    reason = fp8.why_not(device)
    if reason is not None:
        raise UserError(f"model.teacher_precision=fp8: {reason}; leave it out")
