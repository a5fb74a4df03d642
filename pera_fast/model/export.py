"""Exports the teacher as one safetensors file with timm's parameter names."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from pera_fast import __version__
from pera_fast.config import Config
from pera_fast.durable import whole_file

from .pera import PerA


def timm_state_dict(state: Mapping[str, Tensor], prefix: str = "teacher.backbone.") -> dict[str, Tensor]:
    """The backbone's parameters by the names of timm's ``vit_*_patch16`` models.

    Args:
        state: parameters by published names, such as ``PerA.state_dict()``.
        prefix: what the backbone's names begin with in state.

    Returns:
        float32 CPU tensors of their own, contiguous; loads with ``strict=True`` into a timm ``VisionTransformer``
        built with ``num_classes=0``.

    Raises:
        KeyError: no name begins with prefix.
    """
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not found:
        raise KeyError(f"no parameter begins with {prefix!r}")
    return {name: value.detach().float().cpu().contiguous().clone() for name, value in found.items()}


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, object]) -> None:
    """Write atomically: a reader sees the old file or the whole new one. Metadata values become JSON strings.

    Equal tensors and metadata give equal bytes.

    Raises:
        OSError: the folder cannot be written or is full; the old file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = _sorted_header(save(tensors, metadata={key: json.dumps(value) for key, value in metadata.items()}))
    with whole_file(path, sync=True) as partial:
        partial.write_bytes(contents)  # not safetensors' own writer, whose files only their owner may read


def _sorted_header(contents: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes it in the order of a randomly seeded hash."""
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + contents[end:]


def export_teacher(model: PerA, path: str | Path, more: Mapping[str, object] | None = None) -> None:
    """Write the teacher's backbone with timm's names (docs/method.md section 8: the teacher is the model that is kept).

    Args:
        model: the training model.
        path: the file, by convention ``exported/teacher.safetensors`` of a run.
        more: further metadata.

    Raises:
        OSError: it could not be written.
    """
    write_safetensors(timm_state_dict(model.state_dict()), Path(path), {**teacher_metadata(model.cfg), **(more or {})})


def teacher_metadata(cfg: Config) -> dict[str, object]:
    """Metadata to build the network and feed it: sizes, patch, bands and their ranges, normalisation.

    Names are those of the settings, but for `img_size` (views.global_size) and `bits` (data.depth, None until the data
    decided it): `depth` is the network's.
    """
    keys = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")
    sizes = {key: getattr(cfg.model, key) for key in keys}
    views = {"img_size": cfg.views.global_size, "mean": list(cfg.views.mean), "std": list(cfg.views.std)}
    data = {key: getattr(cfg.data, key) for key in ("bands", "band_scale", "band_range")}
    return {
        "format": "pt",
        "library": f"pera-fast {__version__}",
        "recipe": cfg.recipe,
        **sizes,
        **views,
        "bits": None if cfg.data.depth == "auto" else int(cfg.data.depth),
        **data,
    }
