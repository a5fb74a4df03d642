"""The typed configuration tree. Attribute names are the keys of the command line; defaults are the published vit_b16.

Numbers and their meaning: docs/method.md sections 2 to 6. Ranges that concern one key stand beside it, as field
metadata, and are enforced by `check.py` together with the rules that tie several keys to each other.
"""
# ruff: noqa: RUF009 - _key returns a dataclass field, with a factory where the default is a list

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pera_fast.errors import UserError

Value = bool | int | float | str | list[str] | list[float] | list[int | str] | list[list[float]] | None
"""What a key may hold."""


def _key(
    default: Any,
    *,
    low: float | None = None,  # smallest value allowed
    high: float | None = None,  # largest value allowed
    above: float | None = None,  # open lower end
    below: float | None = None,  # open upper end
    choices: tuple[str, ...] | None = None,
    rising: bool = False,  # a list of two with first <= second
) -> Any:
    """A dataclass field with the rule for its value (for a list: for each element)."""
    rules = {"low": low, "high": high, "above": above, "below": below, "choices": choices, "rising": rising}
    metadata = {name: rule for name, rule in rules.items() if rule is not None and rule is not False}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _count(default: int | None, low: int = 1) -> Any:
    return _key(default, low=low)


def _fraction(default: float) -> Any:
    return _key(default, low=0, high=1)


@dataclass(frozen=True)
class ModelConfig:
    """Networks and masks (docs/method.md sections 3 and 4)."""

    patch_size: int = _count(16)  # pixels a side
    embed_dim: int = _count(768)  # width of the transformer; a multiple of num_heads
    depth: int = _count(12)  # blocks; mask tokens enter before block depth // 2
    num_heads: int = _count(12)  # attention heads; divides embed_dim
    mlp_ratio: float = _key(4.0, above=0)  # width of a block's MLP over embed_dim
    drop_path: float = _key(0.3, low=0, below=1)  # fraction of sequences that skip a student branch; uniform over depth
    in_chans: int = _count(3)  # channels of an image (follows data.bands); views.mean, views.std have as many entries
    head_hidden: int = _count(2048)  # width of the heads' MLP
    bottleneck: int = _count(384)  # width of the L2-normalised rows that meet the prototypes
    prototypes: int = _count(131072, low=2)  # number of prototypes
    # Activations to recompute in the backward pass: none, cheap ones (norms, GELU), or whole blocks. auto: the first
    # of these that leaves a tenth of the GPU's free memory; cheap on a CPU.
    recompute: str = _key("auto", choices=("auto", "none", "cheap", "block"))
    # Attention implementation on a GPU. auto: the fastest that was measured for the card and the sequence lengths, else
    # xformers.
    attention: str = _key(
        "auto", choices=("auto", "xformers", "cudnn", "varlen", "triton", "sdpa", "amx", "avx512_bf16")
    )
    # Precision of matrix products in the teacher's blocks. same: train.precision; fp8: e4m3 with a scale for each row.
    teacher_precision: str = _key("same", choices=("same", "fp8"))
    # Shape of the masks. none: dense, both networks see every patch.
    masking: str = _key("random", choices=("random", "block", "grid", "none"))
    student_ratio: float = _key(0.2, above=0, high=1)  # fraction of patches that the student sees
    teacher_ratio: float = _key(0.6, above=0, high=1)  # fraction that the teacher sees; disjoint from the student's

    def patch_counts(self, num_patches: int) -> tuple[int, int, int]:
        """(student, predicted, teacher) patches of a crop with `num_patches` (docs/method.md section 3.1).

        Predicted counts only for global crops. With masking=none both see everything and nothing is predicted.
        """
        if self.masking == "none":
            return num_patches, 0, num_patches
        student = round(num_patches * self.student_ratio)
        # max: with ratios that sum to 1, float error may put the two roundings on different sides of a half.
        before_teacher = max(student, round(num_patches * (1 - self.teacher_ratio)))
        return student, before_teacher - student, num_patches - before_teacher


