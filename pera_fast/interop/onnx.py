"""Writes a backbone as an ONNX file and checks it with onnxruntime."""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pera_fast.durable import whole_file
from pera_fast.errors import UserError, one_line
from pera_fast.interop.graph import PlainTransformer
from pera_fast.weights.backbone import Backbone

NEEDS = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # largest difference to PyTorch, relative to the largest feature
OPSET = 20


def missing() -> list[str]:
    """Packages of the extra `onnx` that are not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def require_onnx() -> None:
    """Raises UserError, with the command that installs them, unless the extra `onnx` is installed."""
    if absent := missing():
        raise UserError(f"--formats onnx: {', '.join(absent)} is missing: pip install 'pera-fast[onnx]'")


def write_onnx(backbone: Backbone, path: Path, metadata: Mapping[str, object]) -> float:
    """Write the backbone as ONNX: input `pixels`, outputs `cls` and `patches`, as `graph.PlainTransformer` has them.

    Batch, height and width are free; height and width are multiples of the patch size.

    Args:
        backbone: float32.
        path: the file; its folder exists.
        metadata: stored in the file, values as JSON.

    Returns:
        The largest difference between onnxruntime's and PyTorch's features relative to the largest feature, over two
        batches of noise: at the native size, and a patch higher and two patches wider.

    Raises:
        UserError: a package is missing, the file cannot be written, or the difference is above `TOLERANCE`.
    """
    require_onnx()
    cfg, model = backbone.cfg, PlainTransformer(backbone).eval()
    size, patch, chans = cfg.views.global_size, cfg.model.patch_size, cfg.model.in_chans
    try:
        with whole_file(path) as partial:
            _export(model, torch.rand(2, chans, size, size), patch, partial)
            _describe(partial, metadata)
            error = max(
                _difference(model, partial, torch.rand(3, chans, size, size)),
                _difference(model, partial, torch.rand(1, chans, size + patch, size + 2 * patch)),
            )
            if error > TOLERANCE:
                raise UserError(f"{path}: onnxruntime's features differ from PyTorch's by {error:.1e}; not written")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return error


def _export(model: PlainTransformer, pixels: torch.Tensor, patch: int, path: Path) -> None:
    free = {
        "batch": torch.export.Dim("batch"),
        "rows": torch.export.Dim("rows"),
        "columns": torch.export.Dim("columns"),
    }
    shapes = {"pixels": {0: free["batch"], 2: patch * free["rows"], 3: patch * free["columns"]}}
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            model,
            (pixels,),
            dynamo=True,
            input_names=["pixels"],
            output_names=["cls", "patches"],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        whole = Path(folder) / "model.onnx"
        try:
            program.save(str(whole), external_data=False)
        except ValueError as error:  # protobuf holds 2 GiB
            raise UserError(f"{path}: the network is too large for one ONNX file ({one_line(error, 120)})") from None
        path.write_bytes(whole.read_bytes())


@contextmanager
def _quiet() -> Any:
    """Keep the exporter's notes, which are for its developers, from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _describe(path: Path, metadata: Mapping[str, object]) -> None:
    import onnx

    model = onnx.load(path)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    onnx.save(model, path)


def _difference(model: PlainTransformer, path: Path, pixels: torch.Tensor) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    got = session.run(["cls", "patches"], {"pixels": pixels.numpy()})
    with torch.inference_mode():
        want = [value.numpy() for value in model(pixels)]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))
