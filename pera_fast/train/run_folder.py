"""Rules of the run folder: what may be started or resumed in it (docs/architecture.md "Contracts").

Resuming continues the run as it was: its own configuration holds. Overrides given with --resume change it where that
keeps the run exact; a few that do not are noted in the log; the rest is refused.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from pera_fast.config import (
    Config,
    Differences,
    differences,
    from_yaml,
    load_config,
    read_config,
    recipe_names,
    to_yaml,
)
from pera_fast.config.keys import flatten
from pera_fast.durable import lock, whole_file
from pera_fast.errors import UserError
from pera_fast.train.checkpoint import CheckpointState, find_checkpoints, load_newest

log = logging.getLogger(__name__)

BATCH = {"train.batch_size", "train.total_batch_size", "train.accumulate"}  # may be split anew if the total stays
HARMLESS = {
    "train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.max_nonfinite",
    "train.loggers",
    "data.loader_threads", "data.prefetch", "data.verify", "data.index", "data.max_pixels", "model.recompute",
    "data.storage_timeout", "eval.data", "eval.root", "eval.every", "eval.images", "eval.size",
}  # fmt: skip
# These go on, but not bit for bit.
NOTED = {
    "train.steps", "train.epochs", "train.precision", "train.device", "train.compile", "train.cuda_graph",
    "data.reduced_decoding", "data.decode_on", "finetune.patience", "finetune.validate_every", "finetune.overlap",
}  # fmt: skip


def _load_pretraining(recipe: str | PathLike[str], overrides: Sequence[str], saved: Config | None) -> Config:
    return load_config(recipe, overrides)


@dataclass(frozen=True)
class Settings:
    """A kind of run: how its configuration is made.

    Attributes:
        default: recipe where none is given.
        names: the recipes' names.
        load: the configuration of a recipe and overrides, for a folder whose run has the saved one; None: a new run.
    """

    default: str = "vit_b16"
    names: Callable[[], list[str]] = recipe_names
    load: Callable[[str | PathLike[str], Sequence[str], Config | None], Config] = _load_pretraining


PRETRAINING = Settings()


@dataclass(frozen=True)
class RunFolder:
    """Names inside a run folder."""

    root: Path

    index = property(lambda self: self.root / "index.parquet")
    config = property(lambda self: self.root / "config.yaml")
    asked = property(lambda self: self.root / "asked.yaml")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    log = property(lambda self: self.root / "train.log")
    checkpoints = property(lambda self: self.root / "checkpoints")
    teacher = property(lambda self: self.root / "exported" / "teacher.safetensors")
    model = property(lambda self: self.root / "exported" / "model.safetensors")
    best = property(lambda self: self.root / "exported" / "best.safetensors")
    skipped = property(lambda self: self.root / "skipped.csv")
    finished = property(lambda self: self.root / "finished.json")
    loggers = property(lambda self: self.root / "loggers.json")  # by which names loggers know the run

    def holds_run(self) -> bool:
        """Whether a run has taken a step here: with its first one it writes config.yaml, before it logs anything."""
        return self.config.exists() or self._has_metrics() or bool(find_checkpoints(self.checkpoints))

    def _has_metrics(self) -> bool:
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes and locks the folder; a run that takes no step inside leaves nothing in it. Raises UserError."""
        missing = [path for path in (self.root, *self.root.absolute().parents) if not path.exists()]
        before = set() if missing else set(self.root.iterdir())
        self.make()
        with self.locked():
            try:
                yield
            finally:
                if not self.holds_run():
                    self._remove_all_but(before, missing)

    def _remove_all_but(self, before: set[Path], folders: list[Path]) -> None:
        """Removes what a run makes before its first step, and the folders that were made for it, innermost first."""
        files = [self.index, self.config, self.asked, self.metrics, self.log, self.skipped, self.root / ".lock"]
        for path in {*files, *self.root.glob("events.out.tfevents.*")} - before:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):  # something else came into it
                folder.rmdir()

    def make(self) -> None:
        """Creates the folder. Raises UserError if nothing can be written there."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".writable-"):
                pass
        except OSError as error:
            raise UserError(f"--out {self.root}: cannot write there ({error.strerror}); give another folder") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here at the same time. Raises UserError if one does already."""
        with open(self.root / ".lock", "w") as file:
            try:
                error = lock(file)  # ends with the process, however that ends
            except BlockingIOError:
                raise UserError(
                    f"--out {self.root}: another process is training there; wait for it or stop it"
                ) from None
            if error:
                log.info("%s: its disk knows no locks (%s); see that no other process trains there", self.root, error)
            yield

    def write_config(self, cfg: Config, asked: Config) -> None:
        """Writes the configuration, and that which was asked for, before the data decided what was left open."""
        replace_text(self.asked, to_yaml(asked))
        replace_text(self.config, to_yaml(cfg))

    def read_asked(self) -> Config | None:
        """The configuration that was asked for; None in folders of versions that did not write it."""
        return read_config(self.asked) if self.asked.exists() else None

    def cut_metrics(self, step: int) -> None:
        """Drops what was logged after `step`, so that no step stands there twice after resuming."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_bytes().split(b"\n"):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line.decode() + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # the process was killed while it wrote this line, or the disk lost it
        replace_text(self.metrics, "".join(kept))


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all. Raises UserError if it cannot be written."""
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