@dataclass(frozen=True)
class ViewsConfig:
    """Crops and the two differently coloured views of each (docs/method.md section 2)."""

    num_global: int = _count(2)  # crops per image
    num_local: int = _count(8, low=0)  # crops per image
    global_size: int = _count(448)  # pixels a side; a multiple of model.patch_size
    local_size: int = _count(96)  # pixels a side; a multiple of model.patch_size
    global_scale: list[float] = _key([0.4, 1.0], above=0, high=1, rising=True)  # area of a crop / area of the image
    local_scale: list[float] = _key([0.05, 0.4], above=0, high=1, rising=True)  # the same for local crops
    aspect: list[float] = _key([0.75, 1.33], above=0, rising=True)  # width / height of the crop's window
    hflip: float = _fraction(0.5)  # probability of a horizontal flip
    vflip: float = _fraction(0.5)  # probability of a vertical flip
    student_color: float = _fraction(0.8)  # probability that the student's view changes colour
    student_gray: float = _fraction(0.1)  # probability of grayscale instead of jitter, if it does
    teacher_color: float = _fraction(0.1)  # probability that the teacher's view is jittered
    brightness: float = _fraction(0.4)  # jitter: factor from U(1-b, 1+b)
    contrast: float = _fraction(0.4)  # jitter: factor from U(1-c, 1+c)
    saturation: float = _fraction(0.2)  # jitter: factor from U(1-s, 1+s)
    hue: float = _key(0.1, low=0, high=0.5)  # jitter: shift from U(-h, h), in turns of the colour wheel
    # Red, green and blue among the bands, as data.bands names them: saturation, hue and grayscale act on these,
    # brightness and contrast on all. null: the three of three channels, none of another number; []: none.
    rgb_bands: list[int | str] | None = None
    mean: list[float] = _key([0.485, 0.456, 0.406])  # mean of each channel, of values scaled to [0, 1]
    std: list[float] = _key([0.229, 0.224, 0.225], above=0)  # standard deviation of each channel, likewise


@dataclass(frozen=True)
class LossConfig:
    """Loss terms (docs/method.md section 5)."""

    student_temp: float = _key(0.1, above=0)  # temperature of the student's logits
    center_momentum: float = _fraction(0.9)  # EMA of the mean teacher logits
    centering: str = _key("center", choices=("center", "sinkhorn"))
    koleo_weight: float = _key(0.1, low=0)  # weight of the KoLeo loss
    koleo_on: str = _key(
        "logits", choices=("logits", "bottleneck")
    )  # input of KoLeo; the published method takes logits
    pixel_weight: float = _key(0.01, low=0)  # weight of the pixel loss


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, schedules and the teacher's EMA (docs/method.md section 6). Every schedule is per optimiser step."""

    lr: float = _key(1e-3, low=0)  # peak learning rate; not scaled by the batch size
    warmup_lr: float = _key(0.0, low=0)  # learning rate at the start of the linear warm-up
    final_lr: float = _key(1e-6, low=0)  # learning rate at the end of the cosine
    warmup_epochs: float = _key(20.0, low=0)  # length of the warm-up; train.epochs and train.steps stretch it
    weight_decay: float = _key(0.04, low=0)  # weight decay of all parameters at the start of its cosine
    final_weight_decay: float = _key(0.2, low=0)  # weight decay at the end
    betas: list[float] = _key([0.9, 0.999], low=0, below=1)  # AdamW's decay rates of the moments
    eps: float = _key(2e-5, above=0)  # AdamW's epsilon
    clip: float = _key(3.0, above=0)  # largest gradient norm over all trained parameters
    teacher_momentum: float = _fraction(0.992)  # momentum of the teacher's EMA at the start of its cosine
    final_teacher_momentum: float = _fraction(1.0)  # momentum at the end
    teacher_temp: float = _key(0.05, above=0)  # temperature of the teacher's logits after the warm-up
    warmup_teacher_temp: float = _key(0.03, above=0)  # temperature at the start of its linear warm-up
    teacher_temp_warmup_epochs: float = _key(30.0, low=0)  # length of that warm-up; stretched likewise


