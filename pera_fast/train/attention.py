"""Chooses the attention of a run: the configured one, or the fastest for its sequence lengths."""

import torch

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_fast.model.pera import PRECISIONS
from pera_kernels import backend
from pera_kernels.attention import measured
from pera_kernels.attention.op import SHORT_SEQUENCE, implementations, passed_over


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


def sequence_lengths(cfg: Config) -> list[int]:
    """Tokens of the sequences that the networks of a configuration attend over, longest first."""
    lengths = set()
    for size, predicts in ((cfg.views.global_size, True), (cfg.views.local_size, False)):
        student, predicted, teacher = cfg.model.patch_counts((size // cfg.model.patch_size) ** 2)
        lengths |= {1 + student, 1 + teacher, 1 + student + (predicted if predicts else 0)}
    return sorted(lengths, reverse=True)


def describe_attention(cfg: Config, device: torch.device) -> str:
    """One line: what attends over sequences of which lengths."""
    return "; ".join(_described(name, lengths) for name, lengths in _by_name(cfg, device).items())


def explain_attention(cfg: Config, device: torch.device) -> str:
    """``describe_attention``, each implementation with the reason why it runs and the source of that."""
    found = _by_name(cfg, device)
    return "; ".join(f"{_described(name, lengths)}: {_why(name, cfg, device)}" for name, lengths in found.items())


def _described(name: str, lengths: list[str]) -> str:
    return f"{name} for sequences of {', '.join(lengths)} tokens"


def _by_name(cfg: Config, device: torch.device) -> dict[str, list[str]]:
    """Lengths of the sequences that each implementation takes."""
    by_name: dict[str, list[str]] = {}
    for length, name in implementations(device, *_heads(cfg), sequence_lengths(cfg)).items():
        by_name.setdefault(name, []).append(str(length))
    return by_name


def _heads(cfg: Config) -> tuple[torch.dtype, int, int]:
    return PRECISIONS[cfg.train.precision], cfg.model.num_heads, cfg.model.embed_dim // cfg.model.num_heads


def _why(name: str, cfg: Config, device: torch.device) -> str:
    if name == backend.wanted("attention"):
        asked = cfg.model.attention == name
        return f"{'model.attention' if asked else backend.ENVIRONMENT}={name}"
    if name == "triton":
        return f"several sequences share a tile, up to {SHORT_SEQUENCE} tokens ({measured.SHORT})"
    where = "a CPU with AMX"
    row = measured.AMX
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        where, row = f"compute capability {capability[0]}.{capability[1]}", measured.MEASURED.get(capability)
    if row is not None and row.fastest == name:
        return f"the fastest on {where}, measured with {', '.join(map(str, row.lengths))} tokens ({row.source})"
    over = passed_over(device, *_heads(cfg))
    return "; ".join(["the first that runs", *(f"not {other}, as {reason}" for other, reason in over.items())])
