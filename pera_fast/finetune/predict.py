"""`predict`: runs a fine-tuned network on new images; classes go to a CSV, masks to GeoTIFF or PNG."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.data.ahead import map_ahead
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.durable import lock
from pera_fast.errors import UserError
from pera_fast.features.extract import choose_device
from pera_fast.features.images import ImageReader, resize
from pera_fast.features.inputs import Input, find_inputs
from pera_fast.features.tiles import Tile, TileGrid, tiled
from pera_fast.features.windows import WindowReader
from pera_fast.finetune.classes_out import ClassesFile
from pera_fast.finetune.masks_out import MaskWriter, mask_there, place_of
from pera_fast.finetune.model import FineTuner
from pera_fast.finetune.tuned import load_tuned
from pera_fast.finetune.validate import stacked, tile_logits
from pera_fast.paths import local_path, refuse_inside
from pera_fast.progress import progress_bar
from pera_fast.storage import MachineError
from pera_fast.train.console import PLAIN_SECONDS, RunLog
from pera_fast.train.signals import exit_on_termination

log = logging.getLogger(__name__)
_THREADS = 2  # that read ahead


@dataclass(frozen=True)
class Predicted:
    """Result of `predict`.

    Attributes:
        out: the folder.
        written: inputs with a result, those of earlier calls included.
        skipped: inputs that could not be read, in skipped.csv.
    """

    out: Path
    written: int
    skipped: int


def predict(
    weights: str | PathLike[str],
    data: str | PathLike[str],
    out: str | PathLike[str],
    *,
    root: str | PathLike[str] | None = None,
    size: int | None = None,
    overlap: float = 0.25,
    batch_size: int = 16,
    device: str = "auto",
    precision: str | None = None,
    resume: bool = False,
) -> Predicted:
    """Runs a fine-tuned network; the twin of `pera-fast predict`.

    Args:
        weights: a run of `finetune`, or its exported file.
        data: an image, a folder or a CSV, as `features.inputs.find_inputs` takes it.
        out: folder for predictions.csv (scenes) or a mask for each image, and skipped.csv.
        root: folder of the paths in a CSV.
        size: pixels a side of the network's input. None: as in training.
        overlap: fraction of a tile that neighbours share, for masks.
        batch_size: images, or tiles, at a time.
        device: cpu, cuda or auto.
        precision: bf16, fp16 or fp32. None: bf16 on a GPU, else fp32.
        resume: go on in a folder that holds predictions, and leave out what is done.

    Raises:
        UserError: wrong weights, data or options; or none of the inputs could be read.
    """
    if not 0 <= overlap <= 0.75:
        raise UserError(f"--overlap {overlap}: wants a fraction of a tile from 0 to 0.75")
    folder, source = local_path("--out", out), local_path("--data", data)
    refuse_inside("--out", folder, source)
    where = choose_device(device)
    model, cfg = load_tuned(weights, where, precision or ("bf16" if where.type == "cuda" else "fp32"), size)
    inputs = find_inputs(source, model.plan.task == "change", root)
    with exit_on_termination(), ExitStack() as stack:
        _open(folder, resume, stack)
        stack.enter_context(RunLog(folder / "predict.log"))
        job = _Job(model, cfg, folder, SkippedFiles(folder / "skipped.csv"), batch_size, overlap)
        run = job.masks if model.plan.dense else job.scenes
        log.info("%s of %d input(s) at %d px on %s", model.plan.task, len(inputs), model.plan.size, where)
        try:
            run(inputs)
        except KeyboardInterrupt:
            log.warning("stopped; go on with --resume")
            raise SystemExit(130) from None
        if not job.written:
            raise UserError(f"none of the {len(inputs)} input(s) of {source} could be read; see {folder}/skipped.csv")
        log.info("%d of %d input(s) predicted: %s", job.written, len(inputs), folder)
    return Predicted(folder, job.written, job.failed)


def _open(folder: Path, resume: bool, stack: ExitStack) -> None:
    """Make and lock the folder. Raises UserError if it holds something, or cannot be written."""
    held = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if held and not resume:
        raise UserError(f"--out {folder}: holds something already; give another folder, or --resume to go on there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 - closed by the stack
        stack.callback(file.close)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); give another folder") from None
    try:
        lock(file)
    except BlockingIOError:
        raise UserError(f"--out {folder}: another process is writing there; wait for it or stop it") from None


@dataclass
class _Job:
    model: FineTuner
    cfg: Config
    folder: Path
    skipped: SkippedFiles
    batch_size: int
    overlap: float
    written: int = 0
    failed: int = 0

    def _skip(self, one: Input, error: UserError) -> None:
        self.failed += 1
        self.skipped.add(one.paths[0], str(error).removeprefix(f"{one.paths[0]}: "))

    # Scenes

    @torch.inference_mode()
    def scenes(self, inputs: list[Input]) -> None:
        """Classes of whole images."""
        plan, read = self.model.plan, ImageReader(self.cfg)
        device = next(self.model.parameters()).device

        def image(one: Input) -> tuple[Input, Tensor | UserError]:
            try:
                return one, resize(read(one.paths[0]), plan.size)
            except MachineError:
                raise
            except UserError as error:
                return one, error

        with (
            ClassesFile(self.folder / "predictions.csv", plan.classes, plan.several) as file,
            progress_bar("images", len(inputs)) as advance,
        ):
            left = [one for one in inputs if one.file not in file.done]
            self.written = len(inputs) - len(left)
            advance(self.written)
            images = map_ahead(image, left, _THREADS, self.batch_size, "pera-read")
            while some := list(islice(images, self.batch_size)):
                good = []
                for one, found in some:
                    if isinstance(found, UserError):
                        self._skip(one, found)
                    else:
                        good.append((one.file, found))
                if good:
                    batch = torch.stack([pixels for _, pixels in good])[:, None].to(device)
                    file.add([name for name, _ in good], self.model(batch).float().cpu())
                self.written += len(good)
                advance(len(some))

    # Masks

    @torch.inference_mode()
    def masks(self, inputs: list[Input]) -> None:
        """Classes of every pixel, of images of any size."""
        with progress_bar("images", len(inputs)) as advance:
            for one in inputs:
                out = self.folder / one.name
                if mask_there(out):
                    self.written += 1
                    advance(1)
                    continue
                try:
                    with ExitStack() as stack:
                        self._mask(one, out, _open_views(one, self.cfg, stack), advance)
                    self.written += 1
                except MachineError:
                    raise
                except UserError as error:
                    self._skip(one, error)
                except OSError as error:
                    told = f"--out {out}: cannot be written ({error.strerror or error})"
                    raise UserError(f"{told}; make room and go on with --resume") from None

    def _mask(self, one: Input, out: Path, views: "_Views", advance: Callable[[float], None]) -> None:
        size, classes = self.model.plan.size, self.model.plan.classes
        place = place_of(one.paths[0], views.height, views.width)
        if isinstance(place, str):
            log.warning("%s: its mask has no place: %s", one.paths[0], place)
            place = None
        grid = TileGrid(views.height, views.width, size, int(size * self.overlap))
        with MaskWriter(out, views.height, views.width, classes, place) as file:
            rows = tiled(grid, lambda tile: grid.pad(views.read(tile)), tile_logits(self.model), self.batch_size)
            said = time.monotonic()
            for top, logits in rows:
                found = logits.argmax(0).to(torch.int32).cpu().numpy()
                file.write(found, views.valid(top, len(found)))
                advance(len(found) / views.height)
                if time.monotonic() - said >= PLAIN_SECONDS:
                    said = time.monotonic()
                    log.info("%s: row %d of %d", one.file, top + len(found), views.height)


class _Views:
    """The images of an input, whole or in windows.

    Attributes:
        height, width: of each of them.
    """

    def __init__(self, one: Input, readers: list[WindowReader] | list[np.ndarray]):
        self._readers = readers
        sizes = [r.shape[:2] if isinstance(r, np.ndarray) else (r.height, r.width) for r in readers]
        self.height, self.width = sizes[0]
        if len(set(sizes)) > 1:
            told = " and ".join(f"{width} x {height}" for height, width in sizes)
            raise UserError(f"{one.paths[1]}: the images of a pair are of one size, these are {told} px")

    def read(self, tile: Tile) -> np.ndarray:
        """A tile's window [h, w, V * C]."""
        top, left, height, width = tile
        return np.ascontiguousarray(
            stacked(
                [
                    r[top : top + height, left : left + width]
                    if isinstance(r, np.ndarray)
                    else r(top, left, height, width)
                    for r in self._readers
                ]
            )
        )

    def valid(self, top: int, height: int) -> np.ndarray | None:
        """Pixels of whole rows that have data in every image, bool [height, W]; None: all."""
        found: np.ndarray | None = None
        for reader in self._readers:
            valid = None if isinstance(reader, np.ndarray) else reader.valid(top, 0, height, self.width)
            if valid is not None:
                found = valid if found is None else found & valid
        return found


def _open_views(one: Input, cfg: Config, stack: ExitStack) -> _Views:
    """Windows of rasters, so that a scene need not fit in memory; other formats as a whole."""
    try:
        return _Views(one, [stack.enter_context(WindowReader(path, cfg)) for path in one.paths])
    except UserError:
        return _Views(one, [ImageReader(cfg)(path) for path in one.paths])