@dataclass(frozen=True)
class BatchPlan:
    """Images per optimiser step: total = per_device * accumulate * world_size."""

    per_device: int  # images of one micro-batch on one device
    accumulate: int  # micro-batches per optimiser step
    world_size: int  # devices
    total: int

    def __str__(self) -> str:
        steps = f" x {self.accumulate} accumulated" if self.accumulate > 1 else ""
        return f"batch {self.total} in total = {self.per_device} per device x {self.world_size} device(s){steps}"


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision and checkpoints. Read the batch through `resolve_batch`, never from the keys."""

    epochs: int = _count(200)  # passes over the images; another number than the recipe's stretches the warm-ups along
    steps: int | None = _count(None)  # optimiser steps; replaces epochs and stretches the schedules to fit
    batch_size: int | None = _count(16)  # images per device and micro-batch; null: derived from total_batch_size
    total_batch_size: int | None = _count(None)  # images per optimiser step over all devices; null: derived
    accumulate: int | None = _count(1)  # micro-batches per optimiser step; null: derived from total_batch_size
    precision: str = _key("bf16", choices=("bf16", "fp16", "fp32"))  # of activations and matrix products
    seed: int = _key(0, low=0, high=2**63 - 1)  # of every random draw
    checkpoint_every: int = _count(1000)  # optimiser steps between checkpoints
    checkpoint_minutes: float | None = _key(None, above=0)  # minutes between checkpoints, if sooner; null: steps only
    keep_checkpoints: int = _count(3)  # newest checkpoints to keep
    max_nonfinite: int = _count(10)  # successive steps with a non-finite loss after which the run ends
    device: str = _key("auto", choices=("auto", "cpu", "cuda"))
    compile: bool = False  # compile the transformer's blocks with torch.compile
    # Replay forward and backward as one CUDA graph. auto: on a GPU, where shapes are the same in every step.
    cuda_graph: str = _key("auto", choices=("auto", "true", "false"))
    # Loggers that get every step's numbers, beside metrics.jsonl. wandb and mlflow are extras of the package.
    loggers: list[str] = _key(["tensorboard"], choices=("tensorboard", "wandb", "mlflow"))
    # Weights to start from: a run, an exported folder, a file (.safetensors, .params, .pt) or a timm model's name; not
    # read when a run is resumed. null: random ones.
    init_from: str | None = None

    def resolve_batch(self, world_size: int) -> BatchPlan:
        """The batch for `world_size` devices; whatever is null follows from the rest. Raises UserError if it cannot."""
        total, per_device, accumulate = self.total_batch_size, self.batch_size, self.accumulate
        if total is None:
            if per_device is None:
                raise UserError("train.batch_size=null: give train.batch_size or train.total_batch_size")
            accumulate = accumulate or 1
            return BatchPlan(per_device, accumulate, world_size, per_device * world_size * accumulate)
        if per_device is None:
            accumulate = accumulate or 1
            per_device = _share(total, world_size * accumulate, f"{world_size} device(s) x {accumulate} accumulated")
        elif accumulate is None:
            accumulate = _share(total, world_size * per_device, f"{world_size} device(s) x batch_size {per_device}")
        elif total != per_device * world_size * accumulate:
            raise UserError(
                f"train.total_batch_size={total}: but train.batch_size={per_device} x {world_size} device(s) x"
                f" train.accumulate={accumulate} is {per_device * world_size * accumulate}; leave one of the three out"
            )
        return BatchPlan(per_device, accumulate, world_size, total)


def _share(total: int, parts: int, what: str) -> int:
    if total % parts:
        near = sorted({max(total // parts, 1) * parts, (total // parts + 1) * parts})
        raise UserError(
            f"train.total_batch_size={total}: must be a multiple of {parts} ({what}); nearest:"
            f" {' or '.join(map(str, near))}"
        )
    return total // parts


@dataclass(frozen=True)
class DataConfig:
    """Reading and decoding."""

    # Device that decodes and crops images for training on a GPU. cpu leaves the GPU to the step; only crops go there.
    # auto: cpu where its cores keep up with the step. The run prints the choice.
    decode_on: str = _key("auto", choices=("auto", "gpu", "cpu"))
    loader_threads: int | None = _count(None)  # decoding threads per process; null: as many as the step needs
    prefetch: int = _count(2)  # batches ready ahead of the step
    verify: bool = True  # decode every file fully when the index is built
    index: str | None = None  # path of the Parquet manifest; null: in the user's cache
    storage_timeout: float = _key(600.0, low=0)  # seconds to wait for a storage that does not answer, before giving up
    max_pixels: int = _count(2**28)  # width * height of the largest image that is read
    # Decode a JPEG on the CPU at 1/2, 1/4 or 1/8 of its size, if the windows of all its crops then still have this many
    # times their crop's pixels a side. null: never.
    reduced_decoding: float | None = _key(1.25, low=1)
    # Take companions of images (.ovr, .msk, .aux, thumbnails) and what lies in hidden or trash folders as images too.
    companions: bool = False
    # Bands of a file that become channels: numbers from 1, or names (GeoTIFF band descriptions). null: all, in order.
    bands: list[int | str] | None = None
    # Bits of a channel between decoder and network. auto: 16 if most readable files store more than 8, else 8. The
    # run's config.yaml has the choice.
    depth: str = _key("auto", choices=("auto", "8", "16"))
    # How stored values become pixels: percentile:LO,HI of each band over a sample of the files; divide:X (0 to X);
    # given (by band_range); auto: 8-bit files as they are, others percentile:0.5,99.5 at 16 bits, by their type at 8.
    band_scale: str = "auto"
    # Stored values that become black and white: [low,high] for each channel, or one for all. null: band_scale decides;
    # the run's config.yaml has the ranges.
    band_range: list[list[float]] | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Probes during pretraining: kNN of the teacher on labelled images."""

    # Labelled images: class folders, or a CSV with columns file, class and split. null: no probes.
    data: str | None = None
    root: str | None = None  # folder of the paths in that CSV; null: the CSV's own, or the folder of its name
    every: int | None = _count(None)  # optimiser steps between probes; null: as many as keep them under 1% of the time
    images: int = _count(1000, low=2)  # most images to learn from, and most to test on
    size: int | None = _count(None)  # pixels a side that images are resized to; null: views.global_size


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning on labelled images, of `pera-fast finetune` alone."""

    task: str | None = _key(None, choices=("scene", "segmentation", "change"))  # kind of the labels, given by --task
    # Head on the backbone. Scenes: linear or mlp. Masks: fpn sums the levels of a feature pyramid, uper pools and
    # concatenates them. auto: linear, fpn.
    head: str = _key("auto", choices=("auto", "linear", "mlp", "fpn", "uper"))
    pooling: str = _key("both", choices=("cls", "mean", "both"))  # features of a scene: cls token, mean of the patches
    width: int = _count(256)  # channels of the pyramid and its decoder; hidden width of an mlp head
    # Features of a change: |before - after|, or before, after and that.
    change_features: str = _key("difference", choices=("difference", "all"))
    size: int | None = _count(None)  # pixels a side of the network's input; null: that of the weights
    classes: list[int | str] | None = None  # names of the masks' classes 0, 1, ...; null: their numbers
    ignore: int | None = _key(None, low=0, high=65535)  # value of masks that counts for nothing; null: none
    labels: float = _key(1.0, above=0, high=1)  # fraction of the training labels to use
    val_share: float = _key(0.1, low=0, below=1)  # fraction of split train to validate on where there is no split val
    layer_decay: float = _key(0.75, above=0, high=1)  # factor of the learning rate from each block to the one before
    head_lr: float = _key(1.0, above=0)  # factor of the head's learning rate
    crop_scale: list[float] = _key([1.0, 1.0], above=0, high=1, rising=True)  # area of a scene's crop / of the image
    crops: int = _count(1)  # crops of finetune.size from each image in an epoch, for masks
    rotate: bool = True  # turn images and masks by 0, 90, 180 or 270 degrees
    label_smoothing: float = _key(0.0, low=0, below=1)  # of the cross entropy
    dice: float = _key(0.0, low=0)  # weight of the Dice loss beside the cross entropy, for masks
    overlap: float = _key(0.25, low=0, high=0.75)  # of the tiles of images larger than the input, in validation
    validate_every: int = _count(1)  # epochs between validations
    patience: int | None = _count(None)  # validations without a better score after which the run ends; null: never


@dataclass(frozen=True)
class Config:
    """Everything that defines a run. Made by `load_config`; saved as config.yaml in the run folder. Never changed."""

    recipe: str = "vit_b16"
    model: ModelConfig = field(default_factory=ModelConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def with_values(self, values: Mapping[str, Value]) -> "Config":
        """A configuration with other values for some dotted keys; `check` says whether it can be run."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        changed: dict[str, Any] = {name: replace(getattr(self, name), **given) for name, given in sections.items()}
        return replace(self, **changed)

    def rgb_channels(self) -> list[int] | None:
        """Channels that are red, green and blue, as kernels take them; []: none; None: three of three, else none.

        Raises:
            ValueError: views.rgb_bands names a band that is no channel.
        """
        if self.views.rgb_bands is None:
            return None
        bands = self.data.bands or list(range(1, self.model.in_chans + 1))
        return [[band_key(band) for band in bands].index(band_key(band)) for band in self.views.rgb_bands]

    def has_colors(self) -> bool:
        """Whether three channels are red, green and blue."""
        rgb = self.rgb_channels()
        return self.model.in_chans == 3 if rgb is None else bool(rgb)


def band_key(band: int | str) -> int | str:
    """Normalised name of a band, without case and surrounding space, for comparisons."""
    return band.strip().casefold() if isinstance(band, str) else band
