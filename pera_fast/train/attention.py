"""Chooses the attention of a run: the configured one, or the fastest for its sequence lengths."""

import torch

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_fast.model.pera import PRECISIONS
from pera_kernels import backend
from pera_kernels.attention import measured
from pera_kernels.attention.op import SHORT_SEQUENCE, implementations


def prefer_attention(cfg: Config, device: torch.device) -> None:
    """Make ``model.attention`` hold from now on in this process.

    Raises:
        UserError: that implementation cannot run on the device.
    """
    name = None if cfg.model.attention == "auto" else cfg.model.attention
    backend.prefer("attention", name)
    try:
        backend.choose("attention", device)
    except RuntimeError as error:
        backend.prefer("attention", None)
        reason = str(error).split("was asked for, but ")[-1]
        raise UserError(f"model.attention={name}: {reason}; leave it out") from None


def why_attention(cfg: Config, device: torch.device) -> str:
    """One line: why ``describe_attention`` says what it says."""
    if cfg.model.attention != "auto":
        return f"model.attention={cfg.model.attention}"
    if device.type != "cuda":
        native = "amx in bf16 on a CPU with AMX, from heads of 32 values on"
        return f"auto: {native}; else PyTorch's fused attention (sdpa)"
    capability = torch.cuda.get_device_capability(device)
    row = measured.MEASURED.get(capability)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if row is None:
        long = f"no measurement on {name}: xformers, or the next that runs"
    else:
        lengths = ", ".join(map(str, row.lengths))
        long = f"{row.fastest} was the fastest on {name} for {lengths} tokens ({row.source})"
    return f"auto: {long}; triton for at most {SHORT_SEQUENCE} tokens"


def sequence_lengths(cfg: Config) -> list[int]:
    """Tokens of the sequences that the networks of a configuration attend over, longest first."""
    lengths = set()
    for size, predicts in ((cfg.views.global_size, True), (cfg.views.local_size, False)):
        student, predicted, teacher = cfg.model.patch_counts((size // cfg.model.patch_size) ** 2)
        lengths |= {1 + student, 1 + teacher, 1 + student + (predicted if predicts else 0)}
    return sorted(lengths, reverse=True)


def describe_attention(cfg: Config, device: torch.device) -> str:
    """One line: what attends over sequences of which lengths."""
    m = cfg.model
    dtype = PRECISIONS[cfg.train.precision]
    found = implementations(device, dtype, m.num_heads, m.embed_dim // m.num_heads, sequence_lengths(cfg))
    by_name: dict[str, list[str]] = {}
    for length, name in found.items():
        by_name.setdefault(name, []).append(str(length))
    return "; ".join(f"{name} for sequences of {', '.join(lengths)} tokens" for name, lengths in by_name.items())
