"""Predicts the bytes of a run's files from its configuration, before anything is built."""

from dataclasses import dataclass

from pera_fast.config import Config

FLOAT = 4  # bytes of a parameter and of each of AdamW's two moments


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of a checkpoint's parts, and of the teacher's export."""

    model: int  # what is trained, and the center
    optimizer: int
    teacher: int
    export: int

    @property
    def checkpoint(self) -> int:
        return self.model + self.optimizer + self.teacher


def saved_bytes(cfg: Config) -> SavedBytes:
    """Bytes of a checkpoint: networks of docs/method.md section 4 in float32, beside them a few KiB of names."""
    m = cfg.model
    backbone = _backbone(cfg)
    branch = backbone + _mlp(m.embed_dim, m.head_hidden, m.bottleneck) + _weight_norm(m.bottleneck, m.prototypes)
    pixel_head = _mlp(m.embed_dim, m.head_hidden, m.bottleneck) + _weight_norm(m.bottleneck, _patch_values(cfg))
    trained = branch + pixel_head + m.embed_dim  # the mask token
    return SavedBytes(
        model=FLOAT * (trained + m.prototypes), optimizer=2 * FLOAT * trained, teacher=FLOAT * branch,
        export=FLOAT * backbone,
    )  # fmt: skip


def finetune_bytes(cfg: Config) -> SavedBytes:
    """Bytes of a checkpoint of a fine-tuning, without its head, which is small beside the backbone."""
    size = FLOAT * _backbone(cfg)
    return SavedBytes(model=size, optimizer=2 * size, teacher=0, export=size)


def _patch_values(cfg: Config) -> int:
    return cfg.model.patch_size**2 * (cfg.model.in_chans or 3)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _weight_norm(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _mlp(inputs: int, hidden: int, outputs: int) -> int:
    return _linear(inputs, hidden) + _linear(hidden, hidden) + _linear(hidden, outputs)


def _backbone(cfg: Config) -> int:
    """Parameters of a backbone."""
    m, width = cfg.model, cfg.model.embed_dim
    hidden, norm = int(width * m.mlp_ratio), 2 * width
    block = (
        2 * norm + _linear(width, 3 * width) + _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)
    )
    tokens = 2 + (cfg.views.global_size // m.patch_size) ** 2  # cls token and position embeddings
    return tokens * width + _linear(_patch_values(cfg), width) + m.depth * block + norm