@dataclass
class Start:
    """Start of a run: its configuration, and the checkpoint to continue from (None: from scratch)."""

    cfg: Config
    asked: Config  # without what the data decides
    checkpoint: CheckpointState | None = None
    resumed: bool = False
    notes: list[str] = field(default_factory=list)  # for the log
    changed: Differences = field(default_factory=dict)  # on resuming, of the keys that may change the results

    @property
    def step(self) -> int:
        """Optimiser steps already done."""
        return self.checkpoint["step"] if self.checkpoint else 0


def start_new(
    folder: RunFolder, recipe: str | PathLike[str], overrides: Sequence[str], kind: Settings = PRETRAINING
) -> Start:
    """A run from scratch. Raises UserError if the folder holds one already or cannot be written."""
    cfg = kind.load(recipe, overrides, None)
    if folder.root.exists() and not folder.root.is_dir():
        raise UserError(f"--out {folder.root}: is a file; give a folder")
    if folder.holds_run():
        raise UserError(f"--out {folder.root}: holds a run already; continue it with --resume or give another folder")
    return Start(cfg, cfg)


def start_resumed(
    folder: RunFolder, recipe: str | PathLike[str] | None, overrides: Sequence[str], kind: Settings = PRETRAINING
) -> Start:
    """The run of this folder, continued from its newest checkpoint, or from the start if it was ended before the first.

    Raises:
        UserError: nothing to resume, damaged checkpoint, another recipe, or a change that would make it another run.
    """
    if not folder.holds_run():
        raise UserError(f"--out {folder.root}: no run to resume there; leave --resume out to start one")
    saved, state, source = _newest(folder)
    cfg, changed = continue_config(saved, recipe, overrides, source, kind)
    new = flatten(cfg)
    asked = (folder.read_asked() or saved).with_values({key: new[key] for key in differences(saved, cfg)})
    return Start(cfg, asked, state, True, [_resuming(folder, state, source)], changed)


def start_auto(
    folder: RunFolder, recipe: str | PathLike[str], overrides: Sequence[str], kind: Settings = PRETRAINING
) -> Start:
    """A new run where the folder holds none, else its run, continued: one command line for both.

    The settings are given in full each time. Compared is what was asked for, not what the data decided.

    Raises:
        UserError: settings other than those of the run, apart from those that change nothing; lists the keys.
    """
    if not folder.holds_run():
        return start_new(folder, recipe, overrides, kind)
    saved, state, source = _newest(folder)
    requested = kind.load(recipe, overrides, saved)
    new = flatten(requested)
    check_asked(folder, folder.read_asked() or saved, requested)
    # NOTED as well: they were asked for, perhaps on resuming, and no checkpoint has been written since.
    taken = {key: new[key] for key in BATCH | HARMLESS | NOTED}
    cfg = from_yaml(to_yaml(saved.with_values(taken)))  # checks it
    return Start(cfg, requested, state, True, [_resuming(folder, state, source)])


def check_asked(folder: RunFolder, asked: Config, requested: Config) -> None:
    """Raises UserError for settings other than those of the run, apart from those that change nothing."""
    changed = {key: pair for key, pair in differences(asked, requested).items() if key not in BATCH | HARMLESS}
    if changed:
        raise UserError(f"--out {folder.root}: holds a run with other settings: {_list(changed)}; give another --out")


def _newest(folder: RunFolder) -> tuple[Config, CheckpointState | None, str]:
    """Configuration of the folder's run, its newest checkpoint, and the file or folder that they come from.

    Raises:
        UserError: neither a checkpoint nor config.yaml, or a damaged checkpoint.
    """
    newest = load_newest(folder.checkpoints)
    if newest is not None:
        path, state = newest
        return from_yaml(state["config"]), state, str(path)
    if folder.config.exists():
        return read_config(folder.config), None, str(folder.root)
    raise UserError(f"--out {folder.root}: holds neither a checkpoint nor config.yaml to resume from; start anew")


def _resuming(folder: RunFolder, state: CheckpointState | None, source: str) -> str:
    return f"resuming from {source}" if state else f"{folder.root} has no checkpoint yet: starting from step 0"


