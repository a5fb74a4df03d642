"""The authors' checkpoints (`.params`) and our own: read without executing code, written as safetensors.

Our parameters carry the published names, so conversion is a check and a change of container.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from pera_fast.config import Config, from_yaml
from pera_fast.errors import UserError
from pera_fast.model.export import teacher_metadata, timm_state_dict, write_safetensors
from pera_fast.paths import local_path, new_file
from pera_fast.weights.files import check_finite, load_torch, parameters
from pera_fast.weights.vit import HEADS

REQUIRED = (
    "student.backbone.",
    "student.cls_head.",
    "teacher.backbone.",
    "teacher.cls_head.",
    "pred_head.",
    "s_mask_token",
)


@dataclass(frozen=True)
class Converted:
    """Contents of a published checkpoint, and the files that they were written to.

    Attributes:
        teacher: safetensors of the teacher's backbone, timm's names.
        weights: safetensors of all parameters, published names.
        embed_dim, depth, num_heads, patch_size, in_chans, prototypes: sizes of the network.
        img_size: pixels a side of the global crops.
        epoch: the epoch that the checkpoint names, or None.
    """

    teacher: Path
    weights: Path
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    in_chans: int
    prototypes: int
    img_size: int
    epoch: int | None

    @property
    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.teacher} and {self.weights.name}: width {self.embed_dim}, depth {self.depth},"
            f" {self.num_heads} heads, patches of {self.patch_size}, {self.in_chans} channels, crops of {self.img_size}"
        )


def convert(path: str | Path, out: str | Path, num_heads: int | None = None, overwrite: bool = False) -> Converted:
    """Convert a published checkpoint, or one of a run of ours.

    Args:
        path: a file written by the authors' training code: a dictionary with the parameters under ``model``. A plain
            dictionary of parameters, and names that begin with ``module.``, are taken too. A run's checkpoint also
            holds its settings, which then are the metadata, as in the run's own export.
        out: folder for ``teacher.safetensors`` (loads by name into timm's ViT) and ``pera.safetensors`` (everything).
        num_heads: attention heads. None: those of the run's settings, or of the published network of this width.
        overwrite: replace files that are there.

    Returns:
        What was found and the files written.

    Raises:
        UserError: the file is missing, is no such checkpoint, does not say how many heads its network has, or the
            folder cannot be written.
    """
    path, out = local_path("", path), local_path("--out", out)
    stored = load_torch(path)
    state = parameters(stored, path)
    _check(state, path)
    settings = _settings(stored, path)
    found = _sizes(state, path, _heads(num_heads, settings, path))
    epoch = stored.get("epoch")
    for name in ("teacher.safetensors", "pera.safetensors"):
        new_file("", out / name, overwrite)
    result = Converted(
        out / "teacher.safetensors", out / "pera.safetensors", **found, epoch=epoch if isinstance(epoch, int) else None
    )
    metadata = {"format": "pt", "source": path.name, **{k: v for k, v in asdict(result).items() if k in found}}
    if settings is not None:
        metadata |= teacher_metadata(settings)
    try:
        write_safetensors(timm_state_dict(state), result.teacher, metadata)
        write_safetensors({k: v.contiguous().clone() for k, v in state.items()}, result.weights, metadata)
    except OSError as error:
        raise UserError(f"{out}: cannot write the converted weights ({error.strerror or error})") from None
    return result


def _check(state: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in REQUIRED if not any(key.startswith(name) for key in state)]
    if missing:
        raise UserError(f"{path}: not a published PerA checkpoint: it has no {', '.join(missing)}")
    check_finite(state, path)
    student = {k.removeprefix("student."): v.shape for k, v in state.items() if k.startswith("student.")}
    teacher = {k.removeprefix("teacher."): v.shape for k, v in state.items() if k.startswith("teacher.")}
    if student != teacher:
        different = sorted(k for k in student.keys() | teacher.keys() if student.get(k) != teacher.get(k))
        raise UserError(f"{path}: student and teacher differ in {different[0]} ({len(different)} such parameters)")


def _settings(stored: dict, path: Path) -> Config | None:
    """Settings of the run that wrote the checkpoint; None: it is not ours. Raises UserError for settings of no run."""
    text = stored.get("config")
    if not isinstance(stored.get("format"), int) or not isinstance(text, str):
        return None
    try:
        return from_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: its settings cannot be read: {error}") from None


def _heads(given: int | None, settings: Config | None, path: Path) -> int | None:
    """Attention heads that are known before the parameters are looked at. Raises UserError for two different ones."""
    if settings is None or given in (None, settings.model.num_heads):
        return given if settings is None else settings.model.num_heads
    raise UserError(f"--heads {given}: {path} says that its network has {settings.model.num_heads}; leave it out")


def _sizes(state: dict[str, Tensor], path: Path, num_heads: int | None) -> dict[str, int]:
    backbone = "teacher.backbone."
    try:
        projection, pos = state[backbone + "patch_embed.proj.weight"], state[backbone + "pos_embed"]
        width, in_chans, patch, _ = projection.shape
        prototypes = state["teacher.cls_head.last_layer.weight_v"].shape[0]
        grid = round((pos.shape[1] - 1) ** 0.5)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a published PerA checkpoint: {error} is missing or has another shape") from None
    blocks = {int(k.split(".")[3]) for k in state if k.startswith(backbone + "blocks.")}
    if blocks != set(range(len(blocks))) or grid * grid + 1 != pos.shape[1]:
        raise UserError(
            f"{path}: its blocks are not numbered from 0, or its position embedding is not for a square grid"
        )
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise UserError(f"{path}: does not say how many attention heads its width of {width} has; give --heads N")
    if width % heads:
        raise UserError(f"--heads {heads}: does not divide the width of {width} in {path}")
    return {
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        "patch_size": patch,
        "in_chans": in_chans,
        "prototypes": prototypes,
        "img_size": grid * patch,
    }
