"""Writes the README of an exported model: sizes, data, recipe, metrics, and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pera_fast import __version__
from pera_fast.config import Config
from pera_fast.durable import read_object
from pera_fast.errors import UserError
from pera_fast.weights.backbone import Backbone


def read_evaluation(path: Path) -> dict[str, Any]:
    """A report.json of `pera-fast eval`. Raises UserError for anything else."""
    try:
        told = read_object(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--eval {path}: cannot be read ({why}); give a report.json of pera-fast eval") from None
    if not isinstance(told.get("results"), list):
        raise UserError(f"--eval {path}: holds no results; give a report.json of pera-fast eval")
    return told


def text(
    backbone: Backbone, license_: str | None, evaluation: Mapping[str, Any] | None, onnx_error: float | None
) -> str:
    """The README as Markdown, with the front matter that model hubs read.

    Args:
        backbone: the exported one; where its source is a run's folder, the run's numbers are taken from there.
        license_: of the weights.
        evaluation: see `read_evaluation`.
        onnx_error: largest relative difference of onnxruntime's features; None: no ONNX file was written.
    """
    cfg, name = backbone.cfg, Path(backbone.source).name
    parts = [
        _front(license_),
        f"# {name}",
        f"A vision transformer for overhead images, exported by pera-fast {__version__} from `{name}`. It gives"
        " features; it has no classes.",
        "## Network",
        _table(_network(cfg)),
        "## Input",
        _table(_input(cfg)),
        _scaling(cfg),
        *_run(Path(backbone.source), cfg),
        *_evaluated(evaluation),
        "## Use",
        *_use(cfg, onnx_error),
        "## Licence",
        license_ or "Not given. Say it here before you pass the weights on; the images' licence may bind you.",
    ]
    return "\n\n".join(parts) + "\n"


def _front(license_: str | None) -> str:
    lines = [
        f"license: {license_ or 'unknown'}",
        "library_name: timm",
        "tags:",
        "- remote-sensing",
        "- image-feature-extraction",
    ]
    return "\n".join(["---", *lines, "---"])


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def _network(cfg: Config) -> dict[str, object]:
    model, size = cfg.model, cfg.views.global_size
    return {
        "recipe": cfg.recipe,
        "width, depth, heads": f"{model.embed_dim}, {model.depth}, {model.num_heads}",
        "patch": f"{model.patch_size} x {model.patch_size} pixels",
        "position embeddings": f"learnt for {size} x {size} pixels, interpolated for others",
    }


def _input(cfg: Config) -> dict[str, object]:
    bands = cfg.data.bands or list(range(1, cfg.model.in_chans + 1))
    ranges = cfg.data.band_range
    rows: dict[str, object] = {
        "bands": ", ".join(map(str, bands)),
        "mean": ", ".join(f"{value:g}" for value in cfg.views.mean),
        "std": ", ".join(f"{value:g}" for value in cfg.views.std),
    }
    if ranges is not None:
        pairs = ranges if len(ranges) > 1 else ranges * len(bands)
        rows["stored values that become 0 and 1"] = ", ".join(f"{low:g} to {high:g}" for low, high in pairs)
    return rows


def _scaling(cfg: Config) -> str:
    if cfg.data.band_range is not None:
        return (
            "A stored value v of a band with the range low to high becomes (v - low) / (high - low), cut to 0 to 1;"
            " then mean and std."
        )
    return "Stored values are divided by the largest of their type (255 for 8 bits, 65535 for 16); then mean and std."


def _run(folder: Path, cfg: Config) -> list[str]:
    """The section about the training, from the run's folder; nothing for weights from elsewhere."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = next(json.loads(line) for line in reversed(lines) if line.endswith("}"))
        probe = [json.loads(line) for line in lines if '"probe_knn"' in line and line.endswith("}")]
    except (OSError, ValueError, StopIteration):
        return []
    rows: dict[str, object] = {
        "method": "PerA (arXiv 2505.19447): student and teacher on disjoint patch masks",
        "images": _images(folder),
        "steps, epochs": f"{last.get('step')}, {last.get('epoch', 0) + 1}",
        "batch": cfg.train.total_batch_size or cfg.train.batch_size,
        "precision": cfg.train.precision,
        "last loss": last.get("loss"),
    }
    if probe:
        rows["kNN on labelled images, last probe"] = f"{probe[-1]['probe_knn']:.1%} at step {probe[-1]['step']}"
    return ["## Training", _table(rows)]


def _images(folder: Path) -> object:
    """Rows of the run's index, or a word where there is none."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_metadata(folder / "index.parquet").num_rows
    except (OSError, ArrowException):
        return "unknown"


def _evaluated(told: Mapping[str, Any] | None) -> list[str]:
    if told is None:
        return []
    rows = []
    for result in told["results"]:
        metrics = result.get("metrics", {}) if isinstance(result, dict) else {}
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if isinstance(value, float))
        rows.append(f"| {result.get('weights', '')} | {result.get('task', told.get('task', ''))} | {numbers} |")
    return ["## Evaluation", "\n".join(["| weights | task | metrics |", "| --- | --- | --- |", *rows])]


def _use(cfg: Config, onnx_error: float | None) -> list[str]:
    shape = f"[n, {cfg.model.in_chans}, {cfg.views.global_size}, {cfg.views.global_size}]"
    parts = [
        f"With timm, on images {shape} that are scaled and normalised as above:",
        '```python\nimport timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()\n'
        "features = model(images)                  # cls token, [n, width]\n"
        "tokens = model.forward_features(images)   # cls and patches, [n, 1 + patches, width]\n```",
        "timm interpolates positions for other sizes in its own way; at the native size features are equal.",
    ]
    if onnx_error is not None:
        parts += [
            f"With onnxruntime, on images {shape} scaled to 0 to 1 but not normalised, of any size in whole patches:",
            '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
            'cls, patches = session.run(["cls", "patches"], {"pixels": images})\n```',
            f"Its features differ from PyTorch's by {onnx_error:.1e} of the largest, at most, at two sizes.",
        ]
    return [*parts, "With pera-fast, straight from image files: `pera-fast embed IMAGES --weights THIS_FOLDER`."]