def continue_config(
    saved: Config,
    recipe: str | PathLike[str] | None,
    overrides: Sequence[str],
    source: str,
    kind: Settings = PRETRAINING,
) -> tuple[Config, Differences]:
    """The saved configuration with the overrides given on resuming, and those that may change the results.

    Raises:
        UserError: another recipe, or a change that would make it another run; lists the keys that differ.
    """
    if (saved.finetune.task is not None) != (kind is not PRETRAINING):
        command = "pretrain" if saved.finetune.task is None else "finetune"
        raise UserError(f"{source}: is of `pera-fast {command}`; resume it with that command")
    if recipe is not None and recipe not in kind.names():
        why = "a run goes on with its own settings; leave --recipe out, or give --resume auto"
        raise UserError(f"--resume with --recipe {recipe}: {why}")
    requested = kind.load(recipe or saved.recipe, overrides, saved)
    if requested.recipe != saved.recipe:
        changed = _refused(saved, requested)
        raise UserError(
            f"{source}: is of recipe {saved.recipe}, not {requested.recipe} ({_list(changed) or 'equal keys'});"
            f" give --recipe {saved.recipe}, or another --out"
        )
    given = {text.partition("=")[0].strip() for text in overrides}
    taken = given | (BATCH if given & BATCH else set())
    mixture = saved.with_values({key: value for key, value in flatten(requested).items() if key in taken})
    cfg = from_yaml(to_yaml(mixture))  # checks it
    refused = _refused(saved, cfg)
    if refused:
        raise UserError(f"{source}: cannot be continued with {_list(refused)}; leave that out, or give another --out")
    return cfg, {key: pair for key, pair in differences(saved, cfg).items() if key in NOTED}


def change_notes(changed: Differences, cfg: Config, device: str, has_gpu: bool) -> list[str]:
    """Messages about the keys that were changed on resuming: which have an effect, and which have none and why.

    Args:
        changed: of `continue_config`.
        cfg: the configuration that holds from now on.
        device: type of the run's device, cpu or cuda.
        has_gpu: whether there is a GPU.
    """
    without: dict[str, str] = {}
    if cfg.train.steps is not None and "train.steps" not in changed:
        without["train.epochs"] = f"train.steps={cfg.train.steps} is the length of the run"
    if device == "cpu":
        without |= dict.fromkeys(("train.cuda_graph", "data.decode_on"), "the run is on a CPU")
    if not has_gpu and set(changed.get("train.device", ())) == {"auto", "cpu"}:
        without["train.device"] = "there is no GPU"
    notes = [f"{key}={changed[key][1]} has no effect: {why}" for key, why in without.items() if key in changed]
    if counts := {key: pair for key, pair in changed.items() if key not in without}:
        told = f"changed on resuming: {_list(counts)}; from here on this is not the run that it would have been"
        notes.insert(0, told)
    return notes


def _refused(saved: Config, cfg: Config) -> Differences:
    allowed = BATCH | HARMLESS | NOTED | {"recipe"}
    return {key: pair for key, pair in differences(saved, cfg).items() if key not in allowed}


def _list(changed: Differences) -> str:
    """Keys that differ, in one line: key=new (was old)."""
    words = [f"{key}={new} (was {old})" for key, (old, new) in changed.items()]
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")


def check_resumed_batch(state: CheckpointState, total: int, devices: int) -> None:
    """Raises UserError if a step would take other images than the checkpoint's did, on as many devices as then."""
    before = state.get("devices", devices)  # checkpoints did not always say
    if state["total_batch"] != total and before == devices:
        raise UserError(
            f"the checkpoint's steps take {state['total_batch']} images in total, these would take {total};"
            f" give train.total_batch_size={state['total_batch']}, or as many processes as before"
        )


def resumed_position(state: CheckpointState, total: int, devices: int, images: int) -> tuple[int, str]:
    """Position in the data to resume at, in steps of `total` images, and a message about it.

    With the total batch of the checkpoint that is where it stopped, to the image, on any number of devices. With
    another one (another number of devices, `train.batch_size` as it was) steps do not meet: the epoch begins again.
    """
    position, before = state.get("position", state["step"]), state.get("devices", devices)
    if state["total_batch"] == total:
        same = f"{devices} device(s) instead of {before}, the same total batch: the epoch goes on with the same images"
        return position, "" if before == devices else same
    epoch = position // max(1, state["images"] // state["total_batch"])
    return epoch * (images // total), (
        f"{devices} device(s) instead of {before}: a step takes {total} images instead of {state['total_batch']}; epoch"
        f" {epoch} restarts from its beginning (train.total_batch_size={state['total_batch']} would go on within it)"
    )
