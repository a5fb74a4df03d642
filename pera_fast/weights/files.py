"""Reads files of tensors without executing code: PyTorch checkpoints and safetensors.

PyTorch is imported where a file is read: what only looks for damage does not wait for it.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pera_fast.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor


def zip_damage(path: Path) -> str:
    """Damage that the checksums of a `torch.save` file show, which `torch.load` does not look at; empty: none."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad, entries = archive.testzip(), archive.infolist()
    except Exception as error:  # zipfile and zlib raise many things on damaged files
        return (isinstance(error, OSError) and error.strerror) or one_line(error, 200) or type(error).__name__
    if bad is not None:
        return f"checksum of {bad} is wrong"
    if len({entry.filename for entry in entries}) < len(entries):
        return "a name stands twice in its directory"
    # PyTorch stores as it is and without attributes; what an attribute calls a folder it does not read, without a word.
    odd = (e for e in entries if e.external_attr or e.compress_type != zipfile.ZIP_STORED or e.is_dir())
    return next((f"its directory says something odd of {entry.filename}" for entry in odd), "")


def load_torch(path: Path) -> dict[Any, Any]:
    """The dictionary in a file that `torch.save` wrote, tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged, no such file, or holds objects that could run code when loaded.
    """
    import torch

    if not path.exists():
        raise UserError(f"{path}: no such file; give a checkpoint such as the authors' .params file")
    try:
        with open(path, "rb") as file:
            begins = file.read(4)
        if begins.startswith(b"PK") and (damage := zip_damage(path)):
            raise ValueError(f"damaged: {damage}")
        if not begins.startswith((b"PK", b"\x80")):  # a zip file; a pickle of any protocol since 2
            raise ValueError(f"begins with {begins!r}")
        with open(path, "rb") as file:  # by its name torch would take it for another format
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds pickled objects other than tensors, which could run code when loaded; not loaded"
        ) from None
    except Exception as error:  # whatever a broken file makes the unpickler raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: not a PyTorch checkpoint ({reason})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds a {type(stored).__name__}, not a dictionary of parameters")
    return stored


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file; metadata values that are JSON are decoded.

    Raises:
        UserError: the file is missing, damaged, or no safetensors file.
    """
    from safetensors import safe_open

    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, _decoded(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # the library's own error type, and OSError
        raise UserError(f"{path}: not a safetensors file ({one_line(error, 120)})") from None


def _decoded(metadata: dict[str, str]) -> dict[str, Any]:
    decoded: dict[str, Any] = {}
    for key, text in metadata.items():
        try:
            decoded[key] = json.loads(text)
        except (ValueError, RecursionError):
            decoded[key] = text
    return decoded


def parameters(stored: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint: its entry `model`, `state_dict` or `teacher`, or all of it.

    Raises:
        UserError: there are none, or one is not dense or not finite.
    """
    state = next((stored[name] for name in ("model", "state_dict", "teacher") if name in stored), stored)
    if not isinstance(state, dict):
        raise UserError(f"{path}: its parameters are a {type(state).__name__}, not a dictionary")
    from torch import Tensor

    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        keys = ", ".join(f"{key!s:.40}" for key in list(stored)[:5]) or "none"
        raise UserError(f"{path}: holds no parameters (keys: {keys})")
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def check_finite(state: dict[str, Tensor], path: Path | str) -> None:
    """Raises UserError for weights that are not dense floats, or not finite."""
    import torch

    for name, value in state.items():
        if value.layout != torch.strided or not value.is_floating_point():
            raise UserError(f"{path}: {name} is {value.dtype}, {value.layout}; weights are dense floats")
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} is not finite: the checkpoint is damaged, or its run had diverged")
